"""Compute units, one after another or side by side, each after what it is built on.

`compute` says which units are next, and what a failure takes with it. An `Engine` computes
them: this process (`Engine` itself), processes of this machine (`Workers`), or a Ray cluster
(`fslib.study.ray`). Records are the same bits whichever it is.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fslib.errors import FslibError, explained, first_line
from fslib.model.devices import keep_freed_memory
from fslib.progress import Count, hidden, span
from fslib.study.files import CannotWriteError
from fslib.study.fingerprints import SAID
from fslib.study.store import Store, Unit, distinct

PACKAGE = Path(__file__).resolve().parents[1]
# Read by OpenMP, MKL and OpenBLAS when they are loaded: they make as many threads as there are
# cores, unless told otherwise.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Say = Callable[[str], None]
Pace = tuple[str, float]  # the kind of a unit, and how many seconds it took


@dataclass(frozen=True)
class Done:
    """A unit that a worker is through with.

    Args:
        unit: the unit.
        seconds: how long the worker took.
        failure: why there is no record, "" if there is one.
        again: whether the worker was lost and the unit is computed again.
    """

    unit: Unit
    seconds: float
    failure: str = ""
    again: bool = False

    def __str__(self) -> str:
        """Name the unit, and why it has no record."""
        return f"{self.unit.kind}-{self.unit.key}: {self.failure}"


@dataclass
class Chain:
    """Units that one worker computes, one after another.

    Args:
        units: those still to come.
        lost: how often its worker was lost.
        since: when the unit that comes next was begun.
    """

    units: list[Unit]
    lost: int = 0
    since: float = field(default_factory=time.perf_counter)

    def through(self, unit: Unit, failure: str = "") -> Done:
        """Take note that the worker is through with a unit."""
        now = time.perf_counter()
        done = Done(unit, now - self.since, failure)
        self.units, self.since = self.units[self.units.index(unit) + 1 :], now
        return done


class Engine:
    """What computes chains of units: this process, one unit at a time, or others, several.

    Attributes:
        takes_chains: whether units measured on one model are sent as one chain, since models
            do not travel from machine to machine; otherwise a chain is a single unit.
        tries: how often a chain is sent before it is given up, if its worker is lost.
        workers: how many chains are computed at a time.
        under_way: the chains under way, by whatever the engine waits for.
    """

    takes_chains = False
    tries = 1

    def __init__(self, store: Store, workers: int = 1, fresh: bool = False) -> None:
        self._store, self.workers, self._fresh = store, workers, fresh
        self.under_way: dict[Any, Chain] = {}

    def has_room(self) -> bool:
        """Return whether a worker is idle."""
        return len(self.under_way) < self.workers

    def send(self, chain: Chain) -> None:
        """Have an idle worker compute what is left of a chain."""
        self.under_way[0] = chain

    def ended(self, patience: float) -> list[Done]:
        """Return the units that are through, once there is one, or none after so many seconds.

        This process has no patience: it computes the chain now.

        Raises:
            CannotWriteError: or another FslibError, after which no unit can be computed.
        """
        chain = self.under_way.pop(0)
        return [chain.through(u, attempt(self._store, u, fresh=self._fresh)) for u in chain.units]

    def lose(self, chain: Chain, how: str) -> list[Done]:
        """Send what is left of a chain again, or give it up: its worker is gone."""
        if not chain.units:  # it was gone after the last
            return []
        chain.lost += 1
        if chain.lost >= self.tries:
            reason = f"it was lost {chain.lost} times, at last by {how}"
            return [chain.through(unit, reason) for unit in chain.units]
        lost = Done(chain.units[0], 0.0, f"was lost by {how}; it is computed again", again=True)
        self.send(chain)
        return [lost]

    def close(self) -> None:
        """Give up what is under way."""
        self.under_way.clear()


class _Worker:
    """A process of this machine: a pool of one, so that its death is nobody else's."""

    def __init__(self, threads: int) -> None:
        before = set(multiprocessing.active_children())
        # The tracker's own first start would let interrupts through. If this process is killed,
        # it clears up, and need not say so.
        with _for_children(PYTHONWARNINGS="ignore"):
            resource_tracker.ensure_running()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _prepare, (threads,))
        with _for_children(**dict.fromkeys(THREAD_LIMITS, str(threads)), **{SAID: "yes"}):
            self.pool.submit(os.getpid)  # starts the process
        (self.process,) = set(multiprocessing.active_children()) - before

    def end(self) -> int:
        """Kill the process if it lives, and return its exit code."""
        self.process.kill()
        self.pool.shutdown()
        self.process.join()
        return self.process.exitcode or 0


