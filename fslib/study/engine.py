"""Give me these units computed: one after another here, or side by side by workers, each after what it is built on.

`compute` says which unit is next, and an `Engine` who computes it. Units do not depend on the process that computes
them, so records are the same whoever it is. `open_engine` is the one place that chooses an engine; another one, of a
cluster, implements `Engine` and is chosen there.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fslib.errors import FslibError, explained, first_line
from fslib.model.devices import keep_freed_memory
from fslib.progress import Board, hidden, span
from fslib.study.files import CannotWriteError
from fslib.study.fingerprints import SAID
from fslib.study.records import Config, Store, Unit, distinct

PACKAGE = Path(__file__).resolve().parents[1]
# Read by OpenMP, MKL and OpenBLAS when they are loaded: so many threads are made, however many cores there are.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Failure:
    """The unit that failed, and why, in one line."""

    unit: Unit
    reason: str


@dataclass(frozen=True)
class Done:
    """A unit that a worker is through with; failure: why it has no record, "" if it has one."""

    unit: Unit
    worker: int
    seconds: float
    failure: str = ""


class Engine(ABC):
    """Who computes units, up to `workers` of them at a time."""

    workers: int

    @abstractmethod
    def begin(self, unit: Unit) -> int:
        """Begin with a unit, and return the number of the worker that has it."""

    @abstractmethod
    def ended(self, patience: float) -> Done | None:
        """Wait for the first unit that is through, or None after so many seconds. Raises CannotWriteError."""

    @abstractmethod
    def close(self) -> None:
        """Give up what is under way."""


def open_engine(store: Store, workers: int, *, fresh: bool) -> Engine:
    """Return the engine that computes units into a store. fresh: those that are recorded as well."""
    return Here(store, fresh) if workers == 1 else Processes(store, workers, fresh)


def default_workers(threads: int) -> int:
    """Return how many workers of so many threads this machine has cores for; one where they would share a GPU."""
    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def compute(
    store: Store, units: Sequence[Unit], workers: int, *, fresh: bool = False, say: Callable[[str], None] = print
) -> dict[str, Failure]:
    """Compute units (of `missing`), and return {key: failure} of those that have no record now.

    A unit that fails takes those that are built on it with it, and no others. say: takes a line for a log.
    Raises CannotWriteError where nothing can be written any more.
    """
    backlog = Backlog(store, units)
    live = Board.is_live()
    # a chain is no faster side by side, and here it needs no worker to start
    workers = 1 if backlog.is_chain() else min(workers, len(units))
    with (
        Board(len(units), workers, say) as board,
        closing(open_engine(store, workers, fresh=fresh)) as engine,
        nullcontext() if live else hidden(),
    ):
        while True:
            while len(backlog.running) < workers and (unit := backlog.next()):
                board.begin(engine.begin(unit), named(unit))
            if not backlog.running:
                return backlog.failures
            if done := engine.ended(1.0):
                backlog.end(done)
                how = f"failed after {span(done.seconds)}: {done.failure}" if done.failure else ""
                seconds = backlog.seconds_left(workers)
                left = f"; about {span(seconds)} left" if seconds else ""
                line = f"{named(done.unit)} {how or 'done in ' + span(done.seconds)}"
                board.end(done.worker, line, left, urgent=bool(how), skipped=backlog.skipped)
            board.tick()


def named(unit: Unit) -> str:
    """Return a unit as lines of progress name it."""
    return f"{unit.kind}-{unit.key} ({unit.describe()})"


def built_on(unit: Unit) -> list[Unit]:
    """Return the units inside a unit's config, each after those that it is itself built on."""
    found: list[Unit] = []

    def look(value: object) -> None:
        if isinstance(value, Config):
            look(list(vars(value).values()))
            if isinstance(value, Unit) and value is not unit:
                found.append(value)
        elif isinstance(value, Mapping):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(unit)
    return found


