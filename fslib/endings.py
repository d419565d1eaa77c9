"""Endings: what the last part of multi-task training may be, instead of more of the same.

An ending is a rule about gradients; the training loop (`fslib.training`) owns the batches. At every
step the loop asks

    for task in rule.tasks(step):       whose batches the step takes
        ... backward ...
        rule.collect(task)              that task's gradient lies in the parameters: keep or change
    updated = rule.gradients()          what the step updates, with its gradients

`Rule` itself is plain training. `IAT` (Li et al., 2023) stands in `fslib.iat`. Here stand `Stop`,
which leaves the trunk as it is, and `PCGrad` (Yu et al., 2020), which projects conflicting
gradients of tasks.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fslib.data.tasks import Task
from fslib.errors import FslibError, check_count, check_flag, check_number
from fslib.evaluation import EVAL_BATCH, length_batches
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel


@dataclass(frozen=True, eq=False)
class Trunk:
    """A training as an ending finds it when it begins.

    Attributes:
        model, tasks, optimizer, batch_size, seed: the training's.
        order: the task of every step, the first step's first.
        step: steps made.
        cache: what the endings of one training share.
    """

    model: MultiTaskModel
    tasks: dict[str, Task]
    order: list[str]
    optimizer: torch.optim.Optimizer
    batch_size: int
    seed: int
    step: int
    cache: dict[Hashable, Any]


class Rule:
    """Plain training: a step takes the batch of its own task and updates every parameter.

    Attributes:
        order: the task of every step.
        parameters: the model's.
        heads: each task's head set, bool (layers, heads), True = trained on its batches; with IAT.
        scoring_seconds: time that choosing them took.
        dropout: whether dropout is on.
    """

    dropout = True

    def __init__(self, trunk: Trunk) -> None:
        self.order = trunk.order
        self.parameters: list[Tensor] = list(trunk.model.parameters())
        self.heads: dict[str, Bool[np.ndarray, "layers heads"]] = {}
        self.scoring_seconds = 0.0

    def tasks(self, step: int) -> list[str]:
        """Name the tasks whose batches a step takes (steps are counted from 1)."""
        return [self.order[step - 1]]

    def collect(self, task: str) -> None:
        """Take the gradient of a task's loss, just computed, from the parameters' `grad`."""

    def gradients(self) -> list[Tensor]:
        """Put the step's gradients into what it updates, and return that."""
        return self.parameters


@dataclass(frozen=True)
class Ending:
    """What all endings have; by itself, plain training.

    `leak` and `dropout` are two things that the importance pass of the paper's released code leaves
    behind: to see what they alone do to a score.

    Attributes:
        delta: the share of the steps, the last ones, that the ending takes, in (0, 1).
        leak: training examples per task whose loss has a gradient that enters the first update.
        dropout: whether dropout stays on.
    """

    delta: float = 0.1
    leak: int = field(default=0, kw_only=True)
    dropout: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_number("delta", self.delta, "(0, 1)", "0.1 means the last tenth of the steps")
        check_count("leak", self.leak, 0)
        check_flag("dropout", self.dropout)

    def start(self, steps: int) -> int:
        """Return the steps before the ending, or raise FslibError if there are none, or all."""
        start = steps - round(self.delta * steps)
        if not 0 < start < steps:
            raise FslibError(f"delta {self.delta} of {steps} steps: no steps lie before and after")
        return start

    def stop(self, steps: int) -> int:
        """Return the step after which training ends."""
        return steps

    def check(self, trunk: Trunk) -> None:
        """Raise FslibError for a training that cannot have this ending, before its first step."""

    def begin(self, trunk: Trunk) -> Rule:
        """Return the rule that the training follows from here on."""
        return Rule(trunk)

    def needs_two_tasks(self, trunk: Trunk) -> None:
        """Raise FslibError for a training on one task."""
        if len(trunk.tasks) < 2:
            name = type(self).__name__
            raise FslibError(f"{name} needs at least two tasks, and gets {list(trunk.tasks)}")


@dataclass(frozen=True)
class Stop(Ending):
    """No ending: training stops at (1 - delta) of the steps."""

    def stop(self, steps: int) -> int:
        """Return the step at which the ending would begin."""
        return self.start(steps)


