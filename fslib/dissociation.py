"""The dissociation score D, and IAP: what pruning each task's top heads did to every task. Arrays in, arrays out.

Axes, in this order wherever they occur: `pruned` is the task whose heads were pruned, `scored` the task
that was evaluated, both of size `tasks`; `n` examples; `draws` bootstrap or permutation draws.
Scores S and S0 are in [-1, 1] (metrics as fractions), dissociation scores D in points (x 100).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num

from fslib.errors import FslibError, check_count, number_array, unknown
from fslib.scoring import Bootstrap, bootstrap_counts, chance_level, interval, metric_score, p_value

CONVENTIONS = ("lesion", "released", "retention")
DRAWS = 2000  # bootstrap draws
NULL_DRAWS = 20_000  # permutation draws; if there are no more combinations than this, all of them: an exact p


def dissociation(
    scores: Float[np.ndarray, "*sets pruned scored"],
    unpruned: Float[np.ndarray, "*sets2 scored"],
    convention: str = "lesion",
    chance: Float[np.ndarray, " scored"] | None = None,
) -> Float[np.ndarray, "*sets scored"]:
    """Return the dissociation score D_t of every task, in points; its mean over tasks is the model's (Li et al., 2023).

    scores[..., t, u]: score of task u with task t's top heads pruned. unpruned[..., u]: nothing pruned.
    convention:
        "lesion"     D_t = 100 (mean_{s != t} S[s,t] - S[t,t]) / S0[t]: same task, its own lesion against others'.
        "released"   D_t = 100 (mean_{u != t} S[t,u] - S[t,t]) / S0[t]: the paper's released code; it
                     subtracts scores of different tasks, so an easy task reads as negative.
        "retention"  D_t = 100 (mean_{u != t} R[t,u] - R[t,t]), R = (S - chance) / (S0 - chance).
    A task whose S0 (for retention: S0 - chance) is not positive has no defined D: NaN.
    Raises FslibError for fewer than two tasks, shapes that do not belong together, an unknown convention, or
    retention without chance.
    """
    scores, unpruned = number_array("scores", scores), number_array("unpruned", unpruned)
    if scores.ndim < 2 or scores.shape[-1] < 2 or scores.shape[-2] != scores.shape[-1]:
        raise FslibError(f"dissociation compares at least two tasks; got scores of shape {scores.shape}")
    tasks = scores.shape[-1]
    if convention not in CONVENTIONS:
        raise unknown("dissociation convention", convention, CONVENTIONS)
    _check_shape("unpruned", unpruned, scores)
    if chance is not None:
        chance = number_array("chance", chance)
        _check_shape("chance", chance, scores)
    own = np.eye(tasks, dtype=bool)
    if convention == "retention":
        if chance is None:
            raise FslibError("the retention convention needs the chance level of every task")
        room = np.where(unpruned > chance, unpruned - chance, np.nan)
        scores = (scores - chance) / room[..., None, :]
        scale = np.ones_like(unpruned)
    else:
        scale = np.where(unpruned > 0, unpruned, np.nan)
    others = np.where(own, 0, scores).sum(-2 if convention == "lesion" else -1) / (tasks - 1)
    return 100 * (others - np.diagonal(scores, axis1=-2, axis2=-1)) / scale


def _check_shape(name: str, values: np.ndarray, scores: np.ndarray) -> None:
    """Raise FslibError where there is not one value per scored task, or they are of other sets than the scores."""
    sets = zip(reversed(values.shape[:-1]), reversed(scores.shape[:-2]), strict=False)  # as numpy pairs axes
    fits = values.ndim and values.ndim < scores.ndim and values.shape[-1] == scores.shape[-1]
    if not fits or any(own not in (1, theirs) for own, theirs in sets):
        raise FslibError(
            f"{name} of shape {values.shape} does not belong to scores of shape {scores.shape}: give one per scored "
            "task on the last axis, and the same sets before it"
        )


@dataclass(frozen=True, eq=False)
class Lesions:
    """Some of the head sets of an `IAP`: what was pruned, what was then predicted, and how that scores.

    Without the axis `controls` for the top heads, with it for the random ones.
    heads: bool (seeds, fractions, tasks, [controls,] layers, heads), True = pruned.
    predictions[u]: of task u, (seeds, fractions, tasks, [controls,] n).
    scores: (seeds, fractions, tasks, [controls,] scored), last axis the scored task.
    """

    heads: Bool[np.ndarray, "seeds fractions tasks *controls layers heads"]
    predictions: dict[str, Num[np.ndarray, "seeds fractions tasks *controls n"]]
    scores: Float[np.ndarray, "seeds fractions tasks *controls scored"]


@dataclass(frozen=True, eq=False)
class IAP:
    """Predictions of every task under every lesion.

    tasks, metrics: names, in the order of the `tasks` axes. fractions: (fractions,).
    heads: bool (seeds, fractions, tasks, 1 + controls, layers, heads), True = pruned; set 0 is the task's top
        heads, the others are its layer-matched random controls.
    labels[u]: (n,). unpruned[u]: (seeds, n). lesioned[u]: (seeds, fractions, tasks, 1 + controls, n),
        predictions of task u with that head set pruned.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    fractions: tuple[float, ...]
    heads: Bool[np.ndarray, "seeds fractions tasks sets layers heads"]
    labels: dict[str, Num[np.ndarray, " n"]]
    unpruned: dict[str, Num[np.ndarray, "seeds n"]]
    lesioned: dict[str, Num[np.ndarray, "seeds fractions tasks sets n"]]

    @property
    def controls(self) -> int:
        """Count the random head sets of each task and fraction."""
        return self.heads.shape[3] - 1

    @cached_property
    def top(self) -> Lesions:
        """Every task's most important heads."""
        return self._lesions(0)

    @cached_property
    def random(self) -> Lesions:
        """Every task's random controls, as many heads in each layer as its top heads have."""
        return self._lesions(slice(1, None))

    def _lesions(self, sets: int | slice) -> Lesions:
        predictions = {u: self.lesioned[u][:, :, :, sets] for u in self.tasks}
        scores = np.stack([self._metric(u, predictions[u]) for u in self.tasks], -1)
        return Lesions(self.heads[:, :, :, sets], predictions, scores)

    def baseline(self) -> Float[np.ndarray, "seeds tasks"]:
        """Return S0, the score of every task with nothing pruned."""
        return np.stack([self._metric(u, self.unpruned[u]) for u in self.tasks], -1)

    def scores(self) -> Float[np.ndarray, "seeds fractions tasks sets tasks"]:
        """Return S: last axis the scored task, third axis the task whose heads (or matched controls) were pruned."""
        return np.stack([self._metric(u, self.lesioned[u]) for u in self.tasks], -1)

    def chance(self) -> Float[np.ndarray, " tasks"]:
        """Return the score of each task's best constant answer."""
        return np.array([chance_level(m, self.labels[u]) for u, m in zip(self.tasks, self.metrics, strict=True)])

    def _metric(self, task: str, predictions: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        return metric_score(self.metrics[self.tasks.index(task)], predictions, self.labels[task], counts)

    def score_intervals(
        self, level: float = 0.95, draws: int = DRAWS, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (mean, low, high) over seeds of the scores under top-head lesions, each (1 + fractions, tasks, tasks).

        First row: nothing pruned. Axes after it: pruned task, scored task. Bootstrap over examples.
        """
        check_count("seed", seed, 0)
        mean, lows, highs = [], [], []
        for u in self.tasks:
            shape = (len(self.heads), 1, len(self.tasks), len(self.labels[u]))
            whole = np.broadcast_to(self.unpruned[u][:, None, None], shape)
            predictions = np.concatenate([whole, self.top.predictions[u]], 1)
            counts = bootstrap_counts(len(self.labels[u]), draws, np.random.default_rng(seed))
            low, high = interval(self._metric(u, predictions, counts).mean(0), level)
            mean.append(self._metric(u, predictions).mean(0))
            lows.append(low)
            highs.append(high)
        return np.stack(mean, -1), np.stack(lows, -1), np.stack(highs, -1)

    def dissociation(
        self, convention: str = "lesion", *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
    ) -> "Dissociation":
        """Return the dissociation score per fraction, per task and as their mean, with interval, null and p.

        Interval: bootstrap over evaluation examples, the same resample for every head set (paired), of the mean
        over seeds; it holds for these trained models and head sets, and is NaN if a resample has no defined D.
        Null: every task's head set is drawn at random among its top heads and its layer-matched controls (a
        permutation test: if top heads are nothing special in their layers, all are alike); p is the share of
        such draws with a score at least as large. The null band is made from the controls alone. With few controls
        only the mean over tasks has power: one task's p is at best about 1 / (controls + 1) ** seeds.
        The last row is the mean over fractions: one number that no choice of a fraction can flatter.
        """
        by_seed = self._by_seed(convention)
        low, high = interval(np.moveaxis(self._resampled(convention, draws, seed), 0, -1), level)
        null_mean, null_low, null_high, p = self._null(convention, level, seed)
        return Dissociation(
            convention,
            self.tasks,
            self.fractions,
            by_seed.mean(0),
            low,
            high,
            by_seed,
            null_mean,
            null_low,
            null_high,
            p,
        )

    def bootstrap(
        self, convention: str = "lesion", *, draws: int = DRAWS, seed: int = 0, over_seeds: bool = False
    ) -> dict[str, Bootstrap]:
        """Return {task: D over all fractions, with its bootstrap draws}, and "mean" for the mean over tasks.

        over_seeds: resample the models as well, for statements about training and not about these models. The same
        `seed` draws the same resamples, so the difference of two `IAP`s on the same examples is paired.
        """
        values = self._by_seed(convention).mean(0)[-1]
        resampled = self._resampled(convention, draws, seed, over_seeds)[:, -1]
        columns = enumerate((*self.tasks, "mean"))
        return {name: Bootstrap(float(values[i]), resampled[:, i]) for i, name in columns}

    def _by_seed(self, convention: str) -> Float[np.ndarray, "seeds rows columns"]:
        return _append_means(dissociation(self.top.scores, self.baseline()[:, None], convention, self.chance()))

    def _resampled(
        self, convention: str, draws: int, seed: int, over_seeds: bool = False
    ) -> Float[np.ndarray, "draws rows columns"]:
        check_count("seed", seed, 0)
        lesioned, unpruned = [], []
        for i, u in enumerate(self.tasks):
            counts = bootstrap_counts(len(self.labels[u]), draws, np.random.default_rng([seed, i]))
            lesioned.append(self._metric(u, self.top.predictions[u], counts))  # (seeds, fractions, tasks, draws)
            unpruned.append(self._metric(u, self.unpruned[u], counts))  # (seeds, draws)
        scores = np.moveaxis(np.stack(lesioned, -1), 3, 0)  # (draws, seeds, fractions, pruned, scored)
        base = np.moveaxis(np.stack(unpruned, -1), 1, 0)  # (draws, seeds, scored)
        by_seed = dissociation(scores, base[:, :, None], convention, self.chance())  # (draws, seeds, fractions, tasks)
        if over_seeds:
            weights = bootstrap_counts(len(self.heads), draws, np.random.default_rng([seed, 1000]))
            return _append_means((by_seed * weights[:, :, None, None]).sum(1) / len(self.heads))
        return _append_means(by_seed.mean(1))

    def _null(self, convention: str, level: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (mean, low, high) of the controls alone and the permutation p, each (rows, columns)."""
        scores, base, chance = self.scores(), self.baseline(), self.chance()
        seeds, fractions, tasks, sets, _ = scores.shape
        if sets == 1:
            undefined = np.full((fractions + 1, tasks + 1), np.nan)
            return undefined, undefined, undefined, undefined

        def redraw(choice: np.ndarray) -> np.ndarray:  # (draws, seeds * tasks) -> (draws, fractions + 1, tasks + 1)
            choice = choice.reshape(-1, seeds, 1, tasks)
            s, f, t = np.ogrid[:seeds, :fractions, :tasks]
            picked = scores[s, f, t, choice]  # (draws, seeds, fractions, pruned, scored)
            return _append_means(dissociation(picked, base[:, None], convention, chance).mean(1))

        rng = np.random.default_rng([seed, 99])
        band = redraw(1 + random_choices(sets - 1, seeds * tasks, NULL_DRAWS, rng))
        exact = sets ** (seeds * tasks) <= NULL_DRAWS
        observed = redraw(np.zeros((1, seeds * tasks), dtype=int))[0]
        p = p_value(redraw(random_choices(sets, seeds * tasks, NULL_DRAWS, rng)), observed, exact)
        return band.mean(0), *interval(np.moveaxis(band, 0, -1), level), p

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, as stored beside a record."""
        named = {"heads": self.heads}
        for u in self.tasks:
            named |= {
                f"labels/{u}": self.labels[u],
                f"unpruned/{u}": self.unpruned[u],
                f"lesioned/{u}": self.lesioned[u],
            }
        return named

    @classmethod
    def from_arrays(
        cls, tasks: Sequence[str], metrics: Sequence[str], fractions: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> "IAP":
        """Make an `IAP` again from what `arrays` returned."""
        parts = [{u: arrays[f"{part}/{u}"] for u in tasks} for part in ("labels", "unpruned", "lesioned")]
        return cls(tuple(tasks), tuple(metrics), tuple(fractions), arrays["heads"], *parts)

    @classmethod
    def over_seeds(cls, runs: Sequence["IAP"]) -> "IAP":
        """Put several runs (models trained with different seeds), evaluated on the same examples, together as one.

        Raises FslibError for no run, and for runs that differ in anything but the seed.
        """
        runs = list(runs) if isinstance(runs, Sequence) else [runs]
        if not runs:
            raise FslibError("no runs to put together")
        if strange := [run for run in runs if not isinstance(run, IAP)]:
            raise FslibError(f"{strange[0]!r:.80} is no IAP: give a list of what prune_important_heads returns")
        first = runs[0]
        for run in runs:
            same = (run.tasks, run.metrics, run.fractions) == (first.tasks, first.metrics, first.fractions)
            same &= run.heads.shape[1:] == first.heads.shape[1:]
            if not same or any(not np.array_equal(run.labels[u], first.labels[u]) for u in first.tasks):
                raise FslibError(
                    "runs differ in tasks, fractions, controls, model shape or evaluation examples: "
                    "they cannot be averaged"
                )
        joined = {k: np.concatenate([run.arrays()[k] for run in runs]) for k in first.arrays() if "labels" not in k}
        joined |= {f"labels/{u}": first.labels[u] for u in first.tasks}
        return cls.from_arrays(first.tasks, first.metrics, first.fractions, joined)


class Point(NamedTuple):
    """One cell of a `Dissociation`, in points: a number per field, or an array where several cells are asked for.

    value: D, the mean over seeds. low, high: its interval over examples. by_seed: (seeds,) D of every model.
    null_mean, null_low, null_high: D of matched random heads. p: of the permutation test against them.
    """

    value: float
    low: float
    high: float
    by_seed: np.ndarray
    null_mean: float
    null_low: float
    null_high: float
    p: float


@dataclass(frozen=True, eq=False)
class Dissociation:
    """Dissociation scores, in points: arrays (fractions + 1, tasks + 1), last column and last row the means.

    by_seed: (seeds, fractions + 1, tasks + 1). low, high: interval over examples. null_*: matched random heads.
    p: one-sided permutation p against them (NaN without controls).
    """

    convention: str
    tasks: tuple[str, ...]
    fractions: tuple[float, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    by_seed: np.ndarray
    null_mean: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    p: np.ndarray

    @property
    def mean(self) -> Point:
        """The mean over tasks and fractions: the one number that decides."""
        return self._cells(-1, -1)

    def of(self, task: str) -> Point:
        """Return one task's D over all fractions. Raises FslibError for another task."""
        return self._cells(-1, self._column(task))

    def along(self, task: str = "mean") -> Point:
        """Return D at every fraction, arrays (fractions,), of one task or ("mean") of the mean over tasks."""
        return self._cells(slice(len(self.fractions)), self._column(task))

    def _column(self, task: str) -> int:
        names = (*self.tasks, "mean")
        if task not in names:
            raise unknown("task of this dissociation", task, names)
        return names.index(task)

    def _cells(self, rows: int | slice, column: int) -> Point:
        # [()] makes a number of what would be an array without axes
        return Point(*(getattr(self, field)[..., rows, column][()] for field in Point._fields))

    def frame(self) -> pd.DataFrame:
        """Return one row per fraction and task; "mean" stands for the mean over either."""
        rows = []
        for i, fraction in enumerate([*map(str, self.fractions), "mean"]):
            for j, task in enumerate([*self.tasks, "mean"]):
                row: dict[str, object] = {"convention": self.convention, "fraction": fraction, "task": task}
                row |= {"D": self.value[i, j], "low": self.low[i, j], "high": self.high[i, j]}
                row |= {f"null {k}": getattr(self, f"null_{k}")[i, j] for k in ("mean", "low", "high")}
                row |= {
                    "p": self.p[i, j],
                    "seed min": self.by_seed[:, i, j].min(),
                    "seed max": self.by_seed[:, i, j].max(),
                }
                rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return str(self.frame().round(3).to_string(index=False))

    def _repr_html_(self) -> str:
        return str(self.frame().round(3).to_html(index=False))


def _append_means(scores: Float[np.ndarray, "*sets fractions tasks"]) -> Float[np.ndarray, "*sets rows columns"]:
    """Append the mean over tasks as a last column, then the mean over fractions as a last row."""
    scores = np.concatenate([scores, scores.mean(-1, keepdims=True)], -1)
    return np.concatenate([scores, scores.mean(-2, keepdims=True)], -2)


def score_left(scores: Float[np.ndarray, "*axes scored"], unpruned: np.ndarray) -> Float[np.ndarray, "*axes scored"]:
    """Return what a lesion leaves of a score, in % of the unpruned one (broadcast); NaN where that is not > 0."""
    return 100 * (scores / np.where(unpruned > 0, unpruned, np.nan))


def random_choices(sets: int, tasks: int, draws: int, rng: np.random.Generator) -> Int[np.ndarray, "draws tasks"]:
    """Draw which of `sets` head sets each task gets in each of `draws` null draws; all combinations if they are few."""
    if sets**tasks <= draws:
        return np.stack(np.meshgrid(*[np.arange(sets)] * tasks, indexing="ij"), -1).reshape(-1, tasks)
    return rng.integers(sets, size=(draws, tasks))