def missing(store: Store, units: Sequence[Unit], *, fresh: bool = False) -> list[Unit]:
    """Return the units to compute, each after what it is built on; of what is recorded nothing is, unless `fresh`."""
    wanted = [unit for unit in units if fresh or store.find(unit) is None]
    every = distinct(inner for unit in wanted for inner in (*built_on(unit), unit))
    return [unit for unit in every if fresh or store.find(unit) is None]


@dataclass
class Backlog:
    """What is still to do: which unit is next, what a failure takes with it, and how long the rest may take."""

    store: Store
    units: Sequence[Unit]
    running: dict[str, Unit] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    skipped: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of finished units, by kind

    def __post_init__(self) -> None:
        self.waiting = {unit.key: unit for unit in self.units}
        bases = {key: {base.key for base in built_on(unit)} for key, unit in self.waiting.items()}
        self.needs = {key: found & self.waiting.keys() for key, found in bases.items()}

    def is_chain(self) -> bool:
        """Whether every unit is built on the one before, so that there is never a choice."""
        keys = list(self.waiting)
        return all(before in self.needs[key] for before, key in pairwise(keys))

    def next(self) -> Unit | None:
        """Take a unit that can be begun, or None if all others wait for one under way.

        Rather one that needs no model that a unit under way may be training, for it would wait there.
        """
        ready = [u for k, u in self.waiting.items() if not self.needs[k]]
        if not ready:
            return None
        taken = {key for unit in self.running.values() for key in self._untrained(unit)}
        unit = next((u for u in ready if not taken & self._untrained(u)), ready[0])
        self.running[unit.key] = self.waiting.pop(unit.key)
        return unit

    def _untrained(self, unit: Unit) -> set[str]:
        return {base.key for base in built_on(unit) if not self.store.checkpoint(base).is_dir()}

    def end(self, done: Done) -> None:
        """Take note of a unit that is through."""
        key = done.unit.key
        del self.running[key]
        self.store.reread(done.unit)
        self.seconds.setdefault(done.unit.kind, []).append(done.seconds)
        if done.failure:
            self.failures[key] = Failure(done.unit, done.failure)
            for other in [k for k, needs in self.needs.items() if key in needs and k in self.waiting]:
                self.failures[other] = self.failures[key]
                del self.waiting[other]
                self.skipped += 1
        for needs in self.needs.values():
            needs.discard(key)

    def seconds_left(self, workers: int) -> float:
        """Estimate from the finished units, those of the same kind where there are any, how long the rest takes."""
        every = [s for seconds in self.seconds.values() for s in seconds]
        rest = [*self.waiting.values(), *self.running.values()]
        means = [sum(known) / len(known) for known in (self.seconds.get(unit.kind, every) for unit in rest)]
        return sum(means) / workers


def attempt(store: Store, unit: Unit, *, fresh: bool) -> str:
    """Compute a unit; return "", or why it has no record, in one line. Raises CannotWriteError, which ends them all."""
    try:
        store.renew(unit) if fresh else store.get(unit)
    except CannotWriteError:
        raise
    except OSError as error:
        raise CannotWriteError(f"{unit.kind}-{unit.key}: {error.strerror} ({error.filename})") from error
    except Exception as error:  # a mistake in one unit should not keep others from being computed
        return first_line(error) if isinstance(error, FslibError) else f"{explained(error)}{place_of(error)}"
    return ""


