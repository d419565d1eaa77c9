"""Verify records by computing them again: the same bits on the same machine, else close ones.

On another type of machine sums come out in another order, training drifts, and single
predictions differ by more than the effects that claims are about. So what decides there is not
one record: recomputed records take the place of the stored ones, and the estimates and verdicts
of all claims are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fslib.claims import SESOI, Claim
from fslib.errors import FslibError
from fslib.scoring import rank_correlation
from fslib.study.files import CannotWriteError, scratch_folder
from fslib.study.store import Record, Store, Unit
from fslib.study.study import Study

Lines = list[str]
Decider = Callable[[Study], dict[str, Claim]]
DECIDING = "08"  # the notebook that decides, on the records of all others
# What a record of another type of machine may differ by before something else must be wrong.
SCORE_TOLERANCE = 0.08  # metric values
AGREEMENT = 0.85  # share of equal predictions
RANK_TOLERANCE = 0.80  # rank correlation of other arrays
CLOSE = "within tolerance (another machine, other threads or other versions)"


@dataclass(frozen=True)
class Comparison:
    """A recomputed record against the stored one.

    Args:
        exact: whether the two must be bit-equal.
        problems: what differs beyond what is allowed, one line each.
        again: the recomputed record.
    """

    exact: bool
    problems: list[str]
    again: Record


def verify_unit(study: Study, unit: Unit) -> Comparison:
    """Compute a recorded unit from scratch, in an empty folder, and compare it with its record."""
    stored = study.store.get(unit)
    with scratch_folder() as scratch:
        again = Store(scratch, study.store.threads).get(unit)
    exact = stored.machine == again.machine and stored.versions == again.versions
    return Comparison(exact, record_differences(stored, again, exact), again)


def told(study: Study, unit: Unit, say: Callable[[str], None]) -> Comparison | None:
    """Verify a unit, say how it compares, and return that; None if it cannot be computed again."""
    name = f"{unit.kind}-{unit.key} ({unit.describe()}"
    try:
        comparison = verify_unit(study, unit)
    except CannotWriteError:
        raise
    except FslibError as error:
        say(f"{name}): cannot be computed again: {error}")
        return None
    how = "DIFFERS" if comparison.problems else "bit-equal" if comparison.exact else CLOSE
    say(f"{name}, {comparison.again.seconds:.0f} s): {how}")
    for problem in comparison.problems:
        say(f"    {problem}")
    return comparison


def record_differences(stored: Record, again: Record, exact: bool) -> list[str]:
    """Say where two records of one unit differ.

    Args:
        stored: the record on the disk.
        again: the recomputed one.
        exact: whether each bit counts; otherwise what is beyond the tolerances above.
    """
    problems = _result_differences(stored.result, again.result, exact, "result")
    if stored.arrays.keys() != again.arrays.keys():
        return [*problems, f"arrays {sorted(stored.arrays)} became {sorted(again.arrays)}"]
    found = {n: _array_difference(a, again.arrays[n], exact) for n, a in stored.arrays.items()}
    return [*problems, *(f"{name}: {how}" for name, how in found.items() if how)]


def _array_difference(old: np.ndarray, new: np.ndarray, exact: bool) -> str:
    """Say how two arrays differ, "" if they do not or not beyond what is allowed."""
    if old.shape != new.shape:
        return f"shape {old.shape} became {new.shape}"
    gone, gone_now = old != old, new != new  # NaN alone differs from itself
    share = float(np.mean((old != new) & ~(gone & gone_now))) if old.size else 0.0
    if not share:
        return ""
    if exact:
        return f"{share:.1%} of the values differ, where this machine must repeat them"
    if old.dtype.kind != "f":
        same = f"{1 - share:.1%} of the values agree, below {AGREEMENT:.0%}"
        return same if 1 - share < AGREEMENT else ""
    if (gone != gone_now).any():
        return "other values are undefined (NaN)"
    r = rank_correlation(old[~gone], new[~gone])
    return f"rank correlation {r:.3f}, below {RANK_TOLERANCE}" if r < RANK_TOLERANCE else ""


def _result_differences(old: Any, new: Any, exact: bool, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [p for k in old for p in _result_differences(old[k], new[k], exact, f"{where}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [p for i, (a, b) in pairs for p in _result_differences(a, b, exact, f"{where}[{i}]")]
    is_same = old == new or (old != old and new != new)  # NaN is repeated by NaN
    may_differ = isinstance(old, float) and isinstance(new, float) and not exact
    is_same |= may_differ and abs(old - new) <= SCORE_TOLERANCE
    return [] if is_same else [f"{where}: {old} became {new}"]


def compare_claims(study: Study, records: Sequence[Record], decide: Decider) -> tuple[Lines, Lines]:
    """Return how estimates and verdicts move if these records replace the stored ones.

    Args:
        study: where it lacks records that a claim stands on, nothing is compared.
        records: recomputed ones.
        decide: returns what there is on every claim.

    Returns:
        A line per number that a claim stands on, and a line per verdict that is another.
    """
    if not records or not all(study.store.find(unit) for unit in study.plan(DECIDING)):
        return [], []
    before, after = decide(study), decide(study.with_records(records))
    lines, changed = [], []
    for claim, old in before.items():
        new, (sesoi, unit) = after[claim], SESOI[claim]
        least = f"smallest effect of interest {sesoi:g} {unit}".rstrip()
        for part, other in zip(old.parts, new.parts, strict=True):
            moved = f"{part.interval.value:+.2f} became {other.interval.value:+.2f}"
            lines.append(f"{claim}, {part.what}: {moved}, {least}")
        if old.verdict != new.verdict:
            changed.append(f"here, the verdict on {claim}: {old.verdict!r} became {new.verdict!r}")
    return lines, changed
