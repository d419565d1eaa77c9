"""What is learned: tasks, your own or (`fslib.data.loading`) the embedded ones and folders in GLUE's layout.

A `Task` is a name, a train and an eval `Split`, label names and a metric. Everything downstream
(heads of the model, metrics, tables) derives from it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fslib.errors import FslibError, check_count, check_number, unknown

CLASS_METRICS = ("accuracy", "f1", "matthews")
METRICS = (*CLASS_METRICS, "spearman")
# A task of this name could not be told from a row or column that tables have beside the tasks' own.
RESERVED = ("mean", "step", "random")
Unordered = (
    Mapping | Set
)  # what is no list of texts or labels, although Python lets it be read as one
# Main metric per task where it is not accuracy (as GLUE reports them).
METRIC_OF = {"mrpc": "f1", "qqp": "f1", "cola": "matthews", "sts-b": "spearman"}


@dataclass(frozen=True)
class Split:
    """Examples: n texts, for sentence pairs n second texts, n labels.

    labels: int64 class indices in [0, classes), or float64 targets for regression.
    documents: per example the ids of the source documents it was made of (the text itself if unknown);
        a document stands on one side only.
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
        return Split(
            tuple(self.texts[i] for i in pick),
            None if self.pairs is None else tuple(self.pairs[i] for i in pick),
            self.labels[pick],
            tuple(self.documents[i] for i in pick),
        )

    def sources(self) -> set[str]:
        """Return all document ids of this side."""
        return {d for documents in self.documents for d in documents}


