"""Notebook 05: claim C2, the more similar two tasks, the weaker the specialization of a model trained on both?"""

from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field

from fslib.heads import checked_fractions
from fslib.importance import head_importance
from fslib.model.multitask import MultiTaskModel
from fslib.scoring import interval, p_value, rank_correlation
from fslib.similarity import (
    cosine,
    head_overlap,
    importance_similarity,
    linear_cka,
    representations,
    task_embedding,
    task_similarity,
    text_embedding,
)
from fslib.study.evidence import NOT_TESTABLE, exchanged_correlations, verdict
from fslib.study.plots import COLOURS, MARKERS, panels, styled
from fslib.study.records import Result, Store, Unit
from fslib.study.study import Study, plans
from fslib.study.units import SeededFineTuning
from fslib.training import train

MEASURES = ("importance", "top heads", "TaskEmb", "TextEmb", "CKA")
LEAST_PAIRS = 3  # fewer have no rank correlation
PRIMARY = "importance"  # the similarity that decides on C2, chosen beforehand; the others show how much hangs on it


class SimilarityUnit(SeededFineTuning, Unit):
    """Similarity of every two of `tasks`, from models trained on one of them each, for `steps` steps."""

    kind: ClassVar[str] = "similarity"
    examples: int = Field(ge=2)
    fraction: float = Field(0.3, gt=0, le=1)

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads do not allow."""
        super().check()
        checked_fractions([self.fraction], self.shape())

    def compute(self, store: Store) -> Result:
        """Measure on models that never saw the pair, so that no measure shares noise with the pair's dissociation."""
        tasks = self.load()
        shared: dict[str, Any] = {"examples": self.examples, "seed": self.seed}
        parts = [task.part("train", self.examples, self.seed) for task in tasks.values()]
        pretrained = MultiTaskModel.from_pretrained(self.encoder, tasks, max_length=self.max_length)
        evidence: dict[str, list] = {measure: [] for measure in MEASURES}
        for name, task in tasks.items():
            train(model := self.new_model({name: task}), task, **self.options())
            evidence["importance"].append(head_importance(model, task, **shared))
            evidence["TaskEmb"].append(task_embedding(model, task, **shared))
            evidence["TextEmb"].append(text_embedding(pretrained, task, **shared))
            # of one task's pairs and another's single texts alike: all models see the texts of all tasks
            evidence["CKA"].append(np.concatenate([representations(model, part) for part in parts]))
        evidence["top heads"] = evidence["importance"]
        similarity: dict[str, Any] = {
            "importance": importance_similarity,
            "top heads": lambda a, b: head_overlap(a, b, self.fraction),
            "TaskEmb": task_similarity,
            "TextEmb": cosine,
            "CKA": linear_cka,
        }
        matrices = {m: [[float(similarity[m](a, b)) for b in evidence[m]] for a in evidence[m]] for m in MEASURES}
        arrays = {f"importance/{t}": m.astype(np.float32) for t, m in zip(tasks, evidence["importance"], strict=True)}
        return Result({"tasks": list(tasks), "similarity": matrices}, arrays)