def place_of(error: Exception) -> str:
    """Say where in this package an error came from."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(PACKAGE))]
    return f" (at {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""


class Here(Engine):
    """This process, for one unit at a time."""

    workers = 1

    def __init__(self, store: Store, fresh: bool) -> None:
        self._store, self._fresh = store, fresh
        self._units: list[Unit] = []

    def begin(self, unit: Unit) -> int:
        """Take note of the unit."""
        self._units.append(unit)
        return 0

    def ended(self, patience: float) -> Done | None:
        """Compute it, however long that takes."""
        unit, begun = self._units.pop(), time.perf_counter()
        failure = attempt(self._store, unit, fresh=self._fresh)
        return Done(unit, 0, time.perf_counter() - begun, failure)

    def close(self) -> None:
        """Nothing is under way."""


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    unit: Unit | None = None
    begun: float = 0.0


class Processes(Engine):
    """Worker processes of this machine, each spawned when it is first needed."""

    def __init__(self, store: Store, workers: int, fresh: bool) -> None:
        self.workers = workers
        self._store, self._fresh = store, fresh
        self._crew: dict[int, _Worker] = {}

    def begin(self, unit: Unit) -> int:
        """Send the unit to an idle worker."""
        number = next(n for n in range(self.workers) if n not in self._crew or self._crew[n].unit is None)
        worker = self._crew.get(number) or self._spawn(number)
        worker.unit, worker.begun = unit, time.perf_counter()
        with suppress(BrokenPipeError):  # it has died: `ended` will say so
            worker.pipe.send(unit)
        return number

    def _spawn(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        words = (theirs, self._store.folder, self._store.threads, self._fresh)
        process = context.Process(target=work, args=words, daemon=True, name=f"fslib worker {number + 1}")
        resource_tracker.ensure_running()  # its first start would let interrupts through
        variables = dict.fromkeys(THREAD_LIMITS, str(self._store.threads)) | {SAID: "yes"}
        with environment(**variables), _without_interrupts():
            process.start()
            self._crew[number] = _Worker(process, ours)
        theirs.close()  # so that the pipe ends with the worker
        return self._crew[number]

    def ended(self, patience: float) -> Done | None:
        """Wait for a worker's word, or its end."""
        busy: dict[Any, int] = {w.pipe: number for number, w in self._crew.items() if w.unit}
        for pipe in connection.wait(list(busy), patience):
            number = busy[pipe]
            worker = self._crew[number]
            unit, worker.unit = worker.unit, None
            assert unit is not None
            seconds = time.perf_counter() - worker.begun
            try:
                failure, is_fatal = worker.pipe.recv()
            except (EOFError, OSError):
                failure, is_fatal = self._death(number), False
            if is_fatal:
                raise CannotWriteError(failure)
            return Done(unit, number, seconds, failure)
        return None

    def _death(self, number: int) -> str:
        """Say how a worker died, and clear up after it."""
        process = self._crew.pop(number).process
        process.join()
        code = process.exitcode
        if code == -signal.SIGTERM:
            time.sleep(0.5)  # meant for all of us? then it ends this process here, in the words that are for that
        _clear_up(self._store)
        if code >= 0:
            return f"its worker ended by itself (exit code {code})"
        hint = "; out of memory? try fewer --workers" if code == -9 else ""
        return f"its worker was killed ({signal.Signals(-code).name}{hint})"

    def close(self) -> None:
        """Kill the workers, which may be in the middle of something, and clear up what they leave half written."""
        crew, self._crew = self._crew, {}
        for worker in crew.values():
            worker.process.kill()
        for worker in crew.values():
            worker.process.join()
            worker.pipe.close()
        if crew:
            _clear_up(self._store)


def _clear_up(store: Store) -> None:
    with suppress(FslibError):  # whatever is the matter, the error that led here says more
        store.sweep()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back inside the block, and keep it for ever from a process that begins there.

    It is meant for the command alone: a worker would die of it in a traceback, even while it imports this.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(pipe: connection.Connection, folder: Path, threads: int, fresh: bool) -> None:
    """Be a worker: compute the units that come through the pipe, and say how each went."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which a worker that is killed would leave
    torch.set_num_threads(threads)
    keep_freed_memory()
    store = Store(folder, threads)
    with hidden(), suppress(EOFError, BrokenPipeError):  # the command has ended
        while True:
            unit = pipe.recv()
            try:
                said = (attempt(store, unit, fresh=fresh), False)
            except CannotWriteError as error:
                said = (str(error), True)
            pipe.send(said)


def _end_with_parent() -> None:
    """End this process when its parent has ended, in whatever way: nobody would ask for its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
