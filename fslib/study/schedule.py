"""Give me these units computed: one after another, or side by side, each after what it is built on.

`compute` says which units are next; `open_engine` is the one place that chooses who computes them.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

from fslib.progress import Board, hidden, span
from fslib.study.engine import Done, Engine, built_on, named
from fslib.study.ray import Cluster
from fslib.study.store import Store, Unit, distinct
from fslib.study.workers import Here, Processes

LINES = 16  # of workers that a terminal shows, below the one that counts units


@dataclass(frozen=True)
class Failure:
    """The unit that failed, and why, in one line."""

    unit: Unit
    reason: str


@dataclass(frozen=True)
class Where:
    """Where units are computed: in so many processes of this machine, or on a Ray cluster.

    ray: "local", "auto" or an address; None for this machine. gpus: of a unit there.
    """

    workers: int = 1
    ray: str | None = None
    gpus: int | float = 0


def open_engine(store: Store, where: Where, *, fresh: bool) -> Engine:
    """Return the engine that computes units into a store. fresh: those that are recorded as well."""
    if where.ray is not None:
        return Cluster(store, where.ray, where.gpus)
    return Here(store, fresh) if where.workers == 1 else Processes(store, where.workers, fresh)


def compute(
    store: Store,
    units: Sequence[Unit],
    where: Where,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Failure]:
    """Compute units (of `missing`), and return {key: failure} of those that have no record now.

    A unit that fails takes those that are built on it with it, and no others. say: takes a line for a log.
    Raises CannotWriteError where nothing can be written any more, FslibError where no worker can be had.
    """
    backlog = Backlog(store, units)
    live = Board.is_live()
    if where.ray is None:
        # a chain is no faster side by side, and here it needs no worker to start
        where = Where(1 if backlog.is_chain() else min(where.workers, len(units)))
    with (
        closing(open_engine(store, where, fresh=fresh)) as engine,
        nullcontext() if live else hidden(),
    ):
        shown = engine.workers if engine.workers <= LINES and not engine.takes_chains else 0
        with Board(len(units), shown, say) as board:
            while True:
                while engine.has_room() and (chosen := backlog.next(chains=engine.takes_chains)):
                    board.begin(engine.begin(chosen), named(chosen[0]))
                if not backlog.running:
                    return backlog.failures
                for done in engine.ended(1.0):
                    _note(backlog, board, done, engine.workers)
                board.tick()


def _note(backlog: "Backlog", board: Board, done: Done, workers: int) -> None:
    """Take note of a unit that is through, and show it."""
    if done.unit.key not in backlog.running:  # it went with another, of the same chain, that failed
        return
    backlog.end(done)
    how = f"failed after {span(done.seconds)}: {done.failure}" if done.failure else ""
    seconds = backlog.seconds_left(workers)
    left = f"; about {span(seconds)} left" if seconds else ""
    line = f"{named(done.unit)} {how or 'done in ' + span(done.seconds)}"
    board.end(done.worker, line, left, urgent=bool(how), skipped=backlog.skipped)
    if done.then:
        board.begin(done.worker, named(done.then))


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

    def next(self, *, chains: bool = False) -> list[Unit]:
        """Take a unit that can be begun, alone or with its chain, or nothing if all others wait for one under way.

        Rather one that needs no model that a unit under way may be training, for it would wait there.
        """
        ready = [u for k, u in self.waiting.items() if not self.needs[k]]
        if not ready:
            return []
        taken = {key for unit in self.running.values() for key in self._untrained(unit)}
        first = next((u for u in ready if not taken & self._untrained(u)), ready[0])
        chosen = self._chain(first) if chains else [first]
        for unit in chosen:
            self.running[unit.key] = self.waiting.pop(unit.key)
        return chosen

    def _chain(self, first: Unit) -> list[Unit]:
        """Return a unit and all that need nothing but it, each other and what is recorded, and share a base with it."""
        shared = {first.key, *(base.key for base in built_on(first))}
        found = {first.key: first}
        for key in sorted(
            self.waiting, key=lambda key: len(self.needs[key])
        ):  # each after what it is built on
            unit = self.waiting[key]
            if self.needs[key] <= found.keys() and shared & {base.key for base in built_on(unit)}:
                found[key] = unit
        return list(found.values())

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
            for place in (self.waiting, self.running):
                for other in [k for k in place if key in self.needs[k]]:
                    self.failures[other] = self.failures[key]
                    del place[other]
                    self.skipped += 1
        for needs in self.needs.values():
            needs.discard(key)

    def seconds_left(self, workers: int) -> float:
        """Estimate from the finished units, those of the same kind where there are any, how long the rest takes."""
        every = [s for seconds in self.seconds.values() for s in seconds]
        rest = [*self.waiting.values(), *self.running.values()]
        means = [
            sum(known) / len(known)
            for known in (self.seconds.get(unit.kind, every) for unit in rest)
        ]
        return sum(means) / workers
