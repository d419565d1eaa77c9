"""Metrics, correlations and bootstrap: plain arrays in, plain arrays out.

Axes: `n` examples; `draws` bootstrap or permutation draws. Metrics are fractions, in [-1, 1].
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.stats import rankdata

from fslib.errors import FslibError, check_count, check_number, finite_array, unknown


def bootstrap_counts(n: int, draws: int, rng: np.random.Generator) -> Int[np.ndarray, "draws n"]:
    """Draw bootstrap samples: how often each of n examples is in each sample (rows sum to n).

    Counts, not indices: using the same counts for every head set is what makes comparisons paired.
    """
    check_count("draws", draws)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws)


def metric_score(
    metric: str,
    predictions: Num[np.ndarray, "*sets n"],
    labels: Num[np.ndarray, " n"],
    counts: Int[np.ndarray, "draws n"] | None = None,
) -> np.ndarray:
    """Return a metric for many sets of predictions at once.

    metric: accuracy; f1 (class 1 positive); matthews (any number of classes); spearman. A metric that is
        undefined (no positives, constant predictions) is 0.
    predictions: (*sets, n). labels: (n,). counts: (draws, n) bootstrap counts, or None for the data itself.
    Returns (*sets,), or (*sets, draws) with counts. In [0, 1] for accuracy and f1, else in [-1, 1].
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape[-1] != len(labels):
        raise FslibError(f"{predictions.shape[-1]} predictions for {len(labels)} labels")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise FslibError(
            f"{metric} of predictions or labels that are NaN or infinite is no number: look at the model"
        )
    weights = np.ones((1, len(labels))) if counts is None else np.asarray(counts, dtype=float)
    if metric == "spearman":
        scores = _spearman(predictions, labels, weights.astype(int))
    elif metric == "accuracy":
        scores = (predictions == labels) @ weights.T / weights.sum(1)
    elif metric == "f1":
        true, claimed = labels == 1, predictions == 1
        scores = _ratio(2 * ((claimed & true) @ weights.T), claimed @ weights.T + weights @ true)
    elif metric == "matthews":
        scores = _matthews(predictions, labels, weights)
    else:
        raise unknown("metric", metric, ("accuracy", "f1", "matthews", "spearman"))
    return scores[..., 0] if counts is None else scores


def left_out_scores(
    metric: str, predictions: Num[np.ndarray, "*sets n"], labels: Num[np.ndarray, " n"]
) -> Float[np.ndarray, "*sets n"]:
    """Return a metric without each example in turn, as a jackknife takes it; NaN where there is but one example.

    Examples with the same prediction and the same label leave the same behind. A metric of classes is therefore
    computed once per such cell of the confusion matrix: n x n counts would be 13 GB for 40,430 examples.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    n = len(labels)
    if predictions.shape[-1] != n:
        raise FslibError(f"{predictions.shape[-1]} predictions for {n} labels")
    flat = predictions.reshape(-1, n)
    if n < 2:
        found = np.full(flat.shape, np.nan)
    elif metric == "spearman":
        kept = (np.delete(np.arange(n), i) for i in range(n))
        found = np.stack([metric_score(metric, flat[:, rest], labels[rest]) for rest in kept], -1)
    else:
        if metric == "accuracy":  # right or wrong is all that it looks at
            flat, labels = (flat == labels).astype(int), np.ones(n, dtype=int)
        classes, codes = np.unique(np.concatenate([flat.ravel(), labels]), return_inverse=True)
        cell = codes[:-n].reshape(flat.shape) * len(classes) + codes[-n:]  # (sets, n)
        at_once = max(1, 2**20 // len(classes) ** 4)
        parts = [
            _without_one(metric, cell[i : i + at_once], classes)
            for i in range(0, len(cell), at_once)
        ]
        found = np.concatenate(parts) if parts else np.empty(flat.shape)
    return found.reshape(predictions.shape)


def _without_one(
    metric: str, cell: Int[np.ndarray, "sets n"], classes: Num[np.ndarray, " classes"]
) -> np.ndarray:
    """Return (sets, n) scores without each example; cell: its place in the confusion matrix, row by row (predicted)."""
    cells, which = np.unique(cell, return_inverse=True)
    which = which.reshape(cell.shape)
    counts = np.stack([(which == c).sum(-1) for c in range(len(cells))], -1)  # (sets, cells)
    one_less = (counts[:, None] - np.eye(len(cells), dtype=int)).reshape(-1, len(cells))
    scores = metric_score(
        metric, classes[cells // len(classes)], classes[cells % len(classes)], one_less
    )
    return np.take_along_axis(scores.reshape(counts.shape), which, -1)


def _ratio(a: np.ndarray | np.floating, b: np.ndarray | np.floating) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)


def _matthews(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Gorodkin's R_K, which is Matthews' correlation for two classes."""
    classes = np.union1d(predictions, labels)
    total = weights.sum(1)
    said = np.stack([(predictions == k) @ weights.T for k in classes])  # (classes, *sets, draws)
    true = np.stack([weights @ (labels == k) for k in classes])  # (classes, draws)
    true = true.reshape(len(classes), *[1] * (predictions.ndim - 1), -1)
    covariance = (predictions == labels) @ weights.T * total - (said * true).sum(0)
    spread = np.sqrt(np.maximum((total**2 - (said**2).sum(0)) * (total**2 - (true**2).sum(0)), 0))
    return _ratio(covariance, spread)


