"""From the numbers of a few models, scored on a few examples, to an interval.

It is for all such models and examples. A number such as a score or a difference of two scores is
measured on every model (`seeds`: trainings that differ in all that is drawn) and every evaluation
example (`n`), each model on the same examples. Both are samples, so both vary: the interval is a
two-way t interval, and two measures of the same models and examples are compared in pairs.

    Var(mean) = (MS_seeds + MS_examples - MS_residual) / (S n)

with degrees of freedom by Satterthwaite (1946). For a score that is no mean over examples (F1, a
dissociation), an example's value is replaced by its *influence*, found by leaving the example out
(jackknife; Efron and Stein, 1981).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import stats

from fslib.errors import FslibError
from fslib.scoring import left_out_scores, metric_score

LEVEL = 0.95
POWER = 0.80


class Interval(NamedTuple):
    """An estimate, its standard error and the degrees of freedom of that.

    NaN where it is not defined.
    """

    value: float
    se: float
    df: float

    def at(self, level: float) -> tuple[float, float]:
        """Return (low, high) of the t interval at a level, such as 0.95."""
        half = self.se * float(stats.t.ppf((1 + level) / 2, self.df))
        return self.value - half, self.value + half

    @property
    def low(self) -> float:
        """The lower end at 95 %."""
        return self.at(LEVEL)[0]

    @property
    def high(self) -> float:
        """The upper end at 95 %."""
        return self.at(LEVEL)[1]

    @property
    def p(self) -> float:
        """Two-sided p that the true value is 0; 1 if nothing varies and it is 0."""
        if self.se == 0:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / self.se, self.df))

    @property
    def mde(self) -> float:
        """The minimum detectable effect (Card et al., 2020).

        Found with 80 % power in a two-sided test at 5 %. Of this number alone: a claim that needs
        two numbers, and p corrected for five claims, needs more.
        """
        return self.se * float(stats.t.ppf((1 + LEVEL) / 2, self.df) + stats.t.ppf(POWER, self.df))

    def scaled(self, factor: float) -> "Interval":
        """Return the same in another unit."""
        return Interval(factor * self.value, abs(factor) * self.se, self.df)


@dataclass(frozen=True, eq=False)
class Measure:
    """One number of every model, and every evaluation example's influence on it.

    A constant, or what was measured once and for all, has one row, which stands for every seed.

    Args:
        values: (seeds,).
        influence: {what the examples are of: (seeds, n)}: of a mean, the example's value minus the
            mean; of another number, (n - 1) (number - number without the example).
    """

    values: Float[np.ndarray, " seeds"]
    influence: Mapping[str, Float[np.ndarray, "seeds n"]]

    def __sub__(self, other: "Measure") -> "Measure":
        """Return the paired difference: same models, same examples."""
        return weighted([self, other], [1.0, -1.0])

    def scaled(self, factor: float) -> "Measure":
        """Return the same number in another unit."""
        return weighted([self], [factor])

    def interval(self) -> Interval:
        """Return the two-way t interval of the mean; of one seed, over examples.

        A sum of squares that comes out below what the other parts make possible is chance: no
        component of the variance is taken as negative. Where two or three seeds happen to agree,
        Satterthwaite's degrees of freedom are far too many, so the seeds' share of the variance
        counts in full there, not squared.
        """
        seeds, value = len(self.values), float(np.mean(self.values))
        parts = [_mean_squares(rows) for rows in self.influence.values()]
        if not np.isfinite(value) or any(np.isnan(v) for part in parts for v, _ in part):
            return Interval(value, np.nan, np.nan)
        by_example = [examples for examples, _ in parts]
        residual = [(-v, df) for _, (v, df) in parts]
        by_seed = (float(np.var(self.values, ddof=1)) / seeds, seeds - 1) if seeds > 1 else (0.0, 1)
        candidates = [[by_seed, *by_example, *residual], [by_seed], by_example]
        variances = [sum(v for v, _ in terms) for terms in candidates]
        largest = max(variances)
        # of those that differ by rounding alone, the fewest degrees of freedom: the same everywhere
        pairs = zip(candidates, variances, strict=True)
        tied = [terms for terms, v in pairs if v >= largest * (1 - 1e-9)]
        squares = max(sum(v**2 / df for v, df in terms) for terms in tied)
        df = largest**2 / squares if squares > 0 else 1.0
        if by_seed[0] > 0:
            df = min(df, by_seed[1] * (by_seed[0] + sum(v for v, _ in by_example)) / by_seed[0])
        return Interval(value, float(np.sqrt(largest)), float(df))


@dataclass(frozen=True, eq=False)
class Cells:
    """A table of measures of the same models and examples.

    Such as D at every fraction of every task.

    Args:
        values: (seeds, rows, cols).
        influence: {what the examples are of: (seeds, n, rows, cols)}.
    """

    values: Float[np.ndarray, "seeds rows cols"]
    influence: Mapping[str, Float[np.ndarray, "seeds n rows cols"]]

    def measure(self, row: int, column: int) -> Measure:
        """Return one cell."""
        influence = {u: x[:, :, row, column] for u, x in self.influence.items()}
        return Measure(self.values[:, row, column], influence)

    def intervals(self) -> tuple[Float[np.ndarray, "rows cols"], Float[np.ndarray, "rows cols"]]:
        """Return (low, high) of every cell, at 95 %."""
        ends = np.full((2, *self.values.shape[1:]), np.nan)
        for row, column in np.ndindex(*self.values.shape[1:]):
            ends[:, row, column] = self.measure(row, column).interval().at(LEVEL)
        return ends[0], ends[1]

    def __sub__(self, other: "Cells") -> "Cells":
        """Return the paired difference, cell by cell."""
        influence = {u: x - other.influence[u] for u, x in self.influence.items()}
        return Cells(self.values - other.values, influence)


Term = tuple[float, int]  # a variance and its degrees of freedom


def _mean_squares(rows: Float[np.ndarray, "seeds n"]) -> tuple[Term, Term]:
    """Return the variance of the mean due to examples, and to the residual."""
    seeds, n = rows.shape
    if n < 2:
        return (np.nan, 1), (np.nan, 1)
    rows = rows - rows.mean(1, keepdims=True)
    column = rows.mean(0)
    examples = float((column**2).sum() / (n - 1) / n)
    if seeds == 1:
        return (examples, n - 1), (0.0, 1)
    rest = float(((rows - column) ** 2).sum() / ((seeds - 1) * (n - 1)))
    return (examples, n - 1), (rest / (seeds * n), (seeds - 1) * (n - 1))


def weighted(measures: Sequence[Measure], weights: Sequence[float]) -> Measure:
    """Return the weighted sum of measures of the same models and examples.

    Raises:
        FslibError: If they are of different models or examples.
    """
    models = {len(m.values) for m in measures}
    seeds = max(models)
    if models - {1, seeds}:
        raise FslibError(f"measures of {sorted(models)} models cannot be paired")
    total, influence = np.zeros(seeds), {}
    for name in dict.fromkeys(name for m in measures for name in m.influence):
        sizes = {m.influence[name].shape[1] for m in measures if name in m.influence}
        if len(sizes) > 1:
            raise FslibError(f"measures of {sorted(sizes)} examples of {name} cannot be paired")
        influence[name] = np.zeros((seeds, sizes.pop()))
    for measure, weight in zip(measures, weights, strict=True):
        total += weight * measure.values
        for name, rows in measure.influence.items():
            influence[name] += weight * rows
    return Measure(total, influence)


def mean_of(measures: Sequence[Measure]) -> Measure:
    """Return the mean of several measures of the same models, such as scores."""
    if not measures:
        raise FslibError("a mean of no measure")
    return weighted(measures, [1 / len(measures)] * len(measures))


def score_measure(
    name: str, metric: str, predictions: Num[np.ndarray, "seeds n"], labels: Num[np.ndarray, " n"]
) -> Measure:
    """Return every model's score on a task's examples, a fraction, with influences.

    Args:
        name: Of the task, which its examples are known by.
        metric: As `fslib.scoring.metric_score` takes it.
        predictions: (seeds, n).
        labels: (n,).
    """
    values = metric_score(metric, predictions, labels)
    without = left_out_scores(metric, predictions, labels)
    return Measure(values, {name: (len(labels) - 1) * (values[:, None] - without)})


def constant(value: float, like: Measure) -> Measure:
    """Return a number that does not vary, to be compared with a measure."""
    influence = {name: np.zeros((1, rows.shape[1])) for name, rows in like.influence.items()}
    return Measure(np.array([float(value)]), influence)


def relabelling_p(
    values: Float[np.ndarray, "labellings models *cells"], draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "draws *cells"]]:
    """Return two-sided p of the first labelling, models relabelled singly and alike.

    Where the combinations of labellings are at most `draws`, they are all counted; else so many are
    drawn, the true one among them (Phipson and Smyth, 2010). NaN where the number is.

    Args:
        values: A number of every model under each labelling, the true one first.
        draws: The most combinations that are counted.
        rng: The generator that draws.

    Returns:
        (*cells,) p where each model is relabelled by itself; (*cells,) p where all are relabelled
        alike; and the numbers of the first's draws.
    """
    labellings, models = values.shape[:2]
    if labellings**models <= draws:
        chosen = np.array(list(product(range(labellings), repeat=models)))
    else:
        chosen = rng.integers(labellings, size=(draws, models))
        chosen[0] = 0
    each = np.mean([values[chosen[:, m], m] for m in range(models)], axis=0)
    observed, shared = values[0].mean(0), values.mean(1)

    def p(null: np.ndarray) -> np.ndarray:
        extreme = np.abs(null) >= np.abs(observed) - 1e-9
        return np.where(np.isnan(observed), np.nan, extreme.mean(0))

    return p(each), p(shared), each
