"""Multi-task training: at every step one task, one batch, one update of the shared encoder.

`train` runs it through, to one ending; `branch` runs its first part once and then as many endings as are asked.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fslib.data.tasks import Task
from fslib.endings import IAT, Ending, PCGrad, Stop
from fslib.errors import FslibError
from fslib.loop import History, Training
from fslib.model.multitask import MultiTaskModel


def train(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    iat: IAT | None = None,
    pcgrad: PCGrad | None = None,
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
    iat, pcgrad: how the last `delta` of the steps are made, instead of like the others.
    sampling: proportional, sqrt, uniform or annealed (over `epochs` equal parts of the steps).
    seed: for the order of tasks and batches and for dropout; the caller's RNG state is left alone.
    evaluate_every: score `evaluate_on` (default: the tasks) before the first step, every so many, and at the end.
    mixed_precision: "bf16" or "fp16", None for what `accelerate` is configured to (float32).
    Raises FslibError for settings out of range, a task without a classifier, IAT or PCGrad with one task, or a
    loss that is not finite.
    """
    settings = {k: v for k, v in locals().items() if k not in ("model", "tasks", "iat", "pcgrad")}
    if iat is not None and pcgrad is not None:
        raise FslibError("give iat or pcgrad: a training has one ending; fslib.branch compares several")
    run = Training(model, tasks, **settings)
    if (ending := iat or pcgrad) is not None:
        run.check(ending)
        run.advance(ending.start(steps))
        run.begin(ending)
    run.advance(steps)
    return run.history


def branch(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    endings: Mapping[str, Ending | None],
    **settings: Any,
) -> Iterator[tuple[str, History]]:
    """One trunk, many endings: train the shared first part once, and each ending from it.

        for name, history in fslib.branch(model, tasks, {"plain": None, "IAT": fslib.IAT()}, steps=600):
            scores[name] = fslib.evaluate(model, tasks)

    endings: by a name of your choice; None is plain training, which branches off last. They come in the order in
        which they branch off, and inside the loop's body `model` is at the end of the one that is named; after the
        loop, at that of the last. settings: of `train`.
    Every ending starts from the same weights, optimizer, schedule, data order and random state, so they differ in
    nothing else (a plain one equals unbroken training bit for bit), and m endings cost (1 - delta) + m delta of
    one training: `history.branched` says where each left the trunk. Memory: two copies of model and optimizer.
    Raises FslibError as `train` does, before the first step.
    """
    if not endings:
        raise FslibError("no endings: give at least one, such as {'plain': None}")
    run = Training(model, tasks, **settings)
    for ending in endings.values():
        run.check(ending)
    starts = {name: ending.start(run.steps) for name, ending in endings.items() if ending is not None}
    last = max(starts.values(), default=0)
    starts = {name: starts.get(name, last) for name in endings}
    return _branches(run, endings, starts)


def _branches(
    run: Training, endings: Mapping[str, Ending | None], starts: Mapping[str, int]
) -> Iterator[tuple[str, History]]:
    names = sorted(endings, key=lambda name: starts[name])
    for number, name in enumerate(names):
        if number == 0 or starts[name] != starts[names[number - 1]]:
            run.advance(starts[name])
            trunk = run.snapshot()
        run.begin(endings[name])
        if not isinstance(endings[name], Stop):
            run.advance(run.steps)
        yield name, run.history
        if number + 1 < len(names):
            run.restore(trunk)
