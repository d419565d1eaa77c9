"""Units of work, their records, and where both live: computed once, written whole.

A *unit* is a config that computes itself: config in, record out, safe to repeat. Its key is a hash of its kind, its
config and the fingerprints of its data. A `Store` finds a unit's record or computes it: present = reused, missing =
computed, one process at a time. Trained models are kept as checkpoints beside the records.

A record is `<kind>-<key>.json` with `<kind>-<key>.npz` beside it; the JSON is written last and holds the checksums of
the arrays and of itself. The arrays of a record that replaces another wait as `<kind>-<key>.next.npz` for its JSON, so
that at any moment one of the two is whole. Reading checks the checksums, and that kind, config and data are those of
the key: an edited or damaged record is never used. Only who computes sets it aside; who lists or verifies renames
nothing.
"""

import hashlib
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock, Timeout

from fslib.errors import FslibError, first_line
from fslib.model.devices import fixed_threads
from fslib.study.config import Config, shown
from fslib.study.files import sweep, write_bytes, writing
from fslib.study.fingerprints import cached_task, changed_cards, require, write_cards
from fslib.study.provenance import ROOT, git_commit, machine, versions

NEXT = ".next.npz"  # ends the name of arrays that wait for their JSON


def results_root() -> Path:
    """Return the results folder: FSLIB_RESULTS, else `results/` beside the package, else in the working folder."""
    if chosen := os.environ.get("FSLIB_RESULTS"):
        return Path(chosen).absolute()
    return (ROOT if (ROOT / "notebooks").is_dir() else Path.cwd()) / "results"


