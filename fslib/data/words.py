"""Make sentences in which two words are swapped, or one word is exchanged.

Both rules work on any text, so that one question can be asked of several: `bbc-shift` and
`sst-shift` differ in nothing but the text. What is wrong must not be seen from the words alone,
without their order and context.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Row = tuple[str, str | None, int, tuple[str, ...]]  # text, its pair, label, ids of its documents
Sentences = Iterable[tuple[str, str]]  # ids of their documents, and the sentences
Rng = np.random.Generator

COMMON = 100  # so many of the most frequent words hold sentences together: never exchanged
_ANY = re.compile("")
_EXCHANGEABLE = re.compile(r"""([a-z]{4,})([.,;:!?"']*)""")


def shift_words(sentence: str, rng: Rng, movable: re.Pattern[str] = _ANY) -> str | None:
    """Return the sentence with two adjacent, different words swapped.

    Args:
        sentence: words between white space.
        rng: draws the two.
        movable: both words begin like this.

    Returns:
        The sentence; None if it has no such pair.
    """
    words = sentence.split()
    free = [word.casefold() if movable.match(word) else "" for word in words]  # "": stays
    swappable = [i for i, (a, b) in enumerate(pairwise(free)) if a and b and a != b]
    if not swappable:
        return None
    i = swappable[int(rng.integers(len(swappable)))]
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def shifted_rows(sentences: Sentences, rng: Rng, movable: re.Pattern[str] = _ANY) -> list[Row]:
    """Return rows in which every second sentence has two neighbours swapped (label 1).

    Args:
        sentences: (document id, sentence), taken one by one, so that a generator may draw from the
            same `rng`.
        rng: draws the words.
        movable: as in `shift_words`.
    """
    rows: list[Row] = []
    for document, sentence in sentences:
        shifted = shift_words(sentence, rng, movable)
        # labels by turns keep the two classes equal
        text, label = (shifted, 1) if shifted and len(rows) % 2 else (sentence, 0)
        rows.append((text, None, label, (document,)))
    return rows


class Place(NamedTuple):
    """A word of a sentence that may be exchanged.

    Args:
        document: the id of the document.
        words: of the sentence.
        position: of the word in the sentence.
        word: without punctuation.
    """

    document: str
    words: list[str]
    position: int
    word: str

    def row(self, word: str, label: int) -> Row:
        """Return the row of the sentence with this word there; punctuation stays."""
        words = list(self.words)
        words[self.position] = word + words[self.position].removeprefix(self.word)
        return (" ".join(words), None, label, (self.document,))

    def takes(self, other: "Place") -> bool:
        """Whether the other's word may come here.

        It must be of another document, and new to the sentence.
        """
        known = {w.strip(".,;:!?\"'").casefold() for w in self.words}
        return self.document != other.document and other.word not in known


def exchanged_rows(sentences: Sentences, corpus: Iterable[str], rng: Rng) -> list[Row]:
    """Return rows in which half of the sentences have a word of another (label 1).

    Sentences exchange words in twos that are next to each other in the order of frequency (ties in
    random order). So a word comes into sentences exactly as often as it leaves others, and neither
    its presence nor its frequency tells. Exchanged are lower-case words of four letters and more
    that are not among the COMMON most frequent, and no word after "a" or "an", which would tell by
    its first letter. A sentence without such a word is left out. Both classes are of equal size.

    Args:
        sentences: (document id, sentence).
        corpus: the sentences over which words are counted.
        rng: draws the word of each sentence, and the order of ties.
    """
    found = (_EXCHANGEABLE.fullmatch(word) for sentence in corpus for word in sentence.split())
    counts = Counter(match[1] for match in found if match)
    common = {word for word, _ in counts.most_common(COMMON)}
    places = [p for document, s in sentences if (p := _place(document, s.split(), common, rng))]
    intact, changed = places[::2], places[1::2]
    order = sorted(rng.permutation(len(changed)), key=lambda i: counts[changed[i].word])
    spoiled: list[Row] = []
    waiting: list[Place] = []
    for place in (changed[i] for i in order):
        partner = next((w for w in waiting if w.takes(place) and place.takes(w)), None)
        if partner is None:
            waiting.append(place)
        else:
            waiting.remove(partner)
            spoiled += [place.row(partner.word, 1), partner.row(place.word, 1)]
    return [place.row(place.word, 0) for place in intact[: len(spoiled)]] + spoiled


def _place(document: str, words: list[str], common: set[str], rng: Rng) -> Place | None:
    """Draw the word of a sentence that may be exchanged; None if it has none."""
    allowed = []
    for before, (i, word) in zip(["", *words], enumerate(words), strict=False):
        match = _EXCHANGEABLE.fullmatch(word)
        if match and match[1] not in common and before.casefold() not in ("a", "an"):
            allowed.append(Place(document, words, i, match[1]))
    return allowed[int(rng.integers(len(allowed)))] if allowed else None


def whole_texts(texts: Iterable[str], shortest: int) -> list[str]:
    """Return the texts that are no part of another one, in order.

    Repeats are kept once, and white space is levelled. A part is a run of whole words. Texts of
    fewer than `shortest` words are left out.
    """
    levelled = dict.fromkeys(" ".join(text.split()) for text in texts)
    every = [words for text in levelled if len(words := text.split()) >= shortest]
    at: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # run of `shortest` words -> its places
    for number, words in enumerate(every):
        for start in range(len(words) - shortest + 1):
            at.setdefault(tuple(words[start : start + shortest]), []).append((number, start))

    def is_part(number: int, words: list[str]) -> bool:
        places = at[tuple(words[:shortest])]
        return any(n != number and every[n][i : i + len(words)] == words for n, i in places)

    return [" ".join(words) for number, words in enumerate(every) if not is_part(number, words)]
