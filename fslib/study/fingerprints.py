"""The data that records were computed on, as `data.json` beside the records tells it.

The key of a record holds the fingerprints of its data, so that a reader without the data could not even find it. What
tables need of the data beside their records, labels above all, is kept there as well; texts are not, and nothing is
computed without them.
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
_consulted: list[Path] = []  # the last one first


def consult(folder: Path) -> None:
    """Let a results folder tell of data that are not at hand. The folder that was named last is asked first."""
    path = folder / FILE
    _consulted[:] = [path, *(p for p in _consulted if p != path)]


@cache
def cached_task(name: str) -> Task:
    """Return a task by name, loaded once per process; if its data are not at hand, what data.json tells of it.

    Says in a line that data are not at hand, or are others than the records'.
    """
    try:
        task = load_task(name)
    except NotAtHandError as error:
        for path in _consulted:
            if card := read_cards(path).get(name):
                _say(
                    f"data of {name} are not at hand: records are found by the fingerprint in {_short(path)}"
                )
                return recorded_task(name, card, f"the data of {name} are not at hand: {error}")
        raise
    if (there := _recorded_fingerprint(name)) not in ("", task.fingerprint):
        _say(
            f"data of {name} at hand ({task.fingerprint}) are not those in {_short(_consulted[0])} ({there}): "
            "records on those are not found, and would be computed anew"
        )
    return task


def _recorded_fingerprint(name: str) -> str:
    """Return the fingerprint that the folder named last tells, "" if it tells none."""
    try:
        return str(read_cards(_consulted[0])[name]["fingerprint"])
    except (FslibError, LookupError):
        return ""


def _short(path: Path) -> str:
    return os.path.join(*path.parts[-3:])  # noqa: PTH118 - no path to open


def _say(line: str) -> None:
    """Say a line on standard error; in a kernel, where that would stand as a warning, on standard output."""
    ipython = sys.modules.get("IPython")
    kernel = ipython is not None and ipython.get_ipython() is not None
    if not os.environ.get(SAID):
        print(
            line if kernel else f"fslib: {line}",
            file=sys.stdout if kernel else sys.stderr,
            flush=True,
        )


class LabelsOnly(Split):
    """A side of a task whose labels are known and no more: who asks for a text is told why there is none."""

    why: str

    def __init__(self, labels: np.ndarray, why: str) -> None:
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "why", why)

    def __getattr__(self, name: str) -> Any:
        if name in ("texts", "pairs", "documents"):
            raise FslibError(self.why)
        raise AttributeError(name)

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
    """Return the task that a card tells of; `why` is said where a text is asked for."""
    sides = [LabelsOnly(_unpacked(card[side]), why) for side in ("train", "eval")]
    names = tuple(card["label_names"])
    task = RecordedTask(
        name, sides[0], sides[1], names, card["metric"], card["description"], card["source"]
    )
    task.__dict__["fingerprint"] = card[
        "fingerprint"
    ]  # in the place of the one that would be made of the texts
    return task


def require(names: Iterable[str], what: str) -> None:
    """Raise FslibError if `what` cannot be computed, since the data of a task are not at hand."""
    for name in names:
        task = cached_task(name)
        if isinstance(task.train, LabelsOnly):
            raise FslibError(f"{what} has no record and cannot be computed: {task.train.why}")


def read_cards(path: Path) -> dict[str, dict[str, Any]]:
    """Return {task: its card} of a data.json, {} if there is none. Raises FslibError for one that is damaged."""
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        for card in cards.values():
            recorded_task("any", card, "")
        return dict(cards)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # whatever a damaged file makes of itself
        raise FslibError(
            f"{path} is damaged ({first_line(error)}): restore it, or delete it and fslib run where the data are"
        ) from error


def changed_cards(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the cards that a folder lacks, or has of other data or words, of those tasks whose data are at hand."""
    try:
        known = read_cards(folder / FILE)
    except FslibError:
        known = {}
    tasks = {name: cached_task(name) for name in names}
    whole = {name: task for name, task in tasks.items() if not isinstance(task, RecordedTask)}
    told = {
        n: [known.get(n, {}).get(what) for what in ("fingerprint", "description")] for n in whole
    }
    return {n: card_of(t) for n, t in whole.items() if told[n] != [t.fingerprint, t.description]}


def write_cards(folder: Path, cards: dict[str, dict[str, Any]]) -> None:
    """Write cards into a folder's data.json; of other tasks it keeps what it tells."""
    with suppress(FslibError):  # where it is damaged, these are all that is known
        cards = read_cards(folder / FILE) | cards
    content = {"tasks": {name: cards[name] for name in sorted(cards)}}
    write_text(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def card_of(task: Task) -> dict[str, Any]:
    """Return what data.json tells of a task."""
    return {
        "fingerprint": task.fingerprint,
        "description": task.description,
        # not a local path: it says nothing to others, and the fingerprint says which data it holds
        "source": "" if Path(task.source).exists() else task.source,
        "metric": task.metric,
        "label_names": list(task.label_names),
        "train": _packed(task.train.labels),
        "eval": _packed(task.eval.labels),
    }


def _packed(labels: np.ndarray) -> dict[str, Any]:
    """Return labels as JSON holds them: little-endian numbers, compressed, in base64."""
    kind = "<i2" if labels.dtype.kind in "iu" else "<f8"
    packed = base64.b64encode(zlib.compress(labels.astype(kind).tobytes(), 9)).decode()
    return {"examples": len(labels), "type": kind, "labels": packed}


def _unpacked(side: dict[str, Any]) -> np.ndarray:
    labels = np.frombuffer(zlib.decompress(base64.b64decode(side["labels"])), side["type"])
    if len(labels) != side["examples"]:
        raise ValueError(f"{len(labels)} labels for {side['examples']} examples")
    return labels.astype(np.int64 if labels.dtype.kind == "i" else np.float64)