class Workers(Engine):
    """Processes of this machine, each spawned when it is first needed."""

    tries = 2

    def __init__(self, store: Store, workers: int, fresh: bool = False) -> None:
        super().__init__(store, workers, fresh)
        self._crew: dict[_Worker, Future[str] | None] = {}

    def send(self, chain: Chain) -> None:
        """Send the unit to an idle worker."""
        worker = next((w for w, future in self._crew.items() if future is None), None)
        worker = worker or _Worker(self._store.threads)
        words = (self._store.folder, self._store.threads, chain.units[0], self._fresh)
        try:
            self._crew[worker] = future = worker.pool.submit(_compute, *words)
        except BrokenProcessPool:  # it died while it was idle
            self._bury(worker)
            return self.send(chain)
        self.under_way[future] = chain

    def ended(self, patience: float) -> list[Done]:
        """Wait for a worker that is through, or dead."""
        found: list[Done] = []
        for future in wait(self.under_way, patience, FIRST_COMPLETED).done:
            chain = self.under_way.pop(future)
            worker = next(w for w, busy in self._crew.items() if busy is future)
            self._crew[worker] = None
            try:
                found.append(chain.through(chain.units[0], future.result()))
            except BrokenProcessPool:
                found += self.lose(chain, f"the end of its worker ({self._bury(worker)})")
        return found

    def _bury(self, worker: _Worker) -> str:
        """Say how a worker died, and clear up after it."""
        self._crew.pop(worker, None)
        code = worker.end()
        self._store.sweep()
        hint = ": out of memory? try fewer --workers" if code == -9 else ""
        return f"{signal.Signals(-code).name}{hint}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Kill the workers, and clear up what they leave half written."""
        super().close()
        crew, self._crew = self._crew, {}
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.end()
        self._store.sweep()


def _prepare(threads: int) -> None:
    """Get a worker ready, once it has imported this."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()


def _end_with_parent() -> None:
    """End this process when its parent has ended, in whatever way: nobody waits for its work."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _compute(folder: Path, threads: int, unit: Unit, fresh: bool) -> str:
    """Compute a unit in a worker."""
    with hidden():
        return attempt(Store(folder, threads), unit, fresh=fresh)


