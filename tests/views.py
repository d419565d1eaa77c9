"""Views for the tests of the explorer: all numbers made up, of any size, with names that would do harm as HTML."""

import numpy as np

from fslib.intervals import Interval
from fslib.study.headwise import Pattern
from fslib.study.view import Effect, HeadSet, View

EVIL = "</script><script>document.title='taken'</script>"


def made_up(layers: int = 2, heads: int = 3, names: tuple[str, ...] = ("alpha", "beta", EVIL), tokens: int = 4) -> View:
    """A view with a pattern per task, every head alone and one set of two heads."""
    rng = np.random.default_rng(0)
    shape, count = (layers, heads), layers * heads

    def interval() -> Interval:
        return Interval(float(rng.uniform(20, 90)), float(rng.uniform(1, 3)), 50.0)

    def effects() -> tuple[Effect, ...]:
        return tuple(Effect(interval(), interval()) for _ in names)

    def pattern() -> Pattern:
        weights = rng.random((*shape, tokens, tokens))
        words = ("[CLS]", "<b>bold</b>", *(f"t{i}" for i in range(tokens - 2)))
        return Pattern(words, EVIL, "no", weights / weights.sum(-1, keepdims=True), rng.random((*shape, tokens)))

    sets = [HeadSet("top 33 % of alpha", (0, count - 1), effects())]
    sets += [HeadSet(f"head {at} alone", (at,), effects()) for at in range(count)]
    return View(
        title=f"made up {EVIL}",
        about="Nothing was measured.",
        importance={name: rng.random(shape) for name in names},
        metrics=dict.fromkeys(names, "accuracy"),
        descriptions=dict.fromkeys(names, EVIL),
        whole={name: interval() for name in names},
        sets=sets,
        rise={name: rng.normal(size=shape) for name in names},
        texts=dict.fromkeys(names, 1),
        patterns={name: [pattern()] for name in names},
    )
