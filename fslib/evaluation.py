"""Run a model over a split and score it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Split, Task, Tasks, as_tasks
from fslib.errors import FslibError, check_count, check_number
from fslib.intervals import LEVEL, score_measure
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.scoring import metric_score

EVAL_BATCH = 32
Most = int | None  # so many examples at most; None for all


@dataclass(frozen=True, eq=False)
class Score:
    """One task's evaluation: a metric over predictions and labels, each (n,).

    Args:
        metric: A metric's name, as `fslib.scoring.metric_score` takes it.
        predictions: (n,) classes or values.
        labels: (n,) of the same kind.
        doubts: Why the score means little, "" where it does not (`Task.doubts`); it is printed with
            the score.
    """

    metric: str
    predictions: np.ndarray
    labels: np.ndarray
    doubts: str = ""

    @property
    def value(self) -> float:
        """The metric, a fraction (0.9 is 90 % for accuracy)."""
        return float(metric_score(self.metric, self.predictions, self.labels))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the t interval (low, high) over examples; NaN for one example."""
        check_number("level", level, "(0, 1)", "0.95 is the usual one")
        measure = score_measure("examples", self.metric, self.predictions[None], self.labels)
        return measure.interval().at(level)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        low, high = self.interval()
        but = f"; {self.doubts}" if self.doubts else ""
        found = f"{self.metric} {self.value:.3f}, 95 % [{low:.3f}, {high:.3f}]"
        return f"Score({found}, n={len(self.labels)}{but})"


def evaluate(
    model: MultiTaskModel, tasks: Tasks, *, split: str = "eval", batch_size: int = EVAL_BATCH
) -> dict[str, Score]:
    """Score the model on every task and return {name: Score}.

    Dropout is off; heads that are pruned around the call stay so.

    Args:
        model: The model, with a classifier for every task.
        tasks: A task or several.
        split: "eval" or "train".
        batch_size: Examples at once; it does not change what is predicted.

    Raises:
        FslibError: For a task the model has no classifier for, or one for other labels or another
            metric under the same name, and for a model that gives NaN.
    """
    named, scores = as_tasks(tasks), {}
    check_model(model, *named.values())
    for name, task in named.items():
        part = task.part(split, None)
        predictions = predict(model, task, length_batches(model, part, batch_size), len(part))
        doubts = task.doubts if split == "eval" else ""
        scores[name] = Score(task.metric, predictions, part.labels, doubts)
    return scores


def predict(model: MultiTaskModel, task: Task, batches: list[Batch], n: int) -> np.ndarray:
    """Return predicted classes (int64) or values (float32), (n,), in split order."""
    predictions = blank(task, n)
    with in_mode(model, training=False), torch.inference_mode():
        for batch in batches:
            logits = check_finite(model(batch.to(model.device).inputs, task.name), task.name)
            predictions[batch.indices] = predicted(task, logits)
    return predictions


def blank(task: Task, *shape: int) -> np.ndarray:
    """Return zeros in the type of a task's predictions: int64, float32 for regression."""
    return np.zeros(shape, dtype=np.float32 if task.is_regression else np.int64)


def predicted(task: Task, logits: Float[Tensor, "batch outputs"]) -> np.ndarray:
    """Return (batch,) what logits say: classes, or values for regression."""
    return (logits[:, 0].float() if task.is_regression else logits.argmax(-1)).cpu().numpy()


def check_finite(values: Tensor, task: str) -> Tensor:
    """Return what a model gives for a task as it is.

    Raises:
        FslibError: Where it is NaN or infinite: an argmax of NaN is class 0.
    """
    if not bool(torch.isfinite(values).all()):
        raise FslibError(f"NaN or infinity for task {task}: train again with a lower lr")
    return values


def check_several(sizes: Mapping[str, int]) -> None:
    """Raise FslibError where fewer than two examples of a task are scored."""
    for name, size in sizes.items():
        if size < 2:
            raise FslibError(f"task {name}: an interval needs two examples or more, not {size}")


def length_batches(model: MultiTaskModel, split: Split, batch_size: int) -> list[Batch]:
    """Return all examples once, in batches of like length.

    The longest come first: what they needed is then used again, and memory does not grow batch by
    batch.
    """
    encoded = model.encode(split)
    return [encoded.batch(indices) for indices in reversed(encoded.in_length_order(batch_size))]


def sample(task: Task, split: str = "train", examples: Most = None, seed: int = 0) -> Split:
    """Draw a random part of a split, or return all of it where `examples` is None."""
    check_count("examples", examples, none=True)
    return task.part(split, examples, seed)
