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
    table = yaml.safe_load(Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8"))
    return {
        name: Source(**{field: _as_tuple(value) for field, value in entry.items()})
        for name, entry in table["tasks"].items()
    }


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
    if name == "xnli":
        languages = ", ".join(known for known in registry() if known.startswith("xnli-"))
        raise FslibError(f"task 'xnli' is one task per language: {languages}")
    check_among("task of the registry", name, registry())
    source = registry()[name]
    data, origin = _saved(source, Path(folder)) if folder else _fetched(name, source)
    if missing := [split for split in source.splits if split not in data]:
        held = ", ".join(data) or "none"
        raise FslibError(f"task {name}: no split {missing[0]!r} in {origin}; it has {held}")
    sides = []
    for split, rows, without in zip(source.splits, source.rows, source.unlabelled, strict=True):
        expected = rows - without if check_rows else None
        sides.append(_side(f"task {name}, split {split}", source, data[split], expected))
    labels = source.labels
    if source.pairs:
        labels, sides = EMBEDDED["bbc-pair"].labels, _paired(sides, labels)
    told: dict[str, Any] = {"description": source.description, "source": origin}
    return make_task(name, sides[0], sides[1], label_names=labels, **told)


def saved_copy(name: str, root: Path | None) -> Path | None:
    """Return the folder under `root` that bears a task's name, in any case.

    For ag-pair it may also be that of AG News. None if there is no such folder.
    """
    folders = [p for p in root.iterdir() if p.is_dir()] if root else []
    other = folder_called("ag", folders) if name == "ag-pair" else None
    return folder_called(name, folders) or other


def folder_called(name: str, folders: Iterable[Path], *, exact_first: bool = True) -> Path | None:
    """Return the folder of that name, else the one that bears it in another case.

    Args:
        name: what is looked for.
        folders: where.
        exact_first: False where case does not tell tasks apart.

    Returns:
        The folder; None if there is none.

    Raises:
        FslibError: several bear the name and none is first; which one is meant would depend on
            their order on disk.
    """
    alike = sorted(p for p in folders if p.name.lower() == name.lower())
    exact = [p for p in alike if exact_first and p.name == name]
    if len(alike) > 1 and not exact:
        both = " and ".join(map(str, alike))
        raise FslibError(f"task {name}: {both} differ in case alone: rename one of them")
    return next(iter(exact or alike), None)


def _saved(source: Source, folder: Path) -> tuple[dict[str, Any], str]:
    """Return a saved copy's splits, and where it lies."""
    import datasets  # here and below only: it takes most of a second

    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder))), str(folder)
        splits = {}
        for split in source.splits:
            paths = [folder / f"{split}.{suffix}" for suffix in SUFFIXES]
            for path in [p for p in paths if p.is_file()][:1]:
                kind = path.suffix.removeprefix(".").removesuffix("l")  # jsonl is read as json
                # otherwise a text such as "None" or "nan" would be read as missing
                options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}
                options |= {"data_files": str(path), "split": "train"}
                splits[split] = datasets.load_dataset(kind, **options)
    except Exception as error:  # each reader has errors of its own
        why = first_line(error)
        raise FslibError(f"data folder {folder} cannot be read ({why}): save it again") from error
    return splits, str(folder)


def _fetched(name: str, source: Source) -> tuple[dict[str, Any], str]:
    """Return the Hub's splits, downloaded or from its cache, and their commit.

    Each question to a Hub out of reach takes 24 seconds of retries, and a profile has many tasks:
    for PAUSE seconds after such a failure only the cache is asked, as HF_HUB_OFFLINE=1 does.
    """
    import datasets

    global _silent_until
    what, revision = f"{source.hub} ({source.config}, revision {source.revision})", source.revision
    offline, silent = datasets.config.HF_HUB_OFFLINE, time.monotonic() < _silent_until
    try:
        datasets.config.HF_HUB_OFFLINE = offline or silent
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=revision)
        builder.download_and_prepare()
        data = dict(builder.as_dataset())
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow: each its own
        if isinstance(error, ConnectionError) and not silent:
            _silent_until = time.monotonic() + PAUSE
        paused = " (just out of reach, asked again in a minute)" if silent else ""
        raise NotAtHandError(
            f"task {name}: the Hub did not supply dataset {what}: {first_line(error)}{paused}; "
            f"check the network, or save a copy as {name} in the folder FSLIB_DATA points at"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if builder.hash != revision:  # offline, datasets takes any cached commit, and only logs it
        held = f"the cached copy of {source.hub} is of revision {builder.hash}"
        raise FslibError(f"task {name}: {held}, not {revision}: connect to the Hub")
    return data, f"{source.hub} ({source.config}) at {revision}"


def _side(where: str, source: Source, rows: Any, expected: int | None) -> Side:
    """Return texts and labels of the labelled rows of a split, if they are so many."""
    for column in (*chain(*source.texts), source.label):
        if column not in rows.column_names:
            held = ", ".join(rows.column_names)
            raise FslibError(f"{where}: no column {column!r}; it has {held}")
    labels = _labels(where, source, rows)
    kept = [i for i, label in enumerate(labels) if label is not None]
    if not kept:
        raise FslibError(f"{where}: every label is -1; use data with labels")
    if expected not in (None, len(kept)):
        found = f"{len(kept)} labelled rows found, {expected} expected"
        raise FslibError(f"{where}: {found}; get the published data, or pass check_rows=False")
    parts = [_joined(rows, columns) for columns in source.texts]
    texts = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
    return [texts[i] for i in kept], [labels[i] for i in kept]


def _joined(rows: Any, columns: tuple[str, ...]) -> list[Any]:
    """Return one text per row; a missing text is left for make_task to refuse."""
    values = [rows[column][:] for column in columns]
    if len(columns) == 1:
        return values[0]
    return [" ".join(filter(None, parts)) for parts in zip(*values, strict=True)]


def _labels(where: str, source: Source, rows: Any) -> list[Any]:
    """Return the name of each row's label, or its number; None where it has none."""
    where = f"{where}: column {source.label!r}"
    column = rows[source.label][:]
    if not source.labels:
        try:
            return [None if y is None or float(y) < 0 else float(y) for y in column]
        except ValueError as error:
            raise FslibError(f"{where} must hold numbers ({error})") from None
    names = getattr(rows.features[source.label], "names", None)
    if names:
        found = [None if y is None or y < 0 else names[y] for y in column]
    else:
        found = [None if str(y) in ("", "-1", "-", "None") else str(y) for y in column]
        names = sorted({*found} - {None})
    if missing := [name for name in source.labels if name not in names]:
        raise FslibError(f"{where} has no label {missing[0]!r}; it has {', '.join(names)}")
    if strange := sorted(filter(None, {*found} - {*source.labels})):
        held = ", ".join(source.labels)
        raise FslibError(f"{where} has label {strange[0]!r}, none of {held}")
    return found


def _paired(sides: list[Side], topics: tuple[str, ...]) -> list[Side]:
    """Make AG-Pair from AG News: pair each text with its topic and with another.

    A text that repeats is kept once, in eval rather than in train, so that it is used twice and on
    one side only (`pair_rows`).
    """
    known: set[str] = set()
    made: list[Side] = []
    for side in (1, 0):
        articles: list[Article] = []
        for text, topic in zip(*sides[side], strict=True):
            if text not in known:
                known.add(text)
                articles.append(Article(text, str(topics.index(topic)), "", (text,)))
        rows = pair_rows(articles, np.random.default_rng([SPLIT_SEED, side]))
        made.append(([(first, second) for first, second, *_ in rows], [y for _, _, y, _ in rows]))
    return made[::-1]
