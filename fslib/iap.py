"""The dissociation score D, and IAP: what pruning each task's top heads did to every task. Arrays in, arrays out.

Axes, in this order wherever they occur: `pruned` is the task whose heads were pruned, `scored` the task
that was evaluated, both of size `tasks`; `n` examples; `draws` permutation draws.
Scores S and S0 are in [-1, 1] (metrics as fractions), dissociation scores D in points (x 100).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Num

from fslib.errors import FslibError, check_count, number_array, unknown
from fslib.intervals import Cells, Measure, relabelling_p
from fslib.scoring import chance_level, left_out_scores, metric_score

CONVENTIONS = ("lesion", "released", "retention")
HEADLINE = (
    0.1,
    0.3,
)  # the fractions that D is averaged over: from 40 % on, most of a random set are top heads
PARTS = ("labels", "unpruned", "lesioned")  # of an IAP, a task each
DRAWS = 9999  # relabellings drawn; if there are no more than that, all of them: an exact p


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
        raise FslibError(
            f"dissociation compares at least two tasks; got scores of shape {scores.shape}"
        )
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
    sets = zip(
        reversed(values.shape[:-1]), reversed(scores.shape[:-2]), strict=False
    )  # as numpy pairs axes
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


class Unlesioned(NamedTuple):
    """Evaluation examples of a task that no lesion was evaluated on: they may decide what is scored on the others.

    labels: (n,). predictions: (seeds, n), of the unpruned models.
    """

    labels: Num[np.ndarray, " n"]
    predictions: Num[np.ndarray, "seeds n"]


@dataclass(frozen=True, eq=False)
class IAP:
    """Predictions of every task under every lesion.

    tasks, metrics: names, in the order of the `tasks` axes. fractions: (fractions,).
    heads: bool (seeds, fractions, tasks, 1 + controls, layers, heads), True = pruned; set 0 is the task's top
        heads, the others are its layer-matched random controls.
    labels[u]: (n,). unpruned[u]: (seeds, n). lesioned[u]: (seeds, fractions, tasks, 1 + controls, n),
        predictions of task u with that head set pruned.
    apart[u]: more examples, which were not evaluated under lesions; of every task, or of none.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    fractions: tuple[float, ...]
    heads: Bool[np.ndarray, "seeds fractions tasks sets layers heads"]
    labels: dict[str, Num[np.ndarray, " n"]]
    unpruned: dict[str, Num[np.ndarray, "seeds n"]]
    lesioned: dict[str, Num[np.ndarray, "seeds fractions tasks sets n"]]
    apart: dict[str, Unlesioned] = field(default_factory=dict)

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
        return np.array(
            [chance_level(m, self.labels[u]) for u, m in zip(self.tasks, self.metrics, strict=True)]
        )

    def _metric(self, task: str, predictions: np.ndarray) -> np.ndarray:
        return metric_score(self.metrics[self.tasks.index(task)], predictions, self.labels[task])

    def part(
        self, tasks: Sequence[str] | None = None, examples: Callable[[int], np.ndarray] = np.arange
    ) -> "IAP":
        """Return the same for some of the tasks, as pruned and as scored, and some of every task's examples.

        examples: returns the positions to keep of n examples, as `fslib.claims.score_half` does.
        Raises FslibError for another task, for fewer than two, and where fewer than two examples are left.
        """
        names = self.tasks if tasks is None else tuple(tasks)
        for name in names:
            if name not in self.tasks:
                raise unknown("task of this pruning", name, self.tasks)
        if len(names) < 2:
            raise FslibError(f"dissociation compares at least two tasks, not {list(names)}")
        at = [self.tasks.index(name) for name in names]
        kept = {u: examples(len(self.labels[u])) for u in names}
        labels = {u: self.labels[u][kept[u]] for u in names}
        if short := [u for u in names if len(labels[u]) < 2]:
            raise FslibError(f"fewer than two examples of task {short[0]} are left")
        unpruned = {u: self.unpruned[u][:, kept[u]] for u in names}
        lesioned = {u: self.lesioned[u][:, :, at][..., kept[u]] for u in names}
        metrics = tuple(self.metrics[i] for i in at)
        apart = {u: self.apart[u] for u in names if u in self.apart}
        return IAP(
            names, metrics, self.fractions, self.heads[:, :, at], labels, unpruned, lesioned, apart
        )

    def dissociation(
        self, convention: str = "lesion", *, draws: int = DRAWS, seed: int = 0
    ) -> "Dissociation":
        """Return the dissociation score per fraction, per task and as their mean, with intervals and p.

        Intervals: two-way t over seeds and examples, each example's influence by leaving it out (`fslib.intervals`);
        with one seed, over examples alone. They are taken of D, of the mean D of the matched random heads, and of the
        difference of the two.
        p: label permutation. If it did not matter which task's lesion is called a task's own, every relabelling would
        be as likely as the true one; p is the share of relabellings, drawn for each model by itself, with a D at least
        as large. `p_shared`: the same relabelling for all models, a stricter question with few possible answers.
        The last row is the mean over the headline fractions (10 and 30 %, where they are among those pruned).
        """
        check_count("draws", draws)
        check_count("seed", seed, 0)
        top = self._cells(convention, self.top)
        random = self._cells(convention, self.random) if self.controls else None
        rng = np.random.default_rng([seed, 99])
        tests = relabelling_p(self._relabelled(convention, draws, rng), draws, rng)
        return Dissociation(convention, self.tasks, self.fractions, top, random, *tests)

    @cached_property
    def headline(self) -> list[int]:
        """The places, in `fractions`, of those D is averaged over: 10 and 30 %, or all where neither is pruned."""
        return [i for i, f in enumerate(self.fractions) if round(f, 9) in HEADLINE] or [
            *range(len(self.fractions))
        ]

    def _scored(
        self, convention: str, scores: np.ndarray, unpruned: np.ndarray
    ) -> Float[np.ndarray, "*sets rows cols"]:
        """Return D with its means appended: over tasks as a last column, then over fractions as a last row."""
        d = dissociation(scores, unpruned, convention, self.chance())
        d = np.concatenate([d, d.mean(-1, keepdims=True)], -1)
        return np.concatenate([d, d[..., self.headline, :].mean(-2, keepdims=True)], -2)

    def _cells(self, convention: str, lesions: Lesions) -> Cells:
        """Return D under some lesions, the mean over controls where there are any, and every example's influence."""
        scores, base = _over_controls(lesions.scores), self.baseline()
        values = self._scored(convention, scores, base[:, None])
        influence = {}
        for i, u in enumerate(self.tasks):
            n = len(self.labels[u])
            metric, labels = self.metrics[i], self.labels[u]
            left = left_out_scores(
                metric, lesions.predictions[u], labels
            )  # (seeds, fractions, tasks, [controls,] n)
            left_scores, left_base = np.repeat(scores[None], n, 0), np.repeat(base[None], n, 0)
            left_scores[..., i] = np.moveaxis(_over_controls(left), -1, 0)
            left_base[..., i] = left_out_scores(metric, self.unpruned[u], labels).T
            without = self._scored(
                convention, left_scores, left_base[:, :, None]
            )  # (n, seeds, rows, cols)
            influence[u] = np.moveaxis((n - 1) * (values - without), 0, 1)
        return Cells(values, influence)

    def _relabelled(
        self, convention: str, draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "orders *cells"]:
        """Return D of every model in every cell under each relabelling of the lesions, the true labels first."""
        own = tuple(range(len(self.tasks)))
        few = math.factorial(len(own)) <= max(draws, 24)
        orders = (
            permutations(own)
            if few
            else (own, *(tuple(rng.permutation(len(own))) for _ in range(draws)))
        )
        base = self.baseline()[:, None]
        return np.stack(
            [self._scored(convention, self.top.scores[:, :, order], base) for order in orders]
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, as stored beside a record."""
        named = {"heads": self.heads}
        for part in PARTS:
            named |= {f"{part}/{u}": getattr(self, part)[u] for u in self.tasks}
        for u, (labels, predictions) in self.apart.items():
            named |= {f"labels apart/{u}": labels, f"unpruned apart/{u}": predictions}
        return named

    @classmethod
    def from_arrays(
        cls,
        tasks: Sequence[str],
        metrics: Sequence[str],
        fractions: Sequence[float],
        arrays: Mapping[str, np.ndarray],
    ) -> "IAP":
        """Make an `IAP` again from what `arrays` returned."""
        names = tuple(tasks), tuple(metrics), tuple(fractions)
        labels, unpruned, lesioned = ({u: arrays[f"{k}/{u}"] for u in tasks} for k in PARTS)
        kept = [u for u in tasks if f"labels apart/{u}" in arrays]
        apart = {
            u: Unlesioned(arrays[f"labels apart/{u}"], arrays[f"unpruned apart/{u}"]) for u in kept
        }
        return cls(*names, arrays["heads"], labels, unpruned, lesioned, apart)

    @classmethod
    def over_seeds(cls, runs: Sequence["IAP"]) -> "IAP":
        """Put runs that differ in nothing but the seed together as one. Raises FslibError for no run, and others."""
        runs = list(runs) if isinstance(runs, Sequence) else [runs]
        if not runs:
            raise FslibError("no runs to put together")
        if strange := [run for run in runs if not isinstance(run, IAP)]:
            raise FslibError(
                f"{strange[0]!r:.80} is no IAP: give a list of what prune_important_heads returns"
            )
        first, each = runs[0], [run.arrays() for run in runs]
        labels = {k: v for k, v in each[0].items() if k.startswith("labels")}
        for run, arrays in zip(runs, each, strict=True):
            same = (run.tasks, run.metrics, run.fractions) == (
                first.tasks,
                first.metrics,
                first.fractions,
            )
            same &= run.heads.shape[1:] == first.heads.shape[1:] and arrays.keys() == each[0].keys()
            if not same or any(not np.array_equal(arrays[k], v) for k, v in labels.items()):
                what = "tasks, fractions, controls, model shape or evaluation examples"
                raise FslibError(f"runs differ in {what}: they cannot be averaged")
        joined = labels | {
            k: np.concatenate([arrays[k] for arrays in each]) for k in each[0] if k not in labels
        }
        return cls.from_arrays(first.tasks, first.metrics, first.fractions, joined)


class Point(NamedTuple):
    """One cell of a `Dissociation`, in points: a number per field, or an array where several cells are asked for.

    value: D, the mean over seeds. low, high: its interval. by_seed: (seeds,) D of every model. random, random_low,
    random_high: D of matched random heads. above, above_low, above_high: D minus that. p, p_shared: relabelling.
    """

    value: float
    low: float
    high: float
    by_seed: np.ndarray
    random: float
    random_low: float
    random_high: float
    above: float
    above_low: float
    above_high: float
    p: float
    p_shared: float


@dataclass(frozen=True, eq=False)
class Dissociation:
    """Dissociation scores, in points: arrays (fractions + 1, tasks + 1), last column and last row the means.

    top: D of every task's top heads. controls: the mean D of the matched random heads, None without controls.
    p, p_shared: one-sided, of the label permutation (`IAP.dissociation`). null: D of its draws, (draws, rows, cols).
    """

    convention: str
    tasks: tuple[str, ...]
    fractions: tuple[float, ...]
    top: Cells
    controls: Cells | None
    p: np.ndarray
    p_shared: np.ndarray
    null: np.ndarray

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        undefined = np.full(self.top.values.shape[1:], np.nan)
        parts = {
            "": self.top,
            "random_": self.controls,
            "above_": self.top - self.controls if self.controls else None,
        }
        found = {"by_seed": self.top.values, "p": self.p, "p_shared": self.p_shared}
        for name, cells in parts.items():
            low, high = cells.intervals() if cells else (undefined, undefined)
            value = cells.values.mean(0) if cells else undefined
            found |= {name.rstrip("_") or "value": value, f"{name}low": low, f"{name}high": high}
        return found

    @property
    def mean(self) -> Point:
        """The mean over tasks and the headline fractions: the one number that decides."""
        return self._cells(-1, -1)

    def of(self, task: str) -> Point:
        """Return one task's D over the headline fractions. Raises FslibError for another task."""
        return self._cells(-1, self._column(task))

    def along(self, task: str = "mean") -> Point:
        """Return D at every fraction, arrays (fractions,), of one task or ("mean") of the mean over tasks."""
        return self._cells(slice(len(self.fractions)), self._column(task))

    def measure(self, task: str = "mean", *, above_random: bool = False) -> Measure:
        """Return D over the headline fractions, of one task or the mean, per model and with influences.

        above_random: minus the mean D of matched random heads. Raises FslibError where there are none.
        """
        if above_random and self.controls is None:
            raise FslibError(
                "without random controls nothing can be said beyond chance: prune with controls=1 or more"
            )
        cells = self.top - self.controls if above_random and self.controls else self.top
        return cells.measure(-1, self._column(task))

    def _column(self, task: str) -> int:
        names = (*self.tasks, "mean")
        if task not in names:
            raise unknown("task of this dissociation", task, names)
        return names.index(task)

    def _cells(self, rows: int | slice, column: int) -> Point:
        # [()] makes a number of what would be an array without axes
        return Point(*(self._arrays[field][..., rows, column][()] for field in Point._fields))  # type: ignore[arg-type]

    def frame(self) -> pd.DataFrame:
        """Return one row per fraction and task; "mean" is the mean over tasks, or over the headline fractions."""
        rows, arrays = [], self._arrays
        for i, fraction in enumerate([*map(str, self.fractions), "mean"]):
            for j, task in enumerate([*self.tasks, "mean"]):
                row: dict[str, object] = {
                    "convention": self.convention,
                    "fraction": fraction,
                    "task": task,
                }
                names = {
                    "D": "value",
                    "low": "low",
                    "high": "high",
                    "random": "random",
                    "above random": "above",
                }
                names |= {
                    "above low": "above_low",
                    "above high": "above_high",
                    "p": "p",
                    "p, shared": "p_shared",
                }
                row |= {name: arrays[field][i, j] for name, field in names.items()}
                seeds = self.top.values[:, i, j]
                rows.append(row | {"seed min": seeds.min(), "seed max": seeds.max()})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return str(self.frame().round(3).to_string(index=False))

    def _repr_html_(self) -> str:
        return str(self.frame().round(3).to_html(index=False))


def _over_controls(scores: np.ndarray) -> Float[np.ndarray, "seeds fractions tasks last"]:
    """Return the mean over the axis of controls, where there is one: before it come seeds, fractions and tasks."""
    return scores.mean(3) if scores.ndim == 5 else scores


def score_left(
    scores: Float[np.ndarray, "*axes scored"], unpruned: np.ndarray
) -> Float[np.ndarray, "*axes scored"]:
    """Return what a lesion leaves of a score, in % of the unpruned one (broadcast); NaN where that is not > 0."""
    return 100 * (scores / np.where(unpruned > 0, unpruned, np.nan))


def double_dissociations(
    left: Float[np.ndarray, "pruned scored"],
) -> Bool[np.ndarray, "tasks tasks"]:
    """Return for which pairs of tasks each is hurt more by its own lesion than by the other's (Shallice, 1988).

    left[t, u]: what is left of task u's score with t's top heads pruned. Symmetric, False on the diagonal.
    """
    own = np.diagonal(left)
    worse = own[None, :] < left  # worse[t, u]: u's own lesion hurts u more than t's does
    return worse & worse.T
