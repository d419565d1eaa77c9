"""Notebook 01: does one encoder learn all tasks at once, and does it pay or cost to learn them together?"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import paired_differences
from fslib.intervals import score_measure
from fslib.plot import GREY, looks, panels, percent, styled
from fslib.study.study import Study


def losses(study: Study, window: int = 15) -> dict[str, pd.DataFrame]:
    """Return each task's training loss: a running mean over `window` of its steps, averaged over seeds."""
    grid = np.linspace(0, study.profile.steps, 41)[1:]
    losses = {}
    for i, name in enumerate(study.profile.tasks):
        curves = []
        for record in study.multitask():
            steps = np.flatnonzero(record.arrays["order"] == i)
            if len(steps):
                smooth = (
                    pd.Series(record.arrays["losses"][steps]).rolling(window, min_periods=1).mean()
                )
                curves.append(np.interp(grid, steps + 1, smooth))
        losses[name] = pd.DataFrame(
            {"step": grid, "loss": np.mean(curves, 0) if curves else np.nan}
        )
    return losses


def curves(study: Study) -> pd.DataFrame:
    """Return evaluation scores along training: seed, step, and one column per task."""
    rows = [
        {"seed": seed, **point}
        for seed, record in zip(study.seeds, study.multitask(), strict=True)
        for point in record.result["curve"]
    ]
    return pd.DataFrame(rows).astype({"step": int})


def scores(study: Study) -> pd.DataFrame:
    """Return one row per task and method: score, interval, and its paired difference from multi-task training.

    Of `alone_seeds`, so that every comparison is between models of the same seeds.
    """
    frames = []
    for name, task in study.tasks.items():
        measures = {
            method: {name: score_measure(name, task.metric, predictions, task.eval.labels)}
            for method, predictions in _predictions(study, name).items()
        }
        frame = paired_differences(measures, "multi-task", ("method", "task"), with_mean=False)
        by_seed = [measures[method][name].values for method in frame["method"]]
        frame["seeds"] = [len(values) for values in by_seed]
        frame["seed min"], frame["seed max"] = (
            [v.min() for v in by_seed],
            [v.max() for v in by_seed],
        )
        frames.append(frame)
    columns = ["task", "method", "seeds", "score", "low", "high", "seed min", "seed max"]
    return pd.concat(frames, ignore_index=True)[
        [*columns, "minus multi-task", "diff low", "diff high"]
    ]


def _predictions(study: Study, task: str) -> dict[str, np.ndarray]:
    """Return {method: (seeds, n)} predictions of one task's evaluation examples."""
    train, evaluation = study.tasks[task].train, study.tasks[task].eval
    constant = 0 if study.tasks[task].is_regression else np.bincount(train.labels).argmax()
    records = {
        "multi-task": [study.store.get(study.training(s)) for s in study.alone_seeds],
        "single-task": [study.store.get(study.training(s, task)) for s in study.alone_seeds],
        "bag of words": [study.store.get(study.words())],
    }
    predictions = {
        m: np.stack([r.arrays[f"predictions/{task}"] for r in rs]) for m, rs in records.items()
    }
    return predictions | {"majority class": np.full((1, len(evaluation)), constant)}


def sentence(row: pd.Series) -> str:
    """Say whether a method is better or worse than multi-task training, beyond the interval; from a row of `scores`."""
    low, high = row["diff low"], row["diff high"]
    word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    return (
        f"{row['task']}: {row['method']} is {word} multi-task "
        f"(difference {100 * row['minus multi-task']:+.1f} points, [{100 * low:+.1f}, {100 * high:+.1f}])"
    )


@styled
def plot_learning_curves(
    losses: Mapping[str, pd.DataFrame], curves: pd.DataFrame, chance: Mapping[str, float]
) -> Figure:
    """Draw, left: training loss (running mean) per task. Right: evaluation score along training, mean and each seed.

    losses[task]: columns step, loss, averaged over seeds. curves: columns seed, step, then one per task.
    """
    style = looks(list(losses))
    figure, (left, right) = panels(2, 2.7)
    for task, frame in losses.items():
        left.plot(frame["step"], frame["loss"], color=style[task]["color"], label=task)
        for _, run in curves.groupby("seed"):
            right.plot(run["step"], run[task], color=style[task]["color"], linewidth=0.5, alpha=0.4)
        mean = curves.groupby("step")[task].mean()
        right.plot(mean.index, mean, **style[task], linewidth=1.4)  # type: ignore[arg-type]
        right.axhline(chance[task], color=style[task]["color"], linestyle=":", linewidth=0.9)
    left.set(xlabel="step (one batch of one task)", ylabel="training loss, running mean")
    left.legend()
    right.set(xlabel="step", ylabel="evaluation score (%)")
    percent(right)
    return figure


@styled
def plot_scores(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw scores with intervals, one panel per task, one row per method. table: task, method, score, low, high."""
    figure, axes = panels(len(tasks), 1.9, sharey=True)
    methods = list(dict.fromkeys(table["method"]))
    style = looks(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        part = table[table["task"] == task].set_index("method").loc[methods]
        for row, (method, values) in enumerate(part.iterrows()):
            ours = str(method).startswith(("multi", "single"))
            low, high = values["score"] - values["low"], values["high"] - values["score"]
            ax.errorbar(
                values["score"],
                row,
                xerr=[[low], [high]],
                fmt=style[task]["marker"],
                color=style[task]["color"] if ours else GREY,
                capsize=2,
            )
        ax.set(title=task, xlabel="score (%)")
        ax.set_yticks(range(len(methods)), methods)
        ax.set_ylim(len(methods) - 0.5, -0.5)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        percent(ax, "x")
    return figure