@dataclass(frozen=True, eq=False)
class Result:
    """What a unit has computed: JSON values, and arrays by name."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Unit(Config, ABC):
    """One piece of work, whole in its config. Every subclass names its own `kind`, which is part of its key."""

    kind: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "compute" in vars(cls) and "kind" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} computes something of its own: give it a `kind` of its own"
            )

    @abstractmethod
    def compute(self, store: "Store") -> Result:
        """Do the work; records and models that it builds on are taken from the store, or computed there."""

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
    """What a unit has computed, from what, and where. config and result are JSON values; arrays are kept in the npz.

    data: fingerprint of every task. sources: where those that were loaded from elsewhere came from (Hub id, commit).
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

    threads: with how many a unit is computed, whatever the machine has, so that its record is the same everywhere.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self.threads = folder, threads
        self._open: dict[str, Record] = {}

    def with_records(self, records: Iterable[Record]) -> "Store":
        """Return a store of the same folder that has these records in the place of those on the disk."""
        other = Store(self.folder, self.threads)
        other._open = self._open | {record.key: record for record in records}
        return other

    def find(self, unit: Unit) -> Record | None:
        """Return the unit's record if there is a sound one; touches no file. Raises FslibError if it is unreadable."""
        key = unit.key
        if key not in self._open:
            try:
                record = self.load(unit.kind, key)
            except DamagedRecordError:
                return None
            if record is None:
                return None
            self._open[key] = record
        return self._open[key]

    def get(self, unit: Unit) -> Record:
        """Return the unit's record, computed now if it is missing; nothing is written unless it is whole.

        A damaged record is set aside, with a warning, and computed again; one that cannot be read is left alone.
        """
        record = self.find(unit)
        if record is not None:
            return record
        with self.lock(unit):
            self._set_aside_if_damaged(unit)
            record = self.find(unit)  # another run may have been first
            return self._computed(unit) if record is None else record

    def renew(self, unit: Unit) -> Record:
        """Return the unit's record, computed now in any case; the old one stays until the new one takes its place."""
        with self.lock(unit):
            self._set_aside_if_damaged(unit)
            return self._computed(unit)

    def reread(self, unit: Unit) -> None:
        """Read the unit's record anew when it is next asked for: another process may have written it."""
        self._open.pop(unit.key, None)

    def _computed(self, unit: Unit) -> Record:
        """Compute a unit, under its lock, and return its record, once it is written."""
        for part in ("runs", "checkpoints"):
            sweep(self.folder / part, f"{unit.kind}-{unit.key}.")
        with fixed_threads(self.threads):
            record = self._measured(unit)
        self.save(record)
        self._open[unit.key] = record
        return record

    def _measured(self, unit: Unit) -> Record:
        """Compute a unit, and return what is recorded of it. Raises FslibError if its data are not at hand."""
        require(unit.task_names(), f"{unit.kind}-{unit.key}")
        started = time.perf_counter()
        result = unit.compute(self)
        seconds = round(time.perf_counter() - started, 2)
        sources = {name: cached_task(name).source for name in unit.task_names()}
        return Record(
            unit.kind,
            unit.key,
            unit.model_dump(mode="json"),
            unit.data(),
            result.values,
            result.arrays,
            seconds,
            versions(),
            git_commit(),
            machine(),
            # not local paths: they say nothing to others, and a fingerprint says which data they hold
            {
                name: source
                for name, source in sources.items()
                if source and not Path(source).exists()
            },
        )

    def tell_data(self, names: Iterable[str]) -> None:
        """Write into data.json which data the records are computed on, for who has the records and not the data."""
        if changed_cards(self.folder, names := list(names)):
            with self._lock("data"):
                write_cards(self.folder, changed_cards(self.folder, names))

    def sweep(self) -> None:
        """Delete what killed processes have left half written anywhere under the folder."""
        if (self.folder / "runs").is_dir():
            with self._lock("sweep"):
                for part in ("", "runs", "checkpoints", "tables", "figures", "notebooks"):
                    sweep(self.folder / part)
            for waiting in (self.folder / "runs").glob(f"*{NEXT}"):
                with (
                    suppress(Timeout),
                    self._lock(waiting.name.removesuffix(NEXT)).acquire(timeout=0),
                ):
                    _settle(waiting)

    def set_aside(self) -> list[Path]:
        """Return what was found damaged before, records and checkpoints, and is kept to be looked at."""
        return sorted(
            p for part in ("runs", "checkpoints") for p in (self.folder / part).glob("*.corrupt")
        )

    def checkpoint(self, unit: Unit) -> Path:
        """Return the folder of a unit's trained model, whether there is one or not."""
        return self.folder / "checkpoints" / f"{unit.kind}-{unit.key}"

    def path(self, kind: str, key: str) -> Path:
        """Return the path of a record's JSON; its arrays lie beside it, as .npz."""
        return self.folder / "runs" / f"{kind}-{key}.json"

    def lock(self, unit: Unit) -> FileLock:
        """Let one process at a time compute a unit; the lock of a killed one is free."""
        return self._lock(f"{unit.kind}-{unit.key}")

    def _lock(self, name: str) -> FileLock:
        path = self.folder / "runs" / ".locks" / f"{name}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
        return FileLock(path)

    def load(self, kind: str, key: str) -> Record | None:
        """Read a record, whatever it says; None if there is none. No file is touched.

        Raises DamagedRecordError for a record whose content cannot be trusted, FslibError for one that cannot be read.
        """
        path = self.path(kind, key)
        content = _read(path)
        if content is None:
            return None
        stored, wrong = path.with_suffix(".npz"), Exception()
        # new arrays wait beside the old ones until their JSON is there; while this looks, they may take their place
        for place in (stored, path.with_suffix(NEXT), stored):
            arrays = _read(place)
            try:
                record = _parsed(content, arrays)
                if (record.kind, record.key) != (kind, key):
                    raise ValueError(f"it holds {record.kind}-{record.key}")
                return record
            except (
                Exception
            ) as error:  # both files were read: whatever goes wrong now lies in their content
                wrong = error
        if _read(path) != content:  # another process has removed it, or computed it anew
            return self.load(kind, key)
        raise DamagedRecordError(f"record {path} is damaged ({first_line(wrong)})") from wrong

    def _set_aside_if_damaged(self, unit: Unit) -> None:
        """Rename a damaged record; only under its lock, or a good one could be hit that another process has made."""
        path = self.path(unit.kind, unit.key)
        try:
            self.load(unit.kind, unit.key)
        except DamagedRecordError as error:
            aside = path.with_suffix(".json.corrupt")
            with writing(aside):
                path.replace(aside)
            warnings.warn(f"{error}: set aside as {aside.name}, to be computed again", stacklevel=3)

    def save(self, record: Record) -> None:
        """Write a record; one that it replaces is there, and whole, until the new one is."""
        content = {k: v for k, v in asdict(record).items() if k != "arrays"} | {"arrays_sha256": ""}
        arrays = BytesIO()
        if record.arrays:
            np.savez_compressed(arrays, **record.arrays)  # type: ignore[arg-type]
            content["arrays_sha256"] = hashlib.sha256(arrays.getvalue()).hexdigest()
        content["content_sha256"] = content_checksum(content)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        self._write(
            self.path(record.kind, record.key),
            text.encode("utf-8", "backslashreplace"),
            arrays.getvalue(),
        )

    def _write(self, path: Path, content: bytes, arrays: bytes) -> None:
        """Write a record's files, its arrays first and its JSON last: one without its arrays is never seen."""
        place = path.with_suffix(NEXT if path.is_file() else ".npz")
        if arrays:
            write_bytes(place, arrays)
        write_bytes(path, content)
        if place.name.endswith(NEXT) and place.is_file():
            _settle(place)

    def files(self, unit: Unit) -> tuple[bytes, bytes]:
        """Return a record as its files hold it, JSON and arrays. Raises FslibError if there is no sound one."""
        path = self.path(unit.kind, unit.key)
        content, arrays = _read(path), _read(path.with_suffix(".npz"))
        if content is None or self.find(unit) is None:
            raise FslibError(f"there is no record {path}")
        return content, arrays or b""

    def adopt(self, unit: Unit, files: tuple[bytes, bytes]) -> None:
        """Write a unit's record that another store has computed, as it is.

        Raises DamagedRecordError, before anything is written, for files that are not this unit's record, or not whole.
        """
        content, arrays = files
        try:
            record = _parsed(content, arrays)
        except Exception as error:  # whatever is wrong lies in their content
            raise DamagedRecordError(
                f"record {unit.kind}-{unit.key} came damaged ({first_line(error)})"
            ) from error
        if (record.kind, record.key) != (unit.kind, unit.key):
            raise DamagedRecordError(
                f"instead of record {unit.kind}-{unit.key} came {record.kind}-{record.key}"
            )
        with self.lock(unit):
            self._write(self.path(unit.kind, unit.key), content, arrays)
        self.reread(unit)