@dataclass(frozen=True)
class Task:
    """One task. Build your own with `make_task`; `label_names` is empty for regression.

    source: where the data came from, with Hub id and commit; the fingerprint says which data they are.
    """

    name: str
    train: Split
    eval: Split
    label_names: tuple[str, ...]
    metric: str = "accuracy"
    description: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        letters = set("abcdefghijklmnopqrstuvwxyz0123456789-_")
        if not isinstance(self.name, str) or not self.name or not set(self.name) <= letters:
            raise FslibError(
                f"task name {self.name!r}: use lower-case letters, digits, - and _ only"
            )
        if self.name in RESERVED:
            raise FslibError(
                f"task name {self.name!r} is a row of tables, as are {', '.join(RESERVED)}: choose another"
            )
        if self.metric not in METRICS:
            raise unknown(f"metric of task {self.name}", self.metric, METRICS)
        if self.is_regression != (self.metric not in CLASS_METRICS):
            kind = "numbers without label names" if self.is_regression else "label names"
            raise FslibError(
                f"task {self.name}: metric {self.metric} does not fit labels that are {kind}"
            )
        if self.metric == "f1" and len(self.label_names) != 2:
            raise FslibError(
                f"task {self.name}: f1 needs 2 classes, the second one positive; got {self.label_names}"
            )
        if len(set(self.label_names)) != len(self.label_names):
            raise FslibError(f"task {self.name}: label names repeat: {self.label_names}")
        for side, split in (("train", self.train), ("eval", self.eval)):
            if not isinstance(split, Split) or not isinstance(split.labels, np.ndarray):
                raise FslibError(
                    f"task {self.name}: its {side} is no Split with an array of labels: use make_task"
                )
            self._check(side, split)
        if (self.train.pairs is None) != (self.eval.pairs is None):
            raise FslibError(
                f"task {self.name}: train and eval must both be pairs or both single texts"
            )

    def _check(self, side: str, split: Split) -> None:
        where = f"task {self.name}, {side} split"
        if not len(split):
            raise FslibError(f"{where}: no examples")
        lengths = {
            len(split.labels),
            len(split.documents),
            len(split.pairs or split.texts),
            len(split),
        }
        if len(lengths) != 1:
            raise FslibError(
                f"{where}: {len(split)} texts but {len(split.labels)} labels; give one label per text"
            )
        for side_texts in (split.texts, split.pairs or ()):
            check_texts(where, side_texts)
        if self.is_regression:
            if not np.isfinite(split.labels).all():
                raise FslibError(f"{where}: labels must be finite numbers")
            return
        outside = set(np.unique(split.labels)) - set(range(len(self.label_names)))
        if outside or split.labels.dtype.kind not in "iu":
            raise FslibError(
                f"{where}: labels must be 0..{len(self.label_names) - 1}; found {sorted(outside)}"
            )
        if len(self.label_names) < 2 or (side == "train" and len(np.unique(split.labels)) < 2):
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
        """SHA-256 (16 hex digits) over every text and label, so that a record knows the data it came from."""
        digest = hashlib.sha256(repr((self.name, self.label_names, self.metric)).encode())
        for split in (self.train, self.eval):
            digest.update(repr((split.texts, split.pairs)).encode())
            digest.update(split.labels.tobytes())
        return digest.hexdigest()[:16]

    def limited(
        self, *, train: int | None = None, eval: int | None = None, seed: int = 0
    ) -> "Task":
        """Return the same task on a random part of its examples (all where a limit is None or larger)."""
        return replace(
            self, train=self.part("train", train, seed), eval=self.part("eval", eval, seed)
        )

    def part(self, side: str, limit: int | None, seed: int = 0) -> Split:
        """Return a random part of one side, "train" or "eval": all of it where the limit is None or larger.

        Unlike a task, a part may be of one class, as that of a rare one easily is.
        """
        check_count(side, limit, none=True)
        check_count("seed", seed, 0)
        rng = np.random.default_rng(seed)
        order = {
            "train": rng.permutation(len(self.train)),
            "eval": rng.permutation(len(self.eval)),
        }[side]
        whole: Split = self.train if side == "train" else self.eval
        return whole if limit is None or limit >= len(whole) else whole.take(np.sort(order[:limit]))

    def shared_texts(self) -> set[str]:
        """Return the texts that stand, as they are, in both train and eval (nil for the embedded tasks)."""
        sides = [set(s.texts) | set(s.pairs or ()) for s in (self.train, self.eval)]
        return sides[0] & sides[1]

    @cached_property
    def doubts(self) -> str:
        """Say why a score on the eval split means little: train holds its texts, or it has one label; else ""."""
        found = []
        known = set(zip(self.train.texts, self.train.pairs or self.train.texts, strict=True))
        if all(
            text in known
            for text in zip(self.eval.texts, self.eval.pairs or self.eval.texts, strict=True)
        ):
            found.append("train holds every text of eval")
        if len(np.unique(self.eval.labels)) == 1:
            found.append("all eval labels are alike")
        return ", ".join(found)


def check_texts(where: str, texts: Sequence[str]) -> None:
    """Raise FslibError for what is no sequence of strings, or cannot be written as UTF-8, which tokenizers need."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise FslibError(f"{where}: texts must be a list of strings, not {type(texts).__name__}")
    try:
        "".join(texts).encode()  # all at once: one of them is looked for only where there is one
    except TypeError:
        raise FslibError(f"{where}: texts must be a list of strings") from None
    except UnicodeEncodeError:
        for i, text in enumerate(texts):
            if broken := [c for c in text if "\ud800" <= c <= "\udfff"]:
                raise FslibError(
                    f"{where}, example {i}: {broken[0]!a} is half a character (a lone surrogate): read the text anew "
                    'as UTF-8, or leave it out with text.encode(errors="ignore").decode()'
                ) from None


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

    train, eval: `(texts, labels)`, two lists, where a text is a string or a (first, second) pair and a label
        is a class index, a label name, or a number for regression; or a `datasets.Dataset` or a pandas DataFrame
        whose label column is called `label` (or `labels`, `score`) and whose other string columns, in order, are the
        texts.
    eval: None holds `eval_share` of the distinct texts out of `train`, so that no text is on both sides.
    label_names: empty means regression, unless a dataset's label column is a ClassLabel, which names them.
    metric: accuracy, f1 (2 classes) or matthews; spearman for regression.
    Raises FslibError for examples that do not fit. What makes a score say little is said beside it: `Task.doubts`.
    """
    check_count("seed", seed, 0)
    names = _checked_names(name, label_names) or _class_names(train)
    train_split = _as_split(name, train, names)
    if eval is None:
        train_split, eval_split = _hold_out(name, train_split, eval_share, seed)
    else:
        eval_split = _as_split(name, eval, names)
    metric = metric or METRIC_OF.get(str(name)) or ("accuracy" if names else "spearman")
    return Task(name, train_split, eval_split, names, metric, description, source)


