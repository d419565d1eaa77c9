"""Multi-task training: at every step one task, one batch, one update of the shared encoder.

`train` runs it through, to one ending; `branch` runs its first part once and then as many endings
as are asked.
"""

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fslib.data.batches import task_order
from fslib.data.tasks import Task, Tasks, as_tasks
from fslib.endings import Ending, PCGrad, Rule, Trunk, left_gradients
from fslib.errors import FslibError, check_among, check_count, check_number, unknown
from fslib.evaluation import evaluate
from fslib.iat import IAT
from fslib.model.devices import best_device, random_state, set_random_state
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.progress import bar, hidden

PRECISIONS = ("float32", "bf16")
STATES = ("model", "optimizer", "schedule")  # what a snapshot holds of each: its `state_dict`
MIXED = -1  # in History.order: a step on examples of all tasks
READ_EVERY = 50  # steps between readings of losses on another device: no step waits for its copy


@dataclass(frozen=True)
class Settings:
    """How a training goes: the keyword arguments of `train` and `branch`.

    The optimizer is AdamW (fused), without weight decay on biases and norms.

    Attributes:
        steps: updates.
        batch_size: examples of a step.
        lr: the peak learning rate.
        weight_decay: of AdamW.
        warmup: share of the steps in which `lr` is reached, linearly; later it falls linearly.
        decay: share of the steps, the last ones, in which it falls; 1: all after the warm-up.
        lr_floor: share of `lr` at the end; 0: nothing.
        clip: the largest gradient norm; None: any.
        sampling: proportional, sqrt, uniform or annealed (over `epochs` equal parts of the steps).
        epochs: see `sampling`.
        seed: for the order of tasks and batches and for dropout; the caller's random state is left
            alone.
        evaluate_every: score `evaluate_on` before the first step, every so many, and at the end.
        evaluate_on: the tasks, by default.
        precision: of the forward pass, "float32" or "bf16" (`torch.autocast`; weights and updates
            stay float32), whatever the environment says.
    """

    steps: int = 600
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: float = 1.0
    lr_floor: float = 0.0
    clip: float | None = 1.0
    sampling: str = "annealed"
    epochs: int = 5
    seed: int = 0
    evaluate_every: int | None = None
    evaluate_on: Mapping[str, Task] | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "epochs"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        check_count("evaluate_every", self.evaluate_every, none=True)
        intervals = {"lr": "(0, inf)", "weight_decay": "[0, inf)", "clip": "(0, inf)"}
        intervals |= {"warmup": "[0, 1)", "decay": "(0, 1]", "lr_floor": "[0, 1)"}
        for name, interval in intervals.items():
            check_number(name, getattr(self, name), interval, none=name == "clip")
        check_among("precision", self.precision, PRECISIONS)


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments, or raise FslibError for an unknown one."""
    known = [f.name for f in fields(Settings)]
    if wrong := [name for name in values if name not in known]:
        raise unknown("setting of training", wrong[0], known)
    return Settings(**values)


def lr_factor(
    step: int, steps: int, warmup: float = 0.1, lr_floor: float = 0.0, decay: float = 1.0
) -> float:
    """Return the share of the peak learning rate, in [0, 1], after `step` of the steps.

    It goes from 0 to 1 over the first `warmup` of them; over the last `decay` of them, or all that
    are left, it is lr_floor + (1 - lr_floor) * what is left of a linear decay to 0.
    """
    rising = round(warmup * steps)
    if step < rising:
        return step / rising
    falling = max(rising, steps - round(decay * steps))
    left = min(1.0, (steps - step) / max(1, steps - falling))
    return lr_floor + (1 - lr_floor) * max(0.0, left)


def lr_share(
    steps: int, delta: float, lr_floor: float = 0.0, *, warmup: float = 0.1, decay: float = 1.0
) -> float:
    """Return which share of all learning falls into the last `delta` of the steps, in (0, 1].

    Learning is the learning rate, summed over steps. The share is an ending's dose: with a decay to
    0 the last tenth of the steps gets about a hundredth.

    Raises:
        FslibError: for values that `train` refuses, and for a delta that leaves no step before or
            in the ending.
    """
    Settings(steps=steps, warmup=warmup, lr_floor=lr_floor, decay=decay)
    factors = [lr_factor(step, steps, warmup, lr_floor, decay) for step in range(steps)]
    return sum(factors[Ending(delta).start(steps) :]) / sum(factors)


@dataclass
class History:
    """What happened in training.

    Attributes:
        tasks: names.
        order: (steps,) index into `tasks` of each step's task, -1 for a step on all of them.
        losses: (steps,) mean batch loss.
        evaluations: one dict per point, {"step": s, task: metric, ...}, the first before training
            (step 0).
        branched: step at which the ending began (0: one training from its first step); steps before
            it may be shared.
        heads: with IAT, each task's head set, bool (layers, heads), True = trained on its batches.
        scoring_seconds: time that scoring their importance took.
    """

    tasks: list[str]
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    branched: int = 0
    heads: dict[str, Bool[np.ndarray, "layers heads"]] = field(default_factory=dict)
    scoring_seconds: float = 0.0

    def steps_of(self, task: str) -> int:
        """Count the updates made on a task's batches."""
        check_among("task of this training", task, self.tasks)
        return self.order.count(self.tasks.index(task))


