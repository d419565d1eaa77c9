"""Verify records by computing them again: bit by bit on a machine of the same type, else within tolerances.

On another type of machine sums come out in another order, training drifts, and single predictions differ by more than
the effects that claims are about. So what decides there is not one record: recomputed records take the place of the
stored ones, and the estimates and verdicts of all claims are compared.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fslib.claims import SESOI, Evidence
from fslib.errors import FslibError
from fslib.scoring import rank_correlation
from fslib.study.files import CannotWriteError, scratch_folder
from fslib.study.store import Record, Store, Unit
from fslib.study.study import Study

Decider = Callable[[Study], dict[str, Evidence]]
DECIDING = "08"  # the notebook that decides, on the records of all others
# What a record computed on a machine of another type may differ by before something else must be wrong.
SCORE_TOLERANCE = 0.08  # metric values
AGREEMENT = 0.85  # share of equal predictions
RANK_TOLERANCE = 0.80  # rank correlation of other arrays


@dataclass(frozen=True)
class Comparison:
    """A recomputed record against the stored one: what differs beyond what is allowed, one line each."""

    unit: Unit
    exact: bool
    problems: list[str]
    seconds: float
    again: Record


def verify_unit(study: Study, unit: Unit) -> Comparison:
    """Compute a recorded unit from scratch, in an empty folder, and return how it compares with its record."""
    stored = study.store.load(unit.kind, unit.key)
    if stored is None:
        raise FslibError(f"no record of {unit.kind}-{unit.key} to verify: run fslib run first")
    started = time.perf_counter()
    with scratch_folder() as scratch:
        again = Store(scratch, study.store.threads).get(unit)
    exact = stored.machine == again.machine and stored.versions == again.versions
    return Comparison(
        unit, exact, record_differences(stored, again, exact), time.perf_counter() - started, again
    )


def told(study: Study, unit: Unit, say: Callable[[str], None]) -> Comparison | None:
    """Verify a unit, say how it compares, and return that; None if it cannot be computed again, which is said."""
    name = f"{unit.kind}-{unit.key} ({unit.describe()}"
    try:
        comparison = verify_unit(study, unit)
    except CannotWriteError:
        raise
    except FslibError as error:
        say(f"{name}): cannot be computed again: {error}")
        return None
    how = (
        "bit-equal"
        if comparison.exact
        else "within tolerance (another machine, other threads or other versions)"
    )
    say(f"{name}, {comparison.seconds:.0f} s): {'DIFFERS' if comparison.problems else how}")
    for problem in comparison.problems:
        say(f"    {problem}")
    return comparison


def record_differences(stored: Record, again: Record, exact: bool) -> list[str]:
    """Say where two records of one unit differ: bit by bit (exact), or beyond the tolerances above."""
    problems = _result_differences(stored.result, again.result, exact, "result")
    if stored.arrays.keys() != again.arrays.keys():
        return [*problems, f"arrays {sorted(stored.arrays)} became {sorted(again.arrays)}"]
    for name, old in stored.arrays.items():
        new = again.arrays[name]
        if old.shape != new.shape:
            problems.append(f"{name}: shape {old.shape} became {new.shape}")
            continue
        different = (old != new) & ~(_nan(old) & _nan(new))
        if not different.any():
            continue
        if exact:
            share = float(np.mean(different))
            problems.append(
                f"{name}: {share:.1%} of the values differ, where this machine must repeat them"
            )
        elif old.dtype.kind != "f":
            if (same := 1 - float(np.mean(different))) < AGREEMENT:
                problems.append(f"{name}: {same:.1%} of the values agree, below {AGREEMENT:.0%}")
        elif (_nan(old) != _nan(new)).any():
            problems.append(f"{name}: other values are undefined (NaN)")
        elif (r := rank_correlation(old[~_nan(old)], new[~_nan(new)])) < RANK_TOLERANCE:
            problems.append(f"{name}: rank correlation {r:.3f}, below {RANK_TOLERANCE}")
    return problems


def _nan(values: np.ndarray) -> np.ndarray:
    """Tell, per value, whether it is NaN."""
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)


def _result_differences(old: Any, new: Any, exact: bool, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [p for k in old for p in _result_differences(old[k], new[k], exact, f"{where}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [p for i, (a, b) in pairs for p in _result_differences(a, b, exact, f"{where}[{i}]")]
    if old == new or (old != old and new != new):  # NaN is repeated by NaN
        return []
    if (
        not exact
        and isinstance(old, float)
        and isinstance(new, float)
        and abs(old - new) <= SCORE_TOLERANCE
    ):
        return []
    return [f"{where}: {old} became {new}"]


@dataclass(frozen=True)
class Claims:
    """What becomes of the claims with recomputed records in the place of the stored ones.

    lines: one per number that a claim stands on. changed: the claims whose verdict is another.
    """

    lines: list[str]
    changed: list[str]


def compare_claims(study: Study, records: Sequence[Record], decide: Decider) -> Claims | None:
    """Return how estimates and verdicts move if these records take the place of the stored ones.

    decide: returns what there is on every claim. None where the study does not have the records of all claims.
    """
    if not all(study.store.find(unit) for unit in study.plan(DECIDING)):
        return None
    before, after = decide(study), decide(study.with_records(records))
    lines, changed = [], []
    for claim, old in before.items():
        new, (sesoi, unit) = after[claim], SESOI[claim]
        for part, other in zip(old.parts, new.parts, strict=True):
            moved = f"{part.interval.value:+.2f} became {other.interval.value:+.2f}"
            lines.append(
                f"{claim}, {part.what}: {moved}, smallest effect of interest {sesoi:g} {unit}".rstrip()
            )
        if old.verdict != new.verdict:
            changed.append(f"{claim}: {old.verdict!r} became {new.verdict!r}")
    return Claims(lines, changed)


def told_claims(
    study: Study, again: Sequence[Record], decide: Decider, say: Callable[[str], None]
) -> bool:
    """Say what becomes of the claims with records of this machine, and return whether a verdict is another."""
    claims = compare_claims(study, again, decide) if again else None
    if claims is None:
        return False
    for line in claims.lines:
        say(f"    {line}")
    for change in claims.changed:
        say(f"with the records of this machine, the verdict on {change}")
    return bool(claims.changed)
