"""Files that are whole or not there, and what killed processes leave of them.

A file is written under another name, which tells host and process, and renamed: a reader sees all of it or nothing,
whenever the writer is killed, and what a killed writer has left can be told from what a live one is writing.
"""

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors import SafetensorError

from fslib.errors import FslibError
from fslib.model.devices import partial_mark

SCRATCH = "fslib-tmp-"  # begins the name of every temporary folder
P_VALUES = re.compile(r"(.+ )?p(, .+)?")  # names of columns


class CannotWriteError(FslibError):
    """A file could not be written: what comes next would fail in the same way."""


@contextmanager
def writing(path: Path, *, instead: str = "another folder with --results") -> Iterator[None]:
    """Turn a failed write into one line that says what to do, or what to choose instead."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's error in its text only
        number = getattr(error, "errno", None) or int(
            (re.findall(r"os error (\d+)", str(error)) or [0])[0]
        )
        reason = os.strerror(number) if number else str(error)
        mend = "make it writable"
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            mend = "free some space"
        elif number in (errno.EMFILE, errno.ENFILE):
            mend = "allow more open files (ulimit -n)"
        is_scratch = any(part.startswith(SCRATCH) for part in path.parts)
        other = "set TMPDIR to another folder" if is_scratch else f"choose {instead}"
        raise CannotWriteError(f"cannot write {path}: {reason}; {mend}, or {other}") from error


def is_abandoned(name: str) -> bool:
    """Tell whether a file under this name was being written by a process of this host that is no more."""
    match = re.search(r"\.partial-(?:(.+)-)?(\d{1,9})$", name)
    if match is None or match[1] not in (None, platform.node()) or os.name == "nt":
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as another user's
        return False
    return False


def sweep(folder: Path, stem: str = "") -> None:
    """Delete what dead processes have left half written in a folder (only of files whose names begin with `stem`)."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.lstrip(".").startswith(stem) and is_abandoned(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a temporary folder that is gone after the block; of a killed process, `sweep` deletes it."""
    with writing(Path(os.environ.get("TMPDIR") or "/tmp") / SCRATCH):
        folder = tempfile.TemporaryDirectory(
            prefix=SCRATCH, suffix=partial_mark(), ignore_cleanup_errors=True
        )
    with folder as name:
        yield Path(name)


def write_bytes(path: Path, content: bytes, **instead: str) -> None:
    """Write a file whole or not at all, creating its folder; `instead`: see `writing`."""
    partial = path.with_name(f".{path.name}{partial_mark()}")
    with writing(path, **instead):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):  # the first error tells more
                partial.unlink(missing_ok=True)


def write_text(path: Path, content: str, **instead: str) -> None:
    """Write a text in UTF-8; half of a pair of surrogates, which UTF-8 cannot hold, is written as its escape."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"), **instead)


def in_markdown(cell: Any) -> Any:
    """Return a cell as Markdown shows it letter by letter: no HTML tag, column or escape is read into it."""
    if not isinstance(cell, str):
        return cell
    plain = " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split("\n"))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", plain)


def save_table(folder: Path, name: str, table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Write tables/<name>.csv (full precision) and .md (rounded); returns the rounded table, for display.

    A column that is named for p values ("p", "claim p", "p, shared") shows none of them as 0.
    """
    rounded = table.copy()
    numeric = rounded.select_dtypes("floating").columns
    rounded[numeric] = rounded[numeric].round(digits) + 0.0  # no -0.0
    for column in filter(P_VALUES.fullmatch, numeric):
        rounded[column] = table[column].map(_p_value)
    shown = rounded.rename(columns=in_markdown)
    for place in range(shown.shape[1]):
        if not pd.api.types.is_numeric_dtype(shown.dtypes.iloc[place]):
            shown.isetitem(place, shown.iloc[:, place].map(in_markdown))
    write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
    write_text(folder / "tables" / f"{name}.md", shown.to_markdown(index=False) + "\n")
    return rounded


def _p_value(p: float) -> str:
    if np.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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
        content = buffer.getvalue()
        write_bytes(
            folder / f"{name}.{kind}", numbered_clips(content) if kind == "svg" else content
        )
    return figure


def numbered_clips(svg: bytes) -> bytes:
    """Name the clip paths of an SVG by their order.

    matplotlib names each by a hash of its place with all digits, the last of which may differ when a layout is computed
    again, where everything else is written rounded.
    """
    for number, name in enumerate(re.findall(rb'<clipPath id="(\w+)"', svg)):
        svg = re.sub(rb'(clipPath id="|url\(#)' + name + rb"\b", rb"\g<1>clip%d" % number, svg)
    return svg
