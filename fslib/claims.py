"""From intervals to claims: the one verdict with its gates, its scope, and its tests.

The rules were fixed before the records that they decide on. A claim of the paper is that some
number is above 0. It has one or two such parts (both are needed), a *smallest effect of interest*
(SESOI), and gates: what must hold for the question to make sense at all. Gates are checked on one
half of the evaluation examples and scores computed on the other, so that what was chosen by its
score is not scored on it. Three things can be said of a claim, each tested by itself and corrected
for the number of claims (Holm, 1979), so that each is said wrongly of any claim of a profile in at
most 5 % of profiles:

    supported     every part is above 0:          p = the largest of its parts'
    contradicted  some part is below 0:           p = number of parts x the smallest of those below
    no effect     every part is within +- SESOI:  p = the largest of two one-sided tests (TOST)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num, Shaped
from scipy import stats

from fslib.iap import IAP, Unlesioned
from fslib.intervals import Interval, Measure, constant, mean_of, score_measure
from fslib.scoring import chance_level

Half = Callable[[int], np.ndarray]

SIGNIFICANCE = 0.05
SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTABLE = "inconclusive", "not testable"
NO_EFFECT = "no effect of"  # followed by the smallest effect of interest
LEAST_SEEDS = 3  # with fewer the interval holds the truth too rarely (tests/benchmarks/calibration)
LEAST_TASKS = 8  # for a correlation over pairs of tasks
CHANGED_BY = 0.1  # standard deviations: what a number must move by to count as changed
LEAST_CHANGED = 0.03  # the share of predictions that a treatment must change to be one
EXCHANGES = 9999  # of the names of tasks; all of them where there are no more than 5040

# The smallest effect of interest of a claim, and its unit
SESOI = {
    "C1": (2.0, "points of D"),
    "C2": (0.5, ""),
    "C3": (1.0, "point of D"),
    "C4": (0.5, "points"),
    "C5": (1.0, "point"),
}


class Tests(NamedTuple):
    """The p of what can be said of a claim; NaN where a gate forbids to say it."""

    supported: float
    contradicted: float
    no_effect: float


@dataclass(frozen=True)
class Part:
    """One number that a claim says is above 0.

    Args:
        what: Its name, as it is printed.
        interval: Of the number.
        p: Two-sided, of a permutation test, where there is one; it is needed beside the interval's.
    """

    what: str
    interval: Interval
    p: float | None = None

    @property
    def tested(self) -> float:
        """The p that is shown, two-sided."""
        return self.interval.p if self.p is None else self.p

    def tests(self, sesoi: float) -> Tests:
        """Return the p of being above 0, below 0, and within +- sesoi."""
        value, se, df = self.interval
        p, room = float(np.max([self.interval.p, self.tested])), sesoi - abs(value)  # of NaN, NaN
        within = float(stats.t.sf(room / se, df)) if se > 0 else float(room <= 0)
        return Tests(p if value > 0 else 1.0, p if value < 0 else 1.0, within)

    def __str__(self) -> str:
        """Say the number, its interval, p and minimum detectable effect."""
        said = f"{self.what} {interval_text(self.interval)}"
        return f"{said}, {p_text(self.tested)}, MDE {self.interval.mde:.2g}"


@dataclass(frozen=True)
class Claim:
    """A claim, and what there is on it.

    Args:
        name: A key of `SESOI`.
        parts: The numbers that it says are above 0.
        scope: What it was tested on: encoder, trainings, tasks, steps. Printed with every verdict.
        n: Trainings that its intervals generalize over; of a correlation over pairs, tasks.
        failed: Which gate failed, so that nothing can be said; "" if none did.
        weak: Why the treatment is too weak to support or to contradict the claim; "" if it is not.
        corrected: p corrected for the number of claims, by `decided`.
    """

    name: str
    parts: tuple[Part, ...]
    scope: str
    n: int
    failed: str = ""
    weak: str = ""
    corrected: Tests | None = None

    @property
    def tests(self) -> Tests:
        """The p of what can be said, before the number of claims is corrected for."""
        if self.barred or self.n < LEAST_SEEDS:
            return Tests(np.nan, np.nan, np.nan)
        above, below, within = zip(*(p.tests(SESOI[self.name][0]) for p in self.parts), strict=True)
        p = Tests(np.max(above), min(1.0, len(self.parts) * np.min(below)), np.max(within))
        return Tests(np.nan, np.nan, p.no_effect) if self.weak else p

    @property
    def barred(self) -> bool:
        """Whether a gate failed, or a part has no interval."""
        return bool(self.failed or not self.parts) or not all(
            np.isfinite(part.interval.se) for part in self.parts
        )

    @property
    def verdict(self) -> str:
        """Not testable, supported, contradicted, no effect of the SESOI or more, inconclusive."""
        if self.barred:
            return NOT_TESTABLE
        size = " ".join(filter(None, [f"{SESOI[self.name][0]:g}", SESOI[self.name][1]]))
        words = (SUPPORTED, CONTRADICTED, f"{NO_EFFECT} {size} or more")
        for word, p in zip(words, self.corrected or self.tests, strict=True):
            if p < SIGNIFICANCE:
                return word
        return INCONCLUSIVE

    @property
    def p(self) -> float:
        """The p of what is said, or the smaller one of supported and contradicted; or NaN."""
        above, below, within = self.corrected or self.tests
        return within if self.verdict.startswith(NO_EFFECT) else float(np.fmin(above, below))

    @property
    def why(self) -> str:
        """Which gate failed, or why the treatment is too weak; "" if neither."""
        few = f"{self.n} training(s), and {LEAST_SEEDS} are needed" if self.n < LEAST_SEEDS else ""
        return self.failed or self.weak or few

    def __str__(self) -> str:
        """Say the verdict, its scope and its reasons in one line."""
        because = "; ".join(filter(None, [self.why, *map(str, self.parts)]))
        return f"{self.verdict} ({self.scope}): {because}"


def interval_text(interval: Interval, digits: int = 2) -> str:
    """Return an estimate with its 95 % interval, as text."""
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def p_text(p: float) -> str:
    """Return a p value, which is never 0, as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def decided(claims: Mapping[str, Claim]) -> dict[str, Claim]:
    """Return the claims of a profile with their p corrected for how many there are.

    Of a claim that may not be decided, p counts as 1.
    """
    columns = zip(*(claim.tests for claim in claims.values()), strict=True)
    corrected = map(Tests, *(holm(column).tolist() for column in columns))
    return {
        name: replace(claim, corrected=own)
        for (name, claim), own in zip(claims.items(), corrected, strict=True)
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
        p: Two-sided, of exchanging tasks.
    """

    interval: Interval
    p: float


Pairs = Float[np.ndarray, "tasks tasks"]  # a symmetric matrix over pairs of tasks


def correlation_over_pairs(a: Pairs, b: Pairs, given: Pairs | None = None) -> Interval:
    """Return the rank correlation of two symmetric matrices over pairs of tasks.

    Its interval leaves out tasks (jackknife), not pairs, since pairs that share a task are not
    independent: it is a little too wide rather than too narrow. A task without any pair does not
    count. NaN for fewer than three pairs; the interval is NaN if fewer than three are left without
    some task.

    Args:
        a: One of them; NaN where a pair is not known.
        b: The other.
        given: What sorts the pairs into groups, 0 or 1: ranks are then compared within a group
            (partial correlation). None for one group.
    """
    known = np.isfinite(a) & np.isfinite(b) & ~np.eye(len(a), dtype=bool)
    tasks = np.flatnonzero(known.any(axis=1))
    groups = np.zeros_like(a) if given is None else given

    def correlation(chosen: np.ndarray) -> float:
        pairs = np.ix_(chosen, chosen)
        entries = np.triu(known[pairs])
        if entries.sum() < 3:
            return np.nan
        x, y = (_ranks(m[pairs][entries], groups[pairs][entries]) for m in (a, b))
        size = float(np.sqrt((x @ x) * (y @ y)))
        return float(x @ y) / size if size > 1e-9 else np.nan

    without = np.array([correlation(np.delete(tasks, k)) for k in range(len(tasks))])
    n = len(tasks)
    se = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()) if n else np.nan
    return Interval(correlation(tasks), float(se), n - 1)


def _ranks(
    values: Float[np.ndarray, " pairs"], groups: Num[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Return the ranks of all pairs, minus the mean of their group."""
    ranks = stats.rankdata(values)
    for group in np.unique(groups):
        ranks[groups == group] -= ranks[groups == group].mean()
    return ranks


def mantel(a: Pairs, b: Pairs, rng: np.random.Generator, given: Pairs | None = None) -> Mantel:
    """Correlate two symmetric matrices over pairs of tasks, by ranks (Mantel, 1967).

    For p not pairs but tasks are exchanged, the observed order counted among them (Phipson and
    Smyth, 2010); with `given`, tasks of what the groups leave of the ranks of `a` (partial Mantel:
    Smouse, Long and Sokal, 1986). NaN where an entry off the diagonal is, and for fewer than four
    tasks.

    Args:
        a: One matrix.
        b: The other.
        rng: Draws the exchanges, where there are too many to try all.
        given: As in `correlation_over_pairs`.
    """
    tasks = len(a)
    upper = np.triu_indices(tasks, 1)
    if tasks < 4 or not (np.isfinite(a[upper]).all() and np.isfinite(b[upper]).all()):
        return Mantel(Interval(np.nan, np.nan, np.nan), np.nan)
    if math.factorial(tasks) <= 5040:
        orders = np.array(list(permutations(range(tasks))))
    else:
        drawn = rng.permuted(np.tile(np.arange(tasks), (EXCHANGES - 1, 1)), axis=1)
        orders = np.vstack([np.arange(tasks), drawn])
    groups = (np.zeros_like(a) if given is None else given)[upper]
    # exchanged names are the same ranks in other places
    ranks = np.zeros((tasks, tasks))
    ranks[upper] = _ranks(a[upper], groups)
    ranks += ranks.T
    null = np.abs(ranks[orders[:, upper[0]], orders[:, upper[1]]] @ _ranks(b[upper], groups))
    p = float((null >= null[0] - 1e-9).mean())  # the first order is the observed one
    return Mantel(correlation_over_pairs(a, b, given), p)


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
