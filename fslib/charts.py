"""Plots of notebooks 04 to 08, in the style of `figures`: tables in, a matplotlib Figure out, nothing computed.

Ours in colour, controls and references in grey; a horizontal bar is always a 95 % interval.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fslib.dissociation import Dissociation
from fslib.figures import COLOURS, GREY, MARKERS, looks, panels, percent, styled

CONTROLS = ("random", "least", "mixed", "trunk")


def _is_control(name: str) -> bool:
    return any(word in name for word in CONTROLS)


def _forest(ax: Axes, names: Iterable[str], value: Iterable, low: Iterable, high: Iterable, **options: object) -> None:
    """Values with intervals, one row a name, the first on top."""
    names = list(names)
    rows = np.arange(len(names))
    middle, least, most = (np.array(list(x), dtype=float) for x in (value, low, high))
    for row, name in enumerate(names):
        colour = GREY if _is_control(name) else options.get("color", COLOURS[0])
        ax.errorbar(
            middle[row],
            row,
            xerr=[[middle[row] - least[row]], [most[row] - middle[row]]],
            fmt="D" if _is_control(name) else "o",
            color=colour,
            capsize=2,
            markersize=4,
        )
    ax.set_yticks(rows, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)


@styled
def encoders(table: pd.DataFrame) -> Figure:
    """Left: mean dissociation of each encoder (interval) beside random heads'. Right: what it learned, over chance."""
    figure, (left, right) = panels(2, 0.9 + 0.27 * len(table), sharey=True, width_ratios=[1.5, 1])
    names = table["encoder"]
    _forest(left, names, table["D"], table["low"], table["high"])
    left.plot(
        table["random heads"], range(len(table)), "|", color=GREY, markersize=11, mew=2, label="random heads, matched"
    )
    left.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D, mean over tasks and fractions (points)")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.barh(range(len(table)), table["above chance by"], color="#bbbbbb", height=0.55)
    right.set(xlabel="score above chance (points)")
    percent(right, "x")
    return figure


@styled
def selections(table: pd.DataFrame) -> Figure:
    """Left: dissociation that each way to choose heads yields. Right: its rank correlation with the default."""
    figure, (left, right) = panels(2, 0.9 + 0.24 * len(table), sharey=True, width_ratios=[1.5, 1])
    _forest(left, table["selection"], table["D"], table["low"], table["high"])
    left.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D, mean over tasks (points)")
    right.barh(range(len(table)), table["rank correlation"].fillna(0), color="#bbbbbb", height=0.55)
    right.set(xlabel="rank correlation with the first", xlim=(min(0, table["rank correlation"].min()), 1))
    return figure


