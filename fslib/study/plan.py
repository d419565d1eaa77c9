"""What a profile costs: operations, memory and hours from nothing, on one machine or on many; seconds that are left.

Operations are counted, not measured (`fslib.model.footprint`), of `Unit.token_layers`. Hours follow from a rate that
the reader gives, or that records show. On many machines they come from the scheduler that would run, with a clock in
the place of work.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from fslib.errors import FslibError
from fslib.evaluation import EVAL_BATCH
from fslib.model import footprint
from fslib.study.engine import Done, built_on
from fslib.study.records import Record, Store, Unit
from fslib.study.schedule import Backlog
from fslib.study.units import FineTuning, mean_tokens

HOUR = 3600.0


def fine_tuning(unit: Unit) -> FineTuning | None:
    """Return the fine-tuning that a unit does or measures; None for one that has no encoder."""
    return next((u for u in (unit, *built_on(unit)) if isinstance(u, FineTuning)), None)


def flops(unit: Unit) -> float:
    """Return about how many floating-point operations a unit takes, all of them in layers of the encoder.

    A multiplication and an addition are two. 0 for a unit without an encoder. Raises FslibError where its config cannot
    be loaded.
    """
    model = fine_tuning(unit)
    if model is None:
        return 0.0
    tokens = round(sum(map(model.tokens, model.tasks)) / len(model.tasks))
    each = footprint.forward_flops(model.encoder, tokens) / tokens / model.layers()
    return unit.token_layers() * each


def memory(unit: Unit) -> int:
    """Return about how many bytes a unit takes on its device, beside what torch itself does; 0 without an encoder.

    Of the longest batch that `max_length` allows: of a training step where it trains, else of importance.
    """
    model = fine_tuning(unit)
    if model is None:
        return 0
    if model is unit:
        return footprint.training_bytes(model.encoder, model.batch_size, model.max_length)
    return footprint.measuring_bytes(model.encoder, EVAL_BATCH, model.max_length)


def recorded_rate(recorded: Sequence[tuple[Unit, Record]]) -> float:
    """Return the operations per second that records show, pooled over those that have an encoder; 0 if none has."""
    counted = [(flops(unit), record.seconds) for unit, record in recorded]
    seconds = sum(seconds for work, seconds in counted if work)
    return sum(work for work, _ in counted) / seconds if seconds else 0.0


def checked_rate(tflops: float | None, recorded: Sequence[tuple[Unit, Record]]) -> float:
    """Return the operations per second to plan with: those given in units of 10^12, else those that records show.

    Raises FslibError for a rate that is no positive number, and where nothing shows one.
    """
    if tflops is not None and not 0 < tflops < math.inf:
        raise FslibError(f"--tflops {tflops:g}: give the operations per second that your device reaches, in 10^12")
    rate = recorded_rate(recorded) if tflops is None else tflops * 1e12
    if not rate:
        raise FslibError("nothing is recorded that would show how fast this is: give --tflops, such as --tflops 50")
    return rate


def cost_table(units: Sequence[Unit], rate: float, recorded: Sequence[tuple[Unit, Record]] = ()) -> pd.DataFrame:
    """Return a row per kind of unit and encoder: how many, built on what, operations, memory, hours at a rate.

    rate: operations per second. recorded: units that have a record; if there are any, a column says how many hours
    they took.
    """
    seconds = {unit.key: record.seconds for unit, record in recorded}
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        model = fine_tuning(unit)
        groups.setdefault((unit.kind, model.encoder if model else ""), []).append(unit)
    rows = []
    for (kind, encoder), members in groups.items():
        bases = Counter(base.kind for unit in members for base in built_on(unit))
        row = {"kind": kind, "encoder": encoder, "units": len(members), "built on": ", ".join(bases)}
        total = sum(map(flops, members))
        row |= {"PFLOP": total / 1e15, "GB": max(map(memory, members)) / 2**30, "hours": total / rate / HOUR}
        if recorded:
            row["recorded hours"] = sum(seconds.get(unit.key, 0.0) for unit in members) / HOUR
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Simulation:
    """How units would be spread over workers: hours until the last is done, and the share of them that work took."""

    workers: int
    hours: float
    utilisation: float


def simulate(store: Store, units: Sequence[Unit], seconds: Mapping[str, float], workers: int) -> Simulation:
    """Return how a cluster of so many workers would go through units (of `missing`) that take so many seconds each.

    The order is that of `fslib run --ray`: chains that share a model stay together. Nothing is computed or waited for.
    """
    backlog = Backlog(store, units)
    idle, clock = list(range(workers)), 0.0
    ends: list[tuple[float, int, list[Unit]]] = []  # of each worker's present unit, with what it goes on with
    while True:
        while idle and (chain := backlog.next(chains=True)):
            worker = idle.pop()
            heapq.heappush(ends, (clock + seconds[chain[0].key], worker, chain))
        if not ends:
            break
        clock, worker, (done, *rest) = heapq.heappop(ends)
        backlog.end(Done(done, worker, seconds[done.key]))
        if rest:
            heapq.heappush(ends, (clock + seconds[rest[0].key], worker, rest))
        else:
            idle.append(worker)
    work = sum(seconds[unit.key] for unit in units)
    return Simulation(workers, clock / HOUR, work / (clock * workers) if clock else 0.0)


def longest(units: Sequence[Unit], seconds: Mapping[str, float]) -> float:
    """Return the hours of the longest chain of units that must come one after another: no cluster is faster."""
    ends: dict[str, float] = {}
    for unit in units:  # each after what it is built on
        bases = [ends.get(base.key, 0.0) for base in built_on(unit)]
        ends[unit.key] = max(bases, default=0.0) + seconds[unit.key]
    return max(ends.values(), default=0.0) / HOUR


def plan_lines(store: Store, units: Sequence[Unit], tflops: float | None, workers: Sequence[int]) -> Iterator[str]:
    """Yield what units cost from nothing, line by line, for `fslib plan`; unknown words count as `max_length` tokens.

    Raises FslibError as `checked_rate` does.
    """
    if not units:
        yield "nothing to compute"
        return
    recorded = [(unit, record) for unit in units if (record := store.find(unit))]
    rate = checked_rate(tflops, recorded)
    names = dict.fromkeys(name for unit in units for name in unit.task_names())
    if unknown := [name for name in names if math.isinf(mean_tokens(name))]:
        yield f"not at hand, so counted with published rows of the greatest length: {', '.join(unknown)}"
    table = cost_table(units, rate, recorded)
    left = ("kind", "encoder", "built on")
    justified = table.assign(**{name: table[name].str.ljust(table[name].str.len().max()) for name in left})
    shown = justified.to_string(index=False, justify="left", float_format=lambda value: f"{value:.3g}")
    yield from (line.rstrip() for line in shown.splitlines())
    source = f"that {len(recorded)} records show" if tflops is None else "given"
    yield f"{len(units)} units, {table['PFLOP'].sum():.3g} PFLOP, {rate / 1e12:.3g} TFLOP/s ({source})"
    seconds = {unit.key: flops(unit) / rate for unit in units}
    for number in workers:
        found = simulate(store, units, seconds, number)
        yield f"{number:5} workers: {found.hours:6.3g} hours, busy {found.utilisation:4.0%} of the time"
    yield f"no number of them takes less than {longest(units, seconds):.3g} hours, for the longest chain of units"


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
