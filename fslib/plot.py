"""What all plots share: style, panels, and the kinds that several questions draw.

One colour and one marker per task throughout (Okabe and Ito's palette, which colour-blind readers
can tell apart); controls and chance are grey. Text is 8 to 9 points at the printed width of 7
inches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from numpy.typing import ArrayLike

Look = dict[str, Any]  # options of a drawing function
WIDTH = 7.0  # inches: two columns of a page
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
# in the name of what is drawn in grey
CONTROLS = ("random", "least", "mixed", "trunk", "bag of words", "majority class")
STYLE: Look = {"font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5}
STYLE |= {"legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "figure.dpi": 110, "lines.markersize": 4.5}


def looks(tasks: Sequence[str]) -> dict[str, Look]:
    """Return colour and marker of each task, by its place in the study's list.

    The eighth has another marker.
    """
    places = {task: (i % 7, (i + i // 7) % 7) for i, task in enumerate(tasks)}
    return {task: {"color": COLOURS[c], "marker": MARKERS[m]} for task, (c, m) in places.items()}


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with this module's style, and leave the caller's as it is."""

    @wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(STYLE):  # type: ignore[arg-type]
            figure = plot(*args, **kwargs)
            figure.draw_without_rendering()  # tick labels take their size when they are first drawn
        # laid out: saved twice and shown, it would be laid out three times more
        figure.set_layout_engine("none")
        return figure

    return drawn


