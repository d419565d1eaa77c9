"""From numbers to claims: intervals of paired differences, a test for correlations over pairs, and the one verdict."""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import pandas as pd
from jaxtyping import Float, Num

from fslib.scoring import Bootstrap, bootstrap_counts, interval, metric_score, rank_correlation

SIGNIFICANCE = 0.05
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided at this scale"


def verdict(low: float, high: float, p: float = 0.0) -> str:
    """Decide on the claim that a number is above 0, by its 95 % interval and, where there is a null, its p.

    Returns "supported" if the interval lies above 0 and p < 0.05, "not supported" if the interval lies below 0, and
    else "undecided at this scale"; NaN decides nothing.
    """
    if low > 0 and p < SIGNIFICANCE:
        return SUPPORTED
    return NOT_SUPPORTED if high < 0 else UNDECIDED


class SharedSamples:
    """The same bootstrap samples for everything that is scored on a task, so that all comparisons are paired.

    labels: {task: (n,)} of the evaluation examples. seeds: how many models each method has; they are resampled too.
    """

    def __init__(self, labels: Mapping[str, np.ndarray], seeds: int, draws: int) -> None:
        self.labels = labels
        self.seed_weights = bootstrap_counts(seeds, draws, np.random.default_rng([0, 1000])) / seeds
        self.counts = {
            t: bootstrap_counts(len(y), draws, np.random.default_rng([0, i])) for i, (t, y) in enumerate(labels.items())
        }

    def score(self, task: str, metric: str, predictions: Num[np.ndarray, "seeds n"]) -> Bootstrap:
        """Return the mean score over seeds, with its bootstrap draws over seeds and examples."""
        value = metric_score(metric, predictions, self.labels[task]).mean()
        resampled = metric_score(metric, predictions, self.labels[task], self.counts[task])  # (seeds, draws)
        return Bootstrap(float(value), (resampled * self.seed_weights.T).sum(0))


def differences(
    values: Mapping[str, Mapping[str, Bootstrap]],
    reference: str,
    names: tuple[str, str],
    *,
    value: str = "score",
    with_mean: bool = True,
) -> pd.DataFrame:
    """Return one row per method and item: value, interval, and the paired difference, method minus reference.

    values: {method: {item: value with draws}}, all drawn from the same samples. reference: the method that is
        subtracted; the column "minus <reference>" holds the differences. names: of the columns for method and item.
    value: name of the column of values. with_mean: add a row per method with the mean over items.
    """

    def with_its_mean(items: Mapping[str, Bootstrap]) -> dict[str, Bootstrap]:
        mean = float(np.mean([v for v, _ in items.values()]))
        draws = np.mean([d for _, d in items.values()], axis=0)
        return {**items, "mean": Bootstrap(mean, draws)} if with_mean else dict(items)

    complete = {method: with_its_mean(items) for method, items in values.items()}
    rows = []
    for method, items in complete.items():
        for item, (number, draws) in items.items():
            base = complete[reference][item]
            (low, high), (diff_low, diff_high) = interval(draws), interval(draws - base.draws)
            row: dict[str, object] = {names[0]: method, names[1]: item, value: number}
            row |= {"low": float(low), "high": float(high), f"minus {reference}": number - base.value}
            rows.append(row | {"diff low": float(diff_low), "diff high": float(diff_high)})
    return pd.DataFrame(rows)


def rank_correlation_if_defined(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Return the rank correlation, or NaN where one of the values is not defined, as D of a task at chance."""
    return rank_correlation(a, b) if np.isfinite(a).all() and np.isfinite(b).all() else math.nan


def exchanged_correlations(
    similarity: Float[np.ndarray, "tasks tasks"],
    pairs: Sequence[tuple[int, int]],
    values: Float[np.ndarray, " pairs"],
    rng: np.random.Generator,
    most: int = 5040,
) -> tuple[Float[np.ndarray, " draws"], bool]:
    """Return the rank correlations, over pairs of tasks, of a similarity with another value, under exchanged names.

    Mantel's test: pairs that share a task are not independent, so not pairs but tasks are exchanged. The first is the
    correlation as it is. Returns the correlations, and whether they are of all exchanges (up to `most`) or random ones.
    """
    tasks = len(similarity)
    exact = math.factorial(tasks) <= most
    orders = permutations(range(tasks)) if exact else (rng.permutation(tasks) for _ in range(most))
    own = np.arange(tasks)
    correlations = [
        rank_correlation_if_defined(np.array([similarity[order[a], order[b]] for a, b in pairs]), values)
        for order in (own, *(o for o in orders if not np.array_equal(o, own)))
    ]
    return np.array(correlations), exact
