"""Units on a Ray cluster: chains go out, records come back, and this process alone writes them.

No file system is shared. A chain is what is measured on one trained model: it is computed on one machine, in a scratch
store that holds the records which the chain is built on. Models do not travel. A worker first says which code and
versions it has: one that differs from this process is refused by name.
"""

import inspect
import logging
import os
import pickle
import platform
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fslib.errors import FslibError, first_line
from fslib.model.devices import keep_freed_memory
from fslib.progress import hidden
from fslib.study.engine import Done, Engine, attempt, built_on
from fslib.study.files import CannotWriteError, scratch_folder
from fslib.study.provenance import code_checksum, git_commit, versions
from fslib.study.store import DamagedRecordError, Store, Unit

LOST_AT_MOST = 3  # times that a chain is lost with its machine before it is given up
OBJECT_STORE = 256 * 2**20  # bytes; records are a few megabytes
LOOK_EVERY = 5.0  # seconds between two looks at how large the cluster is


@dataclass(frozen=True)
class Order:
    """A chain for a worker.

    code: what the worker must have as well, of `code`. units: pickled, which other code could not read. keys: what they
    must be on its data. records: pickled as well, [(unit, its files)] of what the chain is built on.
    """

    code: dict[str, str]
    units: bytes
    keys: tuple[str, ...]
    records: bytes
    threads: int


@dataclass(frozen=True)
class Word:
    """What a worker says: why it refuses, or how a unit went, with the files of its record."""

    node: str
    refusal: str = ""
    key: str = ""
    seconds: float = 0.0
    failure: str = ""
    files: tuple[bytes, bytes] = (b"", b"")


def code() -> dict[str, str]:
    """Return what decides on results beside config and data: the code of this package and versions of others."""
    return {"commit": git_commit(), "code": code_checksum(), **versions()}


def obey(order: Order) -> Iterator[Word]:
    """Compute a chain in a scratch store, and say how each unit went; in a worker, or anywhere else."""
    node = platform.node()
    pairs = [(name, mine, order.code.get(name)) for name, mine in code().items()]
    if differing := [
        f"{name} {mine} instead of {wanted}" for name, mine, wanted in pairs if mine != wanted
    ]:
        yield Word(node, f"it has {', '.join(differing)}: install the same there")
        return
    torch.set_num_threads(order.threads)
    keep_freed_memory()
    units, failed = pickle.loads(order.units), set[str]()
    try:
        keys = tuple(unit.key for unit in units)
    except FslibError as error:
        yield Word(node, f"it cannot load the data: {error}")
        return
    if keys != order.keys:
        names = ", ".join(dict.fromkeys(name for unit in units for name in unit.task_names()))
        yield Word(node, f"its data are others, of some of the tasks {names}: give it the same")
        return
    with hidden(), scratch_folder() as folder:
        store = Store(folder, order.threads)
        for unit, files in pickle.loads(order.records):
            store.adopt(unit, files)
        for unit in units:
            if failed & {base.key for base in built_on(unit)}:
                continue
            begun = time.perf_counter()
            try:
                failure = attempt(store, unit, fresh=False)
            except CannotWriteError as error:
                failure = f"{error} (on {node})"
            seconds = time.perf_counter() - begun
            if failure:
                failed.add(unit.key)
            yield Word(
                node, "", unit.key, seconds, failure, (b"", b"") if failure else store.files(unit)
            )


@dataclass
class _Chain:
    """A chain under way: the units still to come, the stream of words, when the last came, how often it was lost."""

    units: list[Unit]
    words: Any = None
    since: float = field(default_factory=time.perf_counter)
    lost: int = 0


