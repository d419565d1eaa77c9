"""Say what is learned: tasks, made by `make_task` or by `fslib.data.loading`.

A `Task` is a name, a train and an eval `Split`, label names and a metric. Everything downstream
(heads of the model, metrics, tables) derives from it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fslib.errors import FslibError, check_among, check_count, check_number, unknown

CLASS_METRICS = ("accuracy", "f1", "matthews")
METRICS = (*CLASS_METRICS, "spearman")
# A task of this name could not be told from a row or column that tables have beside the tasks' own.
RESERVED = ("mean", "step", "random")
# Main metric per task where it is not accuracy (as GLUE reports them).
METRIC_OF = {"mrpc": "f1", "qqp": "f1", "cola": "matthews", "sts-b": "spearman"}


@dataclass(frozen=True)
class Split:
    """The examples of one side of a task.

    Args:
        texts: n texts.
        pairs: n second texts; None for a task about single texts.
        labels: (n,) int64 class indices in [0, classes), or float64 targets for regression.
        documents: per example the ids of the source documents it was made of (the text itself if
            unknown); a document stands on one side only.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray
    documents: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Split":
        """Return the examples at these positions, in this order."""
        pick = [int(i) for i in indices]
        texts = tuple(self.texts[i] for i in pick)
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in pick)
        return Split(texts, pairs, self.labels[pick], tuple(self.documents[i] for i in pick))


