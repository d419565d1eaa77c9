"""What the numbers say, in sentences: every verdict is computed from its interval, whichever way it falls."""

import numpy as np
import pandas as pd

from fslib.pruning import Dissociation

SIGNIFICANCE = 0.05


def verdict(found: Dissociation) -> str:
    """C1 in one sentence, from the mean over tasks and fractions: one test, chosen beforehand."""
    d, low, high, p = (float(a[-1, -1]) for a in (found.value, found.low, found.high, found.p))
    numbers = (
        f"mean D = {d:.1f} points, 95 % interval [{low:.1f}, {high:.1f}], p = {p:.3f} against matched random heads"
    )
    if low > 0 and p < SIGNIFICANCE:
        return f"C1 supported for this model: {numbers}."
    if high < 0 or (p >= SIGNIFICANCE and low <= 0):
        return f"C1 not supported for this model: {numbers}."
    return f"C1 undecided for this model: {numbers}."


def compare(task: str, method: str, row: pd.Series) -> str:
    """One sentence: is multi-task training better or worse than another method, beyond the interval?"""
    low, high = row["diff low"], row["diff high"]
    word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    return (
        f"{task}: multi-task is {word} {method} "
        f"(difference {100 * row['multi-task minus it']:+.1f} points, [{100 * low:+.1f}, {100 * high:+.1f}])"
    )


def importance(correlations: pd.DataFrame, stability: pd.DataFrame) -> str:
    """What the maps say, in numbers: agreement within tasks and between them, and the sample that a ranking needs."""
    values = correlations.to_numpy()
    own = np.eye(len(values), dtype=bool)
    pairs = correlations.where(np.triu(~own)).stack()
    mean = stability.groupby("examples")["mean"].min()
    enough = mean[mean >= 0.95]
    needs = f"from {enough.index[0]} examples on" if len(enough) else f"not within {mean.index.max()} examples"
    return (
        f"Within a task, half samples agree at {values[own].min():.2f} to {values[own].max():.2f}; "
        f"between tasks maps agree at {values[~own].min():.2f} to {values[~own].max():.2f}.\n"
        f"Most alike: {' and '.join(pairs.idxmax())} ({pairs.max():.2f}); "
        f"least alike: {' and '.join(pairs.idxmin())} ({pairs.min():.2f}).\n"
        f"Two disjoint samples rank heads alike (at least 0.95 for every task): {needs}."
    )
