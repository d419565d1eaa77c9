"""Units in parallel: after what they are built on, the same records whoever computes them, and a line per trouble."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate import PartialState
from small_units import SMALL, TASKS, FailingUnit, KilledUnit, NumbersUnit, training

import fslib
from fslib import FslibError, Study
from fslib.progress import Board, span
from fslib.study import schedule
from fslib.study.engine import Done, Engine, built_on
from fslib.study.files import CannotWriteError
from fslib.study.schedule import Backlog, Where, compute, missing, open_engine
from fslib.study.store import Result, Store, Unit
from fslib.study.units import ImportanceUnit, PruneUnit
from fslib.study.workers import Here, Processes, default_workers

pytestmark = pytest.mark.usefixtures("small_tasks")

SCORED = [ImportanceUnit(model=training(seed), examples=4) for seed in (0, 1)]
PRUNED = [PruneUnit(importance=scored, fractions=(0.25,), controls=1) for scored in SCORED]
UNITS = [*(training(seed) for seed in (0, 1)), *SCORED, *PRUNED]
NUMBERS = [NumbersUnit(tasks=TASKS, n=n) for n in range(6)]


class Collection(NumbersUnit):
    """A unit built on others, in whatever way a config can hold them."""

    kind: ClassVar[str] = "collection"
    parts: tuple[NumbersUnit, ...] = ()
    named: dict[str, ImportanceUnit] = {}  # noqa: RUF012 - pydantic copies it

    def compute(self, store: Store) -> Result:
        return Result({"sum": sum(store.get(part).result["n"] for part in self.parts)})


class Pretended(Engine):
    """An engine that computes nothing, ends what began last, and fails what it is told to."""

    workers = 0

    def __init__(
        self, workers: int, failing: tuple[Unit, ...] = (), *, takes_chains: bool = False
    ) -> None:
        self.workers, self.failing, self.log, self.under_way, self.closed = (
            workers,
            failing,
            [],
            [],
            False,
        )
        self.takes_chains = takes_chains

    def has_room(self) -> bool:
        return len(self.under_way) < self.workers

    def begin(self, units: Sequence[Unit]) -> int:
        assert self.has_room() and (self.takes_chains or len(units) == 1)
        self.log += [("begin", unit.key) for unit in units]
        self.under_way.append(list(units))
        return len(self.under_way) - 1

    def ended(self, patience: float) -> list[Done]:
        chain, number = self.under_way.pop(), len(self.under_way)
        self.log += [("end", unit.key) for unit in chain]
        return [
            Done(unit, number, 10.0, "it was told to" if unit in self.failing else "")
            for unit in chain
        ]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pretend(monkeypatch):
    """Put a pretended engine in the place of the one that would be chosen."""

    def put(*words, **options) -> Pretended:
        pretended = Pretended(*words, **options)
        monkeypatch.setattr(schedule, "open_engine", lambda *words, **options: pretended)
        return pretended

    return put


# What is built on what


def test_a_unit_knows_what_it_is_built_on_however_its_config_holds_it():
    assert built_on(PRUNED[0]) == [training(0), SCORED[0]]
    assert built_on(training()) == []
    whole = Collection(tasks=TASKS, n=0, parts=NUMBERS[:2], named={"a": SCORED[0], "b": SCORED[1]})
    assert built_on(whole) == [*NUMBERS[:2], training(0), SCORED[0], training(1), SCORED[1]]


def test_what_a_missing_unit_is_built_on_is_computed_first_and_what_is_recorded_is_not(tmp_path):
    store = Store(tmp_path)
    assert missing(store, [PRUNED[0], UNITS[0]]) == [training(0), SCORED[0], PRUNED[0]]
    store.get(training(0))
    assert missing(store, [PRUNED[0], UNITS[0]]) == [SCORED[0], PRUNED[0]]
    assert missing(store, [training(0)]) == []
    assert missing(store, [PRUNED[0]], fresh=True) == [training(0), SCORED[0], PRUNED[0]]


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_every_unit_begins_after_what_it_is_built_on(tmp_path, pretend, workers):
    pretended = pretend(workers)
    assert compute(Store(tmp_path), UNITS[::-1], Where(workers), say=[].append) == {}
    assert pretended.closed
    places = {entry: place for place, entry in enumerate(pretended.log)}
    assert len(places) == 2 * len(UNITS)
    for unit in UNITS:
        for base in built_on(unit):
            assert places["end", base.key] < places["begin", unit.key]


def test_a_failure_takes_what_is_built_on_it_and_nothing_else(tmp_path, pretend):
    pretended = pretend(2, (SCORED[0],))
    lines = []
    failures = compute(Store(tmp_path), [*UNITS, *NUMBERS], Where(2), say=lines.append)
    assert failures.keys() == {SCORED[0].key, PRUNED[0].key}
    assert all((f.unit, f.reason) == (SCORED[0], "it was told to") for f in failures.values())
    assert ("begin", PRUNED[0].key) not in pretended.log
    assert len(pretended.log) == 2 * (len(UNITS) + len(NUMBERS) - 1)
    assert [
        line
        for line in lines
        if f"importance-{SCORED[0].key} (left+right, seed 0) failed after 10 s: it" in line
    ]
    assert "left" in lines[0] and f"[{len(UNITS) + len(NUMBERS) - 1}/" in lines[-1]


def test_a_unit_waits_for_no_model_that_another_is_training_if_there_is_something_else(tmp_path):
    store = Store(tmp_path)
    other = PruneUnit(importance=SCORED[0], fractions=(0.5,), controls=1)
    backlog = Backlog(
        store, [PRUNED[0], other, NUMBERS[0]]
    )  # as if all that they are built on were recorded
    assert [backlog.next() for _ in range(4)] == [[PRUNED[0]], [NUMBERS[0]], [other], []]


def test_the_time_left_is_that_of_units_of_the_same_kind(tmp_path):
    backlog = Backlog(Store(tmp_path), [*NUMBERS[:3], *UNITS[:2]])
    for unit, seconds in ((NUMBERS[0], 2.0), (training(0), 100.0)):
        backlog.running[unit.key] = backlog.waiting.pop(unit.key)
        backlog.end(Done(unit, 0, seconds))
    assert backlog.seconds_left(1) == 2 + 2 + 100
    assert backlog.seconds_left(2) == 52


def test_one_worker_or_a_chain_needs_no_other_process(tmp_path, monkeypatch):
    assert isinstance(open_engine(Store(tmp_path), Where(1), fresh=False), Here)
    assert isinstance(open_engine(Store(tmp_path), Where(2), fresh=False), Processes)
    monkeypatch.setattr(schedule, "Processes", None)
    assert compute(Store(tmp_path), [UNITS[0], SCORED[0], PRUNED[0]], Where(2), say=[].append) == {}


@pytest.mark.parametrize(("threads", "workers"), [(1, 6), (2, 3), (4, 1), (7, 1)])
def test_there_are_as_many_workers_as_the_cores_have_threads_for(monkeypatch, threads, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert default_workers(threads) == workers
    monkeypatch.setattr(PartialState(), "num_processes", 2)
    assert default_workers(threads) == 1


# Progress


def test_a_log_gets_a_line_now_and_then_and_every_failure(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr("fslib.progress.time.perf_counter", lambda: now[0])
    with Board(6, 1, lines.append) as board:
        for number, urgent in enumerate([False, False, True, False, False], start=1):
            now[0] += 2
            board.begin(0, f"unit {number}")
            board.end(0, f"unit {number} done", "; soon", urgent=urgent, skipped=number == 5)
    assert lines == [
        "[1/6] unit 1 done; soon",
        "[3/6] unit 3 done; soon",
        "[5/6] unit 5 done; soon",
    ]


def test_a_terminal_shows_what_every_worker_is_on(monkeypatch, capsys):
    monkeypatch.setattr(Board, "is_live", staticmethod(lambda: True))
    lines = []
    with Board(3, 2, lines.append) as board:
        board.begin(1, "train-1 (bbc, seed 0)")
        board.end(1, "train-1 done in 2 s", "; about 9 s left", urgent=False, skipped=0)
    shown = capsys.readouterr().err
    assert "0/3 units" in shown and "worker 2: train-1 (bbc, seed 0), 0 s" in shown
    assert "1/3 units; about 9 s left" in shown
    assert lines == []


def test_times_are_said_as_people_do():
    times = (0.4, 59.0, 125.0, 3000.0, 7200.0, 90000.0)
    assert [span(s) for s in times] == ["0 s", "59 s", "2 min", "50 min", "2.0 h", "25.0 h"]


# Workers


def test_records_are_the_same_bits_from_workers_and_from_here_and_trouble_is_a_line_each(
    tmp_path, capfd
):
    """One pool for all of it, since a worker takes seconds to start: it is sound, one fails, one is killed."""
    study = Study("smoke", overrides=SMALL | {"seeds": 2}, results=tmp_path / "here")
    units = study.plan("03")
    assert len(units) == 6
    assert compute(study.store, units, Where(1), say=[].append) == {}

    other = Store(tmp_path / "workers")
    trouble = [KilledUnit(tasks=TASKS, n=0), FailingUnit(tasks=TASKS, n=0)]
    failures = compute(other, [*trouble, *units], Where(2), say=[].append)
    assert failures.keys() == {unit.key for unit in trouble}
    assert failures[trouble[0].key].reason.startswith(
        "its worker was killed (SIGKILL; out of memory?"
    )
    assert failures[trouble[1].key].reason.startswith("RuntimeError: size mismatch (at ")

    for unit in units:
        for suffix in (".json", ".npz"):
            one, two = (
                store.path(unit.kind, unit.key).with_suffix(suffix)
                for store in (study.store, other)
            )
            if suffix == ".npz":
                assert one.read_bytes() == two.read_bytes()
        record, again = study.store.find(unit), other.find(unit)
        assert (record.result, record.machine, record.data) == (
            again.result,
            again.machine,
            again.data,
        )
        assert again.machine["threads"] == 1
    assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name]
    assert "".join(capfd.readouterr()) == ""


def test_a_worker_that_cannot_write_ends_them_all(tmp_path, monkeypatch):
    def full(unit, store):
        raise CannotWriteError("cannot write /x: No space left on device")

    monkeypatch.setattr(NumbersUnit, "compute", full)
    with pytest.raises(CannotWriteError, match="No space left"):
        compute(Store(tmp_path), NUMBERS, Where(1), say=[].append)

    def gone(unit, store):
        raise FileNotFoundError(2, "No such file", "/x")

    monkeypatch.setattr(NumbersUnit, "compute", gone)
    with pytest.raises(CannotWriteError, match=r"numbers-.*No such file \(/x\)"):
        compute(Store(tmp_path), NUMBERS, Where(1), say=[].append)
    monkeypatch.setattr(
        NumbersUnit, "compute", lambda *words: (_ for _ in ()).throw(FslibError("mend this"))
    )
    failures = compute(Store(tmp_path), NUMBERS[:2], Where(1), say=[].append)
    assert [f.reason for f in failures.values()] == ["mend this", "mend this"]


COMMAND = [sys.executable, "-c", "import sys, fslib_command; sys.exit(fslib_command.main())"]
LONG = [
    w for k, v in (SMALL | {"steps": 20_000}).items() for w in ("--set", f"{k}={json.dumps(v)}")
]


def start_long_run(results: Path) -> subprocess.Popen:
    """Start two workers on trainings that take for ever, in a process group of their own, as a terminal would."""
    words = [
        *COMMAND,
        "run",
        "01",
        "--profile",
        "smoke",
        *LONG,
        "--workers",
        "2",
        "--results",
        str(results),
    ]
    here = str(Path(fslib.__file__).parents[1])
    process = subprocess.Popen(
        words,
        env=os.environ | {"PYTHONPATH": here},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(
        lambda: process.poll() is not None or len(list(results.rglob("train-*.lock"))) == 2, 200
    )
    assert process.poll() is None, process.communicate()
    return process


def wait_until(happens, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def is_empty(group: int) -> bool:
    """Whether a process group has no process left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return False
    return True


@pytest.mark.parametrize(
    ("number", "to_all", "code", "said"),
    [
        (
            signal.SIGINT,
            True,
            130,
            "fslib: interrupted; finished units are recorded, run again to go on\n",
        ),
        (signal.SIGKILL, False, -9, ""),
    ],
)
def test_whatever_ends_the_command_ends_its_workers_in_at_most_one_line(
    tmp_path, number, to_all, code, said
):
    process = start_long_run(tmp_path)
    try:
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, said)
        wait_until(lambda: is_empty(process.pid), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number is not signal.SIGKILL:
        assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name]
    assert [p.name.split("-")[0] for p in tmp_path.rglob("*.json") if p.parent.name == "runs"] == [
        "words"
    ]
