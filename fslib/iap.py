"""The dissociation score D, and IAP: what pruning each task's top heads did.

Arrays in, arrays out. Axes, in this order wherever they occur: `pruned` is the task whose heads
were pruned, `scored` the task that was evaluated, both of size `tasks`; `n` examples; `draws`
permutation draws. Scores S and S0 are in [-1, 1] (metrics as fractions), dissociation scores D in
points (x 100).
"""

import math
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Num

from fslib.errors import FslibError, check_among, check_count, number_array
from fslib.intervals import Cells, Measure, relabelling_p
from fslib.scoring import chance_level, left_out_scores, metric_score

CONVENTIONS = ("lesion", "released", "retention")
# the fractions that D is averaged over: from 40 % on, most of a random set are top heads
HEADLINE = (0.1, 0.3)
Arrays = Mapping[str, np.ndarray]
DRAWS = 9999  # relabellings drawn; if there are no more than that, all of them: an exact p
_PARTS = ("labels", "unpruned", "lesioned")  # of an IAP, a task each
# column of `Dissociation.frame`: field of a `Point`
_COLUMNS = {"D": "value", "low": "low", "high": "high", "random": "random"}
_COLUMNS |= {"above random": "above", "above low": "above_low", "above high": "above_high"}
_COLUMNS |= {"p": "p", "p, shared": "p_shared"}


def dissociation(
    scores: Float[np.ndarray, "*sets pruned scored"],
    unpruned: Float[np.ndarray, "*sets2 scored"],
    convention: str = "lesion",
    chance: Float[np.ndarray, " scored"] | None = None,
) -> Float[np.ndarray, "*sets scored"]:
    """Return the dissociation score D_t of every task, in points (Li et al., 2023).

    Its mean over tasks is the model's. A task whose S0 (for retention: S0 - chance) is not positive
    has no defined D: NaN. The conventions:

        lesion      D_t = 100 (mean_{s != t} S[s,t] - S[t,t]) / S0[t]
        released    D_t = 100 (mean_{u != t} S[t,u] - S[t,t]) / S0[t]
        retention   D_t = 100 (mean_{u != t} R[t,u] - R[t,t]), R = (S - chance) / (S0 - chance)

    "lesion" compares a task's own lesion with the others', on the same task. "released" is the
    paper's released code; it subtracts scores of different tasks, so an easy task reads as
    negative.

    Args:
        scores: S[..., t, u], the score of task u with task t's top heads pruned.
        unpruned: S0[..., u], with nothing pruned.
        convention: "lesion", "released" or "retention".
        chance: The chance level of every task, for retention.

    Raises:
        FslibError: For fewer than two tasks, shapes that do not belong together, an unknown
            convention, or retention without chance.
    """
    check_among("dissociation convention", convention, CONVENTIONS)
    if convention == "retention" and chance is None:
        raise FslibError("the retention convention needs the chance level of every task")
    scores, unpruned = number_array("scores", scores), number_array("unpruned", unpruned)
    *sets, pruned, tasks = scores.shape if scores.ndim > 1 else (0, 0)
    if tasks < 2 or pruned != tasks:
        raise FslibError(f"dissociation compares at least two tasks; got shape {scores.shape}")
    chance = number_array("chance", np.zeros(tasks) if chance is None else chance)
    for name, values in {"unpruned": unpruned, "chance": chance}.items():
        # from the end, as numpy pairs axes
        axes = zip(reversed(values.shape[:-1]), reversed(sets), strict=False)
        fits = values.ndim < scores.ndim and values.shape[-1:] == (tasks,)
        if not fits or any(size not in (1, theirs) for size, theirs in axes):
            whose = f"scores of shape {scores.shape}, one per scored task and set"
            raise FslibError(f"{name} of shape {values.shape} does not belong to {whose}")
    scale = unpruned
    if convention == "retention":
        room = np.where(unpruned > chance, unpruned - chance, np.nan)
        scores, scale = (scores - chance) / room[..., None, :], np.ones_like(unpruned)
    own = np.eye(tasks, dtype=bool)
    others = np.where(own, 0, scores).sum(-2 if convention == "lesion" else -1) / (tasks - 1)
    own_scores = np.diagonal(scores, axis1=-2, axis2=-1)
    return 100 * (others - own_scores) / np.where(scale > 0, scale, np.nan)


