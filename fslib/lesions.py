"""Every head alone: what losing it costs each task.

Importance is a first-order estimate of what a head is worth to a task (`fslib.importance`). This is the measurement
that it estimates: one head is switched off, every task is evaluated, and the head comes back before the next one goes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num, Shaped
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Task, as_tasks
from fslib.errors import FslibError, check_count, finite_array, unknown
from fslib.evaluation import EVAL_BATCH, blank_predictions, check_several, length_batches, predicted
from fslib.intervals import Measure, score_measure
from fslib.model.multitask import MultiTaskModel, check_model, example_losses
from fslib.pruning import each_pruned
from fslib.scoring import metric_score, rank_correlation


@dataclass(frozen=True, eq=False)
class HeadLesions:
    """What every head alone is worth to every task, from `lesion_heads`; all examples are evaluation examples.

    shape: (layers, heads). labels: {task: (n,)}. predictions, losses: {task: (1 + layers * heads, n)}, the first row of
    the whole model, then one per head that is off, layer by layer; losses per example.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    shape: tuple[int, int]
    labels: Mapping[str, Num[np.ndarray, " n"]]
    predictions: Mapping[str, Num[np.ndarray, "sets n"]]
    losses: Mapping[str, Float[np.ndarray, "sets n"]]

    def __post_init__(self) -> None:
        """Raise FslibError where an array does not fit the others."""
        for task in self.tasks:
            wanted = (1 + self.shape[0] * self.shape[1], len(self.labels[task]))
            for name in ("predictions", "losses"):
                found = getattr(self, name)[task].shape
                if found != wanted:
                    raise FslibError(
                        f"{name} of task {task} are of shape {found}, not {wanted} (1 + heads, examples)"
                    )

    def cost(self, task: str) -> Float[np.ndarray, "layers heads"]:
        """Return how many points of a task's score are lost with each head alone, < 0: better off without it."""
        scores = metric_score(self._metric(task), self.predictions[task], self.labels[task])
        return 100 * (scores[0] - scores[1:]).reshape(self.shape)

    def reliability(self, task: str, *, splits: int = 200, seed: int = 0) -> float:
        """Return how well the rises are measured: the mean rank correlation of those in two halves of the examples.

        Over random splits, in [-1, 1]. Halves are noisier than the whole, so this is no upper bound of anything.
        """
        n, rng = len(self.labels[task]), np.random.default_rng(seed)
        orders = [rng.permutation(n) for _ in range(splits)]
        pairs = [
            (self.rise(task, order[: n // 2]), self.rise(task, order[n // 2 :])) for order in orders
        ]
        return float(np.mean([rank_correlation(one, other) for one, other in pairs]))

    def rise(
        self, task: str, subset: Shaped[np.ndarray, " subset"] | None = None
    ) -> Float[np.ndarray, "layers heads"]:
        """Return by how much a task's mean loss rises without each head alone; subset: of these examples (positions).

        The measurement behind the estimator "ablation" (`fslib.head_importance`), on evaluation examples.
        """
        self._metric(task)  # refuses another task by name
        losses = self.losses[task] if subset is None else self.losses[task][:, subset]
        mean = losses.mean(1, dtype=np.float64)
        return (mean[1:] - mean[0]).reshape(self.shape)

    def measure(self, task: str, layer: int, head: int) -> Measure:
        """Return the points of a task's score that one head is worth, for each example: `.interval()` is over them.

        layer, head: counted from 0. Raises FslibError for one that the model does not have.
        """
        if not (0 <= layer < self.shape[0] and 0 <= head < self.shape[1]):
            raise FslibError(
                f"layer {layer}, head {head} is outside {self.shape} (layers, heads), counted from 0"
            )
        rows = self.predictions[task][[0, 1 + layer * self.shape[1] + head]]
        whole, without = (
            score_measure(task, self._metric(task), row[None], self.labels[task]) for row in rows
        )
        return (whole - without).scaled(100.0)

    def predicted_by(self, task: str, importance: Float[np.ndarray, "layers heads"]) -> Measure:
        """Return how importance ranks heads as the rise of the loss without each does: Spearman over heads, in [-1, 1].

        With every example's influence: `.interval()` is over evaluation examples, the importance as it is. Noise in the
        rises lowers the correlation. Raises FslibError for importance of another shape.
        """
        self._metric(task)
        if finite_array("importance", importance).shape != self.shape:
            raise FslibError(
                f"importance of shape {np.shape(importance)} is not of {self.shape} (layers, heads)"
            )
        rises = (self.losses[task][1:] - self.losses[task][0]).astype(np.float64)  # (heads, n)
        n = rises.shape[1]
        total = rises.sum(1)
        means = np.concatenate(
            [total[None] / n, (total[:, None] - rises).T / (n - 1)]
        )  # all, then without each
        all_of_them, *without = metric_score("spearman", means, np.ravel(importance))
        return Measure(
            np.array([all_of_them]), {task: (n - 1) * (all_of_them - np.array([without]))}
        )

    def _metric(self, task: str) -> str:
        if task not in self.tasks:
            raise unknown("task of these lesions", task, self.tasks)
        return self.metrics[self.tasks.index(task)]


def lesion_heads(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    batch_size: int = EVAL_BATCH,
) -> HeadLesions:
    """Switch off every head alone, evaluate every task on its evaluation examples, and return the `HeadLesions`.

    Costs layers x heads + 1 forward passes per example. Heads that are pruned around the call stay off.
    Raises FslibError for a task the model has no classifier for, or with a single evaluation example, and for a model
    that gives NaN.
    """
    named = as_tasks(tasks)
    check_model(model, *named.values())
    check_several({name: len(task.eval) for name, task in named.items()})
    check_count("batch_size", batch_size)
    shape = model.n_layers, model.n_heads
    count = math.prod(shape)
    sets = np.concatenate([np.zeros((1, count), bool), np.eye(count, dtype=bool)]).reshape(
        -1, *shape
    )
    batches = {name: length_batches(model, task.eval, batch_size) for name, task in named.items()}
    predictions = {
        name: blank_predictions(task, len(task.eval), len(sets)) for name, task in named.items()
    }
    losses = {name: np.zeros(rows.shape, np.float32) for name, rows in predictions.items()}

    def keep(task: str, batch: Batch, number: int, logits: Tensor) -> None:
        predictions[task][batch.indices, number] = predicted(named[task], logits)
        losses[task][batch.indices, number] = (
            example_losses(logits, batch.labels).float().cpu().numpy()
        )

    each_pruned(model, batches, sets, keep)
    kept = [{u: rows.T for u, rows in found.items()} for found in (predictions, losses)]
    metrics = tuple(task.metric for task in named.values())
    labels = {name: task.eval.labels for name, task in named.items()}
    return HeadLesions(tuple(named), metrics, shape, labels, *kept)
