"""The tasks of the paper by name, from the Hugging Face Hub or from a saved copy of its data.

Why a registry: a dataset on the Hub may lose rows, reorder its labels or vanish, and a score computed on it can
then not be compared with an older one. So every entry says what is expected (commit, columns, label names, rows),
and whatever differs is refused. Labels are mapped by name into the order given here; rows without a label (-1)
are dropped.

Commits, columns, label names and row counts come from dataset cards and from public code that pins the same commits.
They were not checked against the live Hub: the checks made while loading do that. No entry needs a loading script.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fslib.data.bbc import SPLIT_SEED, Article, pair_rows
from fslib.data.tasks import Task, make_task
from fslib.errors import FslibError, NotAtHandError, check_count, first_line, unknown


@dataclass(frozen=True)
class Source:
    """What is expected of one dataset.

    texts: for each of a task's one or two texts the columns it is joined from.
    labels: label names in the order of the class indices; none for regression.
    splits, rows, unlabelled: (train, eval); eval is a validation split where the test split has no labels.
        rows are those published; unlabelled of them carry -1 and are dropped.
    pairs: the task asks whether two texts have the same label (`_paired`).
    The metric is the task's usual one (`fslib.data.tasks.METRIC_OF`), else accuracy.
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


NLI = ("entailment", "neutral", "contradiction")
PAIR_LABELS = ("different", "same")
STARS = ("1 star", "2 star", "3 stars", "4 stars", "5 stars")
TOPICS: dict[str, tuple[str, ...]] = {
    "ag": ("World", "Sports", "Business", "Sci/Tech"),
    "sogou": ("sports", "finance", "entertainment", "automobile", "technology"),
}
# fmt: off
TOPICS["dbpedia"] = (
    "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
    "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork",
)
TOPICS["yahoo"] = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
)
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
# fmt: on


def _from(
    hub: str, revision: str, splits: tuple[str, str]
) -> Callable[[str, str, tuple[int, int], tuple[str, ...], str], Source]:
    """Return a maker of entries of one dataset: (config, columns of texts, rows, labels, description) -> Source."""

    def entry(
        config: str, columns: str, rows: tuple[int, int], labels: tuple[str, ...], description: str
    ) -> Source:
        texts = tuple(tuple(text.split("+")) for text in columns.split())
        return Source(hub, config, revision, texts, labels, splits, rows, description)

    return entry


_GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_glue, _mnli = (
    _from(*_GLUE, ("train", "validation")),
    _from(*_GLUE, ("train", "validation_matched")),
)
_tested = ("train", "test")
_ag = _from("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4", _tested)
_imdb = _from("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31", _tested)
_yelp_p = _from("fancyzhx/yelp_polarity", "bbf1c97a1f0cf005e5aded43839fd814654a1557", _tested)
_yelp_f = _from("Yelp/yelp_review_full", "c1f9ee939b7d05667af864ee1cb066393154bf85", _tested)
_dbpedia = _from("fancyzhx/dbpedia_14", "9abd46cf7fc8b4c64290f26993c540b92aa145ac", _tested)
_yahoo = _from(
    "community-datasets/yahoo_answers_topics", "6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1", _tested
)
_sogou = _from("community-datasets/sogou_news", "99d1ad9fe1592fddc9da501f381b8ae2c8e2fc19", _tested)
_clue = _from("clue/clue", "9bc980255c2fe8d2a9dda48c2001ace3101ad8f2", ("train", "validation"))
_xnli = _from("facebook/xnli", "b8dd5d7af51114dbda02c0e3f6133f332186418e", _tested)
_scitail = _from("allenai/scitail", "0cc4353235b289165dfde1c7c5d1be983f99ce44", _tested)
_snli = _from("stanfordnlp/snli", "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b", _tested)

_TWO = "sentence1 sentence2"
_NLI = "premise hypothesis"
_ARTICLE = "title+content"
_QA = "question_title+question_content+best_answer"
_SAME = ("not_duplicate", "duplicate")
_ENTAILS = ("entailment", "not_entailment")
_FOLLOWS = "does the second sentence follow from the first?"

