"""Workers of this machine: this process, or several that are spawned and compute units side by side."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fslib.errors import FslibError
from fslib.model.devices import keep_freed_memory
from fslib.progress import hidden
from fslib.study.engine import Done, Engine, attempt, environment
from fslib.study.files import CannotWriteError
from fslib.study.fingerprints import SAID
from fslib.study.store import Store, Unit

# Read by OpenMP, MKL and OpenBLAS when they are loaded: so many threads are made, however many cores there are.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def default_workers(threads: int) -> int:
    """Return how many workers of so many threads this machine has cores for; one where they would share a GPU."""
    if torch.cuda.is_available():
        return 1
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // threads)


class Here(Engine):
    """This process, for one unit at a time."""

    workers = 1

    def __init__(self, store: Store, fresh: bool) -> None:
        self._store, self._fresh = store, fresh
        self._units: list[Unit] = []

    def has_room(self) -> bool:
        """Return whether it has no unit."""
        return not self._units

    def begin(self, units: Sequence[Unit]) -> int:
        """Take note of the unit."""
        self._units += units
        return 0

    def ended(self, patience: float) -> list[Done]:
        """Compute it, however long that takes."""
        unit, begun = self._units.pop(), time.perf_counter()
        failure = attempt(self._store, unit, fresh=self._fresh)
        return [Done(unit, 0, time.perf_counter() - begun, failure)]

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

    workers = 0

    def __init__(self, store: Store, workers: int, fresh: bool) -> None:
        self.workers = workers
        self._store, self._fresh = store, fresh
        self._crew: dict[int, _Worker] = {}

    def _idle(self) -> list[int]:
        return [n for n in range(self.workers) if n not in self._crew or self._crew[n].unit is None]

    def has_room(self) -> bool:
        """Return whether a worker is idle, or not spawned yet."""
        return bool(self._idle())

    def begin(self, units: Sequence[Unit]) -> int:
        """Send the unit to an idle worker."""
        (unit,) = units
        number = self._idle()[0]
        worker = self._crew.get(number) or self._spawn(number)
        worker.unit, worker.begun = unit, time.perf_counter()
        with suppress(BrokenPipeError):  # it has died: `ended` will say so
            worker.pipe.send(unit)
        return number

    def _spawn(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        words = (theirs, self._store.folder, self._store.threads, self._fresh)
        process = context.Process(
            target=work, args=words, daemon=True, name=f"fslib worker {number + 1}"
        )
        resource_tracker.ensure_running()  # its first start would let interrupts through
        variables = dict.fromkeys(THREAD_LIMITS, str(self._store.threads)) | {SAID: "yes"}
        with environment(**variables), _without_interrupts():
            process.start()
            self._crew[number] = _Worker(process, ours)
        theirs.close()  # so that the pipe ends with the worker
        return self._crew[number]

    def ended(self, patience: float) -> list[Done]:
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
            return [Done(unit, number, seconds, failure)]
        return []

    def _death(self, number: int) -> str:
        """Say how a worker died, and clear up after it."""
        process = self._crew.pop(number).process
        process.join()
        code = process.exitcode
        if code == -signal.SIGTERM:
            time.sleep(
                0.5
            )  # meant for all of us? then it ends this process here, in the words that are for that
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
    tqdm.set_lock(
        threading.RLock()
    )  # its own is one between processes, which a worker that is killed would leave
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
