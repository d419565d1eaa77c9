"""Notebook 07: claim C5, is an encoder that went through IAT a better start for a new task?"""

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib import claims
from fslib.data.tasks import Task
from fslib.finetuning import PARTS
from fslib.intervals import mean_of
from fslib.plot import COLOURS, GREY, MARKERS, Look, panels, percent, styled, whiskers
from fslib.questions.q06_iat import evaluated_tasks, half_score
from fslib.scoring import chance_level
from fslib.study.study import Study
from fslib.study.units import AS_IT_WAS, PLAIN, RANDOM, TREATED, transfer_name

REFERENCE = "multi-task"
# as the records call them
SOURCES = {AS_IT_WAS: AS_IT_WAS, REFERENCE: PLAIN, "IAT": TREATED, RANDOM: RANDOM}
DIFFERENCE = (f"minus {REFERENCE}", "diff low", "diff high")
COLUMNS = ("part", "source", "target", "size", "seeds", "score", "low", "high", *DIFFERENCE)


class Learned(NamedTuple):
    """What was learned of a target from a source, by every seed's model: (seeds, n) predictions."""

    part: str
    source: str
    target: str
    size: int
    predictions: np.ndarray


def target_tasks(study: Study) -> dict[str, Task]:
    """Return the tasks that no source has seen."""
    return evaluated_tasks(study, study.profile.transfer_targets)


def chance(study: Study) -> dict[str, float]:
    """Return {target: score of the best constant answer}, on the half that is scored."""
    tasks = target_tasks(study)
    labels = {t: claims.halved(task.eval.labels, claims.score_half) for t, task in tasks.items()}
    return {t: chance_level(task.metric, labels[t]) for t, task in tasks.items()}


def _learned(study: Study) -> list[Learned]:
    """Return the predictions of all targets, learned from all sources in both ways."""
    records = [study.store.get(study.source_unit(s)) for s in study.transfer_seeds]
    tasks, sizes, found = target_tasks(study), study.targets().sizes, []
    for part, source, target, size in product(PARTS, SOURCES, tasks, sizes):
        name = transfer_name(target, SOURCES[source], part, size)
        rows = np.stack([record.arrays[name] for record in records])
        n = len(tasks[target].train) if size is None else size
        found.append(Learned(part, source, target, n, rows))
    return found


def learning_curves(study: Study) -> pd.DataFrame:
    """Return a row per part, source, target and size: score, and what it adds to multi-task.

    With rows for the mean over targets and sizes. No row if there is nothing to transfer from.
    """
    if study.no_transfer():
        return pd.DataFrame(columns=COLUMNS)
    tasks, learned, frames = target_tasks(study), _learned(study), []
    for part in PARTS:
        measures: dict[str, dict] = {source: {} for source in SOURCES}
        for f in learned:
            if f.part == part:
                score = half_score(tasks[f.target], f.predictions)
                measures[f.source][f"{f.target}, {f.size}"] = score
        table = claims.paired_differences(measures, REFERENCE, ("source", "item"))
        frames.append(table.assign(part=part, seeds=len(study.transfer_seeds)))
    table = pd.concat(frames, ignore_index=True)
    table[["target", "size"]] = [item.rpartition(", ")[::2] for item in table["item"]]
    return table.replace({"target": {"": "mean"}})[list(COLUMNS)]


def decide(study: Study) -> claims.Evidence:
    """Return what there is on C5: from IAT minus from plain training, and minus random heads.

    Of the full model, the mean over targets and sizes.
    """
    if reason := study.no_transfer():
        return claims.Evidence("C5", (), reason)
    tasks, whole = target_tasks(study), [f for f in _learned(study) if f.part == "full"]
    means = {}
    for source in SOURCES:
        each = [half_score(tasks[f.target], f.predictions) for f in whole if f.source == source]
        means[source] = mean_of(each).scaled(100.0)
    against, parts = {REFERENCE: "plain multi-task training", RANDOM: "IAT with random heads"}, []
    for source, words in against.items():
        difference = means["IAT"] - means[source]
        parts.append(claims.Part.of(f"from IAT minus from {words}", difference))
    return claims.Evidence("C5", tuple(parts), _floor(tasks, whole))


def _floor(tasks: Mapping[str, Task], whole: list[Learned]) -> str:
    """Say where a source is not above the best constant answer, on the half that is not scored."""
    low: dict[str, dict[int, None]] = {t: {} for t in tasks}  # {target: sizes}, each once
    for found in whole:
        task = tasks[found.target]
        answers = found.predictions, task.eval.labels
        rows, labels = (claims.halved(values, claims.gate_half) for values in answers)
        above = claims.above_best_constant(found.target, task.metric, rows, labels)
        if found.source != AS_IT_WAS and above.low <= 0:
            low[found.target][found.size] = None
    named = {t: ", ".join(map(str, sizes)) for t, sizes in low.items() if sizes}
    where = " and ".join(f"{sizes} examples of {t}" for t, sizes in named.items())
    return f"with {where} a source is not above the best constant answer" if where else ""


@styled
def plot_learning_curves(table: pd.DataFrame, chance: Mapping[str, float]) -> Figure:
    """Draw the score against training examples: a row per target, a panel per part trained.

    Args:
        table: Of `learning_curves`; a line per source.
        chance: {target: score of the best constant answer}.
    """
    curves = table[table["target"] != "mean"].astype({"size": float})
    if curves.empty:
        figure, (ax,) = panels(1, 1.0)
        ax.set_axis_off()
        ax.text(0.5, 0.5, claims.NOT_TESTABLE, ha="center", va="center")
        return figure
    chosen = [(target, part) for target in chance for part in PARTS]
    figure, axes = panels(len(chosen), 2.7, len(PARTS), sharey="row")
    sources = list(dict.fromkeys(curves["source"]))
    for ax, (target, part) in zip(axes, chosen, strict=True):
        mine = curves[(curves["part"] == part) & (curves["target"] == target)]
        for i, source in enumerate(sources):
            rows = mine[mine["source"] == source]
            place = rows["size"] * (1 + 0.05 * (i - 1))  # side by side, not on top
            look: Look = {
                "color": GREY if source == AS_IT_WAS else COLOURS[i - 1],
                "marker": MARKERS[i],
            }
            whiskers(ax, place, (rows["score"], rows["low"], rows["high"]), label=source, **look)
        ax.axhline(chance[target], color=GREY, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_xlim(curves["size"].min() / 1.5, curves["size"].max() * 1.5)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        trained = "full model" if part == "full" else f"{part} only"
        ax.set(title=f"{target}, {trained}", xlabel="training examples")
        percent(ax)
    for ax in axes[:: len(PARTS)]:
        ax.set_ylabel("score (%)")
    axes[0].legend()
    return figure
