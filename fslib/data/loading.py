"""Tasks by name: the embedded ones, folders in GLUE's layout (train.tsv and dev.tsv, with a header), the Hub's.

One name is looked up in this order, so that data of one's own come before a download: embedded, a folder of
FSLIB_DATA in GLUE's layout, the registry (`fslib.data.hub`) with a saved copy in FSLIB_DATA, the registry with the Hub.
`DERIVED` tasks are made of the texts of another task, wherever that one is found.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fslib.data import bbc, hub
from fslib.data.tasks import Split, Task, as_tasks, make_task
from fslib.data.words import Rows, shift_words, shifted_rows, whole_texts
from fslib.errors import FslibError, NotAtHandError, checked_path, unknown

# tasks that are made of another one's texts: from which
DERIVED = {"sst-shift": "sst-2"}
SST_WORDS = (6, 24)  # as long as the sentences of BBC: here punctuation and clitics count as words
_SST_MOVABLE = re.compile(
    r"(?!n't)[a-z0-9]"
)  # no punctuation and no clitic ('s), which would tell wherever they stand


def _embedded(name: str) -> Task:
    task = bbc.EMBEDDED[name]
    sides = [_split(rows) for rows in bbc.build(name)]
    return Task(name, sides[0], sides[1], task.labels, description=task.description)


def _split(rows: Rows) -> Split:
    texts, pairs, labels, documents = rows
    return Split(
        tuple(texts),
        None if pairs is None else tuple(pairs),
        np.array(labels, dtype=np.int64),
        tuple(documents),
    )


def shifted_task(name: str, task: Task) -> Task:
    """Return the question of `bbc-shift` (were two adjacent words swapped?) on the texts of another task, SST-2.

    Each text that is no part of another, train's or eval's, is used once: SST-2 trains on the phrases of its
    sentences, too, and a phrase would show how its sentence was before the swap. Of these, those within SST_WORDS.
    Sides stay as they are. Every second text has a swap, of words: not of punctuation or of clitics. A text without
    two neighbours that could be swapped is left out.
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
    question = bbc.EMBEDDED["bbc-shift"]
    return Task(
        name,
        sides[1],
        sides[0],
        question.labels,
        description=question.description,
        source=task.source,
    )