@dataclass(frozen=True)
class PCGrad(Ending):
    """Project conflicting gradients (Yu et al., 2020).

    It removes interference between tasks without choosing heads. Every update takes examples of
    every task, `batch_size` in all: as many updates and as many examples as other endings have.
    Each task's gradient of the whole encoder loses its component against every other task's with
    which it conflicts (negative inner product), the others in random order; the update is their
    mean.

    Attributes:
        project: False leaves the gradients as they are: the control that shows what mixed batches
            do alone.
    """

    project: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("project", self.project)

    def check(self, trunk: Trunk) -> None:
        """Raise FslibError for one task, a batch smaller than that, and nothing to project."""
        self.needs_two_tasks(trunk)
        if self.project and not any(p.requires_grad for p in trunk.model.encoder.parameters()):
            raise FslibError("PCGrad projects the encoder's gradients, and all of it is frozen")
        if trunk.batch_size < len(trunk.tasks):
            raise FslibError(
                f"batch_size {trunk.batch_size} is too small for {len(trunk.tasks)} tasks"
            )

    def begin(self, trunk: Trunk) -> Rule:
        """Return the rule of mixed steps, with or without projection."""
        return ProjectedRule(trunk) if self.project else MixedRule(trunk)


class MixedRule(Rule):
    """A step takes a part of its batch from every task; the gradient is the mean over tasks."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(trunk)
        self.names = list(trunk.tasks)

    def tasks(self, step: int) -> list[str]:
        """Name all tasks, at every step."""
        return self.names


class ProjectedRule(MixedRule):
    """A mixed step whose gradient of the encoder is the mean after PCGrad's projections."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(trunk)
        self.encoder = [p for p in trunk.model.encoder.parameters() if p.requires_grad]
        self.rng = np.random.default_rng((trunk.seed, 4))
        self.collected: list[Tensor] = []
        self.reached: set[nn.Parameter] = set()

    def collect(self, task: str) -> None:
        """Set the encoder's gradient for this task aside; the classifiers' stay where they are."""
        self.reached.update(p for p in self.encoder if p.grad is not None)
        self.collected.append(torch.cat([_flat_gradient(p) for p in self.encoder]))
        for parameter in self.encoder:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Give the encoder the mean of the projected gradients."""
        each = torch.stack(self.collected)  # (tasks, parameters of the encoder)
        self.collected.clear()
        weights = projected((each @ each.T).cpu(), self.rng).to(each)
        # the loop has divided every task's loss by the number of tasks already: the sum is the mean
        update = (weights @ each * len(self.names)).split([p.numel() for p in self.encoder])
        for parameter, part in zip(self.encoder, update, strict=True):
            # a gradient of zeros would let weight decay move what nothing reaches
            if parameter in self.reached:
                parameter.grad = part.view_as(parameter)
        self.reached.clear()
        return self.parameters


def projected(
    gram: Float[Tensor, "tasks tasks"], rng: np.random.Generator
) -> Float[Tensor, " tasks"]:
    """Return PCGrad's update as a weighted sum of the tasks' gradients.

    Projections stay in the span of the gradients, so task i's projected gradient is
    sum_j c[i, j] g_j, and no vector of the encoder's size is needed before the last sum. Source:
    Yu et al. (2020), algorithm 1.

    Args:
        gram: the gradients' inner products, gram[i, j] = <g_i, g_j>.
        rng: draws the order of the projections.

    Returns:
        The weights w of the mean over tasks, sum_j w[j] g_j.
    """
    tasks = len(gram)
    own = torch.eye(tasks, dtype=gram.dtype)
    for i in range(tasks):
        for j in rng.permutation(tasks):
            inner = own[i] @ gram[:, j]
            if i != j and inner < 0 < gram[j, j]:  # the square of a tiny gradient may round to 0
                own[i, j] -= inner / gram[j, j]
    return own.mean(0)


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return grad.flatten()


def left_gradients(trunk: Trunk, examples: int) -> list[Tensor | None]:
    """Return the gradient that a pass over training examples leaves in each parameter.

    Of a batch's mean loss, summed over batches and tasks, in evaluation mode: what the released
    code's importance pass adds to the next update.
    """
    model = trunk.model
    with in_mode(model, training=False):
        for name, task in trunk.tasks.items():
            for batch in length_batches(
                model, task.part("train", examples, trunk.seed), EVAL_BATCH
            ):
                model.losses(batch.to(model.device), name).mean().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found
