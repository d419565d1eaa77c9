"""IAP, important attention-head pruning: switch off each task's most important heads and see who suffers.

For every task t and fraction alpha: the top heads of t are pruned, and every task u is evaluated. The same
is done for layer-matched random sets. `IAP` keeps every prediction, so that scores, dissociation, intervals
and nulls are computed afterwards, from arrays, in any convention.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Num

from fslib.data.tasks import Task, as_tasks
from fslib.errors import FslibError, unknown
from fslib.evaluation import EVAL_BATCH, length_batches, predict
from fslib.heads import head_count, random_heads, top_heads
from fslib.importance import head_importance, mean_context
from fslib.model.attention import ABLATIONS, pruned
from fslib.model.multitask import MultiTaskModel
from fslib.progress import bar
from fslib.scoring import (
    bootstrap_counts,
    chance_level,
    dissociation,
    interval,
    metric_score,
    p_value,
    random_choices,
)

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 2000  # bootstrap draws
NULL_DRAWS = 20_000  # permutation draws; if there are no more combinations than this, all of them: an exact p


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
        return self.heads.shape[3] - 1

    def baseline(self) -> Float[np.ndarray, "seeds tasks"]:
        """S0: score of every task with nothing pruned."""
        return np.stack([self._metric(u, self.unpruned[u]) for u in self.tasks], -1)

    def scores(self) -> Float[np.ndarray, "seeds fractions tasks sets tasks"]:
        """S: last axis the scored task, third axis the task whose heads (or matched controls) were pruned."""
        return np.stack([self._metric(u, self.lesioned[u]) for u in self.tasks], -1)

    def chance(self) -> Float[np.ndarray, " tasks"]:
        """Score of the best constant answer, task by task."""
        return np.array([chance_level(m, self.labels[u]) for u, m in zip(self.tasks, self.metrics, strict=True)])

    def _metric(self, task: str, predictions: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        return metric_score(self.metrics[self.tasks.index(task)], predictions, self.labels[task], counts)

    def score_intervals(
        self, level: float = 0.95, draws: int = DRAWS, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean, low, high) over seeds of the top-head lesions' scores, each (1 + fractions, tasks, tasks).

        First row: nothing pruned. Axes after it: pruned task, scored task. Bootstrap over examples.
        """
        mean, lows, highs = [], [], []
        for u in self.tasks:
            whole = np.broadcast_to(
                self.unpruned[u][:, None, None], (len(self.heads), 1, len(self.tasks), len(self.labels[u]))
            )
            predictions = np.concatenate([whole, self.lesioned[u][:, :, :, 0]], 1)
            counts = bootstrap_counts(len(self.labels[u]), draws, np.random.default_rng(seed))
            low, high = interval(self._metric(u, predictions, counts).mean(0), level)
            mean.append(self._metric(u, predictions).mean(0))
            lows.append(low)
            highs.append(high)
        return np.stack(mean, -1), np.stack(lows, -1), np.stack(highs, -1)

    def dissociation_by_seed(self, convention: str = "lesion") -> Float[np.ndarray, "seeds rows columns"]:
        """The scores alone, model by model, with neither interval nor null; as `Dissociation.by_seed`."""
        top = self.scores()[:, :, :, 0]
        return with_means(dissociation(top, self.baseline()[:, None], convention, self.chance()))

    def dissociation(
        self, convention: str = "lesion", *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
    ) -> "Dissociation":
        """Dissociation score per fraction, per task and as their mean, with interval, null and p.

        Interval: bootstrap over evaluation examples, the same resample for every head set (paired), of the mean
        over seeds; it holds for these trained models and head sets, and is NaN if a resample has no defined D.
        Null: every task's head set is drawn at random among its top heads and its layer-matched controls (a
        permutation test: if top heads are nothing special in their layers, all are alike); p is the share of
        such draws with a score at least as large. The null band is made from the controls alone. With few controls
        only the mean over tasks has power: one task's p is at best about 1 / (controls + 1) ** seeds.
        The last row is the mean over fractions: one number that no choice of a fraction can flatter.
        """
        scores, base, chance = self.scores(), self.baseline(), self.chance()
        by_seed = self.dissociation_by_seed(convention)
        low, high = interval(np.moveaxis(self.bootstrap(convention, draws=draws, seed=seed), 0, -1), level)
        band, p = self._null(scores, base, chance, convention, seed)
        null_low, null_high = interval(np.moveaxis(band, 0, -1), level) if len(band) else (low * np.nan, high * np.nan)
        null_mean = band.mean(0) if len(band) else low * np.nan
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
    ) -> Float[np.ndarray, "draws rows columns"]:
        """Dissociation in bootstrap samples of the evaluation examples, as `Dissociation.value` is laid out.

        over_seeds: resample the models as well, for statements about training and not about these models. The same
        `seed` draws the same resamples, so the difference of two `IAP`s on the same examples is paired.
        """
        chance = self.chance()
        lesioned, unpruned = [], []
        for i, u in enumerate(self.tasks):
            counts = bootstrap_counts(len(self.labels[u]), draws, np.random.default_rng([seed, i]))
            lesioned.append(self._metric(u, self.lesioned[u][:, :, :, 0], counts))  # (seeds, fractions, tasks, draws)
            unpruned.append(self._metric(u, self.unpruned[u], counts))  # (seeds, draws)
        scores = np.moveaxis(np.stack(lesioned, -1), 3, 0)  # (draws, seeds, fractions, pruned, scored)
        base = np.moveaxis(np.stack(unpruned, -1), 1, 0)  # (draws, seeds, scored)
        found = dissociation(scores, base[:, :, None], convention, chance)  # (draws, seeds, fractions, tasks)
        if over_seeds:
            weights = bootstrap_counts(len(self.heads), draws, np.random.default_rng([seed, 1000]))
            return with_means((found * weights[:, :, None, None]).sum(1) / len(self.heads))
        return with_means(found.mean(1))

    def _null(
        self, scores: np.ndarray, base: np.ndarray, chance: np.ndarray, convention: str, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(band, p): null draws from the controls alone, and the permutation p; both end as `with_means`."""
        seeds, fractions, tasks, sets, _ = scores.shape
        if sets == 1:
            return np.empty((0, fractions + 1, tasks + 1)), np.full((fractions + 1, tasks + 1), np.nan)

        def redraw(choice: np.ndarray) -> np.ndarray:  # (draws, seeds * tasks) -> (draws, fractions + 1, tasks + 1)
            choice = choice.reshape(-1, seeds, 1, tasks)
            s, f, t = np.ogrid[:seeds, :fractions, :tasks]
            picked = scores[s, f, t, choice]  # (draws, seeds, fractions, pruned, scored)
            return with_means(dissociation(picked, base[:, None], convention, chance).mean(1))

        rng = np.random.default_rng([seed, 99])
        band = redraw(1 + random_choices(sets - 1, seeds * tasks, NULL_DRAWS, rng))
        exact = sets ** (seeds * tasks) <= NULL_DRAWS
        observed = redraw(np.zeros((1, seeds * tasks), dtype=int))[0]
        return band, p_value(redraw(random_choices(sets, seeds * tasks, NULL_DRAWS, rng)), observed, exact)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as stored beside a record."""
        found = {"heads": self.heads}
        for u in self.tasks:
            found |= {
                f"labels/{u}": self.labels[u],
                f"unpruned/{u}": self.unpruned[u],
                f"lesioned/{u}": self.lesioned[u],
            }
        return found

    @classmethod
    def from_arrays(
        cls, tasks: Sequence[str], metrics: Sequence[str], fractions: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> "IAP":
        """The inverse of `arrays`."""
        parts = [{u: arrays[f"{part}/{u}"] for u in tasks} for part in ("labels", "unpruned", "lesioned")]
        return cls(tuple(tasks), tuple(metrics), tuple(fractions), arrays["heads"], *parts)

    @classmethod
    def over_seeds(cls, runs: Sequence["IAP"]) -> "IAP":
        """Several runs (models trained with different seeds), evaluated on the same examples, as one."""
        if not runs:
            raise FslibError("no runs to put together")
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


def with_means(scores: Float[np.ndarray, "*sets fractions tasks"]) -> Float[np.ndarray, "*sets rows columns"]:
    """Append the mean over tasks as a last column, then the mean over fractions as a last row."""
    scores = np.concatenate([scores, scores.mean(-1, keepdims=True)], -1)
    return np.concatenate([scores, scores.mean(-2, keepdims=True)], -2)


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

    def frame(self) -> pd.DataFrame:
        """One row per fraction and task; "mean" stands for the mean over either."""
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


def prune_important_heads(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    fractions: Sequence[float] = FRACTIONS,
    controls: int = 5,
    *,
    importance: Mapping[str, Float[np.ndarray, "layers heads"]] | None = None,
    reduction: str = "token",
    normalize: str | None = None,
    examples: int | None = None,
    min_per_layer: int = 0,
    iterative: bool = False,
    ablation: str = "zero",
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
) -> IAP:
    """Prune each task's most important heads, and matched random ones, and evaluate every task (Li et al., 2023).

    fractions: shares of all heads, each in (0, 1]. controls: random sets per task and fraction, with as many heads
        in each layer as the task's top heads. importance: {task: (layers, heads)}, or None to score it here on
        `examples` training examples (None: all) with `reduction` and `normalize`. min_per_layer: heads that every
        layer keeps. iterative: score again after each fraction, with what is pruned so far switched off.
    ablation: "zero", or "mean": a head's average output over the training data of the task being evaluated.
    Raises FslibError for a fraction outside (0, 1], or more controls than distinct sets.
    """
    named = as_tasks(tasks)
    fractions = sorted(float(f) for f in fractions)
    total = model.n_layers * model.n_heads
    if not fractions or len({head_count(f, total) for f in fractions}) < len(fractions):
        raise FslibError(
            f"fractions {fractions} of {total} heads: give at least one, and no two that round to one count"
        )
    if controls < 0 or seed < 0:
        raise FslibError(f"controls {controls} and seed {seed}: give 0 or more")
    if ablation not in ABLATIONS:
        raise unknown("ablation", ablation, ABLATIONS)
    wanted = (model.n_layers, model.n_heads)
    for name in named:
        if importance is not None and (name not in importance or importance[name].shape != wanted):
            given = f"of shape {importance[name].shape}" if name in importance else "missing"
            raise FslibError(f"importance of task {name} is {given}; give one of shape {wanted} (layers, heads)")
    options: dict[str, Any] = {"reduction": reduction, "normalize": normalize, "examples": examples, "seed": seed}
    targets = np.zeros((len(fractions), len(named), model.n_layers, model.n_heads), dtype=bool)
    for t, (name, task) in enumerate(named.items()):
        known = importance[name] if importance is not None else head_importance(model, task, **options)
        targets[:, t] = _nested_sets(model, task, known, fractions, min_per_layer, options if iterative else None)
    rng = np.random.default_rng([seed, 2])
    growing = np.moveaxis(targets, 0, 1)  # (tasks, fractions, layers, heads)
    with_controls = [np.concatenate([sets[None], random_heads(sets, controls, rng)]) for sets in growing]
    heads = np.moveaxis(np.stack(with_controls), 2, 0)  # (fractions, tasks, sets, layers, heads)
    means = {
        n: mean_context(model, task, examples=examples, seed=seed) if ablation == "mean" else None
        for n, task in named.items()
    }
    batches = {n: length_batches(model, task.eval, batch_size) for n, task in named.items()}
    unpruned = {n: predict(model, task, batches[n], len(task.eval))[None] for n, task in named.items()}
    lesioned = {n: np.empty((1, *heads.shape[:3], len(task.eval)), unpruned[n].dtype) for n, task in named.items()}
    for place in bar(list(np.ndindex(*heads.shape[:3])), "pruning", "head sets"):
        for n, task in named.items():
            with pruned(model, heads[place], ablation=ablation, mean=means[n]):
                lesioned[n][(0, *place)] = predict(model, task, batches[n], len(task.eval))
    return IAP(
        tuple(named),
        tuple(t.metric for t in named.values()),
        tuple(fractions),
        heads[None],
        {n: task.eval.labels for n, task in named.items()},
        unpruned,
        lesioned,
    )


def _nested_sets(
    model: MultiTaskModel,
    task: Task,
    importance: np.ndarray,
    fractions: Sequence[float],
    min_per_layer: int,
    rescore: dict | None,
) -> Bool[np.ndarray, "fractions layers heads"]:
    """A task's top heads at every fraction; with `rescore`, each step adds the best of the re-scored rest."""
    found: list[np.ndarray] = []
    for fraction in fractions:
        if found and rescore is not None:
            with pruned(model, found[-1]):
                importance = head_importance(model, task, **rescore)
            # what is pruned already scores 0 and must stay in the set
            importance = np.where(found[-1], np.inf, importance)
            importance = np.where(
                np.isinf(importance), importance[np.isfinite(importance)].max(initial=0) + 1, importance
            )
        found.append(top_heads(importance, fraction, min_per_layer=min_per_layer))
    return np.array(found)