def read_tsv(path: Path) -> dict[str, list[str]]:
    """Return the columns of a tab-separated file with one header line, UTF-8, no quoting.

    Raises FslibError, with path and line, for a missing or empty file, a wrong encoding or a ragged row.
    """
    try:
        content = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise FslibError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise FslibError(
            f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from None
    rows = [
        line.split("\t") for line in content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    ]
    if len(rows) < 2:
        raise FslibError(f"{path}: empty; want a header line and at least one row")
    header = rows[0]
    if repeated := [c for c in header if header.count(c) > 1]:
        raise FslibError(f"{path}: column {repeated[0]!r} stands twice in the header")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise FslibError(
                f"{path}, line {number}: {len(row)} fields, but the header names {len(header)}"
            )
    return {column: [row[i] for row in rows[1:]] for i, column in enumerate(header)}


def _text_columns(path: Path, columns: Iterable[str]) -> list[list[str]]:
    """Say which columns make up the first (and second) text: one, two, or groups such as news1-*, news2-*."""
    texts = [c for c in columns if c not in ("label", "score", "index", "id", "idx")]
    groups: dict[str, list[str]] = {}
    for column in texts:
        groups.setdefault(column.rpartition("-")[0] or column, []).append(column)
    if not 1 <= len(groups) <= 2:
        raise FslibError(
            f"{path}: want one or two text columns beside label and index, found {texts or 'none'}"
        )
    return list(groups.values())


def glue_task(folder: str | Path, *, name: str | None = None, metric: str | None = None) -> Task:
    """Return a task from a folder in GLUE's layout: train.tsv and dev.tsv, with a header.

    The column `label` names classes (`score` holds numbers: regression); `index`, `id` and `idx` are left
    out; what remains is the text, or two texts. Columns that share a prefix (news1-sentence1,
    news1-sentence2) are joined. The metric is the task's usual one (`METRIC_OF`), else accuracy.
    """
    folder = checked_path("folder of a task", folder)
    name = folder.name if name is None else name
    name = (
        name.lower() if isinstance(name, str) else name
    )  # what is no string is refused with the task
    tables = {side: read_tsv(folder / f"{side}.tsv") for side in ("train", "dev")}
    label = next((c for c in ("label", "score") if c in tables["train"]), None)
    if label is None:
        raise FslibError(
            f"{folder / 'train.tsv'}: no column 'label' (or 'score'); it has {list(tables['train'])}"
        )
    groups = _text_columns(folder / "train.tsv", tables["train"])
    if missing := [
        c for c in (label, *(c for group in groups for c in group)) if c not in tables["dev"]
    ]:
        raise FslibError(
            f"{folder / 'dev.tsv'}: no column {missing[0]!r}; it has {list(tables['dev'])}"
        )
    names = () if label == "score" else tuple(sorted(set(tables["train"][label])))
    sides = []
    for side, table in tables.items():
        for number, value in enumerate(table[label], start=2):
            if names and value not in names:
                raise unknown(f"label in {folder / f'{side}.tsv'}, line {number},", value, names)
            if not names and not _is_number(value):
                raise FslibError(
                    f"{folder / f'{side}.tsv'}, line {number}: score {value!r} is not a number"
                )
        parts = [
            [" ".join(v) for v in zip(*(table[c] for c in group), strict=True)] for group in groups
        ]
        texts = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
        sides.append((texts, table[label]))
    known = hub.REGISTRY.get(name) if isinstance(name, str) else None
    described = known.description if known else f"from {folder.name}"
    return make_task(
        name,
        sides[0],
        sides[1],
        label_names=names,
        metric=metric,
        description=described,
        source=str(folder),
    )


def _is_number(value: str) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False


def task_names(data: str | Path | None = None, *, hub_too: bool = False) -> list[str]:
    """Return the names that `load_tasks` knows: the embedded tasks, then the folders of `data` (default: FSLIB_DATA).

    hub_too: those of the registry and those made of them as well, which may have to be downloaded.
    """
    own = sorted(folder.name.lower() for folder in _folders(data))
    return list(
        dict.fromkeys([*bbc.EMBEDDED, *own, *((*DERIVED, *hub.REGISTRY) if hub_too else ())])
    )


def _root(data: str | Path | None) -> Path | None:
    root = data if data is not None else os.environ.get("FSLIB_DATA")
    if not root:
        return None
    if not checked_path("data folder", root).is_dir():
        raise FslibError(f"data folder {str(root)!r} (FSLIB_DATA) does not exist")
    return Path(root).absolute()  # a task's source is read in other working folders than this one


def _folders(data: str | Path | None) -> list[Path]:
    root = _root(data)
    return [p for p in root.iterdir() if (p / "train.tsv").is_file()] if root else []


def one_case(name: str, data: str | Path | None = None) -> str:
    """Return a task's name in lower case, as the task calls itself.

    Raises FslibError where several folders of `data` (default: FSLIB_DATA) would then bear it.
    """
    hub.folder_called(name, _folders(data), exact_first=False)
    return name.lower()


def load_task(
    name: str, data: str | Path | None = None, *, check_rows: bool = True, download: bool = True
) -> Task:
    """Return one task by name or by the path of a folder in GLUE's layout.

    download: False raises NotAtHandError for one that the Hub would have to supply.
    """
    if name in bbc.EMBEDDED:
        return _embedded(name)
    if folder := hub.folder_called(name, _folders(data)):
        return glue_task(folder)
    key = name.lower()
    if key in DERIVED:
        return shifted_task(
            key, load_task(DERIVED[key], data, check_rows=check_rows, download=download)
        )
    if key in hub.REGISTRY or key == "xnli":
        saved = hub.saved_copy(key, _root(data))
        if key in hub.REGISTRY and saved is None and not download:
            raise NotAtHandError(
                f"task {name}: not in the folder FSLIB_DATA points at, and not downloaded"
            )
        return hub.hub_task(key, saved, check_rows=check_rows)
    if os.sep in name and Path(name).is_dir():
        return glue_task(Path(name).absolute())
    known = task_names(data, hub_too=True)
    raise unknown("task", name, known, "; or point FSLIB_DATA at a folder in GLUE's layout")


def load_tasks(
    names: str | Path | Iterable[str | Path | Task],
    data: str | Path | None = None,
    *,
    check_rows: bool = True,
) -> dict[str, Task]:
    """Return tasks by name, in the order given: {name: Task}.

    names: embedded tasks (bbc, bbc-pair, bbc-headline, bbc-shift, bbc-somo, bbc-next), folders of `data` (default: the
        environment's FSLIB_DATA) by their name, tasks of the registry (`fslib.data.hub`: mrpc, mnli, ag ...),
        sst-shift, which is made of sst-2, paths of folders in GLUE's layout, or `Task` objects of your own.
    check_rows: False takes data of the registry's tasks whose row counts are not the published ones.
    Raises FslibError for an unknown name (with the nearest valid one) and for two tasks of one name.
    """
    if isinstance(names, (str, Path, Task)):
        names = [names]
    if not isinstance(names, Iterable):
        raise FslibError(f"{names!r} names no tasks: give names, such as {list(bbc.EMBEDDED)}")
    return as_tasks(
        [
            n if isinstance(n, Task) else load_task(str(n), data, check_rows=check_rows)
            for n in names
        ]
    )
