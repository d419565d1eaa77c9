"""Estimate what is still to be computed: seconds per unit, from the records that are there."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fslib.errors import FslibError
from fslib.study.records import Record, Unit


def seconds_left(missing: Sequence[Unit], recorded: Iterable[tuple[Unit, Record]]) -> dict[str, float]:
    """Return {key: about how many seconds} of units without a record; one that nothing is known of is left out.

    What it has to do (`Unit.token_layers`) at the rate of recorded units of its kind, or of all kinds where there are
    none. Records of other machines, or of a busy one, make it a guess.
    """
    seconds, done = defaultdict[str, float](float), defaultdict[str, float](float)
    for unit, record in recorded:
        if work := _work(unit):
            for kind in (unit.kind, "all"):
                seconds[kind] += record.seconds
                done[kind] += work
    found = {}
    for unit in missing if done else ():
        kind = unit.kind if done[unit.kind] else "all"
        if work := _work(unit):
            found[unit.key] = work * seconds[kind] / done[kind]
    return found


def _work(unit: Unit) -> float:
    """Return a unit's `token_layers`, or 0 if its encoder cannot be loaded here: a plan is shown all the same."""
    try:
        return unit.token_layers()
    except FslibError:
        return 0.0
