"""Sentences in which something about a word is wrong: two neighbours swapped, or one word exchanged for another.

Both rules work on any text, so that one question can be asked of several: `bbc-shift` and `sst-shift` differ in
nothing but the text. What is wrong must not be seen from the words alone, without their order and context.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

Rows = tuple[
    list[str], list[str] | None, list[int], list[tuple[str, ...]]
]  # texts, pairs, labels, document ids

COMMON = (
    100  # so many of the most frequent words, which hold sentences together, are never exchanged
)
_ANY = re.compile("")
_EXCHANGEABLE = re.compile(r"""([a-z]{4,})([.,;:!?"']*)""")


def shift_words(
    sentence: str, rng: np.random.Generator, movable: re.Pattern[str] = _ANY
) -> str | None:
    """Return the sentence with two adjacent, different words swapped; None if it has no such pair.

    movable: both words begin like this; what words are is said by white space.
    """
    words = sentence.split()
    swappable = [
        i
        for i in range(len(words) - 1)
        if words[i].casefold() != words[i + 1].casefold()
        and movable.match(words[i])
        and movable.match(words[i + 1])
    ]
    if not swappable:
        return None
    i = swappable[int(rng.integers(len(swappable)))]
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def shifted_rows(
    sentences: Iterable[tuple[str, str]], rng: np.random.Generator, movable: re.Pattern[str] = _ANY
) -> Rows:
    """Return rows in which every second sentence has two neighbours swapped (label 1).

    sentences: (document id, sentence). They are taken one by one, so a generator may draw from the same `rng`.
    """
    texts: list[str] = []
    labels: list[int] = []
    ids: list[tuple[str, ...]] = []
    for document, sentence in sentences:
        shifted = shift_words(sentence, rng, movable)
        # label by turns keeps the two classes equal
        label = int(shifted is not None and len(labels) % 2)
        texts.append(shifted if label and shifted is not None else sentence)
        labels.append(label)
        ids.append((document,))
    return texts, None, labels, ids


class Place(NamedTuple):
    """A word of a sentence that may be exchanged: the document it is of, all words, its position, itself."""

    document: str
    words: list[str]
    position: int
    word: str

    def put(self, word: str) -> str:
        """Return the sentence with another word there; punctuation stays."""
        words = list(self.words)
        words[self.position] = word + words[self.position].removeprefix(self.word)
        return " ".join(words)

    def takes(self, other: "Place") -> bool:
        """Whether the two may exchange their words: of two documents, and no word comes to stand there twice."""
        known = {w.strip(".,;:!?\"'").casefold() for w in self.words}
        return self.document != other.document and other.word not in known


def exchanged_rows(
    sentences: Iterable[tuple[str, str]], corpus: Iterable[str], rng: np.random.Generator
) -> Rows:
    """Return rows in which half of the sentences have one word that belongs to another of them (label 1).

    Sentences exchange words in twos: of two that are next to each other in the order of frequency (over `corpus`, ties
    in random order). So a word comes into sentences exactly as often as it leaves others, and neither its presence
    nor its frequency tells. Exchanged are lower-case words of four letters and more that are not among the COMMON
    most frequent, and no word after "a" or "an", which would tell by its first letter. A sentence without such a word
    is left out.
    sentences: (document id, sentence). Both classes are of equal size.
    """
    counts = Counter(
        found[1] for s in corpus for w in s.split() if (found := _EXCHANGEABLE.fullmatch(w))
    )
    common = {word for word, _ in counts.most_common(COMMON)}
    places = [p for d, s in sentences if (p := _place(d, s.split(), common, rng)) is not None]
    intact, changed = places[::2], places[1::2]
    order = sorted(rng.permutation(len(changed)), key=lambda i: counts[changed[i].word])
    spoiled: list[tuple[Place, str]] = []
    waiting: list[Place] = []
    for place in (changed[i] for i in order):
        partner = next((w for w in waiting if w.takes(place) and place.takes(w)), None)
        if partner is None:
            waiting.append(place)
            continue
        waiting.remove(partner)
        spoiled += [(place, place.put(partner.word)), (partner, partner.put(place.word))]
    intact = intact[: len(spoiled)]
    texts = [" ".join(p.words) for p in intact] + [text for _, text in spoiled]
    labels = [0] * len(intact) + [1] * len(spoiled)
    return texts, None, labels, [(p.document,) for p in (*intact, *(p for p, _ in spoiled))]


def _place(
    document: str, words: list[str], common: set[str], rng: np.random.Generator
) -> Place | None:
    """Draw the word of a sentence that may be exchanged; None if it has none."""
    found = {
        i: match[1] for i, word in enumerate(words) if (match := _EXCHANGEABLE.fullmatch(word))
    }
    after_article = {i for i in found if i and words[i - 1].casefold() in ("a", "an")}
    allowed = [i for i, word in found.items() if word not in common and i not in after_article]
    if not allowed:
        return None
    position = allowed[int(rng.integers(len(allowed)))]
    return Place(document, words, position, found[position])


def whole_texts(texts: Iterable[str], shortest: int) -> list[str]:
    """Return the texts that are no part of another one, repeats once, white space levelled, in order.

    A part is a run of whole words. Texts of fewer than `shortest` words are left out.
    """
    levelled = dict.fromkeys(" ".join(text.split()) for text in texts)
    every = [w for text in levelled if len(w := text.split()) >= shortest]
    at: dict[
        tuple[str, ...], list[tuple[int, int]]
    ] = {}  # where each run of `shortest` words stands
    for number, words in enumerate(every):
        for start in range(len(words) - shortest + 1):
            at.setdefault(tuple(words[start : start + shortest]), []).append((number, start))

    def is_part(number: int, words: list[str]) -> bool:
        places = at[tuple(words[:shortest])]
        return any(
            n != number and every[n][start : start + len(words)] == words for n, start in places
        )

    return [" ".join(words) for number, words in enumerate(every) if not is_part(number, words)]
