"""Units on a Ray cluster: chains go out, records come back, and this process alone writes them.

No file system is shared. A chain is what is measured on one trained model: it is computed on one
machine, in a scratch store that holds the records which the chain is built on. Models do not
travel. A worker first says which code and versions it has: one that differs from this process is
refused by name.
"""

import inspect
import logging
import os
import pickle
import platform
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from fslib.errors import FslibError, explained, first_line
from fslib.model.devices import keep_freed_memory
from fslib.progress import hidden
from fslib.study.files import CannotWriteError, scratch_folder
from fslib.study.parallel import Chain, Done, Engine, attempt, built_on
from fslib.study.provenance import code_checksum, git_commit, versions
from fslib.study.store import Record, Store, distinct

# What a worker says of a unit: its key, why it failed ("" if it did not), its record.
Word = tuple[str, str, Record | None]


class RefusedError(FslibError):
    """A worker would not compute what this process means."""


def code() -> dict[str, str]:
    """Return what decides on results beside config and data: this code and versions of others."""
    return {"commit": git_commit(), "code": code_checksum(), **versions()}


def obey(wanted: dict[str, str], units: bytes, records: bytes, threads: int) -> Iterator[Word]:
    """Compute a chain in a scratch store, and say how each unit went.

    Args:
        wanted: what `code` must be here as well.
        units: by what their keys must be on the data here; pickled, since other code could not
            read them.
        records: pickled, those that the chain is built on.
        threads: with how many a unit is computed.

    Raises:
        RefusedError: this machine cannot compute the chain as the sender would.
    """
    node, failed = platform.node(), set[str]()
    if refusal := _refusal(wanted, units):
        raise RefusedError(f"the worker on {node} was refused: {refusal}")
    torch.set_num_threads(threads)
    keep_freed_memory()
    with hidden(), scratch_folder() as folder:
        store = Store(folder, threads).with_records(pickle.loads(records))
        for unit in pickle.loads(units).values():
            if failed & {base.key for base in built_on(unit)}:
                continue
            try:
                failure = attempt(store, unit)
            except CannotWriteError as error:
                failure = f"{error} (on {node})"
            failed |= {unit.key} if failure else set()
            yield unit.key, failure, None if failure else store.find(unit)


def _refusal(wanted: dict[str, str], pickled: bytes) -> str:
    """Say why this machine cannot compute a chain as the sender would, "" if it can."""
    mine = code()
    others = [f"{k} {mine[k]} instead of {wanted.get(k)}" for k in mine if mine[k] != wanted.get(k)]
    if others:
        return f"it has {', '.join(others)}: install the same there"
    units = pickle.loads(pickled)
    names = ", ".join(dict.fromkeys(name for u in units.values() for name in u.task_names()))
    refusal = f"its data are others, of some of the tasks {names}: give it the same"
    try:
        return "" if all(unit.key == key for key, unit in units.items()) else refusal
    except FslibError as error:
        return f"it cannot load the data: {error}"


class Cluster(Engine):
    """The workers of a Ray cluster. A unit is computed there, recorded here or not.

    Args:
        store: where records go.
        address: "local" for a cluster on this machine that ends with this process, "auto" for
            the one that is running here, or a host and port.
        gpus: what a chain is given, 0 for none.

    Raises:
        FslibError: Ray is missing, no cluster is found, or none of its machines is enough.
    """

    takes_chains = True
    tries = 3

    def __init__(self, store: Store, address: str, gpus: int | float = 0) -> None:
        super().__init__(store)
        self._gpus, self._code, self._ray = gpus, code(), _started(address)
        given = {"num_cpus": store.threads, "num_gpus": gpus, "max_retries": 0}
        # a decorator, as tests put on every function, would hide that it is a generator
        remote = self._ray.remote(inspect.unwrap(obey))
        self._remote = remote.options(num_returns="streaming", **given)
        if not self.has_room():
            self.close()
            wanted = f"{store.threads} processors and {gpus:g} GPUs, which a unit is to have"
            raise FslibError(f"no machine of the Ray cluster {address} has {wanted}")

    def has_room(self) -> bool:
        """Return whether a worker is idle on the machines that are there now."""
        wanted = {"CPU": self._store.threads} | ({"GPU": self._gpus} if self._gpus else {})
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.workers = sum(int(min(has.get(k, 0) // n for k, n in wanted.items())) for has in alive)
        return super().has_room()

    def send(self, chain: Chain) -> None:
        """Send out what is left of a chain, with the records that it is built on."""
        units = {unit.key: unit for unit in chain.units}
        bases = distinct(base for unit in chain.units for base in built_on(unit))
        found = [self._store.find(base) for base in bases if base.key not in units]
        sent = pickle.dumps(units), pickle.dumps(list(filter(None, found)))
        words = self._remote.remote(self._code, *sent, self._store.threads)
        self.under_way[words] = chain

    def ended(self, patience: float) -> list[Done]:
        """Wait for a worker's word, or its end.

        Raises:
            FslibError: a worker must be refused.
        """
        ready, _ = self._ray.wait(list(self.under_way), num_returns=1, timeout=patience)
        return [done for words in ready for done in self._heard(words)]

    def _heard(self, words: Any) -> list[Done]:
        """Take a chain's next word, which is there."""
        chain = self.under_way[words]
        try:
            key, failure, record = self._ray.get(next(words))
            unit = next(unit for unit in chain.units if unit.key == key)
            if record is not None:
                with self._store.lock(unit):
                    self._store.save(record)
            return [chain.through(unit, failure)]
        except StopIteration:
            del self.under_way[words]
            return []
        except self._ray.exceptions.RayError as error:
            del self.under_way[words]
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, RefusedError):
                raise cause from None
            return self.lose(chain, explained(cause))

    def close(self) -> None:
        """Leave the cluster, which then ends what is under way."""
        super().close()
        with suppress(Exception):
            self._ray.shutdown()


def _started(address: str) -> Any:
    """Return the module ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a worker without a GPU sees none
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise FslibError("--ray needs Ray: pip install -e '.[cluster]'") from error
    local = {"include_dashboard": False, "object_store_memory": 2**28}  # records are small
    options: dict[str, Any] = {"log_to_driver": False} | (local if address == "local" else {})
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdigit() and "/" not in host:  # where nobody answers, Ray takes minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray's own, and whatever the network says
        raise FslibError(f"no Ray cluster at {address!r}: {first_line(error)}") from error
    finally:  # Ray puts an answer of its own in the place of this process's
        with suppress(ValueError):  # only the main thread may, and only there Ray does
            signal.signal(signal.SIGTERM, before)
    return ray
