"""From intervals to claims: the one verdict with its gates, and its tests.

The rules were fixed first. A claim of the paper is that some number is above 0. Its evidence has
one or two parts (an intersection-union test: both are needed), a *smallest effect of interest*
(SESOI), and gates: what must hold for the question to make sense at all. Gates are checked on one
half of the evaluation examples and scores computed on the other, so that what was chosen by its
score is not scored on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num, Shaped
from scipy import stats

from fslib.iap import DRAWS, IAP, Unlesioned
from fslib.intervals import Interval, Measure, constant, mean_of, multi_bootstrap, score_measure
from fslib.scoring import chance_level, rank_correlation

Half = Callable[[int], np.ndarray]

SIGNIFICANCE = 0.05
SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTABLE = "inconclusive", "not testable"
NO_EFFECT = "no effect of"  # followed by the smallest effect of interest
LEAST_SEEDS = 2  # one model says nothing of others
LEAST_TASKS = 8  # for a correlation over pairs of tasks
CHANGED_BY = 0.1  # standard deviations: what a number must move by to count as changed
LEAST_CHANGED = 0.03  # the share of predictions that a treatment must change to be one
BOOTSTRAP_SEEDS = 10  # with fewer, resampling seeds says too little of how they vary
EXCHANGES = 9999  # of the names of tasks; all of them where there are no more than 5040

# The claims whose p are corrected together (Holm): the smallest effect of interest, and its unit
SESOI = {
    "C1": (2.0, "points of D"),
    "C2": (0.5, ""),
    "C3": (1.0, "points of D"),
    "C4": (0.5, "points"),
    "C5": (1.0, "points"),
}


@dataclass(frozen=True)
class Part:
    """One number that a claim says is above 0.

    Args:
        what: Its name, as it is printed.
        interval: Of the number.
        p: Of its own test, where that is not the t test of the interval.
        resampled: (low, high) of the Multi-Bootstrap, the sensitivity check.
    """

    what: str
    interval: Interval
    p: float | None = None
    resampled: tuple[float, float] | None = None

    @classmethod
    def of(cls, what: str, measure: Measure, p: float | None = None) -> "Part":
        """Return a part with its two-way t interval.

        From ten seeds on, the Multi-Bootstrap's stands beside it.
        """
        enough = len(measure.values) >= BOOTSTRAP_SEEDS
        resampled = multi_bootstrap(measure, DRAWS, np.random.default_rng(0)) if enough else None
        return cls(what, measure.interval(), p, resampled)

    @property
    def tested(self) -> float:
        """The p that counts."""
        return self.interval.p if self.p is None else self.p

    def __str__(self) -> str:
        """Say the number, its interval or two, p and minimum detectable effect."""
        said = f"{self.what} {interval_text(self.interval)}"
        if self.resampled:
            low, high = self.resampled
            said += f" (Multi-Bootstrap [{low:+.2f}, {high:+.2f}])"
        return f"{said}, {p_text(self.tested)}, MDE {self.interval.mde:.2g}"


@dataclass(frozen=True)
class Evidence:
    """What there is on one claim.

    Args:
        claim: A key of `SESOI`.
        parts: The numbers that it says are above 0.
        failed: Which gate failed, "" if none did.
        p: Of the claim, None for the largest of its parts'; corrected for the other claims by
            `decided`.
    """

    claim: str
    parts: tuple[Part, ...]
    failed: str = ""
    p: float | None = None

    @property
    def claim_p(self) -> float:
        """The p of the claim: all parts are needed, so the largest; NaN if not testable."""
        if self.failed or not self.parts:
            return np.nan
        if self.p is not None:
            return self.p
        return float(np.max([part.tested for part in self.parts]))  # of NaN, NaN

    @property
    def verdict(self) -> str:
        """The verdict in a few words.

        Not testable, supported, contradicted, no effect of the smallest size of interest, or
        inconclusive. Supported needs every part: its interval above 0, and p < 0.05. Contradicted
        and no effect need one: a claim falls with any part of it.
        """
        intervals = [part.interval for part in self.parts]
        if self.failed or not intervals or not all(np.isfinite(i.se) for i in intervals):
            return NOT_TESTABLE
        if all(i.low > 0 for i in intervals) and self.claim_p < SIGNIFICANCE:
            return SUPPORTED
        if any(i.high < 0 for i in intervals):
            return CONTRADICTED
        sesoi, unit = SESOI[self.claim]
        if any(
            -sesoi < low and high < sesoi
            for low, high in (i.at(1 - 2 * SIGNIFICANCE) for i in intervals)
        ):
            return " ".join([NO_EFFECT, f"{sesoi:g}", *filter(None, [unit]), "or more"])
        return INCONCLUSIVE

    def __str__(self) -> str:
        """Say the verdict and its reasons in one line."""
        if self.failed:
            return f"{NOT_TESTABLE}: {self.failed}"
        return f"{self.verdict}: {'; '.join(map(str, self.parts))}"


def interval_text(interval: Interval, digits: int = 2) -> str:
    """Return an estimate with its 95 % interval, as text."""
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def p_text(p: float) -> str:
    """Return a p value, which is never 0, as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def decided(claims: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Return the claims with p corrected for their number (Holm, 1979).

    One that is not testable counts as p = 1.
    """
    corrected = holm([evidence.claim_p for evidence in claims.values()])
    return {
        name: replace(e, p=float(p)) for (name, e), p in zip(claims.items(), corrected, strict=True)
    }


def holm(p: Sequence[float]) -> Float[np.ndarray, " claims"]:
    """Return p values corrected for their number (Holm, 1979), in the order given.

    NaN counts as 1 and stays NaN.
    """
    known = np.nan_to_num(np.asarray(p, dtype=float), nan=1.0)
    order = np.argsort(known, kind="stable")
    steps = np.maximum.accumulate((len(known) - np.arange(len(known))) * known[order])
    corrected = np.empty(len(known))
    corrected[order] = np.minimum(1, steps)
    return np.where(np.isnan(p), np.nan, corrected)


def gate_half(n: int) -> Int[np.ndarray, " half"]:
    """Return which of a task's n evaluation examples decide on gates.

    A random half, the same for every model. Random, not every second one: some tasks have their
    labels by turns.
    """
    return np.sort(np.random.default_rng(n).permutation(n)[: (n + 1) // 2])


def score_half(n: int) -> Int[np.ndarray, " half"]:
    """Return which of n evaluation examples are scored: those that decide on no gate."""
    return np.setdiff1d(np.arange(n), gate_half(n))


def halved(values: Shaped[np.ndarray, "*axes n"], half: Half) -> Shaped[np.ndarray, "*axes half"]:
    """Return a half of the examples, which lie on the last axis."""
    return values[..., half(values.shape[-1])]


def above_best_constant(
    task: str, metric: str, predictions: Num[np.ndarray, "seeds n"], labels: Num[np.ndarray, " n"]
) -> Interval:
    """Return how far a score lies above the best constant answer's.

    Args:
        task: The task's name.
        metric: As `fslib.scoring.metric_score` takes it.
        predictions: (seeds, n).
        labels: (n,).
    """
    score = score_measure(task, metric, predictions, labels)
    return (score - constant(chance_level(metric, labels), score)).interval()


def gate_examples(iap: IAP, task: str) -> Unlesioned:
    """Return the examples that decide on a task's gates.

    Those kept apart from lesions, or else the gate's half.
    """
    if task in iap.apart:
        return iap.apart[task]
    return Unlesioned(halved(iap.labels[task], gate_half), halved(iap.unpruned[task], gate_half))


def above_constant(iap: IAP) -> dict[str, Interval]:
    """Return, per task, how far it is above the best constant answer.

    Of the unpruned score, on the gate's examples.
    """
    found = {}
    for task, metric in zip(iap.tasks, iap.metrics, strict=True):
        labels, predictions = gate_examples(iap, task)
        found[task] = above_best_constant(task, metric, predictions, labels)
    return found


def learned(above: Mapping[str, Interval]) -> list[str]:
    """Name the tasks above the best constant answer beyond their interval: the gate."""
    return [task for task, interval in above.items() if interval.low > 0]


def scored(iap: IAP, tasks: Sequence[str] | None = None) -> IAP:
    """Return some of the tasks (None: all) on the examples that decide on no gate."""
    return iap.part(tasks, np.arange if iap.apart else score_half)


def entering(iap: IAP, gated: IAP | None = None) -> IAP:
    """Return the tasks that enter D, on the examples that are scored.

    All tasks if fewer than two enter.

    Args:
        iap: Of some models.
        gated: Of the models whose unpruned scores decide which tasks enter, None for the same.
    """
    passed = learned(above_constant(gated or iap))
    return scored(iap, passed if len(passed) > 1 else None)


def paired_differences(
    values: Mapping[str, Mapping[str, Measure]],
    reference: str,
    names: tuple[str, str],
    *,
    value: str = "score",
    with_mean: bool = True,
) -> pd.DataFrame:
    """Return a row per method and item: value, interval, paired difference.

    Args:
        values: {method: {item: measure}}, all of the same models and examples.
        reference: The method that is subtracted; the column "minus <reference>" holds the
            differences.
        names: Of the columns for method and item.
        value: Name of the column of values.
        with_mean: Add a row per method with the mean over items.
    """

    def items_of(method: str) -> Mapping[str, Measure]:
        items = values[method]
        return {**items, "mean": mean_of(list(items.values()))} if with_mean else items

    subtracted, rows = items_of(reference), []
    for method in values:
        for item, measure in items_of(method).items():
            own, against = measure.interval(), (measure - subtracted[item]).interval()
            low, high = (0.0, 0.0) if method == reference else (against.low, against.high)
            row = {names[0]: method, names[1]: item, value: own.value}
            row |= {"low": own.low, "high": own.high, f"minus {reference}": against.value}
            rows.append(row | {"diff low": low, "diff high": high})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Mantel:
    """A rank correlation over pairs of tasks.

    Args:
        interval: Jackknife over tasks.
        p: One-sided, that it is below 0.
    """

    interval: Interval
    p: float


def correlation_over_pairs(
    similarity: Float[np.ndarray, "tasks tasks"], other: Float[np.ndarray, "tasks tasks"]
) -> Interval:
    """Return the rank correlation of two symmetric matrices over pairs of tasks.

    Of the pairs where neither is NaN. Its interval leaves out tasks (jackknife), not pairs, since
    pairs that share a task are not independent: it is a little too wide rather than too narrow. A
    task without any pair does not count. NaN for fewer than three pairs; the interval is NaN if
    fewer than three are left without some task.
    """
    known = np.isfinite(similarity) & np.isfinite(other) & ~np.eye(len(similarity), dtype=bool)
    tasks = np.flatnonzero(known.any(axis=1))

    def correlation(chosen: np.ndarray) -> float:
        pairs = np.ix_(chosen, chosen)
        entries = np.triu(known[pairs])
        if entries.sum() < 3:
            return np.nan
        return rank_correlation(similarity[pairs][entries], other[pairs][entries])

    without = np.array([correlation(np.delete(tasks, k)) for k in range(len(tasks))])
    n = len(tasks)
    se = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()) if n else np.nan
    return Interval(correlation(tasks), float(se), n - 1)


def mantel(
    similarity: Float[np.ndarray, "tasks tasks"],
    other: Float[np.ndarray, "tasks tasks"],
    rng: np.random.Generator,
) -> Mantel:
    """Correlate two symmetric matrices over pairs of tasks, by ranks (Mantel, 1967).

    For p not pairs but tasks are exchanged, the observed order counted among them (Phipson and
    Smyth, 2010). NaN where an entry off the diagonal is, and for fewer than four tasks.
    """
    tasks = len(similarity)
    upper = np.triu_indices(tasks, 1)
    if tasks < 4 or not (np.isfinite(similarity[upper]).all() and np.isfinite(other[upper]).all()):
        return Mantel(Interval(np.nan, np.nan, np.nan), np.nan)
    if math.factorial(tasks) <= 5040:
        orders = np.array(list(permutations(range(tasks))))
    else:
        drawn = rng.permuted(np.tile(np.arange(tasks), (EXCHANGES - 1, 1)), axis=1)
        orders = np.vstack([np.arange(tasks), drawn])
    # exchanged names are the same ranks in other places
    ranks, others = np.zeros((tasks, tasks)), stats.rankdata(other[upper])
    ranks[upper] = stats.rankdata(similarity[upper])
    ranks += ranks.T
    null = ranks[orders[:, upper[0]], orders[:, upper[1]]] @ (others - others.mean())
    p = float((null <= null[0] + 1e-9).mean())  # the first order is the observed one
    return Mantel(correlation_over_pairs(similarity, other), p)


def changed_share(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Return the share of predictions that two methods differ in, mean over tasks.

    A number (of a regression) counts as changed if it differs by more than a tenth of the numbers'
    standard deviation.

    Args:
        a: {task: (seeds, n)}.
        b: The same of the other method.
    """

    def share(own: np.ndarray, other: np.ndarray) -> float:
        if own.dtype.kind != "f":
            return float(np.mean(own != other))
        return float(np.mean(np.abs(own - other) > CHANGED_BY * other.std()))

    return float(np.mean([share(a[task], b[task]) for task in a]))
