"""Units of work, their records, and where both live: computed once, written whole.

A *unit* is a config that computes itself: config in, record out, safe to repeat. Its key is a hash of its kind, its
config and the fingerprints of its data. A `Store` finds a unit's record or computes it: present = reused, missing =
computed, one process at a time. Trained models are kept as checkpoints beside the records.

Every file is written under another name and renamed, so a reader sees all of it or nothing, whenever the
writer is killed. A record is `<kind>-<key>.json` with `<kind>-<key>.npz` beside it; the JSON is written last
and holds the arrays' checksum.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from fslib.data.loading import load_task
from fslib.data.tasks import Task
from fslib.errors import FslibError, unknown

ROOT = Path(__file__).resolve().parents[2]


def results_root() -> Path:
    """Return the results folder: FSLIB_RESULTS, else `results/` beside the package, else in the working folder."""
    if chosen := os.environ.get("FSLIB_RESULTS"):
        return Path(chosen)
    return ROOT / "results" if (ROOT / "notebooks").is_dir() else Path("results")


@cache
def cached_task(name: str) -> Task:
    """Return a task by name, loaded once per process."""
    return load_task(name)


class Config(BaseModel):
    """Values that were checked: unknown keys are refused, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
            raise TypeError(f"{cls.__name__} computes something of its own: give it a `kind` of its own")

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
        whole = json.dumps([self.kind, self.model_dump(mode="json"), self.data()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


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


class Store:
    """Records and checkpoints under one folder: `runs/` and `checkpoints/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Record] = {}

    def find(self, unit: Unit) -> Record | None:
        """Return the unit's record if there is one."""
        key = unit.key
        if key not in self._open and (record := self.load(unit.kind, key)):
            self._open[key] = record
        return self._open.get(key)

    def get(self, unit: Unit) -> Record:
        """Return the unit's record, computed now if it is missing; nothing is written unless it is whole."""
        if record := self.find(unit):
            return record
        with self.lock(unit):
            if record := self.find(unit):  # another process was first
                return record
            started = time.perf_counter()
            result = unit.compute(self)
            seconds = round(time.perf_counter() - started, 2)
            sources = {name: cached_task(name).source for name in unit.task_names()}
            record = Record(
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
                {name: source for name, source in sources.items() if source and not Path(source).exists()},
            )
            self.save(record)
            self._open[unit.key] = record
            return record

    def forget(self, unit: Unit) -> None:
        """Delete a unit's record and checkpoint, so that it is computed anew."""
        self._open.pop(unit.key, None)
        path = self.path(unit.kind, unit.key)
        with writing(path):
            for old in (path, path.with_suffix(".npz")):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint(unit), ignore_errors=True)

    def checkpoint(self, unit: Unit) -> Path:
        """Return the folder of a unit's trained model, whether there is one or not."""
        return self.folder / "checkpoints" / f"{unit.kind}-{unit.key}"

    def path(self, kind: str, key: str) -> Path:
        """Return the path of a record's JSON; its arrays lie beside it, as .npz."""
        return self.folder / "runs" / f"{kind}-{key}.json"

    def lock(self, unit: Unit) -> FileLock:
        """Return the lock under which one process at a time computes a unit; that of a killed process is free."""
        path = self.folder / "runs" / ".locks" / f"{unit.kind}-{unit.key}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
        return FileLock(path)

    def load(self, kind: str, key: str) -> Record | None:
        """Read a record; None if there is none. A damaged one is set aside, with a warning, and counts as missing."""
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("arrays_sha256")
            raw = path.with_suffix(".npz").read_bytes() if checksum else b""
            if checksum and hashlib.sha256(raw).hexdigest() != checksum:
                raise ValueError("its arrays do not match their checksum")
            arrays = {}
            if raw:
                with np.load(BytesIO(raw), allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
            record = Record(arrays=arrays, **content)
            if (record.kind, record.key) != (kind, key):
                raise ValueError(f"it holds {record.kind}-{record.key}")
            return record
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not path.is_file():  # another process has removed it or set it aside
                return None
            aside = path.with_suffix(".json.corrupt")
            with writing(aside), suppress(FileNotFoundError):
                path.replace(aside)
            message = f"record {path} is damaged ({error}): set aside as {aside.name}, to be computed again"
            warnings.warn(message, stacklevel=2)
            return None

    def save(self, record: Record) -> None:
        """Write a record, its arrays first and its JSON last: one without its arrays is never seen."""
        content = {k: v for k, v in asdict(record).items() if k != "arrays"} | {"arrays_sha256": ""}
        path = self.path(record.kind, record.key)
        if record.arrays:
            buffer = BytesIO()
            np.savez_compressed(buffer, **record.arrays)  # type: ignore[arg-type]
            content["arrays_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_bytes(path.with_suffix(".npz"), buffer.getvalue())
        write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """Return each unit once, in the order of first mention."""
    return list({unit.key: unit for unit in units}.values())


def checked(config: type[Config], values: dict[str, Any], what: str) -> Any:
    """Return a config made from untrusted values.

    Raises FslibError for the first thing wrong with them, with the nearest valid name.
    """
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown(what, name, config.model_fields) from None
        raise FslibError(f"{what} {name}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's error in its text only
        number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", str(error)) or [0])[0])
        reason = os.strerror(number) if number else str(error)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "free some space" if full else "make it writable"
        raise FslibError(f"cannot write {path}: {reason}; {mend}, or choose another folder with --results") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, creating its folder."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def machine() -> dict[str, Any]:
    """Say what a result may depend on: two machines with equal entries give bit-equal records."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        processor = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), processor)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    packages = {name: version(name) for name in ("fslib", "torch", "transformers", "datasets", "numpy", "scikit-learn")}
    return {"python": platform.python_version(), **packages}


def git_commit() -> str:
    """Return the commit the code is at, with "+changes" if fslib/ differs from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "fslib") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_table(folder: Path, name: str, table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Write tables/<name>.csv (full precision) and .md (rounded); returns the rounded table, for display."""
    rounded = table.copy()
    numeric = rounded.select_dtypes("floating").columns
    rounded[numeric] = rounded[numeric].round(digits) + 0.0  # no -0.0
    write_bytes(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.10g").encode())
    write_bytes(folder / "tables" / f"{name}.md", (rounded.to_markdown(index=False) + "\n").encode())
    return rounded
