"""Views for the tests of the explorer: all numbers made up, of any size, with names that would do harm as HTML."""

import numpy as np

from fslib.explorer.view import HeadSet, View, Whole
from fslib.study.units import Pattern

EVIL = "</script><script>document.title='taken'</script>"


def made_up(
    layers: int = 2,
    heads: int = 3,
    names: tuple[str, ...] = ("alpha", "beta", EVIL),
    tokens: int = 4,
) -> View:
    """A view with a pattern per task, every head alone and one set of two heads; the last of several tasks has values.

    Heads alone are scored on other examples than the set, and fewer, as a profile may have it.
    """
    rng = np.random.default_rng(0)
    shape, count = (layers, heads), layers * heads
    metrics = {
        name: "spearman" if 0 < t == len(names) - 1 else "accuracy" for t, name in enumerate(names)
    }

    def drawn(n: int) -> dict[str, np.ndarray]:
        values = {
            "accuracy": lambda: rng.integers(2, size=n),
            "spearman": lambda: rng.normal(size=n),
        }
        return {name: values[metric]() for name, metric in metrics.items()}

    def pattern() -> Pattern:
        weights = rng.random((*shape, tokens, tokens))
        words = ("[CLS]", "<b>bold</b>", *(f"t{i}" for i in range(tokens - 2)))
        return Pattern(
            words,
            EVIL,
            "no",
            weights / weights.sum(-1, keepdims=True),
            rng.random((*shape, tokens)),
        )

    pairs, alone = (Whole(metrics, drawn(n), drawn(n)) for n in (30, 12))
    sets = [HeadSet("top 33 % of alpha", tuple({0, count - 1}), pairs, pairs.effects(drawn(30)))]
    sets += [
        HeadSet(f"head {at} alone", (at,), alone, alone.effects(drawn(12))) for at in range(count)
    ]
    return View(
        title=f"made up {EVIL}",
        about="Nothing was measured.",
        importance={name: rng.random(shape) for name in names},
        metrics=metrics,
        descriptions=dict.fromkeys(names, EVIL),
        sets=sets,
        rise={name: rng.normal(size=shape) for name in names},
        texts=dict.fromkeys(names, 1),
        patterns={name: [pattern()] for name in names},
    )
