"""Units in parallel: each after what it is built on, the same records whoever computes them."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import small_units
import torch
from small_units import SMALL, TASKS, FailingUnit, KilledUnit, NumbersUnit, training

from fslib import FslibError, Study, progress
from fslib.progress import Count, span
from fslib.study.files import CannotWriteError
from fslib.study.parallel import (
    Backlog,
    Chain,
    Done,
    Engine,
    Workers,
    built_on,
    compute,
    default_workers,
    local_engine,
    missing,
)
from fslib.study.store import Store, Unit
from fslib.study.units import ImportanceUnit, PruneUnit

pytestmark = pytest.mark.usefixtures("small_tasks")

SCORED = [ImportanceUnit(model=training(seed), examples=4) for seed in (0, 1)]
PRUNED = [PruneUnit(importance=scored, fractions=(0.25,), controls=1) for scored in SCORED]
UNITS = [*(training(seed) for seed in (0, 1)), *SCORED, *PRUNED]
NUMBERS = [NumbersUnit(tasks=TASKS, n=n) for n in range(6)]


class Pair(NumbersUnit):
    """A unit built on two others."""

    kind: ClassVar[str] = "pair"
    one: ImportanceUnit
    two: ImportanceUnit


class Pretended(Engine):
    """An engine that computes nothing, ends what began last, and fails or loses what it is told."""

    tries = 2

    def __init__(self, workers: int, failing: Sequence[Unit] = (), losing: Sequence[Unit] = ()):
        super().__init__(Store(Path("/nowhere")), workers)
        self.failing, self.losing, self.log, self.closed = failing, list(losing), [], False

    def send(self, chain: Chain) -> None:
        assert len(self.under_way) < self.workers
        assert self.takes_chains or len(chain.units) == 1
        self.log += [("begin", unit.key) for unit in chain.units]
        self.under_way[len(self.log)] = chain

    def ended(self, patience: float) -> list[Done]:
        chain = self.under_way.pop(max(self.under_way))
        if chain.units[0] in self.losing:
            self.losing.remove(chain.units[0])
            return self.lose(chain, "a fire")
        self.log += [("end", unit.key) for unit in chain.units]
        why = {True: "it was told to", False: ""}
        return [Done(unit, 10.0, why[unit in self.failing]) for unit in chain.units]

    def close(self) -> None:
        self.closed = True


# What is built on what


def test_a_unit_knows_what_it_is_built_on():
    assert built_on(PRUNED[0]) == [training(0), SCORED[0]]
    assert built_on(training()) == []
    both = Pair(tasks=TASKS, n=0, one=SCORED[0], two=SCORED[1])
    assert built_on(both) == [training(0), SCORED[0], training(1), SCORED[1]]


def test_what_a_missing_unit_is_built_on_is_computed_first_and_what_is_recorded_is_not(tmp_path):
    store = Store(tmp_path)
    assert missing(store, [PRUNED[0], UNITS[0]]) == [training(0), SCORED[0], PRUNED[0]]
    store.get(training(0))
    assert missing(store, [PRUNED[0], UNITS[0]]) == [SCORED[0], PRUNED[0]]
    assert missing(store, [training(0)]) == []
    assert missing(store, [PRUNED[0]], fresh=True) == [training(0), SCORED[0], PRUNED[0]]


@pytest.mark.parametrize("workers", [1, 2, 9])
@pytest.mark.parametrize("takes_chains", [True, False])
def test_every_unit_begins_after_what_it_is_built_on(tmp_path, workers, takes_chains):
    engine = Pretended(workers)
    engine.takes_chains = takes_chains
    assert compute(Store(tmp_path), UNITS, engine, [].append) == {}
    assert engine.closed
    places = {entry: place for place, entry in enumerate(engine.log)}
    assert len(places) == len(engine.log) == 2 * len(UNITS)
    before = "begin" if takes_chains else "end"  # in a chain, the order is the worker's
    for unit in UNITS:
        for base in built_on(unit):
            assert places[before, base.key] < places["begin", unit.key]


def test_a_failure_takes_what_is_built_on_it_and_nothing_else(tmp_path):
    lines, planned = [], [*UNITS, *NUMBERS]
    engine = Pretended(2, [SCORED[0]])
    failures = compute(Store(tmp_path), planned, engine, lines.append)
    assert failures.keys() == {SCORED[0].key, PRUNED[0].key}
    for done in failures.values():
        assert str(done) == f"importance-{SCORED[0].key}: it was told to"
    assert ("begin", PRUNED[0].key) not in engine.log
    assert len(engine.log) == 2 * (len(planned) - 1)
    failed = f"importance-{SCORED[0].key} (left+right, seed 0) failed after 10 s: it was told to"
    assert any(failed in line for line in lines)
    assert f"[{len(planned) - 1}/{len(planned)}]" in lines[-1] and "left" not in lines[-1][-20:]


def test_a_lost_unit_is_computed_again_and_given_up_at_last(tmp_path):
    lines, engine = [], Pretended(2, losing=[NUMBERS[1], NUMBERS[2], NUMBERS[2]])
    failures = compute(Store(tmp_path), NUMBERS[:4], engine, lines.append)
    assert failures.keys() == {NUMBERS[2].key}
    assert failures[NUMBERS[2].key].failure == "it was lost 2 times, at last by a fire"
    for unit in NUMBERS[1:3]:
        again = f"numbers-{unit.key} ({unit.describe()}) was lost by a fire; it is computed again"
        assert sum(again in line for line in lines) == 1


def test_what_shares_a_model_is_one_chain_and_what_needs_two_waits_for_both(tmp_path):
    store, other = Store(tmp_path), PruneUnit(importance=SCORED[0], fractions=(0.5,), controls=1)
    both = Pair(tasks=TASKS, n=1, one=SCORED[0], two=SCORED[1])
    backlog = Backlog(store, [*UNITS, other, both, NUMBERS[0]], chains=True)
    first, second, alone = (backlog.next() for _ in range(3))
    assert first == [training(0), SCORED[0], PRUNED[0], other]
    assert second == [training(1), SCORED[1], PRUNED[1]]
    assert (alone, backlog.next()) == ([NUMBERS[0]], [])
    for unit in (*first[:2], *second[:2]):
        assert backlog.next() == []
        backlog.end(Done(unit, 1.0))
    assert backlog.next() == [both]
    # recorded bases are shared as well: their models would be trained again on each machine
    assert Backlog(store, [PRUNED[0], other], chains=True).next() == [PRUNED[0], other]


def test_a_failure_within_a_chain_ends_what_is_built_on_it(tmp_path):
    backlog = Backlog(Store(tmp_path), [*UNITS[::2], PRUNED[1]], chains=True)
    backlog.next()
    backlog.end(Done(training(0), 1.0, "no"))
    assert backlog.failures.keys() == {unit.key for unit in (training(0), SCORED[0], PRUNED[0])}
    assert list(backlog.left.values()) == backlog.next() == [PRUNED[1]]


def test_a_unit_waits_for_no_model_that_another_is_training_if_there_is_something_else(tmp_path):
    other = PruneUnit(importance=SCORED[0], fractions=(0.5,), controls=1)
    backlog = Backlog(Store(tmp_path), [PRUNED[0], other, NUMBERS[0]])  # as if bases were recorded
    assert [backlog.next() for _ in range(4)] == [[PRUNED[0]], [NUMBERS[0]], [other], []]


@pytest.mark.parametrize(
    ("units", "workers", "engine"),
    [
        ([UNITS[0], SCORED[0], PRUNED[0]], 2, Engine),  # a chain
        (NUMBERS[:1], 2, Engine),
        (NUMBERS, 1, Engine),
        (NUMBERS, 2, Workers),
    ],
)
def test_what_cannot_be_parallel_needs_no_other_process(tmp_path, units, workers, engine):
    found = local_engine(Store(tmp_path), units, workers, fresh=False)
    assert type(found) is engine and found.workers == (1 if engine is Engine else 2)


@pytest.mark.parametrize(("threads", "workers"), [(1, 6), (2, 3), (4, 1), (7, 1)])
def test_there_are_as_many_workers_as_the_cores_have_threads_for(monkeypatch, threads, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert default_workers(threads) == workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_workers(threads) == 1


# Progress


def test_the_time_left_is_that_of_units_of_the_same_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(Count, "quiet", 0.0)
    seconds = {"numbers": 2.0, "train": 100.0}

    class Timed(Pretended):
        def ended(self, patience: float) -> list[Done]:
            return [Done(d.unit, seconds[d.unit.kind]) for d in super().ended(patience)]

    units = [NUMBERS[0], training(0), NUMBERS[1], NUMBERS[2], training(1)]
    three = ["2 s left", "1 s left", ""]
    five = ["8 s left", "2 min left", "2 min left", "2 min left", ""]
    for given, workers, wanted in ((units, 1, five), (units[:1] + units[2:4], 2, three)):
        lines = []
        compute(Store(tmp_path), given, Timed(workers), lines.append)
        assert [line.partition("; about ")[2] for line in lines] == wanted
    assert [span(s) for s in (0.4, 3000.0, 7200.0, 90000.0)] == ["0 s", "50 min", "2.0 h", "25.0 h"]


def test_a_log_gets_a_line_now_and_then_and_every_urgent_one(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Count(6, lines.append) as count:
        for number, urgent in enumerate([False, False, True, False, False, False], start=1):
            now[0] += 2
            count.end(f"unit {number} done", urgent=urgent)
    assert lines == [f"[{n}/6] unit {n} done" for n in (1, 3, 6)]


def test_a_terminal_shows_one_bar_and_urgent_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = []
    with Count(3, lines.append) as count:
        count.show(["", "train-1 (bbc, seed 0)"])
        count.end("train-1 done in 2 s", urgent=False)
        count.end("prune-1 failed", urgent=True)
        count.show(["about 9 s left", "train-2"])
    shown = capsys.readouterr().err
    assert "0/3 |" in shown and ", train-1 (bbc, seed 0)" in shown
    assert "2/3 |" in shown and ", about 9 s left, train-2" in shown
    assert lines == ["[2/3] prune-1 failed"]


# Trouble


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CannotWriteError("No space left"), "No space left"),
        (FileNotFoundError(2, "No such file", "/x"), "No such file .*/x"),
        (FslibError("mend this"), ""),
        (RuntimeError("a\nb"), ""),
    ],
)
def test_what_cannot_write_ends_all_and_any_other_error_is_the_units_own(
    tmp_path, monkeypatch, error, said
):
    def fail(unit, store):
        raise error

    monkeypatch.setattr(NumbersUnit, "compute", fail)
    engine = Engine(Store(tmp_path))
    if said:
        with pytest.raises(CannotWriteError, match=said):
            compute(Store(tmp_path), NUMBERS, engine, [].append)
        assert engine.under_way == {}
    else:
        failures = compute(Store(tmp_path), NUMBERS[:2], engine, [].append).values()
        wanted = "mend this" if isinstance(error, FslibError) else "RuntimeError: a (at store.py:"
        assert [done.failure.startswith(wanted) for done in failures] == [True, True]


def test_workers_write_the_same_bits_and_trouble_is_a_line_each(tmp_path, capfd):
    """One crew for all of it, since a worker takes seconds to start: sound, failing, killed."""
    study = Study("smoke", overrides=SMALL, results=tmp_path / "here")
    units = study.plan("03")
    compute(study.store, units, Engine(study.store), [].append)
    other, lines = Store(tmp_path / "workers"), []
    killed, failing = KilledUnit(tasks=TASKS, n=0), FailingUnit(tasks=TASKS, n=0)
    engine = Workers(other, 2)
    failures = compute(other, [killed, failing, *units], engine, lines.append)
    assert failures.keys() == {killed.key, failing.key}
    why = "the end of its worker (SIGKILL: out of memory? try fewer --workers)"
    assert failures[killed.key].failure == f"it was lost 2 times, at last by {why}"
    assert any(f"killed-{killed.key}" in x and f"lost by {why}; it is" in x for x in lines)
    assert failures[failing.key].failure.startswith("RuntimeError: size mismatch (at ")
    for unit in units:
        paths = [store.path(unit.kind, unit.key) for store in (study.store, other)]
        one, two = (path.with_suffix(".npz") for path in paths)
        assert not one.exists() or one.read_bytes() == two.read_bytes()
        record, again = study.store.find(unit), other.find(unit)
        assert (record.result, record.machine) == (again.result, again.machine)
        assert again.machine["threads"] == 1
    assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name]
    assert "".join(capfd.readouterr()) == ""


def test_a_worker_that_dies_idle_or_in_a_full_disk_leaves_nobody_behind(tmp_path):
    store = Store(tmp_path)
    engine = Workers(store, 1)
    engine.send(Chain(NUMBERS[:1]))
    (done,) = small_units.wait_for(lambda: engine.ended(1.0))
    assert done.failure == "" and store.find(NUMBERS[0])
    (worker,) = engine._crew
    worker.process.kill()
    worker.process.join()
    time.sleep(0.5)
    (tmp_path / "computed").unlink()
    (tmp_path / "computed").mkdir()  # it cannot be written
    engine.send(Chain(NUMBERS[1:2]))
    with pytest.raises(CannotWriteError, match="computed"):
        small_units.wait_for(lambda: engine.ended(1.0))
    (worker,) = engine._crew
    engine.close()
    assert not worker.process.is_alive()


def is_empty(group: int) -> bool:
    """Whether a process group has no process left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return False
    return True


INTERRUPTED = "fslib: interrupted; finished units are recorded, run again to go on\n"


@pytest.mark.parametrize(
    ("number", "to_all", "code", "said"),
    [
        (signal.SIGINT, True, 130, INTERRUPTED),
        (signal.SIGTERM, False, 143, INTERRUPTED.replace("interrupted", "terminated")),
        (signal.SIGKILL, False, -9, ""),
    ],
)
def test_whatever_ends_the_command_ends_its_workers(tmp_path, number, to_all, code, said):
    """Two workers on trainings that take for ever, in a process group as a terminal makes it."""
    words = ["run", "3", *small_units.small(steps=20_000, seeds=2), "--workers", "2"]
    process = small_units.start([*words, "--results", str(tmp_path)], start_new_session=True)
    try:
        begun = lambda: len(list(tmp_path.rglob("train-*.lock"))) == 2  # noqa: E731
        small_units.wait_for(lambda: process.poll() is not None or begun())
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, said)
        small_units.wait_for(lambda: is_empty(process.pid), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number is not signal.SIGKILL:
        assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name]
    assert not [p for p in tmp_path.rglob("*.json") if p.parent.name == "runs"]