def panels(n: int, height: float, columns: int = 0, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of the standard width and its axes.

    Args:
        n: How many axes.
        height: Of a row, in inches.
        columns: Axes in a row; 0 for all in one.
        options: Of `plt.subplots`.
    """
    columns = columns or n
    rows = -(-n // columns)
    options |= {"figsize": (WIDTH, height * rows), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **options)
    for spare in axes.flat[n:]:
        spare.set_visible(False)
    plt.close(figure)  # else shown a second time at the end of a notebook's cell
    return figure, list(axes.flat[:n])


def short(name: str, most: int = 16) -> str:
    """Return a name cut to `most` characters, so that it leaves room for the plot."""
    return name if len(name) <= most else name[: most - 1] + "…"


def percent(axes: Axes, which: str = "y") -> None:
    """Label an axis of fractions in percent."""
    getattr(axes, f"{which}axis").set_major_formatter(lambda value, _: f"{100 * value:g}")


def set_limits(
    ax: Axes, value: ArrayLike, low: ArrayLike, high: ArrayLike, which: str = "y"
) -> None:
    """Let an axis show all values, and of intervals what leaves values apart.

    Intervals of two seeds may be vast.

    Args:
        ax: The axes.
        value: The values.
        low: Lower ends of their intervals.
        high: Upper ends.
        which: "x" or "y".
    """
    middle, least, most = (np.append(np.asarray(x, dtype=float), 0.0) for x in (value, low, high))
    if np.isfinite(middle[:-1]).any():
        bottom, top = float(np.nanmin(middle)), float(np.nanmax(middle))
        room, margin = 1.2 * (top - bottom) or 1.0, 0.04 * (top - bottom) or 0.1
        lowest, highest = np.nanmin([*least, *middle]), np.nanmax([*most, *middle])
        limits = max(lowest - margin, bottom - room), min(highest + margin, top + room)
        getattr(ax, f"set_{which}lim")(limits)


def whiskers(ax: Axes, at: Any, ends: Iterable[Any], which: str = "y", **look: Any) -> None:
    """Draw estimates with their intervals.

    Args:
        ax: Where to draw.
        at: The place of each estimate on the other axis.
        ends: Estimates, lower and upper ends of their intervals.
        which: The axis that the estimates lie on.
        **look: Options of `Axes.errorbar`.
    """
    place, value, low, high = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (at, *ends))
    x, y = (place, value) if which == "y" else (value, place)
    options: Look = {"capsize": 2, f"{which}err": [value - low, high - value]}
    ax.errorbar(x, y, **options | look)


def band(ax: Axes, x: ArrayLike, ends: Iterable[Any], label: str, around: str = "") -> None:
    """Draw estimates of controls over x, dashed, in a grey band of their intervals.

    Args:
        ax: Where to draw.
        x: The places of the estimates.
        ends: Estimates, lower and upper ends of their intervals.
        label: Of the line.
        around: Label of the band; "": none.
    """
    value, *interval = ends
    ax.fill_between(x, *interval, color=GREY, alpha=0.25, lw=0, label=around)
    ax.plot(x, value, color=GREY, linestyle="--", linewidth=1, label=label)


def forest(ax: Axes, names: Iterable[str], ends: Iterable[Any], label: str, **look: Any) -> None:
    """Draw estimates with their intervals, one row per name, the first on top.

    Those of `CONTROLS` are grey.

    Args:
        ax: Where to draw.
        names: Of the rows.
        ends: Estimates, lower and upper ends of their intervals.
        label: Of the axis of the estimates.
        **look: Options of `Axes.errorbar`.
    """
    names = list(names)
    for row, (name, *estimate) in enumerate(zip(names, *ends, strict=True)):
        mine: Look = {"fmt": "o", "color": COLOURS[0], "markersize": 4} | look
        if any(word in name for word in CONTROLS):
            mine |= {"fmt": look.get("fmt", "D"), "color": GREY}
        whiskers(ax, row, estimate, "x", **mine)
    name_rows(ax, names)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_xlabel(label)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of a panel, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def zero(ax: Axes, which: str = "x") -> None:
    """Draw a line where the values of an axis are 0."""
    line = ax.axvline if which == "x" else ax.axhline
    line(0, color="black", linewidth=0.6)


def legend_below(figure: Figure, ax: Axes, columns: int) -> Legend:
    """Put the legend of one of a figure's axes below all of them."""
    return figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


@styled
def matrices(
    frames: Mapping[str, pd.DataFrame], label: str, *, fmt: str = ".2f", diverging: bool = False
) -> Figure:
    """Draw annotated matrices on one colour scale (diverging: centred at 0)."""
    columns = min(3, len(frames))
    figure, axes = panels(len(frames), 1.1 + 4.2 / max(columns, 2), columns)
    values = np.concatenate([f.to_numpy(dtype=float).ravel() for f in frames.values()])
    limit = float(np.nanmax(np.abs(values)))
    ends = (-limit, limit) if diverging else (float(np.nanmin(values)), float(np.nanmax(values)))
    look: Look = {"annot": True, "fmt": fmt, "annot_kws": {"fontsize": 7}}
    look |= {"cmap": "PuOr" if diverging else "viridis", "vmin": ends[0], "vmax": ends[1]}
    look |= {"cbar": False, "square": True, "linewidths": 0.5}
    outline: Look = {"fill": False, "edgecolor": "black", "linewidth": 1.6}
    for i, (ax, (title, frame)) in enumerate(zip(axes, frames.items(), strict=True)):
        sns.heatmap(frame.astype(float), ax=ax, **look)
        for row in range(len(frame) if frame.index.equals(frame.columns) else 0):
            ax.add_patch(plt.Rectangle((row, row), 1, 1, **outline))
        ax.set(title=title, xlabel=frame.columns.name or "")
        ax.set(ylabel=(frame.index.name or "") if i % 3 == 0 else "")
        ax.tick_params(axis="x", length=0)
        plt.setp(ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        ax.tick_params(axis="y", rotation=0, length=0)
        if i % 3:
            ax.set_yticklabels([])
    figure.colorbar(axes[0].collections[0], ax=axes, label=label, shrink=0.7, pad=0.02)
    return figure


def map_of(ax: Axes, values: Float[np.ndarray, "layers heads"], **options: Any) -> AxesImage:
    """Draw a map of layers by heads, layer 1 below; options: of `imshow`."""
    layers, heads = values.shape
    image = ax.imshow(values, origin="lower", aspect="auto", **options)
    ax.set_xticks(range(heads), [str(h + 1) for h in range(heads)])
    ax.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


@styled
def head_maps(maps: Mapping[str, Float[np.ndarray, "layers heads"]], columns: int = 2) -> Figure:
    """Draw a panel per task: every head's share of the largest importance."""
    layers = len(next(iter(maps.values())))
    figure, axes = panels(len(maps), 0.6 + 0.19 * layers, columns, sharex=True, sharey=True)
    for i, (ax, (task, values)) in enumerate(zip(axes, maps.items(), strict=True)):
        image = map_of(ax, values / values.max(), cmap="viridis", vmin=0, vmax=1)
        ax.set_title(task)
        if i % columns == 0:
            ax.set_ylabel("layer")
        if i >= len(maps) - columns:
            ax.set_xlabel("head")
    figure.colorbar(image, ax=axes, label="share of the task's largest", pad=0.02)
    return figure
