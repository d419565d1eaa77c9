"""Files that are whole or not there, and what killed processes leave of them.

A file is written under another name, which holds host and process, and then renamed. So a reader
sees all of it or nothing, whenever the writer is killed; and what a dead writer has left can be
told from what a live one is writing, and is swept.
"""

import errno
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors import SafetensorError

from fslib.errors import FslibError
from fslib.model.devices import partial_mark

SCRATCH = "fslib-tmp-"  # begins the name of every temporary folder
P_VALUES = re.compile(r"(.+ )?p(, .+)?")  # names of columns
MENDS = dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)")
MENDS |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space")


class CannotWriteError(FslibError):
    """A file could not be written: what comes next would fail in the same way."""


@contextmanager
def writing(path: Path, *, instead: str = "another folder with --results") -> Iterator[None]:
    """Turn a failed write into one line that says what to do.

    Args:
        path: the file or folder that is written.
        instead: what the user may choose in its place.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors says the system's error in its text only
        told = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or int(told[1] if told else 0)
        reason = os.strerror(number) if number else str(error)
        mend = MENDS.get(number, "make it writable")
        other = "set TMPDIR to another folder" if SCRATCH in str(path) else f"choose {instead}"
        raise CannotWriteError(f"cannot write {path}: {reason}; {mend}, or {other}") from error


def is_abandoned(name: str) -> bool:
    """Return whether a dead process of this host was writing under this name."""
    match = re.search(rf"\.partial-{re.escape(platform.node())}-(\d{{1,9}})$", name)
    try:
        if match and os.name != "nt":  # there, 0 is a real signal
            os.kill(int(match[1]), 0)
    except OSError as error:  # of a process that lives as another user's, it is PermissionError
        return isinstance(error, ProcessLookupError)
    return False


def sweep(folder: Path) -> None:
    """Delete what dead processes have left half written in a folder, but not deeper in it."""
    with suppress(OSError):
        for path in folder.iterdir():
            if is_abandoned(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)  # leaves a file or a link alone
    with suppress(OSError):
        path.unlink()


def set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file or folder, to be looked at, and warn of it."""
    aside = path.with_name(f"{path.name}.corrupt")
    with writing(aside):
        remove(aside)
        path.rename(aside)
    warnings.warn(f"{error}: set aside as {aside.name}, to be computed again", stacklevel=4)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for the block; a killed process's is left to `sweep`."""
    with writing(Path(os.environ.get("TMPDIR") or "/tmp") / SCRATCH):
        folder = tempfile.TemporaryDirectory(partial_mark(), SCRATCH, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def write_bytes(path: Path, content: bytes, **instead: str) -> None:
    """Write a file whole or not at all, and create its folder; `instead` as in `writing`."""
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
            remove(partial)


def write_text(path: Path, content: str, **instead: str) -> None:
    """Write a text in UTF-8; what UTF-8 cannot hold is written as its escape."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"), **instead)


def in_markdown(cell: Any) -> Any:
    """Return a cell so that Markdown reads no HTML tag, column or escape into it."""
    if not isinstance(cell, str):
        return cell
    plain = " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split("\n"))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", plain)


def save_table(folder: Path, name: str, table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Write tables/<name>.csv (full precision) and .md (rounded).

    Returns:
        The rounded table, for display. No p value is shown as 0, in columns that are named for
        p values: "p", "claim p", "p, shared".
    """
    rounded = table.copy()
    numeric = rounded.select_dtypes("floating").columns
    rounded[numeric] = rounded[numeric].round(digits) + 0.0  # no -0.0
    for column in filter(P_VALUES.fullmatch, numeric):
        shown = table[column].map(lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}")
        rounded[column] = shown.where(table[column].notna(), "")
    plain = rounded.rename(columns=in_markdown).map(in_markdown)
    write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.10g"))
    write_text(folder / "tables" / f"{name}.md", plain.to_markdown(index=False) + "\n")
    return rounded


def save_figure(folder: Path, name: str, figure: Figure, caption: str, command: str) -> None:
    """Write <name>.png (200 dpi) and .svg, the same bytes every time.

    Args:
        folder: where to.
        name: the files' name without its end.
        figure: what to draw.
        caption: stands inside both files.
        command: what makes the figure; stands there, too.
    """
    notes = {"Title": caption, "Description": f"made by: {command}"}
    png: dict[str, Any] = {"dpi": 200, "metadata": notes | {"Software": None}}
    svg: dict[str, Any] = {"metadata": notes | {"Date": None, "Creator": "fslib"}}
    for kind, chosen in (("png", png), ("svg", svg)):
        buffer = BytesIO()
        with rc_context({"svg.hashsalt": "fslib"}):
            figure.savefig(buffer, format=kind, bbox_inches="tight", **chosen)
        write_bytes(folder / f"{name}.{kind}", numbered_clips(buffer.getvalue()))


def numbered_clips(svg: bytes) -> bytes:
    """Name the clip paths of an SVG by their order; a PNG has none.

    matplotlib names each by a hash of its place with all digits, the last of which may differ when
    a layout is computed again; everything else is written rounded.
    """
    for number, name in enumerate(re.findall(rb'<clipPath id="(\w+)"', svg)):
        svg = re.sub(rb'(clipPath id="|url\(#)' + name + rb"\b", rb"\g<1>clip%d" % number, svg)
    return svg