def _settle(waiting: Path) -> None:
    """Put arrays that wait for their JSON where they belong, or delete them if it was not written."""
    path = waiting.with_name(waiting.name.removesuffix(NEXT) + ".json")
    with writing(waiting):
        try:
            is_theirs = (
                json.loads(path.read_bytes())["arrays_sha256"]
                == hashlib.sha256(waiting.read_bytes()).hexdigest()
            )
        except Exception:  # no JSON, or one that is damaged: it is dealt with where it is read
            is_theirs = False
        waiting.replace(path.with_suffix(".npz")) if is_theirs else waiting.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """Return a file's content, None if there is no such file. Raises FslibError if it cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FslibError(
            f"cannot read {path}: {error.strerror}; it was left as it is, make it readable"
        ) from error


# What a record's JSON must hold. Records of older versions lack the last two of `Record` and the checksum of the whole.
_TYPES: dict[str, tuple[type, ...]] = {
    "config": (dict,), "data": (dict,), "result": (dict,), "versions": (dict,), "machine": (dict,), "sources": (dict,),
    "commit": (str,), "seconds": (int, float),
}  # fmt: skip


def _parsed(content: bytes, arrays: bytes | None) -> Record:
    """Make a record of its two files. Raises whatever is wrong with them."""
    values = json.loads(content.decode("utf-8"))
    stated = values.pop("content_sha256", None)
    if stated is not None and stated != content_checksum(values):
        raise ValueError("it was edited: its content does not match its checksum")
    checksum = values.pop("arrays_sha256")
    if checksum and arrays is None:
        raise ValueError("its arrays are lost")
    if checksum and hashlib.sha256(arrays or b"").hexdigest() != checksum:
        raise ValueError("its arrays do not match their checksum")
    loaded = {}
    if checksum:
        with np.load(BytesIO(arrays or b""), allow_pickle=False) as stored:
            loaded = {name: stored[name] for name in stored.files}
    record = Record(arrays=loaded, **values)
    for name, types in _TYPES.items():
        value = getattr(record, name)
        if not isinstance(value, types) or isinstance(value, bool):
            raise TypeError(f"its {name} is {shown(value)}")
    if key_of(record.kind, record.config, record.data) != record.key:
        raise ValueError("its kind, config and data are not those of its key")
    return record


def content_checksum(values: dict[str, Any]) -> str:
    """Return the checksum of all that a record's JSON says but for the seconds it took, which no result depends on."""
    rest = {
        k: v
        for k, v in json.loads(json.dumps(values)).items()
        if k not in ("seconds", "content_sha256")
    }
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def key_of(kind: str, config: dict[str, Any], data: dict[str, str]) -> str:
    """Return sixteen hex digits that say which piece of work this is."""
    return hashlib.sha256(json.dumps([kind, config, data], sort_keys=True).encode()).hexdigest()[
        :16
    ]


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """Return each unit once, in the order of first mention."""
    return list({unit.key: unit for unit in units}.values())
