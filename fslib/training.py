"""Multi-task training: at every step one task, one batch, one update of the shared encoder.

`train` runs it through, to one ending; `branch` runs its first part once and then as many endings as are asked.
"""

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fslib.data.batches import task_order
from fslib.data.tasks import Task, as_tasks
from fslib.endings import Ending, PCGrad, Rule, Trunk
from fslib.errors import FslibError, check_count, check_number, unknown
from fslib.evaluation import evaluate
from fslib.iat import IAT
from fslib.model.devices import best_device, cuda_devices, random_state, set_random_state
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.progress import bar, hidden

PRECISIONS = ("float32", "bf16")
MIXED = -1  # in History.order: a step on examples of all tasks
READ_EVERY = (
    50  # steps between readings of losses that lie on another device: no step waits for its copy
)


@dataclass(frozen=True)
class Settings:
    """How a training goes: the keyword arguments of `train` and `branch`.

    AdamW (fused), linear warm-up over the first `warmup` of the steps, then linear decay to `lr_floor` of the peak
    `lr` (0: to nothing), gradient norm clipped at `clip`; no weight decay on biases and norms.
    sampling: proportional, sqrt, uniform or annealed (over `epochs` equal parts of the steps).
    seed: for the order of tasks and batches and for dropout; the caller's random state is left alone.
    evaluate_every: score `evaluate_on` (default: the tasks) before the first step, every so many, and at the end.
    precision: of the forward pass, "float32" or "bf16" (`torch.autocast`; weights and updates stay float32).
    """

    steps: int = 600
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    lr_floor: float = 0.0
    clip: float = 1.0
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
        intervals |= {"warmup": "[0, 1)", "lr_floor": "[0, 1)"}
        for name, interval in intervals.items():
            check_number(name, getattr(self, name), interval)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments. Raises FslibError for an unknown one, with the nearest valid name."""
    known = [f.name for f in fields(Settings)]
    if wrong := [name for name in values if name not in known]:
        raise unknown("setting of training", wrong[0], known)
    return Settings(**values)


def lr_factor(step: int, steps: int, warmup: float = 0.1, lr_floor: float = 0.0) -> float:
    """Return the share of the peak learning rate, in [0, 1], after `step` of the steps.

    From 0 to 1 over the first `warmup` of them; then lr_floor + (1 - lr_floor) * what is left of a linear decay to 0.
    """
    rising = round(warmup * steps)
    if step < rising:
        return step / rising
    return lr_floor + (1 - lr_floor) * max(0.0, (steps - step) / max(1, steps - rising))


def lr_share(steps: int, delta: float, lr_floor: float = 0.0, *, warmup: float = 0.1) -> float:
    """Return which share of the learning rate, summed over all steps, falls into the last `delta` of them, in (0, 1].

    That is an ending's dose: with a decay to 0 the last tenth of the steps gets about a hundredth of what is learned.
    Raises FslibError for values that `train` refuses, and for a delta that leaves no step before or in the ending.
    """
    Settings(steps=steps, warmup=warmup, lr_floor=lr_floor)
    factors = [lr_factor(step, steps, warmup, lr_floor) for step in range(steps)]
    return sum(factors[Ending(delta).start(steps) :]) / sum(factors)


@dataclass
class History:
    """What happened in training.

    tasks: names. order: (steps,) index into `tasks` of each step's task, -1 for a step on all of them.
    losses: (steps,) mean batch loss. evaluations: one dict per point, {"step": s, task: metric, ...}, the first
        before training (step 0).
    branched: step at which the ending began (0: one training from its first step); steps before it may be shared.
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
        if task not in self.tasks:
            raise unknown("task of this training", task, self.tasks)
        return self.order.count(self.tasks.index(task))


def train(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    iat: IAT | None = None,
    pcgrad: PCGrad | None = None,
    **settings: Any,
) -> History:
    """Fine-tune encoder and classifiers on all tasks together, in place, and return what happened.

    One step is one batch of one task. The model keeps its mode.
    iat, pcgrad: how the last `delta` of the steps are made, instead of like the others.
    settings: the fields of `fslib.training.Settings`: steps (600), batch_size (16), lr (1e-4), weight_decay (0.01),
        warmup (0.1), lr_floor (0.0), clip (1.0), sampling ("annealed"), epochs (5), seed (0), evaluate_every,
        evaluate_on, precision ("float32").
    Raises FslibError for settings out of range, a task without a classifier, IAT or PCGrad with one task, or a
    loss that is not finite. Source: Li et al. (2023); annealed sampling: Stickland and Murray (2019).
    """
    if iat is not None and pcgrad is not None:
        raise FslibError(
            "give iat or pcgrad: a training has one ending; fslib.branch compares several"
        )
    run = Training(model, tasks, make_settings(settings))
    if (ending := iat or pcgrad) is not None:
        run.check(ending)
        run.advance(ending.start(run.settings.steps))
        run.begin(ending)
    run.advance(run.settings.steps)
    return run.history


