"""The teaser: the method on two tasks in three pictures, and beside it the main result."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fslib.iap import Dissociation
from fslib.plot import Look, band, looks, panels, set_limits, short, styled, whiskers, zero


class Story(NamedTuple):
    """What the teaser shows: the method on two tasks, and the main result.

    Attributes:
        maps: Importance of the heads for each of the two tasks.
        heads: The top heads of each.
        left: Pruned task by scored task, % of the unpruned score.
        random_left: The same under matched random heads, per task.
        result: D of all tasks.
        tasks: All tasks of the study, for their colours.
    """

    maps: Mapping[str, Float[np.ndarray, "layers heads"]]
    heads: Mapping[str, Bool[np.ndarray, "layers heads"]]
    left: pd.DataFrame
    random_left: Mapping[str, float]
    result: Dissociation
    tasks: tuple[str, ...]


@styled
def plot_teaser(story: Story) -> Figure:
    """Draw the method on two tasks in three pictures, and the main result."""
    figure, (score, choose, lesion, result) = panels(4, 2.75, width_ratios=[1, 1, 1.3, 1.35])
    _draw_heads(score, choose, story)
    _draw_lesions(lesion, story)
    _draw_result(result, story.result)
    return figure


def _draw_heads(score: Axes, choose: Axes, story: Story) -> None:
    """Draw every head of both tasks: how important it is, and whether it is pruned."""
    style = looks(story.tasks)
    layers, heads = next(iter(story.maps.values())).shape
    for ax, title in ((score, "1  score heads"), (choose, "2  prune top heads")):
        ax.set_title(title, loc="left")
        ax.set(xlim=(-0.6, heads - 0.4), ylim=(-0.6, 2 * layers + 1.9), aspect="equal")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, (task, values) in enumerate(story.maps.items()):
        base, colour = (1 - i) * (layers + 1.3), style[task]["color"]
        share, chosen = values / values.max(), story.heads[task]
        for place in np.ndindex(layers, heads):
            x, y = place[1], base + place[0]
            corner, dark = (x - 0.42, y - 0.42), 0.06 + 0.94 * share[place]
            face = "white" if chosen[place] else "#cccccc"
            score.add_patch(Rectangle(corner, 0.84, 0.84, facecolor=colour, alpha=dark, lw=0))
            choose.add_patch(Rectangle(corner, 0.84, 0.84, facecolor=face, lw=0))
            if chosen[place]:
                choose.plot(x, y, marker="x", color=colour, markersize=4, mew=1.3)
        words: Look = {"color": colour, "fontweight": "bold", "va": "bottom"}
        for ax in (score, choose):
            ax.text(-0.5, base + layers - 0.35, short(task), **words)
    score.set_xlabel(f"{heads} heads, {layers} layers (first below)", fontsize=7.5)
    choose.set_xlabel("output set to 0", fontsize=7.5)


def _draw_lesions(ax: Axes, story: Story) -> None:
    """Draw what is left of both tasks' scores under each lesion, and D between them."""
    style, tasks, left = looks(story.tasks), list(story.maps), story.left
    words: Look = {"ha": "center", "fontsize": 6.5, "rotation": 90, "va": "bottom"}
    ax.set_title("3  who suffers?", loc="left")
    for i, (scored, other) in enumerate((tasks, tasks[::-1])):
        bars = (
            (left.loc[scored, scored], style[scored]["color"], "own"),
            (left.loc[other, scored], style[other]["color"], "other's"),
            (story.random_left[scored], "#bbbbbb", "random"),
        )
        for x, (height, colour, name) in enumerate(bars, start=4 * i):
            ax.bar(x, height, color=colour, width=0.85)
            ax.text(x, height + 2, name, **words)
    ax.set_xticks([1, 5], [short(task) for task in tasks], fontsize=7)
    ax.set(ylabel="score left (%)", ylim=(0, 130), yticks=[0, 25, 50, 75, 100])
    ends = [(left.loc[task, task], left.loc[other, task]) for task, other in (tasks, tasks[::-1])]
    gaps = [others - own for own, others in ends]
    if np.isfinite(gaps).any():  # where it is widest, it can be seen
        i = int(np.nanargmax(gaps))
        (own, others), edge = ends[i], 4 * i - 0.62
        look: Look = {"arrowstyle": "<->", "mutation_scale": 6, "lw": 0.9}
        ax.add_patch(FancyArrowPatch((edge, others), (edge, own), **look))
        ax.text(edge - 0.13, (own + others) / 2, "$D$", ha="right", va="center")
    ax.set_xlim(-1.6, 6.8)


def _draw_result(ax: Axes, result: Dissociation) -> None:
    """Draw mean D at every fraction, and that of matched random heads, with intervals."""
    ax.set_title(f"Result: {len(result.tasks)} tasks", loc="left")
    x, mean = 100 * np.array(result.fractions), result.along()
    band(ax, x, (mean.random, mean.random_low, mean.random_high), "random heads")
    top: Look = {"color": "black", "marker": "o", "capsize": 3, "label": "top heads"}
    whiskers(ax, x, (mean.value, mean.low, mean.high), **top)
    zero(ax, "y")
    low, high = np.append(mean.low, mean.random_low), np.append(mean.high, mean.random_high)
    set_limits(ax, np.append(mean.value, mean.random), low, high)
    ax.set(xlabel="heads pruned (%)", ylabel="dissociation $D$ (points)", xticks=x)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2))