def _spearman(predictions: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    correlations = np.empty((*predictions.shape[:-1], len(counts)))
    for draw, count in enumerate(counts):
        index = np.repeat(np.arange(len(labels)), count)
        a, b = rankdata(predictions[..., index], axis=-1), rankdata(labels[index])
        a, b = a - a.mean(-1, keepdims=True), b - b.mean()
        correlations[..., draw] = _ratio(a @ b, np.sqrt((a**2).sum(-1) * (b**2).sum()))
    return correlations


def chance_level(metric: str, labels: Num[np.ndarray, " n"]) -> float:
    """Return what the best constant answer scores: the majority share (accuracy), 2p/(1+p) (f1), else 0."""
    if metric == "accuracy":
        return float(np.unique(labels, return_counts=True)[1].max() / len(labels))
    if metric == "f1":
        positive = float(np.mean(np.asarray(labels) == 1))
        return 2 * positive / (1 + positive)
    return 0.0


def interval(
    draws: Float[np.ndarray, "*sets draws"], level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval (low, high), each (*sets,), from bootstrap draws on the last axis."""
    check_number("level", level, "(0, 1)", "0.95 is the usual one")
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return ends[0, ...], ends[1, ...]  # arrays even for one set


@dataclass(frozen=True, eq=False)
class Score:
    """One task's evaluation: per-example predictions and labels (n,), and the metric over them.

    doubts: why the score means little, "" where it does not (`Task.doubts`); it is printed with the score.
    """

    metric: str
    predictions: np.ndarray
    labels: np.ndarray
    doubts: str = ""

    @property
    def value(self) -> float:
        """The metric, a fraction (0.9 is 90 % for accuracy)."""
        return float(metric_score(self.metric, self.predictions, self.labels))

    def interval(
        self, level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Return the bootstrap interval (low, high) over examples."""
        check_count("seed", seed, 0)
        counts = bootstrap_counts(len(self.labels), draws, np.random.default_rng(seed))
        low, high = interval(
            metric_score(self.metric, self.predictions, self.labels, counts), level
        )
        return float(low), float(high)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        low, high = self.interval()
        but = f"; {self.doubts}" if self.doubts else ""
        return f"Score({self.metric} {self.value:.3f}, 95 % [{low:.3f}, {high:.3f}], n={len(self.labels)}{but})"


def rank_correlation(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float:
    """Return the Spearman correlation of two importance maps, or other arrays of one shape, in [-1, 1].

    Raises FslibError for arrays of different shapes, NaN and infinity.
    """
    a, b = finite_array("what is ranked", a), finite_array("what is ranked", b)
    if a.shape != b.shape or not a.size:
        raise FslibError(
            f"a rank correlation is of two arrays of one shape, not of {a.shape} and {b.shape}"
        )
    return float(metric_score("spearman", np.ravel(a)[None], np.ravel(b))[0])
