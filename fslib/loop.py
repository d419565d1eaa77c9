"""One run of the multi-task training loop, as an object that can stop at any step, be remembered, and go on."""

import copy
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from fslib.data.batches import Batch, task_order
from fslib.data.tasks import Task, as_tasks
from fslib.endings import IAT, Ending, PCGrad, projected
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate, in_mode
from fslib.importance import Contributions, contributions
from fslib.model.multitask import MultiTaskModel
from fslib.progress import bar, hidden
from fslib.rows import HeadRows, RowOptimizer, head_rows

MIXED = -1  # in History.order: a step on examples of all tasks
READ_EVERY = 50  # steps between readings of losses that lie on another device: no step waits for its copy


@dataclass
class History:
    """What happened in training.

    tasks: names. order: (steps,) index into `tasks` of each step's task, -1 for a step on all of them.
    losses: (steps,) mean batch loss. evaluations: one dict a point, {"step": s, task: metric, ...}, the first
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
        """Updates made on a task's batches."""
        return self.order.count(self.tasks.index(task))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that the rest of a training run depends on."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict
    schedule: dict
    scaler: dict | None
    drawn: dict[str, int]
    rng: list[Tensor]
    history: History


class Training:
    """A training run that can stop at any step, be remembered, and go on; see `train` for its settings."""

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Task | Iterable[Task] | Mapping[str, Task],
        *,
        steps: int = 600,
        batch_size: int = 16,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        clip: float = 1.0,
        sampling: str = "annealed",
        epochs: int = 5,
        seed: int = 0,
        evaluate_every: int | None = None,
        evaluate_on: Mapping[str, Task] | None = None,
        mixed_precision: str | None = None,
    ) -> None:
        self.tasks = as_tasks(tasks)
        for name, value, ok in (("lr", lr, lr > 0), ("warmup", warmup, 0 <= warmup < 1), ("clip", clip, clip > 0)):
            if not ok:
                raise FslibError(f"{name} {value} is out of range (lr > 0, 0 <= warmup < 1, clip > 0)")
        if batch_size < 1 or (evaluate_every is not None and evaluate_every < 1):
            raise FslibError(f"batch_size {batch_size} and evaluate_every {evaluate_every} must be at least 1")
        for task in self.tasks:
            if task not in model.classifiers:
                raise unknown("task of this model", task, model.classifiers)
        sizes = [len(t.train) for t in self.tasks.values()]
        self.order = task_order(sizes, steps, sampling, epochs, seed)
        self.model, self.steps, self.batch_size = model, steps, batch_size
        self.lr, self.clip, self.seed = lr, clip, seed
        self.evaluate_every, self.evaluate_on = evaluate_every, evaluate_on or self.tasks
        self.accelerator = _accelerator(mixed_precision)
        model.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=lr, fused=True)
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
        self.wrapped, self.optimizer = self.accelerator.prepare(_Losses(model), optimizer)
        self.encoded = {name: model.encode(task.train) for name, task in self.tasks.items()}
        self.streams = self._streams()
        self.drawn = dict.fromkeys(self.tasks, 0)
        self.step, self.history = 0, History(list(self.tasks))
        self.ending: Ending | None = None
        self._head_rows: list[HeadRows] | None = None
        self._rows: RowOptimizer | None = None
        self._updated: list[Tensor] = list(model.parameters())  # by the step that is being made
        self._unread: list[Tensor] = []
        self._scored: dict[tuple[int, int | None], tuple[dict[str, Contributions], float]] = {}
        with torch.random.fork_rng(devices=_cuda_devices()):
            torch.manual_seed(seed * 1009 + self.accelerator.process_index)
            self.rng = _random_state()

    def check(self, ending: object) -> None:
        """Raise FslibError for an ending that this run cannot have, or what is no ending."""
        if not isinstance(ending, Ending | None):
            raise FslibError(f"{ending!r} is no ending: give fslib.IAT(), fslib.PCGrad(), fslib.Stop() or None")
        if isinstance(ending, (IAT, PCGrad)) and len(self.tasks) < 2:
            raise FslibError(f"{type(ending).__name__} needs at least two tasks, and gets {list(self.tasks)}")
        if isinstance(ending, IAT):
            ending.choose(dict.fromkeys(self.tasks, np.zeros((self.model.n_layers, self.model.n_heads))), _rng(0))
            self.head_rows()  # refuses a model whose heads have none of their own
        if isinstance(ending, PCGrad) and self.batch_size < len(self.tasks):
            raise FslibError(
                f"PCGrad shares batch_size {self.batch_size} among {len(self.tasks)} tasks: make it larger"
            )

    def advance(self, until: int) -> None:
        """Train up to a step, counted from the first."""
        if until > self.step == 0:
            self._look()
        steps = range(self.step, until)
        with in_mode(self.model, training=True), self._own_random_state():
            self._clear()  # gradients that the caller left must not enter the first step
            for self.step in bar(range(steps.start + 1, steps.stop + 1), "training", "steps"):
                self.history.order.append(MIXED if isinstance(self.ending, PCGrad) else self.order[self.step - 1])
                if isinstance(self.ending, PCGrad):
                    self._mixed_gradient(self.ending.project)
                else:
                    self._gradient()
                self.accelerator.clip_grad_norm_(self._updated, self.clip)
                self.optimizer.step()
                self.schedule.step()
                self._clear()
                self._look()
            self._read_losses()

    def begin(self, ending: Ending | None) -> None:
        """From here on, train as the ending says."""
        self.history.branched, self.ending = self.step, ending
        if isinstance(ending, IAT):
            self._begin_iat(ending)
        if isinstance(ending, PCGrad):
            self.streams = self._streams(self.batch_size // len(self.tasks), salt=3)
            self._projection_rng = _rng(self.seed, 4)

    def _begin_iat(self, iat: IAT) -> None:
        """Score importance on training data, choose each task's heads, and separate their rows from the others."""
        scored, self.history.scoring_seconds = self._score(iat)
        maps = {t: c.importance(reduction=iat.reduction, normalize=iat.normalize) for t, c in scored.items()}
        self.history.heads = sets = iat.choose(maps, _rng(self.seed, 5))
        frozen = set(self.model.encoder.parameters()) if iat.others == "freeze" else set()
        self._rows = RowOptimizer(self.model, self.head_rows(), self.optimizer.optimizer, sets, frozen, iat.strict)

    def head_rows(self) -> list[HeadRows]:
        """The model's rows by head, looked for once for all endings."""
        if self._head_rows is None:
            self._head_rows = head_rows(self.model)
        return self._head_rows

    def _score(self, iat: IAT) -> tuple[dict[str, Contributions], float]:
        """Importance at this step, scored once for all endings that begin here."""
        place = (self.step, iat.examples)
        if place not in self._scored:
            started = time.perf_counter()
            found = {
                name: contributions(self.model, task, examples=iat.examples, seed=self.seed)
                for name, task in self.tasks.items()
            }
            self._scored[place] = found, time.perf_counter() - started
        return self._scored[place]

    def _gradient(self) -> None:
        """The gradient of the next batch of this step's task, where the optimizer will find it."""
        name = self.history.tasks[self.order[self.step - 1]]
        loss = self.wrapped(self._next_batch(name), name)
        self._note(loss)
        self.accelerator.backward(loss)
        if self._rows is not None:
            self._updated = self._rows.hand_out(name)

    def _mixed_gradient(self, project: bool) -> None:
        """The mean over tasks of their gradients on a few examples each; of the encoder's, projected or not."""
        encoder = list(self.model.encoder.parameters())
        losses = []
        gradients = []
        for name in self.tasks:
            loss = self.wrapped(self._next_batch(name), name) / len(self.tasks)
            losses.append(loss.detach())
            self.accelerator.backward(loss)
            if project:
                gradients.append(torch.cat([_flat_gradient(p) for p in encoder]))
                for parameter in encoder:
                    parameter.grad = None
        self._note(torch.stack(losses).sum())
        if project:
            each = torch.stack(gradients)  # (tasks, parameters of the encoder)
            weights = projected((each @ each.T).cpu(), self._projection_rng).to(each)
            # their losses were divided by the number of tasks already: the sum is the mean
            update = (weights @ each * len(self.tasks)).split([p.numel() for p in encoder])
            for parameter, part in zip(encoder, update, strict=True):
                parameter.grad = part.view_as(parameter)

    def _next_batch(self, name: str) -> Batch:
        indices = next(self.streams[name])  # all processes draw the same task and share the batch
        self.drawn[name] += 1
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.encoded[name].batch(mine if len(mine) else indices[:1]).to(self.accelerator.device)

    def _streams(self, batch_size: int | None = None, salt: int = 1) -> dict[str, Iterator[np.ndarray]]:
        return {
            name: encoded.forever(batch_size or self.batch_size, _rng(self.seed, salt, i))
            for i, (name, encoded) in enumerate(self.encoded.items())
        }

    def _clear(self) -> None:
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def _note(self, loss: Tensor) -> None:
        self._unread.append(loss.detach())
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
                raise FslibError(f"the loss is {loss} at step {at} (task {name}): lower lr={self.lr}")
        self._unread.clear()

    def _look(self) -> None:
        """Evaluate, if it is time to."""
        every = self.evaluate_every
        if every is not None and (self.step in (0, self.steps) or self.step % every == 0):
            with hidden():
                scores = evaluate(self.model, self.evaluate_on)
            self.history.evaluations.append({"step": self.step, **{n: s.value for n, s in scores.items()}})

    def snapshot(self) -> Snapshot:
        """The run as it is now, copied."""
        return Snapshot(
            self.step,
            {name: value.clone() for name, value in self.model.state_dict().items()},
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.schedule.state_dict()),
            copy.deepcopy(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else None,  # fp16's
            dict(self.drawn),
            list(self.rng),
            copy.deepcopy(self.history),
        )

    def restore(self, then: Snapshot) -> None:
        """Be as the snapshot, of this run and of a step before any ending, says."""
        self.step, self.drawn, self.rng = then.step, dict(then.drawn), list(then.rng)
        self.history, self.ending = copy.deepcopy(then.history), None
        self.model.load_state_dict(then.model)
        optimizer = self.optimizer.optimizer
        for group, parameters in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = list(parameters)
        optimizer.state.clear()
        self.optimizer.load_state_dict(copy.deepcopy(then.optimizer))
        self.schedule.load_state_dict(copy.deepcopy(then.schedule))
        if then.scaler is not None:
            self.accelerator.scaler.load_state_dict(then.scaler)
        self.streams = self._streams()
        for name, stream in self.streams.items():
            for _ in range(self.drawn[name]):
                next(stream)
        self._rows, self._updated = None, list(self.model.parameters())

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """The run's own generators inside, the caller's again afterwards."""
        with torch.random.fork_rng(devices=_cuda_devices()):
            _set_random_state(self.rng)
            try:
                yield
            finally:
                self.rng = _random_state()


def _accelerator(mixed_precision: str | None) -> Accelerator:
    # a step leaves the other tasks' classifiers without a gradient
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # left out, it would be what an earlier training in this process had
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:  # no such precision, or not the one that this process began with
        raise FslibError(f"mixed_precision {precision!r}: {error}") from error
    if accelerator.gradient_accumulation_steps != 1:
        raise FslibError(
            f"gradient accumulation over {accelerator.gradient_accumulation_steps} steps would mix the gradients of "
            "several tasks in one update: set accelerate's to 1, and batch_size as large as memory allows"
        )
    return accelerator


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _cuda_devices())]


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


class _Losses(nn.Module):
    """The mean loss of a batch as a forward pass, which is what data-parallel wrappers wrap."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch, task: str):  # type: ignore[no-untyped-def]
        return self.model.losses(batch, task).mean()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))
