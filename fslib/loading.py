"""Tasks by name: the embedded ones, and folders in GLUE's layout (train.tsv and dev.tsv, with a header)."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fslib import corpora
from fslib.errors import FslibError, unknown
from fslib.tasks import Split, Task, as_tasks, make_task

DESCRIPTIONS = {
    "bbc": "topic of a news article, from its first sentence",
    "bbc-pair": "are two first sentences about the same topic?",
    "bbc-headline": "does this headline belong to this first sentence?",
    "bbc-shift": "were two adjacent words of the sentence swapped?",
}
LABELS = {
    "bbc": corpora.TOPICS,
    "bbc-pair": ("different", "same"),
    "bbc-headline": ("other", "own"),
    "bbc-shift": ("intact", "swapped"),
}


def _embedded(name: str) -> Task:
    sides = [
        Split(tuple(t), None if p is None else tuple(p), np.array(y, dtype=np.int64), tuple(d))
        for t, p, y, d in corpora.build(name)
    ]
    return Task(name, sides[0], sides[1], LABELS[name], description=DESCRIPTIONS[name])


def read_tsv(path: Path) -> dict[str, list[str]]:
    """Columns of a tab-separated file with one header line, UTF-8, no quoting.

    Raises FslibError, with path and line, for a missing or empty file, a wrong encoding or a ragged row.
    """
    try:
        content = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise FslibError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise FslibError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    rows = [line.split("\t") for line in content.replace("\r\n", "\n").removesuffix("\n").split("\n")]
    if len(rows) < 2:
        raise FslibError(f"{path}: empty; want a header line and at least one row")
    header = rows[0]
    if repeated := [c for c in header if header.count(c) > 1]:
        raise FslibError(f"{path}: column {repeated[0]!r} stands twice in the header")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise FslibError(f"{path}, line {number}: {len(row)} fields, but the header names {len(header)}")
    return {column: [row[i] for row in rows[1:]] for i, column in enumerate(header)}


def _text_columns(path: Path, columns: Iterable[str]) -> list[list[str]]:
    """Which columns make up the first (and second) text: one, two, or groups such as news1-*, news2-*."""
    texts = [c for c in columns if c not in ("label", "score", "index", "id", "idx")]
    groups: dict[str, list[str]] = {}
    for column in texts:
        groups.setdefault(column.rpartition("-")[0] or column, []).append(column)
    if not 1 <= len(groups) <= 2:
        raise FslibError(f"{path}: want one or two text columns beside label and index, found {texts or 'none'}")
    return list(groups.values())


def glue_task(folder: str | Path, *, name: str | None = None, metric: str | None = None) -> Task:
    """A task from a folder in GLUE's layout: train.tsv and dev.tsv, with a header.

    The column `label` names classes (`score` holds numbers: regression); `index`, `id` and `idx` are left
    out; what remains is the text, or two texts. Columns that share a prefix (news1-sentence1,
    news1-sentence2) are joined. The metric is the task's usual one (`METRIC_OF`), else accuracy.
    """
    folder = Path(folder)
    name = (name or folder.name).lower()
    tables = {side: read_tsv(folder / f"{side}.tsv") for side in ("train", "dev")}
    label = next((c for c in ("label", "score") if c in tables["train"]), None)
    if label is None:
        raise FslibError(f"{folder / 'train.tsv'}: no column 'label' (or 'score'); it has {list(tables['train'])}")
    groups = _text_columns(folder / "train.tsv", tables["train"])
    if missing := [c for c in (label, *(c for group in groups for c in group)) if c not in tables["dev"]]:
        raise FslibError(f"{folder / 'dev.tsv'}: no column {missing[0]!r}; it has {list(tables['dev'])}")
    names = () if label == "score" else tuple(sorted(set(tables["train"][label])))
    sides = []
    for side, table in tables.items():
        for number, value in enumerate(table[label], start=2):
            if names and value not in names:
                raise unknown(f"label in {folder / f'{side}.tsv'}, line {number},", value, names)
            if not names and not _is_number(value):
                raise FslibError(f"{folder / f'{side}.tsv'}, line {number}: score {value!r} is not a number")
        parts = [[" ".join(v) for v in zip(*(table[c] for c in group), strict=True)] for group in groups]
        texts = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
        sides.append((texts, table[label]))
    return make_task(name, sides[0], sides[1], label_names=names, metric=metric, description=f"from {folder.name}")


def _is_number(value: str) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False


def task_names(data: str | Path | None = None) -> list[str]:
    """Names that `load_tasks` knows: the embedded tasks, then the folders of `data` (default: FSLIB_DATA)."""
    return [*corpora.BUILDERS, *sorted(_folders(data))]


def _folders(data: str | Path | None) -> dict[str, Path]:
    root = data if data is not None else os.environ.get("FSLIB_DATA")
    if not root:
        return {}
    if not Path(root).is_dir():
        raise FslibError(f"data folder {str(root)!r} (FSLIB_DATA) does not exist")
    return {p.name.lower(): p for p in Path(root).iterdir() if (p / "train.tsv").is_file()}


def load_task(name: str, data: str | Path | None = None) -> Task:
    """One task by name or by the path of a folder in GLUE's layout."""
    if name in corpora.BUILDERS:
        return _embedded(name)
    folders = _folders(data)
    if name.lower() in folders:
        return glue_task(folders[name.lower()])
    if os.sep in name and Path(name).is_dir():
        return glue_task(name)
    raise unknown("task", name, task_names(data), "; or point FSLIB_DATA at a folder in GLUE's layout")


def load_tasks(names: str | Path | Iterable[str | Path | Task], data: str | Path | None = None) -> dict[str, Task]:
    """Tasks by name, in the order given: {name: Task}.

    names: embedded tasks (bbc, bbc-pair, bbc-headline, bbc-shift), folders of `data` (default: the
        environment's FSLIB_DATA) by their name, paths of such folders, or `Task` objects of your own.
    Raises FslibError for an unknown name (with the nearest valid one) and for two tasks of one name.
    """
    if isinstance(names, (str, Path)):
        names = [names]
    return as_tasks([n if isinstance(n, Task) else load_task(str(n), data) for n in names])