# name -> config, columns of the text or of the two texts, rows for training and evaluation, labels, question
REGISTRY: dict[str, Source] = {
    "mrpc": _glue(
        "mrpc",
        _TWO,
        (3668, 408),
        ("not_equivalent", "equivalent"),
        "do two news sentences say the same?",
    ),
    "mnli": _mnli("mnli", _NLI, (392702, 9815), NLI, _FOLLOWS),
    "cola": _glue(
        "cola",
        "sentence",
        (8551, 1043),
        ("unacceptable", "acceptable"),
        "is this sentence grammatical?",
    ),
    "ag": _ag(
        "default",
        "text",
        (120000, 7600),
        TOPICS["ag"],
        "topic of a news item, from its title and description",
    ),
    "imdb": _imdb(
        "plain_text", "text", (25000, 25000), ("neg", "pos"), "sentiment of a film review"
    ),
    "yelp_p": _yelp_p(
        "plain_text", "text", (560000, 38000), ("1", "2"), "sentiment of a review (2 is positive)"
    ),
    "yelp_f": _yelp_f("yelp_review_full", "text", (650000, 50000), STARS, "stars of a review"),
    "dbpedia": _dbpedia(
        "dbpedia_14",
        _ARTICLE,
        (560000, 70000),
        TOPICS["dbpedia"],
        "what kind of thing is described",
    ),
    "yahoo": _yahoo(
        "yahoo_answers_topics",
        _QA,
        (1400000, 60000),
        TOPICS["yahoo"],
        "topic of a question and its answer",
    ),
    "sst-2": _glue(
        "sst2",
        "sentence",
        (67349, 872),
        ("negative", "positive"),
        "sentiment of a film review's phrase",
    ),
    "qqp": _glue(
        "qqp", "question1 question2", (363846, 40430), _SAME, "do two questions ask the same?"
    ),
    "qnli": _glue(
        "qnli",
        "question sentence",
        (104743, 5463),
        _ENTAILS,
        "does the sentence answer the question?",
    ),
    "sogou": _sogou(
        "default",
        _ARTICLE,
        (450000, 60000),
        TOPICS["sogou"],
        "topic of a Chinese news item, in Pinyin",
    ),
    "cmnli": _clue("cmnli", _TWO, (391783, 12241), NLI, f"{_FOLLOWS} (Chinese)"),
    **{
        f"xnli-{lang}": _xnli(lang, _NLI, (392702, 5010), NLI, f"{_FOLLOWS} ({lang})")
        for lang in XNLI_LANGUAGES
    },
    "sts-b": _glue("stsb", _TWO, (5749, 1500), (), "how similar are two sentences, from 0 to 5?"),
    "wnli": _glue(
        "wnli",
        _TWO,
        (635, 71),
        ("not_entailment", "entailment"),
        f"{_FOLLOWS} (a pronoun is resolved)",
    ),
    "rte": _glue("rte", _TWO, (2490, 277), _ENTAILS, _FOLLOWS),
    # SciTail's tab-separated configs have lost rows to quotation marks
    "scitail": _scitail("snli_format", _TWO, (23596, 2126), NLI[:2], f"{_FOLLOWS} (science)"),
    "snli": _snli("plain_text", _NLI, (550152, 10000), NLI, f"{_FOLLOWS} (captions)"),
}
REGISTRY["yahoo"] = replace(REGISTRY["yahoo"], label="topic")
REGISTRY["scitail"] = replace(REGISTRY["scitail"], label="gold_label")
REGISTRY["snli"] = replace(REGISTRY["snli"], unlabelled=(785, 176))  # the annotators did not agree
REGISTRY["ag-pair"] = replace(
    REGISTRY["ag"], pairs=True, description="are two news items about the same topic?"
)


