"""The data that records were computed on, as `data.json` beside the records tells it.

The key of a record holds the fingerprints of its data, so a reader without the data could not even
find it. What tables need of the data beside their records, labels above all, is kept there as well;
texts are not, and nothing is computed without them.
"""

import base64
import json
import os
import sys
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fslib.data.loading import load_task
from fslib.data.tasks import Split, Task
from fslib.errors import FslibError, NotAtHandError, first_line
from fslib.study.files import write_text

FILE = "data.json"
SAID = "FSLIB_DATA_SAID"  # set in the environment of processes whose parent has said it all
Cards = dict[str, dict[str, Any]]
_consulted: list[Path] = []  # the last one first


def consult(folder: Path) -> None:
    """Let a results folder tell of data that are not at hand, before those named earlier."""
    path = folder / FILE
    _consulted[:] = [path, *(p for p in _consulted if p != path)]


@cache
def cached_task(name: str) -> Task:
    """Return a task by name, loaded once per process.

    If its data are not at hand, it is what data.json tells of it. That is said in a line, and so is
    it when the data are not those of the records.
    """
    try:
        task = load_task(name)
    except NotAtHandError as error:
        for path in _consulted:
            if card := read_cards(path).get(name):
                gone = f"data of {name} are not at hand"
                _say(f"{gone}: records are found by the fingerprint in {_short(path)}")
                return recorded_task(name, card, f"the {gone}: {error}")
        raise
    card = _known_cards(_consulted[0]).get(name) if _consulted else None
    if card and card["fingerprint"] != task.fingerprint:
        theirs = f"are not those in {_short(_consulted[0])} ({card['fingerprint']})"
        _say(f"data of {name} at hand ({task.fingerprint}) {theirs}: units are computed anew")
    return task


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _say(line: str) -> None:
    """Print a line on standard error; in a kernel, where that would be a warning, not so."""
    ipython = sys.modules.get("IPython")
    kernel = ipython is not None and ipython.get_ipython() is not None
    if not os.environ.get(SAID):
        stream = sys.stdout if kernel else sys.stderr
        print(line if kernel else f"fslib: {line}", file=stream, flush=True)


class LabelsOnly(Split):
    """One side of a task of which only the labels are known; its texts raise FslibError."""

    why: str

    def __init__(self, labels: np.ndarray, why: str) -> None:
        vars(self).update(labels=labels, why=why)  # its base is frozen

    def __getattr__(self, name: str) -> Any:
        is_text = name in ("texts", "pairs", "documents")
        raise FslibError(self.why) if is_text else AttributeError(name)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LabelsOnly({len(self)} labels)"

    def take(self, indices: Any) -> Split:
        """Return the labels at these positions, in this order."""
        return LabelsOnly(self.labels[np.asarray(indices, dtype=np.int64)], self.why)


class RecordedTask(Task):
    """A task as data.json tells it: everything but its texts."""

    def __post_init__(self) -> None:
        """Check nothing: it was checked when it was whole."""


def recorded_task(name: str, card: dict[str, Any], why: str) -> RecordedTask:
    """Return the task that a card tells of.

    Args:
        name: the task's.
        card: of `card_of`.
        why: the message of the error where a text is asked for.
    """
    train, held = (LabelsOnly(_unpacked(card[side]), why) for side in ("train", "eval"))
    told = {k: card[k] for k in ("metric", "description", "source")}
    task = RecordedTask(name, train, held, tuple(card["label_names"]), **told)
    # in the place of the one that would be made of the texts
    vars(task)["fingerprint"] = card["fingerprint"]
    return task


def require(names: Iterable[str], what: str) -> None:
    """Raise FslibError if `what` cannot be computed since data are not at hand."""
    for name in names:
        train = cached_task(name).train
        if isinstance(train, LabelsOnly):
            raise FslibError(f"{what} has no record and cannot be computed: {train.why}")


def read_cards(path: Path) -> Cards:
    """Return {task: its card} of a data.json, {} if there is none.

    Raises:
        FslibError: if it is damaged.
    """
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        for card in cards.values():
            recorded_task("any", card, "")
        return dict(cards)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # whatever a damaged file makes of itself
        raise FslibError(f"{path} is damaged ({first_line(error)}): restore it") from error


def changed_cards(folder: Path, names: Iterable[str]) -> Cards:
    """Return the cards that a folder lacks, or has of other data or words.

    Args:
        folder: that data.json is in.
        names: the tasks to look at; those whose data are not at hand are left out.
    """
    cards = _known_cards(folder / FILE).items()
    known = {name: (card["fingerprint"], card["description"]) for name, card in cards}
    here = {n: t for n in names if not isinstance(t := cached_task(n), RecordedTask)}
    new = [n for n, t in here.items() if known.get(n) != (t.fingerprint, t.description)]
    return {name: card_of(here[name]) for name in new}


def _known_cards(path: Path) -> Cards:
    """Return the cards of a data.json; where it is damaged, nothing is known."""
    with suppress(FslibError):
        return read_cards(path)
    return {}


def write_cards(folder: Path, cards: Cards) -> None:
    """Write new cards into a folder's data.json; the rest of it stays."""
    cards = dict(sorted((_known_cards(folder / FILE) | cards).items()))
    write_text(folder / FILE, json.dumps({"tasks": cards}, indent=1, ensure_ascii=False) + "\n")


def card_of(task: Task) -> dict[str, Any]:
    """Return what data.json tells of a task."""
    told = {k: getattr(task, k) for k in ("fingerprint", "description", "source", "metric")}
    told |= {"source": public_source(task), "label_names": list(task.label_names)}
    return told | {side: _packed(getattr(task, side).labels) for side in ("train", "eval")}


def public_source(task: Task) -> str:
    """Return where a task is from; "" for a local path, which says nothing to others."""
    return "" if Path(task.source).exists() else task.source


def _packed(labels: np.ndarray) -> dict[str, Any]:
    """Return labels as JSON holds them: little-endian numbers, compressed, in base64."""
    kind = "<i2" if labels.dtype.kind in "iu" else "<f8"
    packed = base64.b64encode(zlib.compress(labels.astype(kind).tobytes(), 9)).decode()
    return {"examples": len(labels), "type": kind, "labels": packed}


def _unpacked(side: dict[str, Any]) -> np.ndarray:
    labels = np.frombuffer(zlib.decompress(base64.b64decode(side["labels"])), side["type"])
    return labels.astype(np.int64 if labels.dtype.kind == "i" else np.float64)
