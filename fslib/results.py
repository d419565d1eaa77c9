"""Where records, checkpoints, tables and figures live, and how they get there whole.

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
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors import SafetensorError

from fslib.errors import FslibError

ROOT = Path(__file__).resolve().parent.parent


def results_root() -> Path:
    """The results folder: the environment's FSLIB_RESULTS, else `results/` beside the package, else in this folder."""
    if chosen := os.environ.get("FSLIB_RESULTS"):
        return Path(chosen)
    return ROOT / "results" if (ROOT / "notebooks").is_dir() else Path("results")


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
    """What a result may depend on: two machines with equal entries give bit-equal records."""
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
    found = {name: version(name) for name in ("fslib", "torch", "transformers", "datasets", "numpy", "scikit-learn")}
    return {"python": platform.python_version(), **found}


def git_commit() -> str:
    """The commit the code is at, with "+changes" if fslib/ differs from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "fslib") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Record:
    """One unit's outcome. config and result are JSON values; arrays are kept in the npz.

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


class Records:
    """The records of one profile, in `folder/runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        return self.folder / "runs" / f"{kind}-{key}.json"

    def lock(self, kind: str, key: str) -> FileLock:
        """One process at a time computes a unit; the lock of a killed process is free."""
        path = self.folder / "runs" / ".locks" / f"{kind}-{key}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
        return FileLock(path)

    def load(self, kind: str, key: str) -> Record | None:
        """The record, or None if there is none. A damaged one is set aside, with a warning, and counts as missing."""
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
        """Arrays first, JSON last: a record without its arrays is never seen."""
        content = {k: v for k, v in asdict(record).items() if k != "arrays"} | {"arrays_sha256": ""}
        path = self.path(record.kind, record.key)
        if record.arrays:
            buffer = BytesIO()
            np.savez_compressed(buffer, **record.arrays)  # type: ignore[arg-type]
            content["arrays_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_bytes(path.with_suffix(".npz"), buffer.getvalue())
        write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def save_table(folder: Path, name: str, table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Write tables/<name>.csv (full precision) and .md (rounded); returns the rounded table, for display."""
    rounded = table.copy()
    numeric = rounded.select_dtypes("floating").columns
    rounded[numeric] = rounded[numeric].round(digits) + 0.0  # no -0.0
    write_bytes(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.10g").encode())
    write_bytes(folder / "tables" / f"{name}.md", (rounded.to_markdown(index=False) + "\n").encode())
    return rounded


def save_figure(folder: Path, name: str, figure: Figure, caption: str, command: str) -> Figure:
    """Write <name>.png (200 dpi) and .svg, the same bytes every time, with caption and command inside."""
    notes: Mapping[str, str | None] = {"Title": caption, "Description": f"made by: {command}"}
    savers: dict[str, Callable[[], dict[str, Any]]] = {
        "png": lambda: {"dpi": 200, "metadata": {**notes, "Software": None}},
        "svg": lambda: {"metadata": {**notes, "Date": None, "Creator": "fslib"}},
    }
    for kind, options in savers.items():
        buffer = BytesIO()
        with rc_context({"svg.hashsalt": "fslib"}):
            figure.savefig(buffer, format=kind, bbox_inches="tight", **options())
        write_bytes(folder / f"{name}.{kind}", buffer.getvalue())
    return figure