def hub_task(
    name: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    check_rows: bool = True,
    seed: int = SPLIT_SEED,
) -> Task:
    """Return a task of the registry; `task.source` says which data it is made of, with the commit that was loaded.

    folder: a saved copy to take the data from: what `DatasetDict.save_to_disk` wrote, or one parquet, csv, json or
        jsonl file per split (train.csv, test.csv).
    revision: another commit, branch or tag than the registry's; which commit that is, is recorded.
    check_rows: False takes data whose row counts are not the published ones.
    seed: for the pairs of ag-pair, and nothing else.
    Raises FslibError where data, split, column or label name is missing, rows differ, or no row has a label.
    """
    if name == "xnli":
        raise FslibError(
            f"task 'xnli' is one task per language: xnli-{', xnli-'.join(XNLI_LANGUAGES)}"
        )
    if name not in REGISTRY:
        raise unknown("task of the registry", name, REGISTRY)
    source = REGISTRY[name]
    data, origin = (
        _saved(source, Path(folder))
        if folder
        else _fetched(name, source, revision or source.revision)
    )
    if missing := [split for split in source.splits if split not in data]:
        raise FslibError(
            f"task {name}: no split {missing[0]!r} in {origin}; it has {', '.join(data) or 'none'}"
        )
    sides = [_side(name, source, data, side, check_rows) for side in (0, 1)]
    labels = source.labels
    if source.pairs:
        check_count("seed", seed, 0)
        labels, sides = PAIR_LABELS, _paired(sides, seed)
    if labels:  # by name: some datasets' label names are numbers, which an index could be taken for
        sides = [(texts, [labels[y] for y in indices]) for texts, indices in sides]
    return make_task(
        name, sides[0], sides[1], label_names=labels, description=source.description, source=origin
    )


def saved_copy(name: str, root: Path | None) -> Path | None:
    """Return the folder under `root` that bears a task's name, in any case (for ag-pair also AG News's), or None."""
    folders = [p for p in root.iterdir() if p.is_dir()] if root else []
    return folder_called(name, folders) or (
        folder_called("ag", folders) if name == "ag-pair" else None
    )


def folder_called(name: str, folders: Iterable[Path], *, exact_first: bool = True) -> Path | None:
    """Return the folder of that name, else the one that bears it in another case, else None.

    exact_first: False where case does not tell tasks apart. Raises FslibError where several bear the name and none is
    first: which one is meant would depend on their order on disk.
    """
    alike = sorted(p for p in folders if p.name.lower() == name.lower())
    exact = [p for p in alike if exact_first and p.name == name]
    if len(alike) > 1 and not exact:
        raise FslibError(
            f"task {name}: {' and '.join(map(str, alike))} differ in case alone: rename one of them"
        )
    return next(iter(exact or alike), None)


def _saved(source: Source, folder: Path) -> tuple[dict[str, Any], str]:
    import datasets  # here and below only: it takes most of a second

    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder))), str(folder)
        splits = {}
        for split in source.splits:
            for suffix, kind in (
                ("parquet", "parquet"),
                ("csv", "csv"),
                ("json", "json"),
                ("jsonl", "json"),
            ):
                if (path := folder / f"{split}.{suffix}").is_file():
                    # otherwise a text such as "None" or "nan" would be read as missing
                    options = {"keep_default_na": False} if kind == "csv" else {}
                    splits[split] = datasets.load_dataset(
                        kind, data_files={split: str(path)}, **options
                    )[split]
                    break
    except Exception as error:  # each reader has errors of its own
        raise FslibError(
            f"data folder {folder} cannot be read ({first_line(error)}): save it again"
        ) from error
    return splits, str(folder)


def _fetched(name: str, source: Source, revision: str) -> tuple[dict[str, Any], str]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=revision)
        builder.download_and_prepare()
        data = dict(builder.as_dataset())
    except (
        Exception
    ) as error:  # datasets, huggingface_hub, httpx and pyarrow raise here, each their own
        raise NotAtHandError(
            f"task {name}: the Hub did not supply dataset {source.hub} ({source.config}, revision {revision}): "
            f"{first_line(error)}; check the network, or save a copy as {name} in the folder FSLIB_DATA points at"
        ) from error
    # Offline, datasets takes whatever commit its cache holds, and only logs it.
    if len(revision) == 40 and builder.hash != revision:
        raise FslibError(
            f"task {name}: the cached copy of {source.hub} is of revision {builder.hash}, not {revision}: "
            f"connect to the Hub, or ask for that revision"
        )
    return data, f"{source.hub} ({source.config}) at {builder.hash}"


