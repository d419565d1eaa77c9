"""Run a model over a split and score it."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Split, Task, as_tasks
from fslib.errors import FslibError, check_count
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.scoring import Score

EVAL_BATCH = 32


def evaluate(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "eval",
    batch_size: int = EVAL_BATCH,
) -> dict[str, Score]:
    """Score the model on every task and return {name: Score}; dropout is off, heads pruned around the call stay so.

    split: "eval" or "train". Raises FslibError for a task the model has no classifier for, or one for other labels or
    another metric under the same name, and for a model that gives NaN.
    """
    named = as_tasks(tasks)
    check_model(model, *named.values())
    check_count("batch_size", batch_size)
    scores = {}
    for name, task in named.items():
        part = pick_split(task, split)
        predictions = predict(model, task, length_batches(model, part, batch_size), len(part))
        scores[name] = Score(
            task.metric, predictions, part.labels, task.doubts if split == "eval" else ""
        )
    return scores


def predict(model: MultiTaskModel, task: Task, batches: list[Batch], n: int) -> np.ndarray:
    """Return (n,) predicted classes (int64), or values (float32) for regression, in the split's order."""
    predictions = blank_predictions(task, n)
    with in_mode(model, training=False), torch.inference_mode():
        for batch in batches:
            logits = check_finite(model(batch.to(model.device).inputs, task.name), task.name)
            predictions[batch.indices] = predicted(task, logits)
    return predictions


def blank_predictions(task: Task, *shape: int) -> np.ndarray:
    """Return zeros in the type of a task's predictions: int64 for classes, float32 for the values of a regression."""
    return np.zeros(shape, dtype=np.float32 if task.is_regression else np.int64)


def predicted(task: Task, logits: Float[Tensor, "batch outputs"]) -> np.ndarray:
    """Return (batch,) what logits say: classes, or values for regression."""
    return (logits[:, 0].float() if task.is_regression else logits.argmax(-1)).cpu().numpy()


def check_finite(values: Tensor, task: str) -> Tensor:
    """Return what a model gives for a task as it is. Raises FslibError where it is NaN: an argmax of NaN is class 0."""
    if not bool(torch.isfinite(values).all()):
        raise FslibError(
            f"the model gives NaN or infinity for task {task}: its weights are broken; train it again with a lower lr"
        )
    return values


def check_several(sizes: Mapping[str, int]) -> None:
    """Raise FslibError where fewer than two examples of a task are scored, as there is no interval over them."""
    for name, size in sizes.items():
        if size < 2:
            raise FslibError(
                f"{size} evaluation example of task {name} is scored: an interval needs two or more"
            )


def length_batches(model: MultiTaskModel, split: Split, batch_size: int) -> list[Batch]:
    """Return all examples once, in batches of like length.

    The longest come first: what they needed is then used again, and memory does not grow batch by batch.
    """
    encoded = model.encode(split)
    return [encoded.batch(indices) for indices in reversed(encoded.in_length_order(batch_size))]


def pick_split(task: Task, split: str) -> Split:
    """Return the split of that name. Raises FslibError for one that is neither "train" nor "eval"."""
    if split not in ("train", "eval"):
        raise FslibError(f"unknown split {split!r}: valid: train, eval")
    return task.train if split == "train" else task.eval


def sample(task: Task, split: str, examples: int | None, seed: int) -> Split:
    """Draw a random part of a split, or return all of it where `examples` is None."""
    if examples is None:
        return pick_split(task, split)
    check_count("examples", examples)
    check_count("seed", seed, 0)
    pick_split(task, split)  # refuses an unknown split by name
    return task.part(split, examples, seed)