def _checked_names(name: str, label_names: Sequence[str]) -> tuple[str, ...]:
    # a set has another order in every process, and a generator is empty when it is read a second time
    if isinstance(label_names, str) or not isinstance(label_names, Sequence | np.ndarray):
        names: list[Any] = [None]
    else:
        names = list(label_names)
    if not all(isinstance(n, str) for n in names):
        raise FslibError(
            f"task {name}: label_names {label_names!r:.80} must be a list of strings, in the order of the classes"
        )
    return tuple(names)


def _as_split(name: str, data: Any, names: tuple[str, ...]) -> Split:
    if (columns := _columns(data)) is not None:
        data = _from_columns(name, data, columns, names)
    try:
        if isinstance(data, Unordered):
            raise TypeError("its parts have names, or no order")
        texts, labels = data
    except (TypeError, ValueError):
        raise FslibError(
            f"task {name}: give data as (texts, labels), as a datasets.Dataset or as a DataFrame"
        ) from None
    for column in (texts, labels):
        if isinstance(column, str | bytes | Unordered):
            raise FslibError(
                f"task {name}: texts and labels must be two lists, and one of them is a {type(column).__name__}"
            )
    try:
        texts, labels = list(texts), list(labels)
    except TypeError:
        raise FslibError(f"task {name}: texts and labels must be two lists") from None
    if len(texts) != len(labels):
        raise FslibError(
            f"task {name}: {len(texts)} texts but {len(labels)} labels; give one label per text"
        )
    is_pair = bool(texts) and not isinstance(texts[0], str)
    for i, text in enumerate(texts):
        parts = text if isinstance(text, (tuple, list)) else (text,)
        if len(parts) != 1 + is_pair or not all(isinstance(p, str) for p in parts):
            raise FslibError(
                f"task {name}, example {i}: texts must all be strings, or all pairs of strings"
            )
    firsts = tuple(t[0] for t in texts) if is_pair else tuple(texts)
    seconds = tuple(t[1] for t in texts) if is_pair else None
    documents = tuple((t,) if isinstance(t, str) else tuple(t) for t in texts)
    return Split(firsts, seconds, _as_labels(name, labels, names), documents)


def _as_labels(name: str, labels: list[Any], names: tuple[str, ...]) -> np.ndarray:
    if not names:
        try:
            return np.array([float(y) for y in labels], dtype=np.float64)
        except (TypeError, ValueError):
            raise FslibError(
                f"task {name}: labels are not numbers; name the classes with label_names"
            ) from None
    index = {n: i for i, n in enumerate(names)}
    indices: list[Any] = [index.get(y) if isinstance(y, str) else y for y in labels]
    for i, y in enumerate(indices):
        if isinstance(y, bool | np.bool_) or not _is_among(y, range(len(names))):
            raise unknown(f"label of task {name}, example {i},", labels[i], names)
        # y is equal to a whole number, but may be a float, as in a column that has had gaps
        if not isinstance(labels[i], str) and index.get(str(int(y)), y) != y:
            raise FslibError(
                f"task {name}, example {i}: label {y!r} may be the class index or the label name {str(int(y))!r}, "
                f"which stands at index {index[str(int(y))]}: give labels as names, as strings"
            )
    return np.array(indices, dtype=np.int64)