def _side(
    name: str, source: Source, data: dict[str, Any], side: int, check_rows: bool
) -> tuple[list[Any], list[Any]]:
    """Return (texts, labels) of the labelled rows of the train (0) or the eval (1) split."""
    split = source.splits[side]
    where = f"task {name}, split {split}"
    rows = data[split]
    for column in (*(c for columns in source.texts for c in columns), source.label):
        if column not in rows.column_names:
            raise FslibError(
                f"{where}: no column {column!r}; it has {', '.join(rows.column_names)}"
            )
    labels = _labels(where, source, rows)
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        raise FslibError(
            f"{where}: every label is -1, so nothing can be learned or scored; use data with labels"
        )
    published = source.rows[side]
    for what, count, expected in (
        ("rows", len(rows), published),
        ("labelled rows", len(kept), published - source.unlabelled[side]),
    ):
        if check_rows and count != expected:
            raise FslibError(
                f"{where}: {count} {what} found, {expected} expected; get the published data, or pass check_rows=False"
            )
    parts = [_text(rows, columns) for columns in source.texts]
    texts = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
    return (texts if len(kept) == len(texts) else [texts[i] for i in kept]), labels[kept].tolist()


def _text(rows: Any, columns: tuple[str, ...]) -> list[Any]:
    # what is no string, make_task refuses
    if len(columns) == 1:
        return rows[columns[0]][:]
    return [
        " ".join(part for part in parts if part)
        for parts in zip(*(rows[c][:] for c in columns), strict=True)
    ]


def _labels(where: str, source: Source, rows: Any) -> np.ndarray:
    """Return per row its class index in the registry's order (its number, for regression), -1 where it has none."""
    column = rows[source.label][:]
    if not source.labels:
        try:
            return np.array([-1.0 if y is None else float(y) for y in column])
        except ValueError as error:
            raise FslibError(
                f"{where}: column {source.label!r} must hold numbers ({error})"
            ) from None
    names = getattr(rows.features[source.label], "names", None)
    if names is None:  # the names themselves, or -1
        written = [str(y) for y in column]
        names = sorted(set(written) - {"-1", "-", "", "None"})
        at = {name: i for i, name in enumerate(names)}
        column = [at.get(y) for y in written]
    if missing := [n for n in source.labels if n not in names]:
        raise FslibError(
            f"{where}: no label {missing[0]!r} in column {source.label!r}; it has {', '.join(names)}"
        )
    own = {name: i for i, name in enumerate(source.labels)}
    order = np.array([*(own.get(n, -2) for n in names), -1])  # the last for -1
    indices = order[[-1 if y is None else y for y in column]]
    if (indices == -2).any():
        extra = [n for n in names if n not in own]
        raise FslibError(
            f"{where}: label {extra[0]!r} in column {source.label!r} is none of {', '.join(own)}"
        )
    return indices


def _paired(
    sides: list[tuple[list[Any], list[Any]]], seed: int
) -> list[tuple[list[Any], list[Any]]]:
    """Make AG-Pair from AG News: each text once with one of its own topic and once with one of another (`pair_rows`).

    A text that repeats is kept once, in eval rather than in train, so that it is used twice and on one side only.
    """
    known: set[str] = set()
    made = []
    for side in (1, 0):
        articles = []
        for text, topic in zip(*sides[side], strict=True):
            if text not in known:
                known.add(text)
                articles.append(Article(text, str(topic), "", (text,)))
        firsts, seconds, labels, _ = pair_rows(articles, np.random.default_rng([seed, side]))
        made.append((list(zip(firsts, seconds or [], strict=True)), labels))
    return made[::-1]
