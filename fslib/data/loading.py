"""Load tasks by name: embedded ones, folders in GLUE's layout, the Hub's.

A name is looked up in this order, so that your own data come before a download: embedded; a
folder of FSLIB_DATA in GLUE's layout (train.tsv and dev.tsv, with a header); the registry
(`fslib.data.hub`) with a saved copy in FSLIB_DATA; the registry with the Hub. `DERIVED` tasks are
made of the texts of another task, wherever that one is found.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fslib.data import bbc, hub
from fslib.data.tasks import Split, Task, as_tasks, make_task
from fslib.data.words import Row, shift_words, shifted_rows, whole_texts
from fslib.errors import FslibError, checked_path, unknown

DERIVED = {"sst-shift": "sst-2"}  # task -> the task whose texts it is made of
SST_WORDS = (6, 24)  # as long as the sentences of BBC: here punctuation and clitics count as words
# no punctuation and no clitic ('s), which would tell wherever they stand
_SST_MOVABLE = re.compile(r"(?!n't)[a-z0-9]")


Named = str | Path | Task


def _split(rows: list[Row]) -> Split:
    texts, pairs, labels, documents = zip(*rows, strict=True) if rows else ((), (), (), ())
    numbers = np.array(labels, dtype=np.int64)
    return Split(texts, None if None in pairs else pairs, numbers, documents)


def shifted_task(name: str, task: Task) -> Task:
    """Ask of another task's texts what `bbc-shift` asks: were two words swapped?

    Each text that is no part of another, train's or eval's, is used once: SST-2 trains on the
    phrases of its sentences, too, and a phrase would show how its sentence was before the swap. Of
    these, those within SST_WORDS. Sides stay as they are. Every second text has a swap, of words:
    not of punctuation or of clitics. A text without two neighbours that could be swapped is left
    out.
    """
    whole = set(whole_texts([*task.train.texts, *task.eval.texts], SST_WORDS[0]))
    sides = []
    for number, side in enumerate((task.eval, task.train)):
        rng = np.random.default_rng([bbc.SPLIT_SEED, number])
        texts = dict.fromkeys(" ".join(text.split()) for text in side.texts)
        usable = [t for t in texts if t in whole and len(t.split()) <= SST_WORDS[1]]
        usable = [t for t in usable if shift_words(t, rng, _SST_MOVABLE) is not None]
        whole -= set(usable)  # what eval has used, train leaves out
        drawn = [(usable[i], usable[i]) for i in rng.permutation(len(usable))]
        sides.append(_split(shifted_rows(drawn, rng, _SST_MOVABLE)))
    asked = bbc.EMBEDDED["bbc-shift"]
    told = {"description": asked.description, "source": task.source}
    return Task(name, sides[1], sides[0], asked.labels, **told)


def read_tsv(path: Path) -> dict[str, list[str]]:
    """Return the columns of a tab-separated file.

    It has one header line, is UTF-8 and has no quoting.

    Raises:
        FslibError: the file is missing, empty or not UTF-8, or a row is ragged; path and line are
            named.
    """
    try:
        content = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise FslibError(f"{path} cannot be read as UTF-8: {error}") from None
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    header, *rows = [line.split("\t") for line in lines]
    if not rows:
        raise FslibError(f"{path}: empty; want a header line and at least one row")
    for number, row in enumerate(rows, start=2):
        if len(row) != (n := len(set(header))):
            raise FslibError(f"{path}, line {number}: {len(row)} fields for {n} different columns")
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def glue_task(folder: str | Path, *, name: str | None = None, metric: str | None = None) -> Task:
    """Return a task from a folder in GLUE's layout.

    It holds train.tsv and dev.tsv, with a header. The column `label` names classes (`score` holds
    numbers: regression); `index`, `id` and `idx` are left out; what remains is the text, or two
    texts. Columns that share a prefix (news1-sentence1, news1-sentence2) are joined.

    Args:
        folder: where the two files lie.
        name: of the task; by default the folder's, in lower case.
        metric: by default the task's usual one (`METRIC_OF`), else accuracy.

    Raises:
        FslibError: a file is missing or damaged, or holds no such columns or labels.
    """
    folder = checked_path("folder of a task", folder)
    name = str(folder.name if name is None else name).lower()
    paths = [folder / "train.tsv", folder / "dev.tsv"]
    train, _ = tables = [read_tsv(path) for path in paths]
    label = "score" if "score" in train and "label" not in train else "label"
    texts = [c for c in train if c not in ("label", "score", "index", "id", "idx")]
    groups: dict[str, list[str]] = {}  # the columns of each text
    for column in texts:
        groups.setdefault(column.rpartition("-")[0] or column, []).append(column)
    if not 1 <= len(groups) <= 2:
        raise FslibError(f"{paths[0]}: want one or two text columns, found {texts or 'none'}")
    sides = []
    for path, table in zip(paths, tables, strict=True):
        if missing := [c for c in (label, *texts) if c not in table]:
            raise FslibError(f"{path}: no column {missing[0]!r}; it has {list(table)}")
        parts = [map(" ".join, zip(*(table[c] for c in g), strict=True)) for g in groups.values()]
        sides.append((list(zip(*parts, strict=True)), table[label]))
    names = () if label == "score" else sorted(set(train[label]))
    known = hub.registry().get(name)
    asked = known.description if known else f"from {folder.name}"
    told: dict[str, Any] = {"metric": metric, "description": asked, "source": str(folder)}
    return make_task(name, sides[0], sides[1], label_names=names, **told)


def task_names(data: str | Path | None = None, *, hub_too: bool = False) -> list[str]:
    """Return the names that `load_tasks` knows: the embedded tasks, then own folders.

    Args:
        data: the folder that holds those folders; default: FSLIB_DATA.
        hub_too: also those of the registry and those made of them, which may have to be downloaded.
    """
    own = sorted(folder.name.lower() for folder in _folders(data))
    more = (*DERIVED, *hub.registry()) if hub_too else ()
    return list(dict.fromkeys([*bbc.EMBEDDED, *own, *more]))


def _root(data: str | Path | None) -> Path | None:
    root = os.environ.get("FSLIB_DATA") if data is None else data
    if root and not checked_path("data folder", root).is_dir():
        raise FslibError(f"data folder {str(root)!r} (FSLIB_DATA) does not exist")
    # a task's source is read in other working folders than this one
    return Path(root).absolute() if root else None


def _folders(data: str | Path | None) -> list[Path]:
    root = _root(data)
    return [p for p in root.iterdir() if (p / "train.tsv").is_file()] if root else []


def one_case(name: str, data: str | Path | None = None) -> str:
    """Return a task's name in lower case, as the task calls itself.

    Raises:
        FslibError: several folders of `data` (default: FSLIB_DATA) would then bear it.
    """
    hub.folder_called(name, _folders(data))
    return name.lower()


def load_task(name: str, data: str | Path | None = None, *, check_rows: bool = True) -> Task:
    """Return one task by name or by the path of a folder in GLUE's layout.

    Args:
        name: of the task, or the path.
        data: a folder of tasks; default: FSLIB_DATA.
        check_rows: as in `load_tasks`.
    """
    key = name.lower()
    if name in bbc.EMBEDDED:
        task, (train, scored) = bbc.EMBEDDED[name], map(_split, bbc.build(name))
        return Task(name, train, scored, task.labels, description=task.description)
    if folder := hub.folder_called(name, _folders(data)):
        return glue_task(folder)
    if key in DERIVED:
        return shifted_task(key, load_task(DERIVED[key], data, check_rows=check_rows))
    if key in hub.registry():
        return hub.hub_task(key, hub.saved_copy(key, _root(data)), check_rows=check_rows)
    if os.sep in name and Path(name).is_dir():
        return glue_task(Path(name).absolute())
    raise unknown("task", name, task_names(data, hub_too=True), "; or a folder in FSLIB_DATA")


def load_tasks(
    names: Named | Iterable[Named], data: str | Path | None = None, *, check_rows: bool = True
) -> dict[str, Task]:
    """Return tasks by name, in the order given: {name: Task}.

    Args:
        names: embedded tasks (bbc, bbc-pair, bbc-headline, bbc-shift, bbc-somo, bbc-next), folders
            of `data` by their name, tasks of the registry (`fslib.data.hub`: mrpc, mnli, ag ...),
            sst-shift, which is made of sst-2, paths of folders in GLUE's layout, or `Task` objects
            of your own.
        data: a folder of tasks; default: the environment's FSLIB_DATA.
        check_rows: False takes data of the registry's tasks whose row counts are not the published
            ones.

    Raises:
        FslibError: a name is unknown (the nearest valid one is named), or two tasks have one name.
    """
    given = [names] if isinstance(names, (str, Path, Task)) else names
    if not isinstance(given, Iterable):
        raise FslibError(f"{names!r} names no tasks: give names, such as {list(bbc.EMBEDDED)}")
    load = partial(load_task, data=data, check_rows=check_rows)
    return as_tasks([n if isinstance(n, Task) else load(str(n)) for n in given])