def branch(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    endings: Mapping[str, Ending | None],
    **settings: Any,
) -> Iterator[tuple[str, History]]:
    """Train one trunk, then many endings from it; yield each ending's name and history.

        for name, history in fslib.branch(model, tasks, {"plain": None, "IAT": fslib.IAT()}, steps=600):
            scores[name] = fslib.evaluate(model, tasks)

    endings: by a name of your choice; None is plain training, which branches off last. They come in the order in
        which they branch off, and inside the loop's body `model` is at the end of the one that is named; after the
        loop, at that of the last. settings: as in `train`.
    Every ending starts from the same weights, optimizer, schedule, data order and random state, so they differ in
    nothing else (a plain one equals unbroken training bit for bit), and m endings cost (1 - delta) + m delta of
    one training: `history.branched` says where each left the trunk. Memory: two copies of model and optimizer.
    Raises FslibError as `train` does, before the first step.
    """
    if not endings or not isinstance(endings, Mapping):
        raise FslibError("no endings: give at least one, such as {'plain': None}")
    run = Training(model, tasks, make_settings(settings))
    for ending in endings.values():
        run.check(ending)
    starts = {
        name: ending.start(run.settings.steps)
        for name, ending in endings.items()
        if ending is not None
    }
    last = max(starts.values(), default=0)
    starts = {name: starts.get(name, last) for name in endings}
    return _branches(run, endings, starts)


def _branches(
    run: "Training", endings: Mapping[str, Ending | None], starts: Mapping[str, int]
) -> Iterator[tuple[str, History]]:
    names = sorted(endings, key=lambda name: starts[name])
    for number, name in enumerate(names):
        if number == 0 or starts[name] != starts[names[number - 1]]:
            run.advance(starts[name])
            trunk = run.snapshot()
        ending = endings[name]
        run.begin(ending)
        run.advance(run.settings.steps if ending is None else ending.stop(run.settings.steps))
        yield name, run.history
        if number + 1 < len(names):
            run.restore(trunk)