@dataclass(frozen=True)
class Task:
    """What a model learns and is scored on; make your own with `make_task`.

    Args:
        name: in code and records.
        train: the examples that are learned.
        eval: the examples that are scored.
        label_names: in the order of the class indices; empty for regression.
        metric: one of METRICS.
        description: what it asks.
        source: where the data came from, with Hub id and commit; the fingerprint says which data
            they are.
    """

    name: str
    train: Split
    eval: Split
    label_names: tuple[str, ...]
    metric: str = "accuracy"
    description: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        name, names, task = self.name, self.label_names, f"task {self.name}"
        if not isinstance(name, str) or not re.fullmatch("[a-z0-9_-]+", name) or name in RESERVED:
            allowed = f"lower-case letters, digits, - and _ only; tables use {', '.join(RESERVED)}"
            raise FslibError(f"task name {name!r}: {allowed}")
        check_among(f"metric of {task}", self.metric, METRICS)
        if self.is_regression != (self.metric not in CLASS_METRICS):
            raise FslibError(f"{task}: metric {self.metric} does not fit the label names {names}")
        if self.metric == "f1" and len(names) != 2:
            raise FslibError(f"{task}: f1 needs 2 classes, the second one positive; got {names}")
        if len(set(names)) != len(names):
            raise FslibError(f"{task}: label names repeat: {names}")
        self._check("train", self.train)
        self._check("eval", self.eval)
        if (self.train.pairs is None) != (self.eval.pairs is None):
            raise FslibError(f"{task}: train and eval must both be pairs or both single texts")

    def _check(self, side: str, split: Split) -> None:
        where, classes = f"task {self.name}, {side} split", set(range(len(self.label_names)))
        if not isinstance(split, Split) or not isinstance(split.labels, np.ndarray):
            raise FslibError(f"{where}: no Split with an array of labels: use make_task")
        n, labels = len(split), split.labels
        if not n or {len(labels), len(split.documents), len(split.pairs or split.texts)} != {n}:
            raise FslibError(f"{where}: {n} texts and {len(labels)} labels; give one per text")
        check_texts(where, split.texts)
        check_texts(where, split.pairs or ())
        if self.is_regression:
            if not np.isfinite(labels).all():
                raise FslibError(f"{where}: labels must be finite numbers")
            return
        found = set(np.unique(labels))
        if labels.dtype.kind not in "iu" or not found <= classes:
            raise FslibError(f"{where}: labels must be 0..{len(classes) - 1}; found {found}")
        if len(classes) < 2 or (side == "train" and len(found) < 2):
            raise FslibError(f"{where}: only one class; a classification task needs at least two")

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def n_outputs(self) -> int:
        """Outputs of the task's classifier: its classes, or 1 for regression."""
        return len(self.label_names) or 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) over every text and label: which data a record is of."""
        digest = hashlib.sha256(repr((self.name, self.label_names, self.metric)).encode())
        for split in (self.train, self.eval):
            digest.update(repr((split.texts, split.pairs)).encode())
            digest.update(split.labels.tobytes())
        return digest.hexdigest()[:16]

    def limited(
        self, *, train: int | None = None, eval: int | None = None, seed: int = 0
    ) -> "Task":
        """Return the same task on a random part of its examples.

        Args:
            train: so many of train; all of them where it is None or larger.
            eval: so many of eval.
            seed: of the draw.
        """
        sides = self.part("train", train, seed), self.part("eval", eval, seed)
        return replace(self, train=sides[0], eval=sides[1])

    def part(self, side: str, limit: int | None, seed: int = 0) -> Split:
        """Return a random part of one side.

        Unlike a task, a part may be of one class, as that of a rare one easily is.

        Args:
            side: "train" or "eval".
            limit: so many examples; all of them where it is None or larger.
            seed: of the draw.
        """
        check_among("split", side, ("train", "eval"))
        check_count(side, limit, none=True)
        check_count("seed", seed, 0)
        sides, rng = {"train": self.train, "eval": self.eval}, np.random.default_rng(seed)
        orders = {name: rng.permutation(len(split)) for name, split in sides.items()}
        if limit is None or limit >= len(sides[side]):
            return sides[side]
        return sides[side].take(np.sort(orders[side][:limit]))

    def shared_texts(self) -> set[str]:
        """Return the texts that stand, as they are, in both train and eval."""
        sides = [set(s.texts) | set(s.pairs or ()) for s in (self.train, self.eval)]
        return sides[0] & sides[1]

    @cached_property
    def doubts(self) -> str:
        """Say why a score on the eval split means little; "" where nothing is known."""
        sides = self.train, self.eval
        train, scored = (set(zip(s.texts, s.pairs or s.texts, strict=True)) for s in sides)
        seen = "train holds every text of eval" if scored <= train else ""
        alike = "all eval labels are alike" if len(np.unique(self.eval.labels)) == 1 else ""
        return ", ".join(filter(None, (seen, alike)))


Tasks = Task | Iterable[Task] | Mapping[str, Task]  # whatever holds tasks


def check_texts(where: str, texts: Sequence[str]) -> None:
    """Refuse what is no sequence of strings that a tokenizer can take.

    Raises:
        FslibError: it is something else, or cannot be written as UTF-8.
    """
    listed = _as_list(texts)
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise FslibError(f"{where}: texts must be a list of strings")
    for i, text in enumerate(listed):
        if text.encode(errors="ignore").decode() != text:
            raise FslibError(f"{where}, example {i}: a lone surrogate: read the text as UTF-8")


def make_task(
    name: str,
    train: Any,
    eval: Any = None,
    *,
    label_names: Sequence[str] = (),
    metric: str | None = None,
    eval_share: float = 0.2,
    seed: int = 0,
    description: str = "",
    source: str = "",
) -> Task:
    """Return a task of your own.

    What makes a score on it say little is said beside the score: `Task.doubts`.

    Args:
        name: of lower-case letters, digits, - and _.
        train: `(texts, labels)`, two lists, where a text is a string or a (first, second) pair and
            a label is a class index, a label name, or a number for regression; or a
            `datasets.Dataset` or a pandas DataFrame whose label column is called `label` (or
            `labels`, `score`) and whose other string columns, in order, are the texts.
        eval: likewise; None holds `eval_share` of the distinct texts out of `train`, so that no
            text is on both sides.
        label_names: empty means regression, unless a dataset's label column is a ClassLabel, which
            names them.
        metric: accuracy, f1 (2 classes) or matthews; spearman for regression. By default the usual
            one of a task of this name (`METRIC_OF`), else accuracy.
        eval_share: in (0, 1).
        seed: of what is held out.
        description: what the task asks.
        source: where its data came from.

    Raises:
        FslibError: the examples do not fit.
    """
    check_count("seed", seed, 0)
    given = _as_list(label_names)  # of a set not: it has another order in every process
    if given is None or not all(isinstance(n, str) for n in given):
        raise FslibError(f"task {name}: label_names {label_names!r:.80}: give a list of strings")
    names = tuple(given) or _class_names(train)
    train_split = _as_split(f"task {name}, train", train, names)
    if eval is None:
        train_split, eval_split = _hold_out(f"task {name}", train_split, eval_share, seed)
    else:
        eval_split = _as_split(f"task {name}, eval", eval, names)
    metric = metric or METRIC_OF.get(str(name)) or ("accuracy" if names else "spearman")
    return Task(name, train_split, eval_split, names, metric, description, source)


def _as_list(value: Any) -> list[Any] | None:
    """Return the parts of what has an order and no names; None for other things."""
    try:
        # numbers of Python, from arrays and tensors, too
        value = getattr(value, "tolist", lambda: value)()
        return None if isinstance(value, str | bytes | Mapping | Set) else list(value)
    except TypeError:
        return None


def _as_split(task: str, data: Any, names: tuple[str, ...]) -> Split:
    columns = getattr(data, "column_names", getattr(data, "columns", None))
    if columns is not None:  # a datasets.Dataset or a pandas DataFrame
        data = _from_columns(task, data, list(columns), names)
    parts: list[Any] = [_as_list(part) for part in _as_list(data) or ()]
    if len(parts) != 2 or None in parts or len(parts[0]) != len(parts[1]):
        raise FslibError(f"{task}: give two lists of one length, texts and labels, or a DataFrame")
    texts, labels = parts
    rows = tuple(tuple(text) if isinstance(text, tuple | list) else (text,) for text in texts)
    for i, row in enumerate(rows):
        if not 1 <= len(row) == len(rows[0]) <= 2 or not all(isinstance(part, str) for part in row):
            raise FslibError(f"{task}, example {i}: give texts as strings, or as pairs of them")
    firsts, *seconds = zip(*rows, strict=True) if rows else ((),)
    return Split(firsts, seconds[0] if seconds else None, _as_labels(task, labels, names), rows)


def _as_labels(task: str, labels: list[Any], names: tuple[str, ...]) -> np.ndarray:
    if not names:
        try:
            return np.array([float(y) for y in labels], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise FslibError(f"{task}: no numbers ({error}): give label_names") from None
    index = {n: i for i, n in enumerate(names)}
    indices: list[Any] = [index.get(y) if isinstance(y, str) else y for y in labels]
    for i, y in enumerate(indices):
        # what is no number, such as pandas' NA, may not be comparable
        is_number = isinstance(y, int | float | np.number) and not isinstance(y, bool)
        if not is_number or y not in range(len(names)):
            raise unknown(f"label of {task}, example {i},", labels[i], names)
        # y is equal to a whole number, but may be a float, as in a column that has had gaps
        if not isinstance(labels[i], str) and index.get(name := f"{float(y):.0f}", y) != y:
            both = f"label {y!r} may be the index or the name {name!r} (index {index[name]})"
            raise FslibError(f"{task}, example {i}: {both}: give labels as names, as strings")
    return np.array(indices, dtype=np.int64)


def _label_column(columns: Iterable[Any]) -> str | None:
    return next((c for c in ("label", "labels", "score") if c in columns), None)


def _class_names(data: Any) -> tuple[str, ...]:
    """Return the names of a dataset's ClassLabel; none for other data."""
    features = getattr(data, "features", {})
    return tuple(getattr(features.get(_label_column(features)), "names", ()))


