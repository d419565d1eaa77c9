"""The multi-task training loop: at every step one task, one batch, one update of the shared encoder."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from jaxtyping import Float, Num
from torch import nn
from transformers import get_linear_schedule_with_warmup

from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate, in_mode
from fslib.models import MultiTaskModel
from fslib.progress import bar, hidden
from fslib.tasks import Task, as_tasks

SAMPLINGS = ("proportional", "sqrt", "uniform", "annealed")


@dataclass
class History:
    """What happened in training.

    tasks: names. order: (steps,) index into `tasks` of each step's task. losses: (steps,) mean batch loss.
    evaluations: one dict a point, {"step": s, task: metric, ...}, the first before training (step 0).
    """

    tasks: list[str]
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def steps_of(self, task: str) -> int:
        """Updates made on a task's batches."""
        return self.order.count(self.tasks.index(task))


def sampling_weights(
    sizes: Num[np.ndarray, " tasks"], sampling: str, epoch: int = 1, epochs: int = 1
) -> Float[np.ndarray, " tasks"]:
    """Probability of each task in one step of `epoch` (1..epochs); sums to 1.

    proportional: n; sqrt: n**0.5; uniform: 1; annealed: n**a with a = 1 - 0.8 (epoch-1)/(epochs-1), from
    proportional towards even (Stickland and Murray, 2019); a = 1 when there is one epoch.
    """
    if sampling not in SAMPLINGS:
        raise unknown("sampling", sampling, SAMPLINGS)
    if not 1 <= epoch <= epochs:
        raise FslibError(f"epoch {epoch} is outside 1..{epochs}")
    annealed = 1.0 if epochs == 1 else 1 - 0.8 * (epoch - 1) / (epochs - 1)
    power = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0, "annealed": annealed}[sampling]
    weights = np.asarray(sizes, dtype=float) ** power
    return weights / weights.sum()


def task_order(sizes: list[int], steps: int, sampling: str, epochs: int, seed: int) -> list[int]:
    """Index of the task of every step, drawn with `sampling_weights`; `steps` are cut into `epochs` equal parts."""
    if steps < 1 or epochs < 1 or seed < 0:
        raise FslibError(f"steps {steps} and epochs {epochs} must be at least 1, seed {seed} at least 0")
    rng = np.random.default_rng([seed, 0])
    order = []
    for step in range(steps):
        epoch = 1 + step * epochs // steps if epochs <= steps else 1 + step
        order.append(int(rng.choice(len(sizes), p=sampling_weights(np.array(sizes), sampling, epoch, epochs))))
    return order


def train(
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
) -> History:
    """Fine-tune encoder and classifiers on all tasks together, in place; the model keeps its mode.

    One step is one batch of one task. AdamW (fused), linear warm-up over the first `warmup` of the steps,
    then linear decay to 0, gradient norm clipped at `clip`; no weight decay on biases and norms.
    sampling: proportional, sqrt, uniform or annealed (over `epochs` equal parts of the steps).
    seed: for the order of tasks and batches and for dropout; the caller's RNG state is left alone.
    evaluate_every: score `evaluate_on` (default: the tasks) before the first step, every so many, and at the end.
    mixed_precision: "bf16" or "fp16", None for what `accelerate` is configured to (float32).
    Raises FslibError for settings out of range, a task without a classifier, or a loss that is not finite.
    """
    named = as_tasks(tasks)
    for name, value, ok in (("lr", lr, lr > 0), ("warmup", warmup, 0 <= warmup < 1), ("clip", clip, clip > 0)):
        if not ok:
            raise FslibError(f"{name} {value} is out of range (lr > 0, 0 <= warmup < 1, clip > 0)")
    if batch_size < 1 or (evaluate_every is not None and evaluate_every < 1):
        raise FslibError(f"batch_size {batch_size} and evaluate_every {evaluate_every} must be at least 1")
    for task in named:
        if task not in model.classifiers:
            raise unknown("task of this model", task, model.classifiers)
    history = History(list(named), task_order([len(t.train) for t in named.values()], steps, sampling, epochs, seed))
    # a step leaves the other tasks' classifiers without a gradient
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # left out, it would be what an earlier training in this process had
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:  # no such precision, or not the one that this process began with
        raise FslibError(f"mixed_precision {precision!r}: {error}") from error
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    wrapped, optimizer = accelerator.prepare(_Losses(model), optimizer)
    encoded = {name: model.encode(task.train) for name, task in named.items()}
    streams = {
        n: e.forever(batch_size, np.random.default_rng([seed, 1, i])) for i, (n, e) in enumerate(encoded.items())
    }

    def look(step: int) -> None:
        if evaluate_every is not None and (step in (0, steps) or step % evaluate_every == 0):
            with hidden():
                scores = evaluate(model, evaluate_on or named)
            history.evaluations.append({"step": step, **{n: s.value for n, s in scores.items()}})

    with in_mode(model, training=True), torch.random.fork_rng(devices=_cuda_devices()):
        torch.manual_seed(seed * 1009 + accelerator.process_index)
        look(0)
        optimizer.zero_grad()  # gradients that the caller left must not enter the first step
        for step, choice in enumerate(bar(history.order, "training", "steps"), start=1):
            name = history.tasks[choice]
            indices = next(streams[name])  # all processes draw the same task and share the batch
            mine = indices[accelerator.process_index :: accelerator.num_processes]
            batch = encoded[name].batch(mine if len(mine) else indices[:1]).to(accelerator.device)
            loss = wrapped(batch, name)
            history.losses.append(float(loss.detach()))
            if not np.isfinite(history.losses[-1]):
                raise FslibError(f"the loss is {history.losses[-1]} at step {step} (task {name}): lower lr={lr}")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            look(step)
    return history


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
