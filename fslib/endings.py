"""Endings: what the last part of multi-task training may be, instead of more of the same.

`IAT`, important attention-head training (Li et al., 2023): a batch of a task updates only the query, key and
value rows of that task's own heads. `PCGrad` (Yu et al., 2020): conflicting gradients of tasks are projected.
`Stop`: nothing, which leaves the trunk as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fslib.errors import FslibError, unknown
from fslib.heads import head_count, random_heads, top_heads
from fslib.importance import REDUCTIONS, check_normalize

CHOICES = ("top", "random", "least")
OTHERS = ("train", "freeze")


@dataclass(frozen=True)
class _Ending:
    """delta: the share of the steps, the last ones, that the ending takes, in (0, 1)."""

    delta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise FslibError(f"delta {self.delta} is outside (0, 1): 0.1 means the last tenth of the steps")

    def start(self, steps: int) -> int:
        """Steps made before the ending. Raises FslibError if delta leaves nothing before it or after it."""
        start = steps - round(self.delta * steps)
        if not 0 < start < steps:
            raise FslibError(f"delta {self.delta} of {steps} steps: choose it so that steps lie before and after")
        return start


@dataclass(frozen=True)
class Stop(_Ending):
    """No ending: training stops at (1 - delta) of the steps."""


@dataclass(frozen=True)
class IAT(_Ending):
    """Important attention-head training (Li et al., 2023): in the last `delta` of the steps a batch of task t updates,
    of all query, key and value rows, only those of t's own heads. No other parameter is touched or added.

    alpha: share of all heads in a task's set, in (0, 1].
    heads: "top" (most important to the task), or a control: "random" (as many in each layer), "least" (important).
    others: "train": everything that is not a query, key or value row trains on; "freeze": only classifiers do.
    shared: keep heads that are in every task's set; False leaves them out of all.
    strict: a row outside the set stays as it is, bit for bit. False is the released code's: its gradient is zero,
        but Adam's moments and weight decay move it.
    examples: training examples of each task that importance is scored on (None: all); `reduction`, `normalize`:
        as in `fslib.head_importance`.
    """

    alpha: float = 0.3
    heads: str = "top"
    others: str = "train"
    shared: bool = True
    strict: bool = True
    examples: int | None = 64  # twice what a rank correlation of 0.95 with all examples took in the slowest task
    reduction: str = "token"
    normalize: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise FslibError(f"alpha {self.alpha} is outside (0, 1]: there are no more top heads than heads")
        for what, value, valid in (
            ("heads for IAT", self.heads, CHOICES),
            ("others for IAT", self.others, OTHERS),
            ("reduction", self.reduction, REDUCTIONS),
        ):
            if value not in valid:
                raise unknown(what, value, valid)
        check_normalize(self.normalize)
        if self.examples is not None and self.examples < 1:
            raise FslibError(f"examples {self.examples}: importance needs at least one example, or None for all")

    def choose(
        self, importance: Mapping[str, Float[np.ndarray, "layers heads"]], rng: np.random.Generator
    ) -> dict[str, Bool[np.ndarray, "layers heads"]]:
        """Each task's head set, True = trained on its batches. Raises FslibError for one task, or for an empty set."""
        if len(importance) < 2:
            raise FslibError(f"IAT tells the heads of tasks apart: give at least two tasks, not {list(importance)}")
        total = next(iter(importance.values())).size
        if head_count(self.alpha, total) == 0:
            raise FslibError(f"alpha {self.alpha} of {total} heads is no head: choose at least {1 / total:.3f}")
        sign = -1 if self.heads == "least" else 1
        sets = {t: top_heads(sign * scores, self.alpha) for t, scores in importance.items()}
        if self.heads == "random":
            sets = {t: random_heads(top, 1, rng)[0] for t, top in sets.items()}
        if not self.shared:
            everywhere = np.logical_and.reduce(list(sets.values()))
            sets = {t: chosen & ~everywhere for t, chosen in sets.items()}
        return sets


@dataclass(frozen=True)
class PCGrad(_Ending):
    """Projecting conflicting gradients (Yu et al., 2020): removes interference between tasks without choosing heads.

    Every update takes examples of every task, `batch_size` in all: as many updates and as many examples as other
    endings have. Each task's gradient of the whole encoder loses its component against every other task's with
    which it conflicts (negative inner product), the others in random order; the update is their mean.
    project: False leaves the gradients as they are: the control that shows what mixed batches do alone.
    """

    project: bool = True


Ending = IAT | PCGrad | Stop


def projected(gram: Float[Tensor, "tasks tasks"], rng: np.random.Generator) -> Float[Tensor, " tasks"]:
    """PCGrad's update as a weighted sum of the tasks' gradients, from nothing but their inner products.

    gram[i, j] = <g_i, g_j>. Projections stay in the span of the gradients, so task i's projected gradient is
    sum_j c[i, j] g_j, and no vector of the encoder's size is needed before the last sum. Returns the weights w
    of the mean over tasks, sum_j w[j] g_j.
    """
    tasks = len(gram)
    own = torch.eye(tasks, dtype=gram.dtype)
    for i in range(tasks):
        for j in rng.permutation(tasks):
            inner = own[i] @ gram[:, j]
            if i != j and inner < 0 < gram[j, j]:  # the square of a tiny gradient may round to 0
                own[i, j] -= inner / gram[j, j]
    return own.mean(0)