@styled
def similarity(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """One panel a measure: similarity of the pair against the dissociation of a model trained on it."""
    measures = list(correlations["similarity"])
    figure, axes = panels(len(measures) + 1, 2.3, 3, sharey=True)
    for ax, (_, row) in zip(axes, correlations.iterrows(), strict=False):
        for i, (_, pair) in enumerate(table.iterrows()):
            ax.errorbar(
                pair[row["similarity"]],
                pair["D"],
                yerr=[[pair["D"] - pair["low"]], [pair["high"] - pair["D"]]],
                fmt=MARKERS[i % 7],
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


@styled
def endings(table: pd.DataFrame, against: str = "plain") -> Figure:
    """Left: mean score minus plain training's. Then the same for each task."""
    tasks = list(dict.fromkeys(table["task"]))
    tasks = ["mean", *(t for t in tasks if t != "mean")]
    names = [n for n in dict.fromkeys(table["ending"]) if n != against]
    figure, axes = panels(len(tasks), 0.8 + 0.22 * len(names), sharey=True, width_ratios=[1.6, *[1] * (len(tasks) - 1)])
    for ax, task in zip(axes, tasks, strict=True):
        part = table[table["task"] == task].set_index("ending").loc[names]
        colour = "black" if task == "mean" else looks(tasks[1:])[task]["color"]
        _forest(ax, names, *(100 * part[k] for k in (f"minus {against}", "diff low", "diff high")), color=colour)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_title("mean over tasks" if task == "mean" else task)
    figure.supxlabel(f"score minus that of {against} multi-task training, same trunk (points)", fontsize=8.5)
    return figure


@styled
def ending_dissociation(table: pd.DataFrame, against: str = "plain") -> Figure:
    """Left: dissociation at the end of training. Right: its difference from plain training's."""
    part = table[table["task"] == "mean"]
    figure, (left, right) = panels(2, 0.8 + 0.26 * len(part), sharey=True)
    _forest(left, part["ending"], part["D"], part["low"], part["high"])
    _forest(right, part["ending"], part[f"minus {against}"], part["diff low"], part["diff high"])
    for ax in (left, right):
        ax.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D (points)")
    right.set(xlabel=f"D minus that of {against} training (points)")
    return figure


@styled
def transfer_curves(table: pd.DataFrame, chance: float) -> Figure:
    """Score on the target against its training examples, one panel a part that is trained, one line a source."""
    parts = list(dict.fromkeys(table["part"]))
    figure, axes = panels(len(parts), 2.7, sharey=True)
    sources = list(dict.fromkeys(table["source"]))
    for ax, part in zip(axes, parts, strict=True):
        for i, source in enumerate(sources):
            rows = table[(table["part"] == part) & (table["source"] == source) & (table["size"] != "mean")]
            x = np.array([float(s) for s in rows["size"]]) * (1 + 0.05 * (i - 1))  # side by side, not on top
            ax.errorbar(
                x,
                rows["score"],
                yerr=[rows["score"] - rows["low"], rows["high"] - rows["score"]],
                color=GREY if source == "pre-trained" else COLOURS[i - 1],
                marker=MARKERS[i],
                capsize=2,
                label=source,
            )
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set(title=f"trained on the target: {part}" + (" model" if part == "full" else " only"))
        ax.set(xlabel="training examples of the target")
        percent(ax)
    axes[0].set_ylabel("score on the target (%)")
    axes[0].legend()
    return figure


@styled
def teaser(
    maps: Mapping[str, Float[np.ndarray, "layers heads"]],
    sets: Mapping[str, Bool[np.ndarray, "layers heads"]],
    retained: pd.DataFrame,
    random_left: Mapping[str, float],
    found: Dissociation,
) -> Figure:
    """The method on two tasks in three pictures, and the main result.

    maps, sets: importance and top heads of two tasks. retained: pruned task by scored task, % of the unpruned score.
    random_left: the same under matched random heads, by task.
    """
    figure, axes = panels(4, 2.75, width_ratios=[1, 1, 1.3, 1.35])
    score, choose, lesion, result = axes
    tasks = list(maps)
    style = looks(found.tasks)
    layers, heads = maps[tasks[0]].shape
    for ax, title in ((score, "1  score every head"), (choose, "2  prune a task's top heads")):
        ax.set_title(title, loc="left")
        ax.set(xlim=(-0.6, heads - 0.4), ylim=(-0.6, 2 * layers + 1.9), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, task in enumerate(tasks):
        base = (1 - i) * (layers + 1.3)
        top = maps[task] / maps[task].max()
        for layer in range(layers):
            for head in range(heads):
                place = (head - 0.42, base + layer - 0.42)
                colour = style[task]["color"]
                score.add_patch(
                    Rectangle(place, 0.84, 0.84, facecolor=colour, alpha=0.06 + 0.94 * top[layer, head], lw=0)
                )
                chosen = bool(sets[task][layer, head])
                choose.add_patch(Rectangle(place, 0.84, 0.84, facecolor="white" if chosen else "#cccccc", lw=0))
                if chosen:
                    choose.plot(head, base + layer, marker="x", color=colour, markersize=4, mew=1.3)
        for ax in (score, choose):
            ax.text(-0.5, base + layers - 0.35, task, color=style[task]["color"], fontweight="bold", va="bottom")
    score.set_xlabel(f"{heads} heads, {layers} layers (first below)", fontsize=7.5)
    choose.set_xlabel("output set to 0", fontsize=7.5)
    lesion.set_title("3  who suffers?", loc="left")
    for i, scored in enumerate(tasks):
        other = tasks[1 - i]
        bars = (
            (retained.loc[scored, scored], style[scored]["color"], "own"),
            (retained.loc[other, scored], style[other]["color"], "other's"),
            (random_left[scored], "#bbbbbb", "random"),
        )
        for j, (height, colour, name) in enumerate(bars):
            lesion.bar(4 * i + j, height, color=colour, width=0.85)
            lesion.text(4 * i + j, height + 2, name, ha="center", fontsize=6.5, rotation=90, va="bottom")
    lesion.set_xticks([1, 5], tasks, fontsize=7)
    lesion.set(ylabel="score left (%)", ylim=(0, 130), yticks=[0, 25, 50, 75, 100])
    own, others = retained.loc[tasks[0], tasks[0]], retained.loc[tasks[1], tasks[0]]
    lesion.add_patch(FancyArrowPatch((-0.62, others), (-0.62, own), arrowstyle="<->", mutation_scale=6, lw=0.9))
    lesion.text(-0.75, (own + others) / 2, "$D$", ha="right", va="center")
    lesion.set_xlim(-1.6, 6.8)
    result.set_title("Result: all tasks", loc="left")
    x, rows = 100 * np.array(found.fractions), slice(len(found.fractions))
    result.fill_between(x, found.null_low[rows, -1], found.null_high[rows, -1], color=GREY, alpha=0.25, lw=0)
    result.plot(x, found.null_mean[rows, -1], color=GREY, linestyle="--", linewidth=1, label="random heads")
    value, low, high = (a[rows, -1] for a in (found.value, found.low, found.high))
    result.errorbar(x, value, yerr=[value - low, high - value], color="black", marker="o", capsize=3, label="top heads")
    result.axhline(0, color="black", linewidth=0.6)
    result.set(xlabel="heads pruned (%)", ylabel="dissociation $D$ (points)", xticks=x)
    result.legend(loc="upper right", bbox_to_anchor=(1.02, 1.02))
    return figure
