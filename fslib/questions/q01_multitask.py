"""Notebook 01: does one encoder learn all tasks at once, and does that pay or cost?"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import paired_differences
from fslib.intervals import Measure, score_measure
from fslib.plot import forest, looks, panels, percent, styled
from fslib.questions.tables import SCORE_ENDS, columns, minus
from fslib.study.study import Study

REFERENCE = "multi-task"


def losses(study: Study, window: int = 15) -> dict[str, pd.DataFrame]:
    """Return each task's training loss: a running mean over its own steps, averaged over seeds."""
    grid = np.linspace(0, study.profile.steps, 41)[1:]
    found = {}
    for i, name in enumerate(study.profile.tasks):
        curves = []
        for record in study.multitask():
            steps = np.flatnonzero(record.arrays["order"] == i)
            if len(steps):
                running = pd.Series(record.arrays["losses"][steps]).rolling(window, min_periods=1)
                curves.append(np.interp(grid, steps + 1, running.mean()))
        found[name] = pd.DataFrame({"step": grid, "loss": np.mean(curves, 0) if curves else np.nan})
    return found


def curves(study: Study) -> pd.DataFrame:
    """Return evaluation scores along training: seed, step, and one column per task."""
    runs = zip(study.seeds, study.multitask(), strict=True)
    frames = [pd.DataFrame(record.result["curve"]).assign(seed=seed) for seed, record in runs]
    return pd.concat(frames).astype({"step": int})


def scores(study: Study) -> pd.DataFrame:
    """Return a row per task and method: score, and paired difference from multi-task training.

    Of `alone_seeds`, so that every comparison is between models of the same seeds.
    """
    measures = _measures(study)
    table = paired_differences(measures, REFERENCE, ("method", "task"), with_mean=False)
    by_seed = pd.Series([m.values for by_task in measures.values() for m in by_task.values()])
    table["seeds"] = by_seed.map(len)
    table["seed min"], table["seed max"] = by_seed.map(np.min), by_seed.map(np.max)
    order = table["task"].map(list(study.tasks).index).sort_values(kind="stable").index
    names = ["task", "method", "seeds", *SCORE_ENDS, "seed min", "seed max", *minus(REFERENCE)]
    return table.loc[order, names].reset_index(drop=True)


def _measures(study: Study) -> dict[str, dict[str, Measure]]:
    """Return {method: {task: score of every seed's model}}."""
    found: dict[str, dict[str, Measure]] = {}
    together = [study.training(s) for s in study.alone_seeds]
    for t, task in study.tasks.items():
        alone = [study.training(s, t) for s in study.alone_seeds]
        units: dict[str, list] = {REFERENCE: together, "single-task": alone}
        units["bag of words"] = [study.words()]
        answers = {
            method: [study.store.get(unit).arrays[f"predictions/{t}"] for unit in some]
            for method, some in units.items()
        }
        constant = 0 if task.is_regression else np.bincount(task.train.labels).argmax()
        answers["majority class"] = [np.full(len(task.eval), constant)]
        for method, rows in answers.items():
            measure = score_measure(t, task.metric, np.stack(rows), task.eval.labels)
            found.setdefault(method, {})[t] = measure
    return found


def sentence(row: pd.Series) -> str:
    """Say whether a method, a row of `scores`, is better or worse than multi-task training."""
    low, high = row["diff low"], row["diff high"]
    word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    return (
        f"{row['task']}: {row['method']} is {word} {REFERENCE} (difference "
        f"{100 * row[f'minus {REFERENCE}']:+.1f} points, [{100 * low:+.1f}, {100 * high:+.1f}])"
    )


@styled
def plot_learning_curves(
    losses: Mapping[str, pd.DataFrame], curves: pd.DataFrame, chance: Mapping[str, float]
) -> Figure:
    """Draw, left: training loss per task. Right: score along training, mean and each seed.

    Args:
        losses: Of `losses`.
        curves: Of `curves`.
        chance: {task: score of the best constant answer}.
    """
    style = looks(list(losses))
    figure, (left, right) = panels(2, 2.7)
    for task, frame in losses.items():
        colour = style[task]["color"]
        left.plot(frame["step"], frame["loss"], color=colour, label=task)
        for _, run in curves.groupby("seed"):
            right.plot(run["step"], run[task], color=colour, linewidth=0.5, alpha=0.4)
        mean = curves.groupby("step")[task].mean()
        right.plot(mean.index, mean, **style[task], linewidth=1.4)
        right.axhline(chance[task], color=colour, linestyle=":", linewidth=0.9)
    left.set(xlabel="step (one batch of one task)", ylabel="training loss, running mean")
    left.legend()
    right.set(xlabel="step", ylabel="evaluation score (%)")
    percent(right)
    return figure


@styled
def plot_scores(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw scores with intervals, of `scores`: one panel per task, one row per method."""
    figure, axes = panels(len(tasks), 1.9, sharey=True)
    methods, style = list(dict.fromkeys(table["method"])), looks(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        part = table[table["task"] == task].set_index("method").loc[methods]
        look = {"fmt": style[task]["marker"], "color": style[task]["color"], "markersize": None}
        forest(ax, methods, columns(part, SCORE_ENDS), "score (%)", **look)
        ax.set_title(task)
        percent(ax, "x")
    return figure
