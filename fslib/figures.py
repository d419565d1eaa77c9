"""Every plot. Each function takes arrays or tables and returns a matplotlib Figure; nothing is computed here.

One colour and one marker per task throughout (Okabe and Ito's palette, told apart by colour-blind readers);
controls and chance are grey. Text is 8 to 9 points at the printed width of 7 inches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslib.dissociation import Dissociation

WIDTH = 7.0  # inches: two columns of a page
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "lines.markersize": 4.5,
}


def looks(tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each task, by its place in the study's list of tasks."""
    return {t: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]} for i, t in enumerate(tasks)}


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with this module's style, and leave the caller's as it is."""

    @wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(STYLE):  # type: ignore[arg-type]
            figure = plot(*args, **kwargs)
            figure.draw_without_rendering()  # tick labels take their size when they are first drawn
        return figure

    return drawn


def panels(n: int, height: float, columns: int = 0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the standard width with n axes, `height` inches a row."""
    columns = columns or n
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows), squeeze=False, layout="constrained", **options
    )
    for spare in axes.flat[n:]:
        spare.set_visible(False)
    plt.close(figure)  # shown once, where a notebook names it, not a second time at the end of the cell
    return figure, list(axes.flat[:n])


def percent(axes: Axes, which: str = "y") -> None:
    getattr(axes, f"{which}axis").set_major_formatter(lambda value, _: f"{100 * value:g}")


@styled
def lengths_and_labels(lengths: Mapping[str, np.ndarray], balance: Mapping[str, Mapping[str, int]]) -> Figure:
    """Left: tokens per example, task by task. Right: how often each label occurs (shares of the train split)."""
    style = looks(list(lengths))
    figure, (left, right) = panels(2, 2.6)
    top = max(int(v.max()) for v in lengths.values())
    for task, values in lengths.items():
        left.hist(
            values,
            bins=np.arange(0, top + 3, 3).tolist(),
            density=True,
            histtype="step",
            linewidth=1.4,
            color=style[task]["color"],
            label=task,
        )
    left.set(xlabel="tokens per training example", ylabel="density")
    left.legend()
    for row, (task, counts) in enumerate(balance.items()):
        start, total = 0.0, sum(counts.values())
        for i, (label, count) in enumerate(counts.items()):
            share = count / total
            fade = 0.85 - 0.6 * i / max(1, len(counts) - 1)
            right.barh(row, share, left=start, color=style[task]["color"], alpha=fade, edgecolor="white")
            text = label if share > 0.025 * len(label) else label[:4] + "."
            right.text(start + share / 2, row, text, ha="center", va="center", fontsize=7)
            start += share
    right.set_yticks(range(len(balance)), list(balance))
    right.invert_yaxis()
    right.set_xlabel("share of training examples (%)")
    percent(right, "x")
    return figure


@styled
def learning_curves(losses: Mapping[str, pd.DataFrame], curves: pd.DataFrame, chance: Mapping[str, float]) -> Figure:
    """Left: training loss (running mean) per task. Right: evaluation score along training, one line a seed.

    losses[task]: columns step, loss, averaged over seeds. curves: columns seed, step, then one per task.
    """
    style = looks(list(losses))
    figure, (left, right) = panels(2, 2.7)
    for task, frame in losses.items():
        left.plot(frame["step"], frame["loss"], color=style[task]["color"], label=task)
        for _, run in curves.groupby("seed"):
            right.plot(run["step"], run[task], **style[task], linewidth=1)  # type: ignore[arg-type]
        right.axhline(chance[task], color=style[task]["color"], linestyle=":", linewidth=0.9)
    left.set(xlabel="step (one batch of one task)", ylabel="training loss, running mean")
    left.legend()
    right.set(xlabel="step", ylabel="evaluation score (%)")
    percent(right)
    return figure


