"""Metrics and correlations: plain arrays in, plain arrays out.

Axes: `n` examples; `draws` sets of weights of examples. Metrics are fractions, in [-1, 1].
"""

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.stats import rankdata

from fslib.errors import FslibError, check_among, finite_array


def metric_score(
    metric: str, predictions: Num[np.ndarray, "*sets n"], labels: Num[np.ndarray, " n"]
) -> Float[np.ndarray, "*sets"]:
    """Return a metric for many sets of predictions at once, (*sets,).

    A metric that is undefined (no positives, constant predictions) is 0.

    Args:
        metric: accuracy; f1 (class 1 positive); matthews (any number of classes); spearman.
        predictions: (*sets, n).
        labels: (n,).

    Returns:
        In [0, 1] for accuracy and f1, else in [-1, 1].
    """
    predictions, labels = _checked(metric, predictions, labels)
    if metric == "spearman":
        return _spearman(predictions, labels)
    return _weighted_score(metric, predictions, labels, np.ones((1, len(labels))))[..., 0]


def _weighted_score(
    metric: str, predictions: np.ndarray, labels: np.ndarray, weights: Num[np.ndarray, "draws n"]
) -> Float[np.ndarray, "*sets draws"]:
    """Return a metric of classes where examples count as often as their weights say."""
    if metric == "accuracy":
        return (predictions == labels) @ weights.T / weights.sum(1)
    if metric == "f1":
        true, claimed = labels == 1, predictions == 1
        both = (claimed & true) @ weights.T
        return _ratio(2 * both, claimed @ weights.T + weights @ true)
    return _matthews(predictions, labels, weights)


def left_out_scores(
    metric: str, predictions: Num[np.ndarray, "*sets n"], labels: Num[np.ndarray, " n"]
) -> Float[np.ndarray, "*sets n"]:
    """Return a metric without each example in turn (jackknife); NaN for one example.

    Examples with the same prediction and the same label leave the same behind. A metric of classes
    is therefore computed once per such cell of the confusion matrix: n x n weights would be 13 GB
    for 40,430 examples.
    """
    predictions, labels = _checked(metric, predictions, labels)
    n = len(labels)
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
        size = max(1, 2**20 // len(classes) ** 4)
        starts = range(0, len(cell), size)
        parts = [_without_one(metric, cell[i : i + size], classes) for i in starts]
        found = np.concatenate(parts) if parts else np.empty(flat.shape)
    return found.reshape(predictions.shape)


def _without_one(
    metric: str, cell: Int[np.ndarray, "sets n"], classes: Num[np.ndarray, " classes"]
) -> Float[np.ndarray, "sets n"]:
    """Return scores without each example.

    Args:
        metric: A metric of classes.
        cell: Each example's place in the confusion matrix, row by row (predicted).
        classes: The values of predictions and labels, sorted.
    """
    cells, which = np.unique(cell, return_inverse=True)
    which = which.reshape(cell.shape)
    counts = np.stack([(which == c).sum(-1) for c in range(len(cells))], -1)  # (sets, cells)
    one_less = (counts[:, None] - np.eye(len(cells), dtype=int)).reshape(-1, len(cells))
    predicted, true = classes[cells // len(classes)], classes[cells % len(classes)]
    scores = _weighted_score(metric, predicted, true, one_less.astype(float))
    return np.take_along_axis(scores.reshape(counts.shape), which, -1)


def _checked(metric: str, predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    check_among("metric", metric, ("accuracy", "f1", "matthews", "spearman"))
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if not predictions.shape[-1] == len(labels) > 0:
        raise FslibError(f"{predictions.shape[-1]} predictions for {len(labels)} labels")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise FslibError(f"{metric} of NaN or infinite values is no number: look at the model")
    return predictions, labels


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


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    a, b = rankdata(predictions, axis=-1), rankdata(labels)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    return _ratio(a @ b, np.sqrt((a**2).sum(-1) * (b**2).sum()))


def chance_level(metric: str, labels: Num[np.ndarray, " n"]) -> float:
    """Return what the best constant answer scores.

    The majority's share (accuracy), 2p / (1 + p) for a share p of positives (f1), else 0.
    """
    if metric == "accuracy":
        return float(np.unique(labels, return_counts=True)[1].max() / len(labels))
    if metric == "f1":
        positive = float(np.mean(np.asarray(labels) == 1))
        return 2 * positive / (1 + positive)
    return 0.0


def rank_correlation(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float:
    """Return the Spearman correlation of two arrays of one shape, in [-1, 1].

    Raises:
        FslibError: For arrays of different shapes, NaN and infinity.
    """
    a = finite_array("what is ranked", a)
    b = finite_array("what is ranked", b, a.shape)
    return float(metric_score("spearman", a.ravel()[None], b.ravel())[0])
