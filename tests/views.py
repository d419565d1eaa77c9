"""Views for the tests of the explorer: numbers made up, of any size, names that would do harm."""

import numpy as np

from fslib.evaluation import Score
from fslib.explorer.view import TaskView, View, as_text, compare
from fslib.plot import looks
from fslib.study.units import Pattern

EVIL = "</script><script>document.title='taken'</script>"
NAMES = ("alpha", "beta", EVIL)


def made_up(layers: int = 2, heads: int = 3, names: tuple[str, ...] = NAMES) -> View:
    """Return a view with a text per task, a set of two heads, and heads alone.

    Heads alone (the first 36) are scored on other and fewer examples than the set, as a profile may
    have it. The last of several tasks has values for answers.
    """
    rng = np.random.default_rng(0)
    shape, count = (layers, heads), layers * heads
    metrics = dict.fromkeys(names, "accuracy")
    if len(names) > 1:
        metrics[names[-1]] = "spearman"

    def drawn(metric: str, n: int) -> np.ndarray:
        return rng.integers(2, size=n) if metric == "accuracy" else rng.normal(size=n)

    def pattern() -> Pattern:
        weights = rng.random((*shape, 4, 4))
        shares = weights / weights.sum(-1, keepdims=True)
        words = ("[CLS]", "<b>bold</b>", "t0", "t1")
        return Pattern(words, EVIL, "no", shares, rng.random((*shape, 4)))

    wholes, sets = [], []
    top = ("top 33 % of alpha", sorted({0, count - 1}))
    alone = [(f"head {at} alone", [at]) for at in range(min(count, 36))]
    for number, (n, named) in enumerate([(30, [top]), (12, alone)]):
        labels = {name: drawn(metric, n) for name, metric in metrics.items()}
        scored = [
            (*one, {u: Score(m, drawn(m, n), labels[u]) for u, m in metrics.items()})
            for one in [("all heads", []), *named]
        ]
        whole, found = compare(scored, number)
        wholes.append(whole)
        sets += found
    tasks = []
    for name, look in looks(list(names)).items():
        task = TaskView(name, EVIL, metrics[name], rng.random(shape), **look)
        task.rise, task.texts, task.patterns = rng.normal(size=shape), 1, [as_text(pattern())]
        tasks.append(task)
    return View(f"made up {EVIL}", "Nothing was measured.", shape, tasks, wholes, sets)