def train(
    model: MultiTaskModel,
    tasks: Tasks,
    *,
    iat: IAT | None = None,
    pcgrad: PCGrad | None = None,
    **settings: Any,
) -> History:
    """Fine-tune encoder and classifiers on all tasks together, in place.

    One step is one batch of one task. The model keeps its mode. Source: Li et al. (2023); annealed
    sampling: Stickland and Murray (2019).

    Args:
        model: what is trained.
        tasks: one, several, or several by name.
        iat, pcgrad: how the last `delta` of the steps are made, instead of like the others.
        settings: the fields of `fslib.training.Settings`: steps (600), batch_size (16), lr (1e-4),
            weight_decay (0.01), warmup (0.1), lr_floor (0.0), clip (1.0), sampling ("annealed"),
            epochs (5), seed (0), evaluate_every, evaluate_on, precision ("float32").

    Returns:
        What happened.

    Raises:
        FslibError: for settings out of range, a task without a classifier, IAT or PCGrad with one
            task, or a loss that is not finite.
    """
    if iat is not None and pcgrad is not None:
        why = "a training has one ending; fslib.branch compares several"
        raise FslibError(f"give iat or pcgrad: {why}")
    run = Training(model, tasks, make_settings(settings))
    if (ending := iat or pcgrad) is not None:
        run.check(ending)
        run.advance(ending.start(run.settings.steps))
        run.begin(ending)
    run.advance(run.settings.steps)
    return run.history


def branch(
    model: MultiTaskModel, tasks: Tasks, endings: Mapping[str, Ending | None], **settings: Any
) -> Iterator[tuple[str, History]]:
    """Train one trunk, then many endings from it; yield each ending's name and history.

        for name, history in fslib.branch(model, tasks, {"plain": None, "IAT": fslib.IAT()}):
            scores[name] = fslib.evaluate(model, tasks)

    Every ending starts from the same weights, optimizer, schedule, data order and random state, so
    they differ in nothing else (a plain one equals unbroken training bit for bit), and m endings
    cost (1 - delta) + m delta of one training: `history.branched` says where each left the trunk.
    Memory: two copies of model and optimizer.

    Args:
        model: what is trained.
        tasks: one, several, or several by name.
        endings: by a name of your choice; None is plain training, which branches off last. They
            come in the order in which they branch off, and inside the loop's body `model` is at the
            end of the one that is named; after the loop, at that of the last.
        settings: as in `train`.

    Raises:
        FslibError: as `train` does, before the first step.
    """
    if not endings or not isinstance(endings, Mapping):
        raise FslibError("no endings: give at least one, such as {'plain': None}")
    run = Training(model, tasks, make_settings(settings))
    for ending in endings.values():
        run.check(ending)
    steps = run.settings.steps
    starts = {name: e.start(steps) for name, e in endings.items() if e is not None}
    last = max(starts.values(), default=0)
    return _branches(run, endings, {name: starts.get(name, last) for name in endings})