@contextmanager
def _for_children(**variables: str) -> Iterator[None]:
    """Set variables, and hold Ctrl-C back, for processes that begin inside the block.

    It is meant for the command alone: a worker would die of it in a traceback, even while it
    imports this.
    """
    known, mask = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.environ |= variables
        yield
    finally:
        os.environ.clear()
        os.environ |= known
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def default_workers(threads: int) -> int:
    """Return how many workers of so many threads this machine has cores for; 1 if it has a GPU."""
    if torch.cuda.is_available():
        return 1
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    return max(1, len(affinity(0)) // threads)


def local_engine(store: Store, units: Sequence[Unit], workers: int, *, fresh: bool) -> Engine:
    """Return the engine of this machine that suits these units.

    Where each is built on the one before, more workers would wait, and starting one takes seconds.

    Args:
        store: where records go.
        units: what will be computed, each after what it is built on.
        workers: of how many processes at most.
        fresh: whether what is recorded is computed anew.
    """
    is_chain = all(one in built_on(other) for one, other in pairwise(units))
    workers = 1 if is_chain else min(workers, len(units))
    return Engine(store, fresh=fresh) if workers == 1 else Workers(store, workers, fresh)


def compute(store: Store, units: Sequence[Unit], engine: Engine, say: Say) -> dict[str, Done]:
    """Compute units, and close the engine.

    A unit that fails takes those that are built on it with it, and no others.

    Args:
        store: where records go.
        units: what `missing` has found.
        engine: what computes them.
        say: takes a line of the log.

    Returns:
        {key: what failed} of those that have no record now.

    Raises:
        CannotWriteError: nothing can be written any more.
        FslibError: no worker can be had.
    """
    backlog = Backlog(store, units, chains=engine.takes_chains)
    seconds, left, count = list[Pace](), "", Count(len(units), say)
    with closing(engine), count, nullcontext() if count.is_live else hidden():
        while backlog.left:
            while engine.has_room() and (chain := backlog.next()):
                engine.send(Chain(chain))
            count.show([left, *map(named, backlog.running.values())])
            for done in engine.ended(1.0):
                if done.again:
                    count.tell(f"{named(done.unit)} {done.failure}")
                elif done.unit.key in backlog.running:  # else it went with one that failed
                    backlog.end(done)
                    seconds += [] if done.failure else [(done.unit.kind, done.seconds)]
                    left = _time_left(seconds, list(backlog.left.values()), max(engine.workers, 1))
                    how = f"{'failed after' if done.failure else 'done in'} {span(done.seconds)}"
                    why = f": {done.failure}" if done.failure else ""
                    line = "; ".join(filter(None, [f"{named(done.unit)} {how}{why}", left]))
                    count.end(line, urgent=bool(why) or not backlog.left)
    return backlog.failures


def named(unit: Unit) -> str:
    """Return a unit as lines of progress name it."""
    return f"{unit.kind}-{unit.key} ({unit.describe()})"


def typical_seconds(found: Sequence[Pace]) -> dict[str, float]:
    """Return {kind: median seconds} of units that were computed."""
    return {kind: median(took for k, took in found if k == kind) for kind in dict(found)}


def _time_left(found: Sequence[Pace], rest: Sequence[Unit], workers: int) -> str:
    """Say how long the rest takes, "" if there is none or nothing is known."""
    if not rest or not found:
        return ""
    typical, usual = typical_seconds(found), median(seconds for _, seconds in found)
    return f"about {span(sum(typical.get(u.kind, usual) for u in rest) / workers)} left"


def missing(store: Store, units: Sequence[Unit], *, fresh: bool = False) -> list[Unit]:
    """Return the units to compute, each after what it is built on.

    Args:
        store: where records are.
        units: what is asked for.
        fresh: whether what is recorded is computed anew.
    """
    wanted = [unit for unit in units if fresh or store.find(unit) is None]
    every = distinct(inner for unit in wanted for inner in (*built_on(unit), unit))
    return [unit for unit in every if fresh or store.find(unit) is None]


def built_on(unit: Unit) -> list[Unit]:
    """Return the units that are fields of a unit, each after those that it is built on."""
    inner = [value for value in vars(unit).values() if isinstance(value, Unit)]
    return [found for value in inner for found in (*built_on(value), value)]


class Backlog:
    """What is still to do: which chain is next, and what a failure takes with it.

    Args:
        store: where trained models are.
        units: each after what it is built on.
        chains: whether units with one root, which need no other chain, make one chain.

    Attributes:
        left: the units that are not through, by key.
        running: those of them that are under way.
        failures: {key: what failed} of those that will have no record.
    """

    def __init__(self, store: Store, units: Sequence[Unit], *, chains: bool = False) -> None:
        self._store = store
        self.left = {unit.key: unit for unit in units}
        self.running: dict[str, Unit] = {}
        self.failures: dict[str, Done] = {}
        self._needs: dict[str, set[str]] = {}
        self._chains: dict[str, list[Unit]] = {}
        homes: dict[str, str] = {}
        for key, unit in self.left.items():
            bases = [base.key for base in built_on(unit)]
            needs = self._needs[key] = set(bases) & self.left.keys()
            root = [*bases, key][0]  # recorded or not: its model is trained once a chain
            is_one = chains and all(homes[base] == root for base in needs)
            homes[key] = root if is_one else key
            self._chains.setdefault(homes[key], []).append(unit)

    def next(self) -> list[Unit]:
        """Take a chain that can be begun; none if all that is left waits for what is under way.

        Rather one that needs no model that a unit under way may be training: it would wait there.
        """
        firsts, left = {home: chain[0] for home, chain in self._chains.items()}, self.left.keys()
        ready = [h for h, u in firsts.items() if u.key in left and not self._needs[u.key] & left]
        if not ready:
            return []
        taken = {key for unit in self.running.values() for key in self._untrained(unit)}
        home = next((h for h in ready if not taken & self._untrained(firsts[h])), ready[0])
        chain = self._chains.pop(home)
        self.running |= {unit.key: unit for unit in chain}
        return chain

    def _untrained(self, unit: Unit) -> set[str]:
        return {base.key for base in built_on(unit) if not self._store.checkpoint(base).is_dir()}

    def end(self, done: Done) -> None:
        """Take note of a unit that is through; what is built on a failure fails with it."""
        through = [done.unit.key]
        if done.failure:
            through += [key for key in self.left if done.unit.key in self._needs[key]]
            self.failures |= dict.fromkeys(through, done)
        for key in through:
            self.running.pop(key, None)
            del self.left[key]


def attempt(store: Store, unit: Unit, *, fresh: bool = False) -> str:
    """Compute a unit; return "", or why it has no record, in one line.

    Raises:
        CannotWriteError: nothing can be written, which ends all units.
    """
    try:
        store.renew(unit) if fresh else store.get(unit)
    except CannotWriteError:
        raise
    except OSError as error:
        reason = f"{unit.kind}-{unit.key}: {error.strerror} ({error.filename})"
        raise CannotWriteError(reason) from error
    except FslibError as error:
        return first_line(error)
    except Exception as error:  # a mistake in one unit should not keep others from being computed
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if frame.filename.startswith(str(PACKAGE))]
        at = f" (at {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
        return f"{explained(error)}{at}"
    return ""