def _from_columns(task: str, data: Any, columns: list[Any], names: tuple[str, ...]) -> tuple:
    if repeated := [c for c in columns if columns.count(c) > 1]:
        raise FslibError(f"{task}: two columns are called {repeated[0]!r}: rename one")
    label = _label_column(columns)
    if label is None:
        raise FslibError(f"{task}: no column label, labels or score in the data: {columns}")
    # any string: a gap in the first row makes no column of texts another one
    rest = [c for c in columns if c != label]
    rows = [c for c in rest if any(isinstance(value, str) for value in data[c][:])]
    if len(rows) not in (1, 2):
        raise FslibError(f"{task}: want one or two text columns, found {rows}; select columns")
    texts = list(zip(*(data[column] for column in rows), strict=True))
    labels, own = list(data[label]), _class_names(data)
    if own != names and set(own) & set(names):  # the same classes in another order
        labels = [dict(enumerate(own)).get(y, y) for y in labels]
    return texts, labels


def _hold_out(task: str, split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Split by document (by text, where sources are unknown)."""
    check_number(f"{task}: eval_share", share, "(0, 1)")
    group = list(range(len(split)))  # union-find over examples that share a document

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    first: dict[str, int] = {}
    for i, documents in enumerate(split.documents):
        for document in documents:
            group[root(i)] = root(first.setdefault(document, i))
    roots = [root(i) for i in range(len(split))]
    sizes = Counter(roots)
    order = np.random.default_rng(seed).permutation(sorted(sizes)).tolist()
    before = np.cumsum([0, *(sizes[r] for r in order)])  # examples that are held out so far
    chosen = {r for r, n in zip(order, before, strict=False) if n < share * len(split)}
    if len(chosen) in (0, len(sizes)):
        raise FslibError(f"{task}: too few distinct texts to hold {share:.0%} out; give eval= too")
    held = [i for i, r in enumerate(roots) if r in chosen]
    return split.take([i for i, r in enumerate(roots) if r not in chosen]), split.take(held)


def as_tasks(tasks: Tasks) -> dict[str, Task]:
    """Return {name: Task} from whatever holds tasks.

    Raises:
        FslibError: there is none, or two are of one name.
    """
    held = _as_list(tasks.values() if isinstance(tasks, Mapping) else tasks)
    given: list[Any] = [tasks] if held is None else held
    if strange := [task for task in given if not isinstance(task, Task)]:
        raise FslibError(f"{strange[0]!r:.80} is no task: load_tasks and make_task return tasks")
    if not given:
        raise FslibError("no task given")
    named = {task.name: task for task in given}
    if len(named) < len(given):
        raise FslibError(f"two tasks are of one name: {[task.name for task in given]}")
    return named