def _branches(
    run: "Training", endings: Mapping[str, Ending | None], starts: Mapping[str, int]
) -> Iterator[tuple[str, History]]:
    trunk: dict[str, Any] = {}
    for name in sorted(endings, key=lambda name: starts[name]):
        if trunk:
            run.restore(trunk)
        if not trunk or starts[name] != run.step:
            run.advance(starts[name])
            trunk = run.snapshot()
        ending, steps = endings[name], run.settings.steps
        run.begin(ending)
        run.advance(steps if ending is None else ending.stop(steps))
        yield name, run.history


class Training:
    """A training run that can stop at any step, be remembered, and go on.

    Attributes:
        step: steps made.
        rule: what a step does with gradients (`fslib.endings`).
        history: what has happened.
    """

    def __init__(self, model: MultiTaskModel, tasks: Tasks, settings: Settings) -> None:
        self.model, self.tasks, self.settings = model, as_tasks(tasks), settings
        self.scored = as_tasks(settings.evaluate_on or self.tasks)
        check_model(model, *self.tasks.values(), *self.scored.values())
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in model.parameters()):
            raise FslibError("nothing can be trained: weights are frozen, or gradients off")
        names, s = list(self.tasks), settings
        sizes = [len(task.train) for task in self.tasks.values()]
        self.order = [names[i] for i in task_order(sizes, s.steps, s.sampling, s.epochs, s.seed)]
        model.to(best_device())
        self.optimizer = torch.optim.AdamW(self._groups(), lr=s.lr, fused=True)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(step, s.steps, s.warmup, s.lr_floor, s.decay)
        )
        self.encoded = {name: model.encode(task.train) for name, task in self.tasks.items()}
        self.streams = self._streams(s.batch_size)
        self.step, self.drawn, self.history = 0, dict.fromkeys(self.tasks, 0), History(names)
        self.rng: list[Tensor] = []  # states of torch's generators; none before the first step
        self.cache: dict[Hashable, Any] = {}
        self.left: list[Tensor | None] = []  # gradients that enter the next step
        self.rule = Rule(self._trunk())
        self._unread: list[Tensor] = []

    def check(self, ending: object) -> None:
        """Raise FslibError for an ending that this run cannot have, or what is no ending."""
        if not isinstance(ending, Ending | None):
            valid = "fslib.IAT(), fslib.PCGrad(), fslib.Stop() or None"
            raise FslibError(f"{ending!r} is no ending: give {valid}")
        if ending is not None:
            ending.check(self._trunk())

    def advance(self, until: int) -> None:
        """Train up to a step, counted from the first."""
        if until <= self.step:
            return
        if self.step == 0:
            self._evaluate()
        history = self.history
        with in_mode(self.model, training=self.rule.dropout), self._own_random_state():
            self._clear()  # gradients that the caller left must not enter the first step
            for parameter, left in zip(self.model.parameters(), self.left, strict=False):
                parameter.grad = left
            self.left = []
            for step in bar(range(self.step + 1, until + 1), "training", "steps"):
                self.step, names = step, self.rule.tasks(step)
                history.order.append(history.tasks.index(names[0]) if len(names) == 1 else MIXED)
                losses = []
                for name in names:
                    loss = self._loss(name) / len(names)
                    loss.backward()
                    self.rule.collect(name)
                    losses.append(loss.detach())
                self._record(torch.stack(losses).sum())
                updated, clip = self.rule.gradients(), self.settings.clip
                if clip is not None:
                    nn.utils.clip_grad_norm_(updated, clip)
                self.optimizer.step()
                self.schedule.step()
                self._clear()
                self._evaluate()
            self._read_losses()

    def begin(self, ending: Ending | None) -> None:
        """Train as the ending says from here on (None: as before)."""
        self.history.branched = self.step
        if ending is None:
            return
        self.rule = ending.begin(self._trunk())
        self.rule.dropout = ending.dropout
        self.left = left_gradients(self._trunk(), ending.leak) if ending.leak else []
        self.history.heads = self.rule.heads
        self.history.scoring_seconds = self.rule.scoring_seconds
        if self.step < self.settings.steps:
            sharing = len(self.rule.tasks(self.step + 1))
            if sharing > 1:
                self.streams = self._streams(self.settings.batch_size // sharing, salt=3)

    def _trunk(self) -> Trunk:
        options = self.settings.batch_size, self.settings.seed, self.step, self.cache
        return Trunk(self.model, self.tasks, self.order, self.optimizer, *options)

    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: matrices, and vectors without weight decay."""
        every, decay = list(self.model.parameters()), self.settings.weight_decay
        return [
            {"params": [p for p in every if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _loss(self, name: str) -> Tensor:
        """Return the mean loss of a task's next batch."""
        self.drawn[name] += 1
        device, half = self.model.device, self.settings.precision == "bf16"
        batch = self.encoded[name].batch(next(self.streams[name])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return self.model.losses(batch, name).mean()

    def _streams(self, batch_size: int, salt: int = 1) -> dict[str, Iterator[np.ndarray]]:
        return {
            name: encoded.forever(batch_size, np.random.default_rng((self.settings.seed, salt, i)))
            for i, (name, encoded) in enumerate(self.encoded.items())
        }

    def _clear(self) -> None:
        self.model.zero_grad()
        self.optimizer.zero_grad()  # the rows of heads, with IAT

    def _record(self, loss: Tensor) -> None:
        self._unread.append(loss)
        if loss.device.type == "cpu" or len(self._unread) == READ_EVERY:
            self._read_losses()

    def _read_losses(self) -> None:
        """Move losses to the history, or raise FslibError for one that is not finite."""
        for loss in torch.stack(self._unread).tolist() if self._unread else ():
            self.history.losses.append(loss)
            if not np.isfinite(loss):
                at = len(self.history.losses)
                choice = self.history.order[at - 1]
                name = "all" if choice == MIXED else self.history.tasks[choice]
                raise FslibError(f"loss {loss} at step {at} ({name}): lower lr={self.settings.lr}")
        self._unread.clear()

    def _evaluate(self) -> None:
        """Score the evaluation data, if it is time to."""
        every = self.settings.evaluate_every
        if every is not None and (self.step in (0, self.settings.steps) or self.step % every == 0):
            with hidden():
                scores = {name: s.value for name, s in evaluate(self.model, self.scored).items()}
            self.history.evaluations.append({"step": self.step, **scores})

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of all that the rest of the run depends on."""
        own = {name: getattr(self, name) for name in ("step", "drawn", "rng", "history")}
        states = {name: getattr(self, name).state_dict() for name in STATES}
        return copy.deepcopy(own | states)

    def restore(self, then: Mapping[str, Any]) -> None:
        """Go back to a snapshot of this run, of a step before any ending."""
        for group, whole in zip(self.optimizer.param_groups, self._groups(), strict=True):
            group["params"] = whole["params"]
        self.optimizer.state.clear()
        for name, value in then.items():
            if name in STATES:
                getattr(self, name).load_state_dict(copy.deepcopy(value))
            else:
                setattr(self, name, copy.deepcopy(value))
        self.streams = self._streams(self.settings.batch_size)
        for name, stream in self.streams.items():
            for _ in range(self.drawn[name]):
                next(stream)
        self.rule, self.left = Rule(self._trunk()), []

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Use the run's own generators inside, and the caller's again afterwards."""
        before = random_state()
        if self.rng:
            set_random_state(self.rng)
        else:
            torch.manual_seed(self.settings.seed * 1009)
        try:
            yield
        finally:
            self.rng = random_state()
            set_random_state(before)
