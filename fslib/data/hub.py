"""Load tasks by name from the Hugging Face Hub, or from a saved copy of its data.

Why a registry (`registry.yaml`): a dataset on the Hub may lose rows, reorder its labels or vanish,
and a score computed on it can then not be compared with an older one. So every entry says what is
expected (commit, columns, label names, rows), and whatever differs is refused. Labels are mapped by
name into the order of the entry; rows without a label (-1) are dropped.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fslib.data.bbc import EMBEDDED, SPLIT_SEED, Article, pair_rows
from fslib.data.tasks import Task, make_task
from fslib.errors import FslibError, NotAtHandError, check_among, first_line

SUFFIXES = ("parquet", "csv", "json", "jsonl")  # of a saved split, in the order of preference
PAUSE = 60  # seconds in which a Hub that was out of reach is not asked again
_silent_until = -np.inf  # in time.monotonic()
UNLABELLED = ("", "-1", "-1.0", "-", "None")
Side = tuple[list[Any], list[Any]]  # texts and labels


@dataclass(frozen=True)
class Source:
    """What is expected of the data of one task.

    Args:
        hub: the dataset's id, organisation/name.
        config: the part of the dataset.
        revision: the commit.
        texts: for each of the task's one or two texts the columns it is joined from.
        labels: label names in the order of the class indices; none for regression.
        splits: (train, eval); eval is a validation split where the test split has no labels.
        rows: (train, eval), as published.
        description: what the task asks.
        label: the column of labels.
        unlabelled: (train, eval), how many of the rows carry -1 and are dropped.
        pairs: the task asks whether two texts have the same label (`_paired`).
    """

    hub: str
    config: str
    revision: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    splits: tuple[str, str]
    rows: tuple[int, int]
    description: str
    label: str = "label"
    unlabelled: tuple[int, int] = (0, 0)
    pairs: bool = False


@cache
def registry() -> dict[str, Source]:
    """Read the table of the Hub's tasks: what is expected of each, by name."""
    text = Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["tasks"].items()
    return {name: Source(**{k: _as_tuple(v) for k, v in entry.items()}) for name, entry in entries}


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def hub_task(name: str, folder: str | Path | None = None, *, check_rows: bool = True) -> Task:
    """Return a task of the registry.

    Args:
        name: as in the registry.
        folder: a saved copy to take the data from instead of the Hub: what
            `DatasetDict.save_to_disk` wrote, or one parquet, csv, json or jsonl file per split
            (train.csv, test.csv).
        check_rows: False takes data whose row counts are not the published ones.

    Returns:
        The task; its `source` says which data it is made of, with the commit.

    Raises:
        FslibError: a split, column or label name is missing, row counts differ, no row has a label.
        NotAtHandError: the Hub does not supply the data.
    """
    check_among("task of the registry", name, registry())
    source = registry()[name]
    data, origin = _saved(source, Path(folder)) if folder else _fetched(name, source)
    sides = []
    for split, rows, without in zip(source.splits, source.rows, source.unlabelled, strict=True):
        if split not in data:
            raise FslibError(f"task {name}: no split {split!r} in {origin}; it has {[*data]}")
        expected = rows - without if check_rows else None
        sides.append(_side(f"task {name}, split {split}", source, data[split], expected))
    labels = source.labels
    if source.pairs:
        labels, sides = EMBEDDED["bbc-pair"].labels, _paired(sides, labels)
    return make_task(
        name, *sides, label_names=labels, description=source.description, source=origin
    )


def saved_copy(name: str, root: Path | None) -> Path | None:
    """Return the folder under `root` that bears a task's name, in any case.

    For ag-pair it may also be that of AG News. None if there is no such folder.
    """
    folders = [p for p in root.iterdir() if p.is_dir()] if root else []
    other = folder_called("ag", folders) if name == "ag-pair" else None
    return folder_called(name, folders) or other