class Cluster(Engine):
    """The workers of a Ray cluster. A unit that it is given is computed, recorded or not.

    address: "local" for a cluster on this machine that ends with this process, "auto" for the one that is running
    here, or a host and port. gpus: what a chain is given, 0 for none.
    Raises FslibError where Ray is missing, no cluster is found, or none of its machines is enough.
    """

    takes_chains = True

    def __init__(self, store: Store, address: str, gpus: int | float) -> None:
        self._store, self._gpus, self._code = store, gpus, code()
        self._chains: dict[int, _Chain] = {}
        self._ray = _started(address)
        options = {
            "num_cpus": store.threads,
            "num_gpus": gpus,
            "max_retries": 0,
            "num_returns": "streaming",
        }
        # a decorator, as tests put on every function, would hide that it is a generator
        self._remote = self._ray.remote(inspect.unwrap(obey)).options(**options)
        self._looked, self._workers = -LOOK_EVERY, 0
        if not self.workers:
            self.close()
            wanted = f"{store.threads} processors" + (f" and {gpus:g} GPUs" if gpus else "")
            raise FslibError(
                f"no machine of the Ray cluster {address} has {wanted}, which a unit is to have"
            )

    @property
    def workers(self) -> int:
        """How many chains the machines that are there now can compute at a time."""
        if time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked, alive = (
                time.monotonic(),
                [n["Resources"] for n in self._ray.nodes() if n["Alive"]],
            )
            self._workers = sum(self._fit(resources) for resources in alive)
        return self._workers

    def _fit(self, resources: dict[str, float]) -> int:
        """Return how many chains fit on one machine."""
        fit = resources.get("CPU", 0) // self._store.threads
        return int(min(fit, resources.get("GPU", 0) // self._gpus) if self._gpus else fit)

    def has_room(self) -> bool:
        """Return whether a chain would find a worker."""
        return len(self._chains) < self.workers

    def begin(self, units: Sequence[Unit]) -> int:
        """Send a chain out."""
        number = next(n for n in range(len(self._chains) + 1) if n not in self._chains)
        self._chains[number] = _Chain(list(units))
        self._send(self._chains[number])
        return number

    def _send(self, chain: _Chain) -> None:
        """Send out what is left of a chain, with the records that it is built on."""
        mine = {unit.key for unit in chain.units}
        bases = {
            base.key: base
            for unit in chain.units
            for base in built_on(unit)
            if base.key not in mine
        }
        records = [
            (base, self._store.files(base)) for base in bases.values() if self._store.find(base)
        ]
        keys = tuple(unit.key for unit in chain.units)
        order = Order(
            self._code, pickle.dumps(chain.units), keys, pickle.dumps(records), self._store.threads
        )
        chain.words, chain.since = self._remote.remote(order), time.perf_counter()

    def ended(self, patience: float) -> list[Done]:
        """Wait for a worker's word, or its end. Raises FslibError for a worker that must be refused."""
        by_words = {chain.words: number for number, chain in self._chains.items()}
        found: list[Done] = []
        for words in self._ray.wait(list(by_words), num_returns=1, timeout=patience)[0]:
            found += self._heard(by_words[words])
        return found

    def _heard(self, number: int) -> list[Done]:
        """Take a chain's next word, which is there."""
        chain, errors = self._chains[number], self._ray.exceptions
        try:
            word = self._ray.get(next(chain.words))
            if word.refusal:
                raise FslibError(f"the worker on {word.node} was refused: {word.refusal}")
            unit = next(unit for unit in chain.units if unit.key == word.key)
            if not word.failure:
                self._store.adopt(unit, word.files)
        except StopIteration:
            del self._chains[number]
            return []
        except errors.RayTaskError as error:  # a mistake in `obey` itself
            return self._give_up(number, first_line(error.cause or error))
        except (errors.RayError, DamagedRecordError) as error:
            return self._lose(number, error)
        seconds, chain.since = time.perf_counter() - chain.since, time.perf_counter()
        chain.units = chain.units[chain.units.index(unit) + 1 :]
        return [Done(unit, number, seconds, word.failure, next(iter(chain.units), None))]

    def _lose(self, number: int, error: Exception) -> list[Done]:
        """Send what is left of a chain out again: its machine, or its process there, is gone."""
        chain = self._chains[number]
        chain.lost += 1
        if chain.lost >= LOST_AT_MOST:
            return self._give_up(
                number, f"it was lost {chain.lost} times, at last by {_reason(error)}"
            )
        self._looked = -LOOK_EVERY
        self._send(chain)
        return []

    def _give_up(self, number: int, reason: str) -> list[Done]:
        """Say of all that is left of a chain why it has no record."""
        chain = self._chains.pop(number)
        return [
            Done(unit, number, time.perf_counter() - chain.since, reason) for unit in chain.units
        ]

    def close(self) -> None:
        """Cancel what is under way, and leave the cluster."""
        for chain in self._chains.values():
            with suppress(Exception):  # it may have ended by itself, or with its machine
                self._ray.cancel(chain.words, force=True)
        self._chains.clear()
        with suppress(Exception):
            self._ray.shutdown()


def _reason(error: Exception) -> str:
    """Say in a few words how a worker was lost."""
    names = {
        "NodeDiedError": "the end of its machine",
        "WorkerCrashedError": "the end of its process",
    }
    names |= {"OutOfMemoryError": "too little memory on its machine"}
    return names.get(type(error).__name__, f"{type(error).__name__}: {first_line(error)}")


def _started(address: str) -> Any:
    """Return the module ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1"
    )  # a worker without a GPU sees none
    try:
        import ray
    except ImportError as error:
        raise FslibError("--ray needs Ray: pip install -e '.[cluster]'") from error
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    with _own_sigterm():
        try:
            _reach(address)
            ray.init(address=address, **options)
        except Exception as error:  # Ray's own, and whatever the network says
            raise FslibError(f"no Ray cluster at {address!r}: {first_line(error)}") from error
    return ray


def _reach(address: str) -> None:
    """Raise OSError where nobody answers at a host and port: Ray itself would ask for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which Ray puts its own in the place of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