class Lesions(NamedTuple):
    """Some of the head sets of an `IAP`: what was pruned, predicted, and scored.

    Without the axis `controls` for the top heads, with it for the random ones.

    Args:
        heads: Bool (seeds, fractions, tasks, [controls,] layers, heads), True = pruned.
        predictions: {task: (seeds, fractions, tasks, [controls,] n)}.
        scores: (seeds, fractions, tasks, [controls,] scored), last axis the scored task.
    """

    heads: Bool[np.ndarray, "seeds fractions tasks *controls layers heads"]
    predictions: dict[str, Num[np.ndarray, "seeds fractions tasks *controls n"]]
    scores: Float[np.ndarray, "seeds fractions tasks *controls scored"]


class Unlesioned(NamedTuple):
    """Evaluation examples of a task that no lesion was evaluated on.

    They may decide what is scored on the others.

    Args:
        labels: (n,).
        predictions: (seeds, n), of the unpruned models.
    """

    labels: Num[np.ndarray, " n"]
    predictions: Num[np.ndarray, "seeds n"]


@dataclass(frozen=True, eq=False)
class IAP:
    """Predictions of every task under every lesion.

    Args:
        tasks: Names, in the order of the `tasks` axes.
        metrics: A metric per task.
        fractions: (fractions,).
        heads: Bool (seeds, fractions, tasks, 1 + controls, layers, heads), True = pruned; set 0 is
            the task's top heads, the others are its layer-matched random controls.
        labels: {task: (n,)}.
        unpruned: {task: (seeds, n)}, predictions with nothing pruned.
        lesioned: {task: (seeds, fractions, tasks, 1 + controls, n)}, predictions of that task with
            a head set pruned.
        apart: More examples, which were not evaluated under lesions; of every task, or of none.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    fractions: tuple[float, ...]
    heads: Bool[np.ndarray, "seeds fractions tasks sets layers heads"]
    labels: dict[str, Num[np.ndarray, " n"]]
    unpruned: dict[str, Num[np.ndarray, "seeds n"]]
    lesioned: dict[str, Num[np.ndarray, "seeds fractions tasks sets n"]]
    apart: dict[str, Unlesioned] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"{len(self.heads)} seed(s), {self.controls} control(s)"
        return f"IAP({', '.join(self.tasks)}; fractions {self.fractions}; {sizes})"

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
        """Every task's random controls, as many heads in each layer as its top heads."""
        return self._lesions(slice(1, None))

    def _lesions(self, sets: int | slice) -> Lesions:
        predictions = {u: self.lesioned[u][:, :, :, sets] for u in self.tasks}
        return Lesions(self.heads[:, :, :, sets], predictions, self._scores(predictions))

    def baseline(self) -> Float[np.ndarray, "seeds tasks"]:
        """Return S0, the score of every task with nothing pruned."""
        return self._scores(self.unpruned)

    def _scores(self, predictions: Arrays) -> Float[np.ndarray, "*sets scored"]:
        pairs = zip(self.metrics, self.tasks, strict=True)
        return np.stack([metric_score(m, predictions[u], self.labels[u]) for m, u in pairs], -1)

    def chance(self) -> Float[np.ndarray, " tasks"]:
        """Return the score of each task's best constant answer."""
        pairs = zip(self.metrics, self.tasks, strict=True)
        return np.array([chance_level(m, self.labels[u]) for m, u in pairs])

    def part(
        self, tasks: Sequence[str] | None = None, examples: Callable[[int], np.ndarray] = np.arange
    ) -> "IAP":
        """Return the same for some of the tasks and some of every task's examples.

        Args:
            tasks: As pruned and as scored; None for all.
            examples: Returns the positions to keep of n examples, as `fslib.claims.score_half`
                does.

        Raises:
            FslibError: For another task, and where fewer than two examples are left.
        """
        names = self.tasks if tasks is None else tuple(tasks)
        for name in names:
            check_among("task of this pruning", name, self.tasks)
        at = [self.tasks.index(name) for name in names]
        kept = {u: examples(len(self.labels[u])) for u in names}
        if short := [u for u in names if len(kept[u]) < 2]:
            raise FslibError(f"fewer than two examples of task {short[0]} are left")
        return replace(
            self,
            tasks=names,
            metrics=tuple(self.metrics[i] for i in at),
            heads=self.heads[:, :, at],
            labels={u: self.labels[u][kept[u]] for u in names},
            unpruned={u: self.unpruned[u][:, kept[u]] for u in names},
            lesioned={u: self.lesioned[u][:, :, at][..., kept[u]] for u in names},
            apart={u: self.apart[u] for u in names if u in self.apart},
        )

    def dissociation(
        self, convention: str = "lesion", *, draws: int = DRAWS, seed: int = 0
    ) -> "Dissociation":
        """Return the dissociation score per fraction and task, with intervals and p.

        Intervals: two-way t over seeds and examples, each example's influence by leaving it out
        (`fslib.intervals`); with one seed, over examples alone. They are taken of D, of the mean D
        of the matched random heads, and of the difference of the two.

        p: label permutation. If it did not matter which task's lesion is called a task's own, every
        relabelling would be as likely as the true one; p is the share of relabellings, drawn for
        each model by itself, with a D at least as large. `p_shared`: the same relabelling for all
        models, a stricter question with few possible answers.

        The last row is the mean over the headline fractions (10 and 30 %, where they are among
        those pruned), the last column the mean over tasks.

        Args:
            convention: As `fslib.dissociation` takes it.
            draws: The most relabellings that are counted.
            seed: For the relabellings, where not all are counted.
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
        """The places, in `fractions`, of those D is averaged over.

        10 and 30 %, or all where neither is pruned.
        """
        every = range(len(self.fractions))
        return [i for i in every if round(self.fractions[i], 9) in HEADLINE] or list(every)

    def _scored(self, convention: str, scores: np.ndarray, unpruned: np.ndarray) -> np.ndarray:
        """Return D, (*sets, rows, cols), with its means.

        Over tasks as last column, over fractions as last row.
        """
        d = dissociation(scores, unpruned, convention, self.chance())
        d = np.concatenate([d, d.mean(-1, keepdims=True)], -1)
        return np.concatenate([d, d[..., self.headline, :].mean(-2, keepdims=True)], -2)

    def _cells(self, convention: str, lesions: Lesions) -> Cells:
        """Return D under some lesions, and every example's influence on it.

        Of random heads, D is that of the mean score over controls.
        """
        scores, base = _over_controls(lesions.scores), self.baseline()
        values = self._scored(convention, scores, base[:, None])
        influence = {}
        for i, (u, metric) in enumerate(zip(self.tasks, self.metrics, strict=True)):
            labels, n = self.labels[u], len(self.labels[u])
            # (seeds, fractions, tasks, [controls,] n)
            left = left_out_scores(metric, lesions.predictions[u], labels)
            left_scores, left_base = np.repeat(scores[None], n, 0), np.repeat(base[None], n, 0)
            left_scores[..., i] = np.moveaxis(_over_controls(left), -1, 0)
            left_base[..., i] = left_out_scores(metric, self.unpruned[u], labels).T
            # (n, seeds, rows, cols)
            without = self._scored(convention, left_scores, left_base[:, :, None])
            influence[u] = np.moveaxis((n - 1) * (values - without), 0, 1)
        return Cells(values, influence)

    def _relabelled(self, convention: str, draws: int, rng: np.random.Generator) -> np.ndarray:
        """Return D of every model and cell under each relabelling, the true labels first.

        (orders, *cells).
        """
        own = tuple(range(len(self.tasks)))
        if math.factorial(len(own)) <= max(draws, 24):
            orders = list(permutations(own))
        else:
            orders = [own, *(tuple(rng.permutation(len(own))) for _ in range(draws))]
        base, scores = self.baseline()[:, None], self.top.scores
        return np.stack([self._scored(convention, scores[:, :, order], base) for order in orders])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, as stored beside a record."""
        named = {"heads": self.heads}
        for part in _PARTS:
            named |= {f"{part}/{u}": getattr(self, part)[u] for u in self.tasks}
        for u, (labels, predictions) in self.apart.items():
            named |= {f"labels apart/{u}": labels, f"unpruned apart/{u}": predictions}
        return named

    @classmethod
    def from_arrays(
        cls, tasks: Sequence[str], metrics: Sequence[str], fractions: Sequence, arrays: Arrays
    ) -> "IAP":
        """Make an `IAP` again from what `arrays` returned."""
        labels, unpruned, lesioned = ({u: arrays[f"{k}/{u}"] for u in tasks} for k in _PARTS)
        apart = {
            u: Unlesioned(arrays[f"labels apart/{u}"], arrays[f"unpruned apart/{u}"])
            for u in tasks
            if f"labels apart/{u}" in arrays
        }
        names = tuple(tasks), tuple(metrics), tuple(fractions)
        return cls(*names, arrays["heads"], labels, unpruned, lesioned, apart)

    @classmethod
    def over_seeds(cls, runs: Sequence["IAP"]) -> "IAP":
        """Put runs that differ in nothing but the seed together.

        Raises:
            FslibError: For no run, what is no run, and runs that differ in more.
        """
        runs = list(runs) if isinstance(runs, Sequence) else [runs]
        if not runs or not all(isinstance(run, IAP) for run in runs):
            raise FslibError("no runs to put together: prune_important_heads returns one")
        first, each = runs[0], [run.arrays() for run in runs]
        labels = {name: array for name, array in each[0].items() if name.startswith("labels")}
        named = {(r.tasks, r.metrics, r.fractions, r.heads.shape[1:], *r.arrays()) for r in runs}
        if len(named) > 1 or any(not np.array_equal(a[k], labels[k]) for a in each for k in labels):
            what = "tasks, fractions, controls, model shape or evaluation examples"
            raise FslibError(f"runs differ in {what}: they cannot be averaged")
        parts = {k: np.concatenate([arrays[k] for arrays in each]) for k in each[0]}
        return cls.from_arrays(first.tasks, first.metrics, first.fractions, parts | labels)