def folder_called(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the folder of that name, in any case; None if there is none.

    Raises:
        FslibError: several bear the name: case does not tell tasks apart.
    """
    alike = sorted(p for p in folders if p.name.lower() == name.lower())
    if len(alike) > 1:
        raise FslibError(f"task {name}: {alike[0]} and {alike[1]} differ in case alone: rename one")
    return alike[0] if alike else None


def _saved(source: Source, folder: Path) -> tuple[dict[str, Any], str]:
    """Return a saved copy's splits, and where it lies."""
    import datasets  # here and below only: it takes most of a second

    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder))), str(folder)
        splits = {}
        for split in source.splits:
            for path in [p for s in SUFFIXES if (p := folder / f"{split}.{s}").is_file()][:1]:
                kind = path.suffix.removeprefix(".").removesuffix("l")  # jsonl is read as json
                # otherwise a text such as "None" or "nan" would be read as missing
                options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}
                read = datasets.load_dataset(kind, data_files=str(path), **options)
                splits[split] = read["train"]
    except Exception as error:  # each reader has errors of its own
        raise FslibError(f"data folder {folder} cannot be read: {first_line(error)}") from error
    return splits, str(folder)


def _fetched(name: str, source: Source) -> tuple[dict[str, Any], str]:
    """Return the Hub's splits, downloaded or from its cache, and their commit.

    Each question to a Hub out of reach takes 24 seconds of retries, and a profile has many tasks:
    for PAUSE seconds after such a failure only the cache is asked, as HF_HUB_OFFLINE=1 does.
    """
    import datasets

    global _silent_until
    revision, origin = source.revision, f"{source.hub} ({source.config}) at {source.revision}"
    offline, silent = datasets.config.HF_HUB_OFFLINE, time.monotonic() < _silent_until
    try:
        datasets.config.HF_HUB_OFFLINE = offline or silent
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=revision)
        builder.download_and_prepare()
        data = dict(builder.as_dataset())
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow: each its own
        if isinstance(error, ConnectionError) and not silent:
            _silent_until = time.monotonic() + PAUSE
        why = first_line(error) + " (just out of reach, asked again in a minute)" * silent
        way_out = f"check the network, or save a copy as {name} in the folder of FSLIB_DATA"
        raise NotAtHandError(f"task {name}: no {origin} from the Hub: {why}; {way_out}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if builder.hash != revision:  # offline, datasets takes any cached commit, and only logs it
        raise FslibError(f"task {name}: the cache holds {builder.hash}, not {origin}: go online")
    return data, origin


def _side(where: str, source: Source, rows: Any, expected: int | None) -> Side:
    """Return texts and labels of the labelled rows of a split, if they are so many.

    Labels are names, or numbers in words.
    """
    for column in (*chain(*source.texts), source.label):
        check_among(f"column of {where},", column, rows.column_names)
    column, names = rows[source.label][:], getattr(rows.features[source.label], "names", None)
    if names:
        labels = [None if y is None or y < 0 else names[y] for y in column]
    else:
        labels = [None if str(y) in UNLABELLED else str(y) for y in column]
    held = {*labels} - {None}
    if source.labels and not held <= {*source.labels} <= {*(names or held)}:
        both = f"{names or sorted(held)!r:.300}, not {source.labels}"
        raise FslibError(f"{where}: the labels of column {source.label!r} are {both}")
    kept = [i for i, label in enumerate(labels) if label is not None]
    if not kept:
        raise FslibError(f"{where}: every label is -1; use data with labels")
    if expected not in (None, len(kept)):
        found = f"{len(kept)} labelled rows found, {expected} expected"
        raise FslibError(f"{where}: {found}; get the published data, or pass check_rows=False")
    texts = list(zip(*(_joined(rows, columns) for columns in source.texts), strict=True))
    return [texts[i] for i in kept], [labels[i] for i in kept]


def _joined(rows: Any, columns: tuple[str, ...]) -> list[Any]:
    """Return one text per row; a missing text is left for make_task to refuse."""
    values = [rows[column][:] for column in columns]
    if len(columns) == 1:
        return values[0]
    return [" ".join(filter(None, parts)) for parts in zip(*values, strict=True)]


def _paired(sides: list[Side], topics: tuple[str, ...]) -> list[Side]:
    """Make AG-Pair from AG News: pair each text with its topic and with another.

    A text that repeats is kept once, in eval rather than in train, so that it is used twice and on
    one side only (`pair_rows`).
    """
    articles: dict[str, Article] = {}
    made: list[Side] = []
    for side in (1, 0):
        known = len(articles)
        for (text,), topic in zip(*sides[side], strict=True):
            articles.setdefault(text, Article(text, str(topics.index(topic)), "", (text,)))
        rows = pair_rows([*articles.values()][known:], np.random.default_rng([SPLIT_SEED, side]))
        made.append(([(first, second) for first, second, *_ in rows], [y for _, _, y, _ in rows]))
    return made[::-1]