class Training:
    """A training run that can stop at any step, be remembered, and go on.

    step: steps made. rule: what a step does with gradients (`fslib.endings`). history: what has happened.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Task | Iterable[Task] | Mapping[str, Task],
        settings: Settings,
    ) -> None:
        self.model, self.tasks, self.settings = model, as_tasks(tasks), settings
        check_model(
            model, *self.tasks.values(), *as_tasks(settings.evaluate_on or self.tasks).values()
        )
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in model.parameters()):
            raise FslibError(
                "nothing can be trained: all weights are frozen, or torch.no_grad or torch.inference_mode is on"
            )
        names, s = list(self.tasks), settings
        sizes = [len(task.train) for task in self.tasks.values()]
        self.order = [names[i] for i in task_order(sizes, s.steps, s.sampling, s.epochs, s.seed)]
        self.device = best_device()
        model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, s.weight_decay), lr=s.lr, fused=True
        )
        self.groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(step, s.steps, s.warmup, s.lr_floor)
        )
        self.encoded = {name: model.encode(task.train) for name, task in self.tasks.items()}
        self.streams = self._streams(s.batch_size)
        self.step, self.drawn, self.history = 0, dict.fromkeys(self.tasks, 0), History(names)
        self.cache: dict[Hashable, Any] = {}
        self.rule = Rule(self._trunk())
        self._unread: list[Tensor] = []
        with torch.random.fork_rng(devices=cuda_devices()):
            torch.manual_seed(s.seed * 1009)
            self.rng = random_state()

    def check(self, ending: object) -> None:
        """Raise FslibError for an ending that this run cannot have, or what is no ending."""
        if not isinstance(ending, Ending | None):
            raise FslibError(
                f"{ending!r} is no ending: give fslib.IAT(), fslib.PCGrad(), fslib.Stop() or None"
            )
        if ending is not None:
            ending.check(self._trunk())

    def advance(self, until: int) -> None:
        """Train up to a step, counted from the first."""
        if until <= self.step:
            return
        if self.step == 0:
            self._evaluate()
        with in_mode(self.model, training=True), self._own_random_state():
            self._clear()  # gradients that the caller left must not enter the first step
            for step in bar(range(self.step + 1, until + 1), "training", "steps"):
                self.step = step
                names = self.rule.tasks(step)
                self.history.order.append(
                    self.history.tasks.index(names[0]) if len(names) == 1 else MIXED
                )
                losses = []
                for name in names:
                    loss = self._loss(name) / len(names)
                    loss.backward()
                    self.rule.collect(name)
                    losses.append(loss.detach())
                self._record(torch.stack(losses).sum())
                nn.utils.clip_grad_norm_(self.rule.gradients(), self.settings.clip)
                self.optimizer.step()
                self.schedule.step()
                self._clear()
                self._evaluate()
            self._read_losses()

    def begin(self, ending: Ending | None) -> None:
        """Train as the ending says from here on (None: as before)."""
        self.history.branched = self.step
        if ending is not None:
            self.rule = ending.begin(self._trunk())
            self.history.heads, self.history.scoring_seconds = (
                self.rule.heads,
                self.rule.scoring_seconds,
            )
            if (
                self.step < self.settings.steps
                and (sharing := len(self.rule.tasks(self.step + 1))) > 1
            ):
                self.streams = self._streams(self.settings.batch_size // sharing, salt=3)

    def _trunk(self) -> Trunk:
        s = self.settings
        return Trunk(
            self.model,
            self.tasks,
            self.order,
            self.optimizer,
            s.batch_size,
            s.seed,
            self.step,
            self.cache,
        )

    def _loss(self, name: str) -> Tensor:
        """Return the mean loss of a task's next batch."""
        self.drawn[name] += 1
        batch = self.encoded[name].batch(next(self.streams[name])).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, self.settings.precision == "bf16"):
            return self.model.losses(batch, name).mean()

    def _streams(self, batch_size: int, salt: int = 1) -> dict[str, Iterator[np.ndarray]]:
        return {
            name: encoded.forever(batch_size, np.random.default_rng((self.settings.seed, salt, i)))
            for i, (name, encoded) in enumerate(self.encoded.items())
        }

    def _clear(self) -> None:
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def _record(self, loss: Tensor) -> None:
        self._unread.append(loss)
        if loss.device.type == "cpu" or len(self._unread) == READ_EVERY:
            self._read_losses()

    def _read_losses(self) -> None:
        """Move losses to the history. Raises FslibError for one that is not finite."""
        for loss in torch.stack(self._unread).tolist() if self._unread else ():
            self.history.losses.append(loss)
            if not np.isfinite(loss):
                at = len(self.history.losses)
                choice = self.history.order[at - 1]
                name = "all" if choice == MIXED else self.history.tasks[choice]
                raise FslibError(
                    f"the loss is {loss} at step {at} (task {name}): lower lr={self.settings.lr}"
                )
        self._unread.clear()

    def _evaluate(self) -> None:
        """Score the evaluation data, if it is time to."""
        every = self.settings.evaluate_every
        if every is not None and (self.step in (0, self.settings.steps) or self.step % every == 0):
            with hidden():
                scores = evaluate(self.model, self.settings.evaluate_on or self.tasks)
            self.history.evaluations.append(
                {"step": self.step, **{n: s.value for n, s in scores.items()}}
            )

    def snapshot(self) -> "Snapshot":
        """Return the run as it is now, copied."""
        return Snapshot(
            self.step,
            {name: value.clone() for name, value in self.model.state_dict().items()},
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.schedule.state_dict()),
            dict(self.drawn),
            list(self.rng),
            copy.deepcopy(self.history),
        )

    def restore(self, then: "Snapshot") -> None:
        """Go back to a snapshot of this run, of a step before any ending."""
        self.step, self.drawn, self.rng = then.step, dict(then.drawn), list(then.rng)
        self.history = copy.deepcopy(then.history)
        self.model.load_state_dict(then.model)
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"] = list(parameters)
        self.optimizer.state.clear()
        self.optimizer.load_state_dict(copy.deepcopy(then.optimizer))
        self.schedule.load_state_dict(copy.deepcopy(then.schedule))
        self.streams = self._streams(self.settings.batch_size)
        for name, stream in self.streams.items():
            for _ in range(self.drawn[name]):
                next(stream)
        self.rule = Rule(self._trunk())

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Use the run's own generators inside, and the caller's again afterwards."""
        with torch.random.fork_rng(devices=cuda_devices()):
            set_random_state(self.rng)
            try:
                yield
            finally:
                self.rng = random_state()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that the rest of a training run depends on."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict
    schedule: dict
    drawn: dict[str, int]
    rng: list[Tensor]
    history: History


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