class Point(
    namedtuple(
        "Point",
        "value low high by_seed random random_low random_high "
        "above above_low above_high p p_shared",
    )
):
    """One cell of a `Dissociation`, in points; arrays where several cells are asked for.

    Attributes:
        value: D, the mean over seeds; `low` and `high`: the ends of its interval.
        by_seed: (seeds,) D of every model.
        random: D of matched random heads; `random_low`, `random_high`: as above.
        above: D minus that; `above_low`, `above_high`: as above.
        p: Of the relabelling of each model by itself, in (0, 1].
        p_shared: Of the same relabelling for all models, in (0, 1].
    """


@dataclass(frozen=True, eq=False)
class Dissociation:
    """Dissociation scores, in points: arrays (fractions + 1, tasks + 1).

    The last column and the last row are the means.

    Args:
        convention: As `fslib.dissociation` takes it.
        tasks: Names, in the order of the columns.
        fractions: In the order of the rows.
        top: D of every task's top heads.
        controls: The mean D of the matched random heads, None without controls.
        p: One-sided, of the label permutation (`IAP.dissociation`).
        p_shared: The same, all models relabelled alike.
        null: D of the draws of `p`, (draws, rows, cols).
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
        above = self.top - self.controls if self.controls else None
        found = {"by_seed": self.top.values, "p": self.p, "p_shared": self.p_shared}
        for name, cells in (("", self.top), ("random_", self.controls), ("above_", above)):
            low, high = cells.intervals() if cells else (undefined, undefined)
            value = cells.values.mean(0) if cells else undefined
            found |= {name.rstrip("_") or "value": value, f"{name}low": low, f"{name}high": high}
        return found

    @property
    def mean(self) -> Point:
        """The mean over tasks and the headline fractions: the number that decides."""
        return self._point(-1, -1)

    def of(self, task: str) -> Point:
        """Return one task's D over the headline fractions."""
        return self._point(-1, self._column(task))

    def along(self, task: str = "mean") -> Point:
        """Return D at every fraction, arrays (fractions,), of one task or of the mean."""
        return self._point(slice(len(self.fractions)), self._column(task))

    def measure(self, task: str = "mean", *, above_random: bool = False) -> Measure:
        """Return D over the headline fractions, per model and with influences.

        Args:
            task: Its name, or "mean" for the mean over tasks.
            above_random: Minus the mean D of matched random heads.

        Raises:
            FslibError: For another task, and where there are no random heads to compare with.
        """
        if above_random and self.controls is None:
            raise FslibError("nothing to compare with: prune with controls=1 or more")
        cells = self.top - self.controls if above_random and self.controls else self.top
        return cells.measure(-1, self._column(task))

    def _column(self, task: str) -> int:
        names = (*self.tasks, "mean")
        check_among("task of this dissociation", task, names)
        return names.index(task)

    def _point(self, rows: int | slice, column: int) -> Point:
        # [()] makes a number of what would be an array without axes
        return Point(*(self._arrays[field][..., rows, column][()] for field in Point._fields))

    def frame(self) -> pd.DataFrame:
        """Return one row per fraction and task.

        "mean" is the mean over tasks, or over the headline fractions.
        """
        rows, fractions = [], [*map(str, self.fractions), "mean"]
        for (i, fraction), task in product(enumerate(fractions), (*self.tasks, "mean")):
            point = self._point(i, self._column(task))
            row = {"convention": self.convention, "fraction": fraction, "task": task}
            row |= {name: getattr(point, field) for name, field in _COLUMNS.items()}
            rows.append(row | {"seed min": point.by_seed.min(), "seed max": point.by_seed.max()})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return str(self.frame().round(3).to_string(index=False))

    def _repr_html_(self) -> str:
        return str(self.frame().round(3).to_html(index=False))


def _over_controls(scores: np.ndarray) -> Float[np.ndarray, "seeds fractions tasks last"]:
    """Return the mean over the axis of controls, the fourth, where there is one."""
    return scores.mean(3) if scores.ndim == 5 else scores


def score_left(scores: Float[np.ndarray, "*axes scored"], unpruned: np.ndarray) -> np.ndarray:
    """Return what a lesion leaves of a score, in % of the unpruned one (broadcast).

    NaN where that is not > 0.
    """
    return 100 * (scores / np.where(unpruned > 0, unpruned, np.nan))


def double_dissociations(left: Float[np.ndarray, "pruned scored"]) -> Bool[np.ndarray, "_ _"]:
    """Return which pairs of tasks are hurt more by their own lesions (Shallice, 1988).

    Args:
        left: left[t, u] is what is left of task u's score with t's top heads pruned.

    Returns:
        (tasks, tasks), symmetric, False on the diagonal.
    """
    own = np.diagonal(left)
    worse = own[None, :] < left  # worse[t, u]: u's own lesion hurts u more than t's does
    return worse & worse.T
