"""What the plots of several questions draw alike: estimates with intervals, and a legend below."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from numpy.typing import ArrayLike

Look = dict[str, Any]  # options of a drawing function
ENDS = ("value", "low", "high")


def whiskers(
    ax: Axes, at: ArrayLike | float | int, ends: Iterable[Any], which: str = "y", **look: Any
) -> None:
    """Draw estimates with their intervals.

    Args:
        ax: Where to draw.
        at: The place of each estimate on the other axis.
        ends: Estimates, lower and upper ends of their intervals.
        which: The axis that the estimates lie on.
        **look: Options of `Axes.errorbar`.
    """
    place = np.atleast_1d(np.asarray(at, dtype=float))
    value, low, high = (np.atleast_1d(np.asarray(end, dtype=float)) for end in ends)
    x, y = (place, value) if which == "y" else (value, place)
    options: Look = {"capsize": 2, f"{which}err": [value - low, high - value]}
    ax.errorbar(x, y, **options | look)


def legend_below(figure: Figure, ax: Axes, columns: int) -> Legend:
    """Put the legend of one of a figure's axes below all of them."""
    return figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