@styled
def score_intervals(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Scores with intervals, one panel a task, one row a method. table: task, method, score, low, high."""
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


@styled
def importance_maps(maps: Mapping[str, Float[np.ndarray, "layers heads"]], columns: int = 2) -> Figure:
    """Layer-by-head importance, one panel a task, layer 1 at the bottom, each as a share of its largest value."""
    layers, heads = next(iter(maps.values())).shape
    figure, axes = panels(len(maps), 0.6 + 0.19 * layers, columns, sharex=True, sharey=True)
    for i, (ax, (task, values)) in enumerate(zip(axes, maps.items(), strict=True)):
        image = ax.imshow(values / values.max(), origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
        ax.set_title(task)
        ax.set_xticks(range(heads), [str(h + 1) for h in range(heads)])
        ax.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        if i % columns == 0:
            ax.set_ylabel("layer")
        if i >= len(maps) - columns:
            ax.set_xlabel("head")
    figure.colorbar(image, ax=axes, label="share of the task's largest", pad=0.02)
    return figure


@styled
def matrices(frames: Mapping[str, pd.DataFrame], label: str, *, fmt: str = ".2f", diverging: bool = False) -> Figure:
    """Annotated matrices side by side on one colour scale (diverging: centred at 0)."""
    figure, axes = panels(len(frames), 2.5, min(3, len(frames)))
    values = np.concatenate([f.to_numpy(dtype=float).ravel() for f in frames.values()])
    limit = float(np.nanmax(np.abs(values)))
    low, high = (-limit, limit) if diverging else (float(np.nanmin(values)), float(np.nanmax(values)))
    for i, (ax, (title, frame)) in enumerate(zip(axes, frames.items(), strict=True)):
        sns.heatmap(
            frame.astype(float),
            ax=ax,
            annot=True,
            fmt=fmt,
            cmap="PuOr" if diverging else "viridis",
            vmin=low,
            vmax=high,
            cbar=False,
            square=True,
            annot_kws={"fontsize": 7},
            linewidths=0.5,
        )
        for row in range(len(frame) if frame.index.equals(frame.columns) else 0):
            ax.add_patch(plt.Rectangle((row, row), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
        ax.set_title(title)
        ax.set(xlabel=frame.columns.name or "", ylabel=(frame.index.name or "") if i % 3 == 0 else "")
        ax.tick_params(axis="x", rotation=40, length=0)
        ax.tick_params(axis="y", rotation=0, length=0)
        if i % 3:
            ax.set_yticklabels([])
    figure.colorbar(axes[0].collections[0], ax=axes, label=label, shrink=0.7, pad=0.02)
    return figure


@styled
def stability(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Rank correlation with the full sample against sample size. table: task, examples, mean, low, high."""
    style = looks(tasks)
    figure, (ax,) = panels(1, 2.6)
    figure.set_size_inches(WIDTH * 0.6, 2.6)
    for task in tasks:
        part = table[table["task"] == task]
        ax.plot(part["examples"], part["mean"], **style[task], label=task)  # type: ignore[arg-type]
        ax.fill_between(part["examples"], part["low"], part["high"], color=style[task]["color"], alpha=0.15, lw=0)
    ax.axhline(0.95, color=GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="examples scored", ylabel="rank correlation with a disjoint sample")
    ax.legend()
    return figure


@styled
def pruning_curves(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """One panel per evaluated task: its own lesion, the other tasks' lesions, and the matched random band.

    table: scored, pruned (a task, or "random"), fraction, score, low, high; fraction 0 is the unpruned model.
    """
    style = looks(tasks)
    figure, axes = panels(len(tasks), 2.6, min(2, len(tasks)), sharex=True)
    for ax, scored in zip(axes, tasks, strict=True):
        part = table[table["scored"] == scored]
        band = part[part["pruned"] == "random"]
        ax.fill_between(band["fraction"], band["low"], band["high"], color=GREY, alpha=0.25, lw=0, label="random heads")
        ax.plot(band["fraction"], band["score"], color=GREY, linestyle="--", linewidth=1)
        for pruned in tasks:
            line = part[part["pruned"] == pruned]
            own = pruned == scored
            ax.plot(
                line["fraction"],
                line["score"],
                **style[pruned],  # type: ignore[arg-type]
                linewidth=2.2 if own else 1,
                alpha=1 if own else 0.75,
                label=f"top heads of {pruned}",
                zorder=3 if own else 2,
            )
            if own:
                low, high = line["score"] - line["low"], line["high"] - line["score"]
                ax.errorbar(
                    line["fraction"],
                    line["score"],
                    yerr=[low, high],
                    fmt="none",
                    color=style[pruned]["color"],
                    capsize=2,
                )
        ax.set_title(f"scored: {scored}", color=style[scored]["color"], fontweight="bold")
        ax.set_ylabel("score (%)")
        percent(ax)
        percent(ax, "x")
    for ax in axes[-min(2, len(tasks)) :]:
        ax.set_xlabel("heads pruned (%)")
        ax.tick_params(labelbottom=True)  # also where the panel below stays empty
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def dissociation_by_fraction(results: Sequence[Dissociation]) -> Figure:
    """One panel a convention: mean dissociation (black, interval), each task's, and the matched random band."""
    figure, axes = panels(len(results), 3.0)
    for ax, found in zip(axes, results, strict=True):
        x, rows = np.array(found.fractions), slice(len(found.fractions))  # without the mean over fractions
        style = looks(found.tasks)
        ax.fill_between(x, found.null_low[rows, -1], found.null_high[rows, -1], color=GREY, alpha=0.25, lw=0)
        ax.plot(x, found.null_mean[rows, -1], color=GREY, linestyle="--", linewidth=1, label="mean, random heads")
        for i, task in enumerate(found.tasks):
            ax.plot(x, found.value[rows, i], **style[task], linewidth=1, alpha=0.8, label=task)  # type: ignore[arg-type]
        error = [found.value[rows, -1] - found.low[rows, -1], found.high[rows, -1] - found.value[rows, -1]]
        ax.errorbar(
            x,
            found.value[rows, -1],
            yerr=error,
            color="black",
            marker="o",
            linewidth=2.2,
            capsize=3,
            label="mean, top heads",
        )
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(title=f"convention: {found.convention}", xlabel="heads pruned (%)", ylabel="dissociation D (points)")
        ax.set_xticks(x)
        percent(ax, "x")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure
