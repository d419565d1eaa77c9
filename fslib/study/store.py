"""Units of work, their records, and where both live: computed once, written whole.

A *unit* is a config that computes itself: config in, record out, safe to repeat. Its key is a hash
of its kind, its config and the fingerprints of its data. A `Store` finds a unit's record or
computes it: present = reused, missing = computed, by one process at a time. Trained models are kept
as checkpoints beside the records.

A record is `<kind>-<key>.json`, with its arrays beside it in `<kind>-<key>.npz`. The arrays are
written first and the JSON last, which holds the checksums of the arrays and of itself; reading
checks both, and that kind, config and data are those of the key. So an edited, damaged or half
replaced record is never used: it costs one recomputed unit. Only a process that computes sets it
aside; one that lists or verifies renames nothing.
"""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock

from fslib.errors import FslibError, first_line
from fslib.model.devices import fixed_threads
from fslib.study.config import Config
from fslib.study.files import set_aside, sweep, write_bytes, writing
from fslib.study.fingerprints import cached_task, changed_cards, public_source, require, write_cards
from fslib.study.provenance import ROOT, git_commit, machine, versions


def results_root() -> Path:
    """Return the results folder.

    FSLIB_RESULTS, else `results/` beside the package, else in the working folder.
    """
    if chosen := os.environ.get("FSLIB_RESULTS"):
        return Path(chosen).absolute()
    return (ROOT if (ROOT / "notebooks").is_dir() else Path.cwd()) / "results"


@dataclass(frozen=True, eq=False)
class Result:
    """What a unit has computed: JSON values, and arrays by name."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Unit(Config, ABC):
    """One piece of work, whole in its config.

    Every subclass names its own `kind`, which is part of its key.
    """

    kind: ClassVar[str]

    @abstractmethod
    def compute(self, store: "Store") -> Result:
        """Do the work; take records and models that it builds on from the store."""

    @abstractmethod
    def task_names(self) -> list[str]:
        """Name the tasks whose data the unit uses."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words which tasks and seed the unit is about."""

    def data(self) -> dict[str, str]:
        """Return {task: fingerprint of its data}."""
        return {name: cached_task(name).fingerprint for name in self.task_names()}

    @property
    def key(self) -> str:
        """Sixteen hex digits that say which piece of work this is."""
        return key_of(self.kind, self.model_dump(mode="json"), self.data())


@dataclass(frozen=True)
class Record:
    """What a unit has computed, from what, and where.

    Args:
        kind: the unit's kind.
        key: the unit's key.
        config: the unit's fields, as JSON values.
        data: {task: fingerprint of its data}.
        result: JSON values.
        arrays: by name; kept in the npz.
        seconds: how long it took.
        versions: of Python and packages.
        commit: of the code.
        machine: what results may depend on.
        sources: {task: Hub id and commit}, of tasks that were loaded from elsewhere.
    """

    kind: str
    key: str
    config: dict[str, Any]
    data: dict[str, str]
    result: dict[str, Any]
    arrays: dict[str, np.ndarray]
    seconds: float
    versions: dict[str, str]
    commit: str
    machine: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)


class DamagedRecordError(FslibError):
    """A record is there, but its content cannot be trusted."""


class Store:
    """Records and checkpoints under one folder: `runs/` and `checkpoints/`.

    Args:
        folder: where they are.
        threads: with how many a unit is computed, whatever the machine has, so that its record is
            the same everywhere.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self.threads = folder, threads
        self._open: dict[str, Record] = {}

    def with_records(self, records: Iterable[Record]) -> "Store":
        """Return a store of the same folder with these records before those on the disk."""
        other = Store(self.folder, self.threads)
        other._open = self._open | {record.key: record for record in records}
        return other

    def find(self, unit: Unit) -> Record | None:
        """Return the unit's record if there is a sound one; touch no file.

        Raises:
            FslibError: if it cannot be read.
        """
        key = unit.key
        if key not in self._open:
            with suppress(DamagedRecordError):
                if (record := self.load(unit.kind, key)) is not None:
                    self._open[key] = record
        return self._open.get(key)

    def get(self, unit: Unit) -> Record:
        """Return the unit's record, computed now if it is missing.

        A damaged record is set aside, with a warning, and computed again; one that cannot be read
        is left alone.
        """
        if (record := self.find(unit)) is None:
            with self.lock(unit):
                try:
                    record = self.load(unit.kind, unit.key)  # another run may have been first
                except DamagedRecordError as error:
                    set_aside(self.path(unit.kind, unit.key), error)
                self._open[unit.key] = record = record or self._computed(unit)
        return record

    def renew(self, unit: Unit) -> Record:
        """Return the unit's record, computed now in any case.

        The old one stays until the new one takes its place.
        """
        with self.lock(unit):
            self._open[unit.key] = self._computed(unit)
        return self._open[unit.key]

    def _computed(self, unit: Unit) -> Record:
        """Compute a unit, under its lock, and return its record, once it is written.

        Raises:
            FslibError: if its data are not at hand.
        """
        require(unit.task_names(), f"{unit.kind}-{unit.key}")
        self.sweep()
        with fixed_threads(self.threads):
            started = time.perf_counter()
            result = unit.compute(self)
            seconds = round(time.perf_counter() - started, 2)
            data, here = unit.data(), (versions(), git_commit(), machine())
            sources = {name: at for name in data if (at := public_source(cached_task(name)))}
            made = (unit.model_dump(mode="json"), data, result.values, result.arrays, seconds)
            record = Record(unit.kind, unit.key, *made, *here, sources)
        self.save(record)
        return record

    def tell_data(self, names: Iterable[str]) -> None:
        """Write into data.json which data the records are computed on.

        So they can be found where the data are not at hand.
        """
        if cards := changed_cards(self.folder, names):
            with self.lock():
                write_cards(self.folder, cards)

    def sweep(self) -> None:
        """Delete what killed processes have left half written under the folder."""
        for part in ("", "runs", "checkpoints", "tables", "figures", "notebooks"):
            sweep(self.folder / part)

    def set_aside(self) -> list[Path]:
        """Return the damaged records and checkpoints that are kept to be looked at."""
        return sorted(self.folder.glob("*/*.corrupt"))

    def checkpoint(self, unit: Unit) -> Path:
        """Return the folder of a unit's trained model, whether there is one or not."""
        return self.folder / "checkpoints" / f"{unit.kind}-{unit.key}"

    def path(self, kind: str, key: str) -> Path:
        """Return the path of a record's JSON; its arrays lie beside it, as .npz."""
        return self.folder / "runs" / f"{kind}-{key}.json"

    def lock(self, unit: Unit | None = None) -> FileLock:
        """Let one process at a time compute a unit, or write data.json.

        The lock of a killed process is free.
        """
        name = f"{unit.kind}-{unit.key}" if unit else "data"
        path = self.folder / "runs" / ".locks" / f"{name}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return FileLock(path)

    def load(self, kind: str, key: str) -> Record | None:
        """Read a record, whatever it says; None if there is none. Touch no file.

        Raises:
            DamagedRecordError: if its content cannot be trusted.
            FslibError: if it cannot be read.
        """
        path = self.path(kind, key)
        content, arrays = _read(path), _read(path.with_suffix(".npz"))
        return None if content is None else _parsed(content, arrays, path)

    def state(self, unit: Unit) -> Record | FslibError | None:
        """Return the unit's record, None if there is none, or the error that says why."""
        try:
            return self.load(unit.kind, unit.key)
        except FslibError as error:
            return error

    def save(self, record: Record) -> None:
        """Write a record: its arrays first and its JSON last."""
        content = {k: v for k, v in asdict(record).items() if k != "arrays"} | {"arrays_sha256": ""}
        kind, key, arrays = record.kind, record.key, BytesIO()
        if record.arrays:
            np.savez_compressed(arrays, **record.arrays)  # type: ignore[arg-type]
            content["arrays_sha256"] = hashlib.sha256(arrays.getvalue()).hexdigest()
        content["content_sha256"] = content_checksum(content)
        text, path = json.dumps(content, indent=1, ensure_ascii=False), self.path(kind, key)
        if record.arrays:
            write_bytes(path.with_suffix(".npz"), arrays.getvalue())
        write_bytes(path, f"{text}\n".encode("utf-8", "backslashreplace"))
        self._open.pop(key, None)  # it is older


def _read(path: Path) -> bytes | None:
    """Return a file's content, None if there is no such file.

    Raises:
        FslibError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FslibError(f"cannot read {path}: {error.strerror}; make it readable") from error


def _parsed(content: bytes, arrays: bytes | None, path: Path) -> Record:
    """Return the record that the files at a path hold.

    Raises:
        DamagedRecordError: says what is wrong with them.
    """
    try:
        values = json.loads(content)
        if values.pop("content_sha256") != content_checksum(values):
            raise ValueError("it was edited: its content does not match its checksum")
        checksum = values.pop("arrays_sha256")
        loaded = {}
        if checksum:
            if arrays is None or hashlib.sha256(arrays).hexdigest() != checksum:
                raise ValueError("its arrays are lost, or do not match their checksum")
            with np.load(BytesIO(arrays), allow_pickle=False) as stored:
                loaded = {name: stored[name] for name in stored.files}
        record = Record(arrays=loaded, **values | {"seconds": float(values["seconds"])})
        held = key_of(record.kind, record.config, record.data)
        if record.key != held or path.stem != f"{record.kind}-{held}":
            raise ValueError(f"it holds {record.kind}-{held}")
        return record
    except Exception as error:  # the files were read: the fault is in their content
        raise DamagedRecordError(f"record {path} is damaged ({first_line(error)})") from error


def content_checksum(values: dict[str, Any]) -> str:
    """Return the checksum of a record's JSON, all but its seconds.

    No result depends on the seconds it took.
    """
    known = json.loads(json.dumps(values))
    rest = {k: v for k, v in known.items() if k not in ("seconds", "content_sha256")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def key_of(kind: str, config: dict[str, Any], data: dict[str, str]) -> str:
    """Return sixteen hex digits that say which piece of work this is."""
    whole = json.dumps([kind, config, data], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """Return each unit once, in the order of first mention."""
    return list({unit.key: unit for unit in units}.values())