def similarity_unit(study: Study) -> SimilarityUnit:
    """Return the similarity of all tasks, from models trained on one task as long as on it in a pair."""
    p = study.profile
    model = study.training(study.seed, small=True, steps=p.small_steps // len(p.tasks))
    return SimilarityUnit(**model.model_dump(), examples=p.small_examples)


def task_pairs(study: Study) -> list[tuple[str, str]]:
    """Return all pairs of the profile's tasks."""
    return list(combinations(study.profile.tasks, 2))


@plans("05")
def plan(study: Study) -> list[Unit]:
    """Return the similarities, and every pair's training, importance and pruning."""
    return [similarity_unit(study), *(u for pair in task_pairs(study) for u in study.small_units(tasks=pair))]


def pairs(study: Study) -> pd.DataFrame:
    """Return one row per pair of tasks: five similarities, and the dissociation of a model trained on that pair."""
    matrices = _matrices(study)
    rows = []
    for pair in task_pairs(study):
        d = study.small_units(tasks=pair).prune.iap(study.store).dissociation(draws=study.profile.draws).mean
        row: dict[str, object] = {"pair": " + ".join(pair)} | {m: matrices[m].loc[pair] for m in MEASURES}
        rows.append(row | {"D": d.value, "low": d.low, "high": d.high, "random heads": d.null_mean, "p": d.p})
    return pd.DataFrame(rows)


def _matrices(study: Study) -> dict[str, pd.DataFrame]:
    """Return {measure: tasks by tasks}, from the record."""
    result = study.store.get(similarity_unit(study)).result
    return {m: pd.DataFrame(result["similarity"][m], result["tasks"], result["tasks"]) for m in MEASURES}


def correlations(study: Study) -> pd.DataFrame:
    """Return one row per similarity: its rank correlation with D over pairs, which C2 says is negative.

    Interval: bootstrap over pairs and, within D, over evaluation examples. p: one-sided, exact, by exchanging the
    names of the tasks in the similarities (Mantel's test), since pairs that share a task are not independent.
    NaN where a D is not defined, and for fewer than three pairs.
    """
    draws, names = study.profile.draws, study.profile.tasks
    iaps = [study.small_units(tasks=pair).prune.iap(study.store) for pair in task_pairs(study)]
    boots = [iap.bootstrap(draws=draws)["mean"] for iap in iaps]
    d, resampled = np.array([b.value for b in boots]), np.stack([b.draws for b in boots], -1)
    indices = [(names.index(a), names.index(b)) for a, b in task_pairs(study)]
    chosen = np.random.default_rng(0).integers(len(indices), size=(draws, len(indices)))
    rows = []
    for measure, frame in _matrices(study).items():
        matrix = frame.loc[list(names), list(names)].to_numpy()
        similar = np.array([matrix[index] for index in indices])
        row: dict[str, object] = {"similarity": measure, "rank correlation with D": np.nan}
        row |= {"low": np.nan, "high": np.nan, "p": np.nan, "pairs": len(indices)}
        if len(indices) >= LEAST_PAIRS and np.isfinite(d).all() and np.isfinite(resampled).all():
            drawn = zip(chosen, resampled, strict=True)
            boot = [rank_correlation(similar[c], r[c]) for c, r in drawn if len(set(c)) >= LEAST_PAIRS]
            low, high = interval(np.array(boot))
            null, exact = exchanged_correlations(matrix, indices, d, np.random.default_rng(0))
            row |= {"rank correlation with D": null[0], "low": float(low), "high": float(high)}
            row |= {"p": float(p_value(-null, np.asarray(-null[0]), exact))}
        rows.append(row)
    return pd.DataFrame(rows)


def primary(table: pd.DataFrame) -> pd.Series:
    """Return the row of `correlations` that decides on C2."""
    return table.set_index("similarity").loc[PRIMARY]


def claim(table: pd.DataFrame) -> str:
    """Return C2's verdict, from `correlations`: the claim is that the correlation is below 0."""
    row = primary(table)
    if np.isnan(row["rank correlation with D"]):
        return NOT_TESTABLE
    return verdict(-row["high"], -row["low"], row["p"])


def sentence(table: pd.DataFrame) -> str:
    """Say what becomes of C2, from `correlations`."""
    row = primary(table)
    rho = row["rank correlation with D"]
    return f"C2 {claim(table)}: {rho:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}], p = {row['p']:.3f}"


@styled
def plot_similarity(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """Draw one panel per measure: similarity of the pair against the dissociation of a model trained on it."""
    measures = list(correlations["similarity"])
    figure, axes = panels(len(measures) + 1, 2.3, 3, sharey=True)
    for ax, (_, row) in zip(axes, correlations.iterrows(), strict=False):
        for i, (_, pair) in enumerate(table.iterrows()):
            ax.errorbar(
                pair[row["similarity"]],
                pair["D"],
                yerr=[[pair["D"] - pair["low"]], [pair["high"] - pair["D"]]],
                fmt=MARKERS[(i + i // 7) % 7],
                color=COLOURS[i % 7],
                capsize=2,
                label=pair["pair"],
            )
        ax.axhline(0, color="black", linewidth=0.6)
        rho = row["rank correlation with D"]
        ax.set_title(f"{row['similarity']}: {rho:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]")
        ax.set_xlabel("similarity")
    for ax in axes[::3]:
        ax.set_ylabel("dissociation D (points)")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center", title="model trained on")
    return figure
