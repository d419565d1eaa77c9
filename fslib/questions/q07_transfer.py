"""Notebook 07: claim C5, is an encoder that went through IAT a better start for a new task?"""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib import claims
from fslib.data.tasks import Task
from fslib.finetuning import PARTS
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import COLOURS, GREY, MARKERS, Look, panels, percent, styled, whiskers
from fslib.questions.q06_iat import evaluated_tasks, half_score
from fslib.questions.tables import SCORE_ENDS, columns, minus, scope
from fslib.scoring import chance_level
from fslib.study.study import Study
from fslib.study.units import AS_IT_WAS, PLAIN, RANDOM, TREATED, transfer_name

REFERENCE = "multi-task"
# as the records call them
SOURCES = {AS_IT_WAS: AS_IT_WAS, REFERENCE: PLAIN, "IAT": TREATED, RANDOM: RANDOM}
DIFFERENCE = minus(REFERENCE)
COLUMNS = ("part", "source", "target", "size", "seeds", *SCORE_ENDS, *DIFFERENCE)


def target_tasks(study: Study) -> dict[str, Task]:
    """Return the tasks that no source has seen."""
    return evaluated_tasks(study, study.profile.transfer_targets)


def chance(study: Study) -> dict[str, float]:
    """Return {target: score of the best constant answer}, on the half that is scored."""
    tasks = target_tasks(study)
    labels = {t: claims.halved(task.eval.labels, claims.score_half) for t, task in tasks.items()}
    return {t: chance_level(task.metric, labels[t]) for t, task in tasks.items()}


def _answers(study: Study, part: str) -> dict[str, dict[str, np.ndarray]]:
    """Return {source: {"target, size": what every seed's model answers}}, (seeds, n)."""
    records = [study.store.get(study.source_unit(s)) for s in study.transfer_seeds]
    tasks = target_tasks(study)
    found: dict[str, dict[str, np.ndarray]] = {source: {} for source in SOURCES}
    for source, target, size in product(SOURCES, tasks, study.targets().sizes):
        name = transfer_name(target, SOURCES[source], part, size)
        n = size or len(tasks[target].train)
        found[source][f"{target}, {n}"] = np.stack([record.arrays[name] for record in records])
    return found


def _scores(study: Study, part: str) -> dict[str, dict[str, Measure]]:
    """Return the same as scores."""
    tasks = target_tasks(study)
    return {
        source: {
            of: half_score(tasks[of.rpartition(", ")[0]], rows) for of, rows in answers.items()
        }
        for source, answers in _answers(study, part).items()
    }


def learning_curves(study: Study) -> pd.DataFrame:
    """Return a row per part, source, target and size: score, and what it adds to multi-task.

    With rows for the mean over targets and sizes. No row if there is nothing to transfer from.
    """
    if study.no_transfer():
        return pd.DataFrame(columns=COLUMNS)
    frames = []
    for part in PARTS:
        table = claims.paired_differences(_scores(study, part), REFERENCE, ("source", "of"))
        frames.append(table.assign(part=part, seeds=len(study.transfer_seeds)))
    table = pd.concat(frames, ignore_index=True)
    table[["target", "size"]] = [of.rpartition(", ")[::2] for of in table["of"]]
    return table.replace({"target": {"": "mean"}})[list(COLUMNS)]


def decide(study: Study) -> claims.Claim:
    """Return what there is on C5: from IAT minus from plain training, and minus random heads.

    Of the full model, the mean over targets and sizes.
    """
    of, n = scope_of(study), len(study.transfer_seeds)
    if reason := study.no_transfer():
        return claims.Claim("C5", (), of, n, reason)
    scores = _scores(study, "full")
    means = {source: mean_of([*each.values()]).scaled(100.0) for source, each in scores.items()}
    against = {REFERENCE: "plain multi-task training", RANDOM: "IAT with random heads"}
    parts = tuple(
        claims.Part(f"from IAT minus from {words}", (means["IAT"] - means[source]).interval())
        for source, words in against.items()
    )
    return claims.Claim("C5", parts, of, n, _floor(study) or no_gain(study))


def scope_of(study: Study) -> str:
    """Say what C5 is decided on."""
    p, tasks = study.profile, study.source_tasks
    sizes = ", ".join("all" if size is None else f"{size:,}" for size in p.transfer_sizes)
    more = f"new tasks: {', '.join(p.transfer_targets)}, from {sizes} examples"
    steps = study.training(0, small=True, tasks=tasks).steps if tasks else 0
    return scope(p.small_encoder, len(study.transfer_seeds), steps, tasks, more)


def no_gain(study: Study) -> str:
    """Say on which targets plain multi-task training helps nothing, or nothing ("") if it does.

    Beside the encoder as it was, on the half of the examples that is not scored.
    """
    tasks, answers = target_tasks(study), _answers(study, "full")
    worse = []
    for t, task in tasks.items():
        labels = claims.halved(task.eval.labels, claims.gate_half)
        gains = []
        for of, rows in answers[REFERENCE].items():
            if of.rpartition(", ")[0] == t:
                pair = (claims.halved(x, claims.gate_half) for x in (rows, answers[AS_IT_WAS][of]))
                plain, before = (score_measure(t, task.metric, x, labels) for x in pair)
                gains.append(plain - before)
        if not mean_of(gains).interval().low > 0:
            worse.append(t)
    where = ", ".join(worse)
    return f"multi-task training itself is no better start than none: {where}" if worse else ""


def _floor(study: Study) -> str:
    """Say where a source is not above the best constant answer, on the half that is not scored."""
    tasks, answers = target_tasks(study), _answers(study, "full")
    low: dict[str, list[str]] = {t: [] for t in tasks}  # {target: sizes}, each once
    for of in answers[REFERENCE]:
        t, _, size = of.rpartition(", ")
        metric, labels = tasks[t].metric, claims.halved(tasks[t].eval.labels, claims.gate_half)
        for source in SOURCES.keys() - {AS_IT_WAS}:
            rows = claims.halved(answers[source][of], claims.gate_half)
            if claims.above_best_constant(t, metric, rows, labels).low <= 0 and size not in low[t]:
                low[t].append(size)
    where = " and ".join(f"{', '.join(sizes)} examples of {t}" for t, sizes in low.items() if sizes)
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
    for ax, (target, part) in zip(axes, chosen, strict=True):
        mine = curves[(curves["part"] == part) & (curves["target"] == target)]
        for i, (source, rows) in enumerate(mine.groupby("source", sort=False)):
            place = rows["size"] * (1 + 0.05 * (i - 1))  # side by side, not on top
            look: Look = {"color": GREY if source == AS_IT_WAS else COLOURS[i - 1]}
            look |= {"marker": MARKERS[i], "label": source}
            whiskers(ax, place, columns(rows, SCORE_ENDS), **look)
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
