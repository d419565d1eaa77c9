"""What the tables of several questions write alike: columns, intervals as numbers and as text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd

from fslib.heads import overlap, top_heads
from fslib.intervals import Interval
from fslib.model.encoders import ENCODERS
from fslib.scoring import rank_correlation
from fslib.study.profiles import question_of

ENDS = ("value", "low", "high")
D_ENDS = ("D", "low", "high")
SCORE_ENDS = ("score", "low", "high")


Rows = Iterator[tuple[Any, ...]]


def table_of(*names: str) -> Callable[[Callable[..., Rows]], Callable[..., pd.DataFrame]]:
    """Let a function that yields rows return a table with columns of these names."""

    def decorated(rows: Callable[..., Rows]) -> Callable[..., pd.DataFrame]:
        @wraps(rows)
        def table(*args: Any, **kwargs: Any) -> pd.DataFrame:
            return pd.DataFrame(rows(*args, **kwargs), columns=list(names))

        return table

    return decorated


def minus(reference: str) -> list[str]:
    """Return the columns of a difference from a reference, of `fslib.claims.paired_differences`."""
    return [f"minus {reference}", "diff low", "diff high"]


def columns(table: pd.DataFrame, names: Iterable[str]) -> list[pd.Series]:
    """Return columns of a table, such as estimates with the ends of their intervals."""
    return [table[name] for name in names]


def ends(interval: Interval) -> tuple[float, float, float]:
    """Return an estimate and the ends of its 95 % interval."""
    return interval.value, interval.low, interval.high


def said(row: Mapping[str, Any] | pd.Series, columns: Sequence[str], form: str = "+.2f") -> str:
    """Return an estimate with its interval, columns of a row, as text."""
    value, low, high = (format(row[column], form) for column in columns)
    return f"{value} [{low}, {high}]"


def scope(encoder: str, trainings: int, steps: int, tasks: Sequence[str], *more: str) -> str:
    """Say what a verdict is about: encoder, trainings, steps, tasks and what they ask."""
    kind = "one contrastively tuned checkpoint" if ENCODERS.get(encoder, ({}, False))[1] else ""
    asked = dict.fromkeys(filter(None, map(question_of, tasks)))
    about = f" ({', '.join(asked)})" if asked else ""
    models = f"{trainings} training{'s' * (trainings != 1)} of {steps:,} steps"
    words = [", ".join(filter(None, [encoder, kind])), models, f"{len(tasks)} tasks{about}", *more]
    return "; ".join(words)


def agreement(a: np.ndarray, b: np.ndarray, fraction: float) -> tuple[float, float]:
    """Return how two maps of importance agree: in rank, and in their top heads (Jaccard)."""
    return rank_correlation(a, b), overlap(top_heads(a, fraction), top_heads(b, fraction))
