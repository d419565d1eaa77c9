"""What is still to be computed costs: seconds per unit, from the records that are there."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fslib.study.records import Record, Unit


def seconds_left(missing: Sequence[Unit], recorded: Iterable[tuple[Unit, Record]]) -> dict[str, float]:
    """Return {key: about how many seconds} of units without a record; one that nothing is known of is left out.

    A unit's tokens (`Unit.passes`) at the rate of recorded units of its kind, or of all kinds where there are none.
    Records of other machines, or of a busy one, make it a guess.
    """
    seconds, passes = defaultdict[str, float](float), defaultdict[str, float](float)
    for unit, record in recorded:
        if unit.passes():
            for kind in (unit.kind, "all"):
                seconds[kind] += record.seconds
                passes[kind] += unit.passes()
    found = {}
    for unit in missing:
        kind = unit.kind if passes[unit.kind] else "all"
        if passes[kind] and unit.passes():
            found[unit.key] = unit.passes() * seconds[kind] / passes[kind]
    return found
