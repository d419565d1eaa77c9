"""Every head alone: what losing it costs each task.

Importance is a first-order estimate of what a head is worth to a task (`fslib.importance`). This is
the measurement that it estimates: one head is switched off, every task is evaluated, and the head
comes back before the next one goes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num, Shaped

from fslib.data.tasks import as_tasks
from fslib.errors import FslibError, check_among, finite_array
from fslib.evaluation import EVAL_BATCH, Tasks, check_several, length_batches
from fslib.heads import HeadMap
from fslib.intervals import Measure, score_measure
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.pruning import each_pruned
from fslib.scoring import metric_score, rank_correlation


@dataclass(frozen=True, eq=False)
class HeadLesions:
    """What every head alone is worth to every task, from `lesion_heads`.

    All examples are evaluation examples. The first row of predictions and losses is of the whole
    model, then comes one per head that is off, layer by layer.

    Args:
        tasks: Names.
        metrics: A metric per task.
        shape: (layers, heads).
        labels: {task: (n,)}.
        predictions: {task: (1 + layers * heads, n)}.
        losses: {task: (1 + layers * heads, n)}, of each example.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    shape: tuple[int, int]
    labels: Mapping[str, Num[np.ndarray, " n"]]
    predictions: Mapping[str, Num[np.ndarray, "sets n"]]
    losses: Mapping[str, Float[np.ndarray, "sets n"]]

    def __repr__(self) -> str:
        return f"HeadLesions({', '.join(self.tasks)}; {self.shape[0]} x {self.shape[1]} heads)"

    def cost(self, task: str) -> HeadMap:
        """Return how many points of a task's score are lost with each head alone.

        Below 0: better off without it.
        """
        scores = metric_score(self._metric(task), self.predictions[task], self.labels[task])
        return 100 * (scores[0] - scores[1:]).reshape(self.shape)

    def reliability(self, task: str, *, splits: int = 200, seed: int = 0) -> float:
        """Return how well the rises are measured, in [-1, 1].

        The mean rank correlation of those in two halves of the examples, over random splits. Halves
        are noisier than the whole, so this is no upper bound of anything.
        """
        n, rng = len(self.labels[task]), np.random.default_rng(seed)
        splits_of = (np.split(rng.permutation(n), [n // 2]) for _ in range(splits))
        halves = ([self.rise(task, half) for half in split] for split in splits_of)
        return float(np.mean([rank_correlation(*both) for both in halves]))

    def rise(self, task: str, subset: Shaped[np.ndarray, " subset"] | None = None) -> HeadMap:
        """Return by how much a task's mean loss rises without each head alone.

        The measurement behind the estimator "ablation" (`fslib.head_importance`), on evaluation
        examples.

        Args:
            task: A name.
            subset: Positions of examples; None for all.
        """
        self._metric(task)  # refuses another task by name
        losses = self.losses[task] if subset is None else self.losses[task][:, subset]
        mean = losses.mean(1, dtype=np.float64)
        return (mean[1:] - mean[0]).reshape(self.shape)

    def measure(self, task: str, layer: int, head: int) -> Measure:
        """Return the points of a task's score that one head is worth.

        Its `.interval()` is over examples.

        Args:
            task: A name.
            layer: Counted from 0.
            head: Counted from 0.

        Raises:
            FslibError: For a head that the model does not have.
        """
        if not (0 <= layer < self.shape[0] and 0 <= head < self.shape[1]):
            raise FslibError(f"layer {layer}, head {head} is outside {self.shape}, counted from 0")
        rows = self.predictions[task][[0, 1 + layer * self.shape[1] + head]]
        metric, labels = self._metric(task), self.labels[task]
        whole, without = (score_measure(task, metric, row[None], labels) for row in rows)
        return (whole - without).scaled(100.0)

    def predicted_by(self, task: str, importance: HeadMap) -> Measure:
        """Return how importance ranks heads as the rise of the loss does, in [-1, 1].

        Spearman over heads, with every example's influence: `.interval()` is over evaluation
        examples, the importance as it is. Noise in the rises lowers the correlation.

        Raises:
            FslibError: For importance of another shape.
        """
        self._metric(task)
        importance = finite_array("importance", importance, self.shape)
        rises = (self.losses[task][1:] - self.losses[task][0]).astype(np.float64)  # (heads, n)
        n, total = rises.shape[1], rises.sum(1)
        without = (total[:, None] - rises).T / (n - 1)
        means = np.concatenate([total[None] / n, without])  # of all, then without each
        all_of_them, *others = metric_score("spearman", means, np.ravel(importance))
        influence = (n - 1) * (all_of_them - np.array([others]))
        return Measure(np.array([all_of_them]), {task: influence})

    def _metric(self, task: str) -> str:
        check_among("task of these lesions", task, self.tasks)
        return self.metrics[self.tasks.index(task)]


def lesion_heads(
    model: MultiTaskModel, tasks: Tasks, *, batch_size: int = EVAL_BATCH
) -> HeadLesions:
    """Switch off every head alone and evaluate every task on its evaluation examples.

    Of L layers of H heads, it costs as much as 1 + H (L + 1) / 2 forward passes over the examples
    where layers below the switched-off head can be reused, 1 + H L elsewhere. Heads that are pruned
    around the call stay off.

    Args:
        model: The model, with a classifier for every task.
        tasks: A task or several.
        batch_size: Examples at once.

    Raises:
        FslibError: For a task the model has no classifier for, or with a single evaluation example,
            and for a model that gives NaN.
    """
    named = as_tasks(tasks)
    check_model(model, *named.values())
    check_several({name: len(task.eval) for name, task in named.items()})
    shape = model.n_layers, model.n_heads
    sets = np.eye(1 + math.prod(shape), dtype=bool)[:, 1:].reshape(-1, *shape)  # none, then each
    batches = {name: length_batches(model, task.eval, batch_size) for name, task in named.items()}
    losses = {n: np.zeros((len(sets), len(task.eval)), np.float32) for n, task in named.items()}
    predictions = each_pruned(model, named, batches, sets, losses=losses)
    metrics = tuple(task.metric for task in named.values())
    labels = {name: task.eval.labels for name, task in named.items()}
    return HeadLesions(tuple(named), metrics, shape, labels, predictions, losses)
