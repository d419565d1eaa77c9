"""Notebook 07: claim C5, is an encoder that went through IAT a better start for a new task?"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import (
    NOT_TESTABLE,
    Evidence,
    Half,
    Part,
    above_best_constant,
    gate_half,
    halved,
    paired_differences,
    score_half,
)
from fslib.data.tasks import Task
from fslib.finetuning import PARTS
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import COLOURS, GREY, MARKERS, panels, percent, styled
from fslib.scoring import chance_level
from fslib.study.fingerprints import cached_task
from fslib.study.study import Study
from fslib.study.units import AS_IT_WAS, PLAIN, RANDOM, TREATED, transfer_name

SOURCES = {
    AS_IT_WAS: AS_IT_WAS,
    "multi-task": PLAIN,
    "IAT": TREATED,
    RANDOM: RANDOM,
}  # as the records call them
REFERENCE = "multi-task"
DIFFERENCE = (f"minus {REFERENCE}", "diff low", "diff high")
COLUMNS = ("part", "source", "target", "size", "seeds", "score", "low", "high", *DIFFERENCE)

Results = dict[
    str, dict[str, dict[tuple[str, str], np.ndarray]]
]  # {part: {source: {(target, size): (seeds, n)}}}


def target_tasks(study: Study) -> dict[str, Task]:
    """Return the tasks that no source has seen."""
    return {
        t: cached_task(t).limited(eval=study.profile.ending_examples)
        for t in study.profile.transfer_targets
    }


def _sizes(study: Study, target: str) -> Iterator[tuple[int, int | None]]:
    """Yield a target's numbers of training examples, each with the setting that it comes from (None: all)."""
    for size in study.targets().sizes:
        yield (len(cached_task(target).train) if size is None else size), size


def chance(study: Study) -> dict[str, float]:
    """Return {target: score of the best constant answer}, on the half that is scored."""
    return {
        name: chance_level(task.metric, halved(task.eval.labels, score_half))
        for name, task in target_tasks(study).items()
    }


def _predictions(study: Study, half: Half) -> Results:
    """Return the predictions of the targets' evaluation examples, on a half of them."""
    records = [study.store.get(study.source_unit(s)) for s in study.transfer_seeds]
    found: Results = {part: {source: {} for source in SOURCES} for part in PARTS}
    for part, by_source in found.items():
        for source, by_size in by_source.items():
            for target in study.profile.transfer_targets:
                for n, size in _sizes(study, target):
                    name = transfer_name(target, SOURCES[source], part, size)
                    by_size[target, str(n)] = halved(
                        np.stack([r.arrays[name] for r in records]), half
                    )
    return found


def _measures(study: Study) -> dict[str, dict[str, dict[tuple[str, str], Measure]]]:
    """Return {part: {source: {(target, size): score of every seed's model}}} on the half that is scored."""
    tasks = target_tasks(study)
    labels = {t: halved(task.eval.labels, score_half) for t, task in tasks.items()}
    return {
        part: {
            source: {
                (t, n): score_measure(t, tasks[t].metric, predictions, labels[t])
                for (t, n), predictions in by_size.items()
            }
            for source, by_size in by_source.items()
        }
        for part, by_source in _predictions(study, score_half).items()
    }


def learning_curves(study: Study) -> pd.DataFrame:
    """Return one row per part, source, target and size: score, and its difference from the multi-task source.

    With rows for the mean over targets and sizes. Without a row if there is nothing to transfer from.
    """
    if study.no_transfer():
        return pd.DataFrame(columns=COLUMNS)
    frames = []
    for part, measures in _measures(study).items():
        named = {
            s: {", ".join(item): m for item, m in by_size.items()}
            for s, by_size in measures.items()
        }
        frames.append(paired_differences(named, REFERENCE, ("source", "item")).assign(part=part))
    table = pd.concat(frames, ignore_index=True)
    table["target"] = [item.rpartition(", ")[0] or "mean" for item in table["item"]]
    table["size"] = [item.rpartition(", ")[2] for item in table["item"]]
    return table.assign(seeds=len(study.transfer_seeds))[list(COLUMNS)]


def decide(study: Study) -> Evidence:
    """Return what there is on C5: the full model from IAT minus from plain training, and minus from random heads.

    Mean over targets and sizes.
    """
    if reason := study.no_transfer():
        return Evidence("C5", (), reason)
    curves = _measures(study)["full"]
    means = {
        source: mean_of(list(by_size.values())).scaled(100.0) for source, by_size in curves.items()
    }
    against = ((REFERENCE, "plain multi-task training"), (RANDOM, "IAT with random heads"))
    parts = [
        Part.of(f"from IAT minus from {words}", means["IAT"] - means[source])
        for source, words in against
    ]
    return Evidence("C5", tuple(parts), _floor(study))


def _floor(study: Study) -> str:
    """Say where a source is not above the best constant answer, on the half that no score is computed on."""
    tasks = target_tasks(study)
    labels = {t: halved(task.eval.labels, gate_half) for t, task in tasks.items()}
    low: dict[str, dict[str, None]] = {t: {} for t in tasks}  # {target: sizes}, each once
    for source, by_size in _predictions(study, gate_half)["full"].items():
        for (t, n), predictions in by_size.items() if source != AS_IT_WAS else ():
            if above_best_constant(t, tasks[t].metric, predictions, labels[t]).low <= 0:
                low[t][n] = None
    where = " and ".join(f"{', '.join(sizes)} examples of {t}" for t, sizes in low.items() if sizes)
    return f"with {where} a source is not above the best constant answer" if where else ""


@styled
def plot_learning_curves(table: pd.DataFrame, chance: Mapping[str, float]) -> Figure:
    """Draw the score against training examples: a row of panels per target, one per part trained; a line per source.

    chance: {target: score of the best constant answer}, of `chance`.
    """
    chosen = list(
        table[["target", "part"]][table["size"] != "mean"].drop_duplicates().itertuples(index=False)
    )
    if not chosen:
        figure, (ax,) = panels(1, 1.0)
        ax.set_axis_off()
        ax.text(0.5, 0.5, NOT_TESTABLE, ha="center", va="center")
        return figure
    chosen.sort(key=lambda pair: list(chance).index(pair.target))
    figure, axes = panels(len(chosen), 2.7, len(PARTS), sharey="row")
    sources = list(dict.fromkeys(table["source"]))
    for ax, (target, part) in zip(axes, chosen, strict=True):
        for i, source in enumerate(sources):
            rows = table[
                (table["part"] == part) & (table["source"] == source) & (table["target"] == target)
            ]
            x = np.array([float(s) for s in rows["size"]]) * (
                1 + 0.05 * (i - 1)
            )  # side by side, not on top
            ax.errorbar(
                x,
                rows["score"],
                yerr=[rows["score"] - rows["low"], rows["high"] - rows["score"]],
                color=GREY if source == AS_IT_WAS else COLOURS[i - 1],
                marker=MARKERS[i],
                capsize=2,
                label=source,
            )
        ax.axhline(chance[target], color=GREY, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        sizes = [float(s) for s in table["size"][table["size"] != "mean"]]
        ax.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set(
            title=f"{target}, {part}" + (" model" if part == "full" else " only"),
            xlabel="training examples",
        )
        percent(ax)
    for ax in axes[:: len(PARTS)]:
        ax.set_ylabel("score (%)")
    axes[0].legend()
    return figure