def _is_among(value: Any, valid: range) -> bool:
    try:
        return value in valid
    except TypeError:  # pandas' NA is equal to nothing, and says so by raising
        return False


def _columns(data: Any) -> list[Any] | None:
    """Return the column names of a datasets.Dataset or of a pandas DataFrame; None for other data."""
    if hasattr(data, "column_names"):
        return list(data.column_names)
    return list(data.columns) if hasattr(data, "columns") and hasattr(data, "iloc") else None


def _label_column(columns: list[Any]) -> str | None:
    return next((c for c in ("label", "labels", "score") if c in columns), None)


def _class_names(data: Any) -> tuple[str, ...]:
    """Return the names of a dataset's ClassLabel; none for other data."""
    label = _label_column(_columns(data) or []) if hasattr(data, "features") else None
    return tuple(getattr(data.features[label], "names", ())) if label else ()


def _from_columns(
    name: str, data: Any, columns: list[Any], names: tuple[str, ...]
) -> tuple[list[Any], list[Any]]:
    if repeated := [c for c in columns if columns.count(c) > 1]:
        raise FslibError(f"task {name}: two columns are called {repeated[0]!r}: rename one")
    label = _label_column(columns)
    if label is None:
        raise FslibError(
            f"task {name}: the data have no column label, labels or score; they have {columns}"
        )
    # any string: a gap in the first row makes no column of texts another one
    rows = [
        c for c in columns if c != label and any(isinstance(value, str) for value in data[c][:])
    ]
    if len(rows) not in (1, 2):
        raise FslibError(
            f"task {name}: want one or two text columns, found {rows}; select columns first"
        )
    texts = (
        list(data[rows[0]])
        if len(rows) == 1
        else list(zip(data[rows[0]], data[rows[1]], strict=True))
    )
    labels, own = list(data[label]), _class_names(data)
    if own != names and set(own) & set(
        names
    ):  # the same classes in another order: an index means the dataset's
        labels = [own[int(y)] if _is_among(y, range(len(own))) else y for y in labels]
    return texts, labels


def _hold_out(name: str, split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Split by document: a document (an exact text, where sources are unknown) stays on one side."""
    check_number(f"task {name}: eval_share", share, "(0, 1)")
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
    chosen: set[int] = set()
    held = 0
    for r in np.random.default_rng(seed).permutation(sorted(sizes)):
        if held >= share * len(split):
            break
        chosen.add(int(r))
        held += sizes[int(r)]
    if not chosen or held == len(split):
        raise FslibError(
            f"task {name}: too few distinct texts to hold {share:.0%} out; give eval= as well"
        )
    inside = [i for i, r in enumerate(roots) if r not in chosen]
    return split.take(inside), split.take([i for i, r in enumerate(roots) if r in chosen])


def as_tasks(tasks: Task | Iterable[Task] | Mapping[str, Task]) -> dict[str, Task]:
    """Return {name: Task} from whatever holds tasks. Raises FslibError for none, and for two of one name."""
    if isinstance(tasks, Task):
        tasks = [tasks]
    held: Any = tasks.values() if isinstance(tasks, Mapping) else tasks
    given: list[Any] = (
        [held] if isinstance(held, str) or not isinstance(held, Iterable) else list(held)
    )
    if strange := [task for task in given if not isinstance(task, Task)]:
        raise FslibError(
            f"{strange[0]!r:.80} is no task: give what fslib.load_tasks or fslib.make_task returns"
        )
    named = {task.name: task for task in given}
    if not named:
        raise FslibError("no task given")
    if len(named) < len(given):
        twice = next(t.name for t in given if sum(u.name == t.name for u in given) > 1)
        raise FslibError(f"two tasks are called {twice!r}: rename one")
    return named
