"""What the head explorer shows of one model: importance, scores with and without heads, texts.

All of it is measured: importance by the gradient estimator, a score by switching the heads off.
Nothing is interpolated, and a set of heads that was not tried has no score here. The page gets
these dataclasses as JSON, field by field (`as_json`).
"""

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from fslib.data.tasks import Task
from fslib.evaluation import Score
from fslib.iap import IAP
from fslib.intervals import Measure, score_measure
from fslib.lesions import HeadLesions
from fslib.plot import looks
from fslib.study.design import TEXTS
from fslib.study.units import Pattern

Map = Float[np.ndarray, "layers heads"]
NamedScores = tuple[str, list[int], Mapping[str, Score]]  # of a set of heads: name, heads, scores


@dataclass(frozen=True)
class Estimate:
    """A number of one task, and its 95 % interval over evaluation examples; NaN: not defined."""

    value: float
    low: float
    high: float
    examples: int


@dataclass(frozen=True)
class HeadSet:
    """Heads that were switched off together, and what that did to every task.

    Args:
        name: What the page calls the set.
        heads: Positions of its heads, layer by layer.
        whole: Number of the whole model (`View.wholes`) that it is compared with.
        scores: Every task's score without the heads, in %.
        lost: What is lost of the whole model's score, in points, paired by example.
    """

    name: str
    heads: list[int]
    whole: int
    scores: list[Estimate]
    lost: list[Estimate]


@dataclass(eq=False)
class TaskView:
    """A task of the model: how it is drawn, and what is known of its heads.

    Args:
        name: The task's name.
        description: What it asks.
        metric: Its main metric.
        importance: Of every head.
        color: Of its map and signs.
        marker: matplotlib's name of its sign.
        rise: By how much the loss rises without each head alone; None where it is not recorded.
        texts: How many of its texts can be looked at.
        patterns: What is recorded of them (`as_text`).
    """

    name: str
    description: str
    metric: str
    importance: Map
    color: str
    marker: str
    rise: Map | None = None
    texts: int = TEXTS
    patterns: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class View:
    """What there is to see of one model.

    Args:
        title: First line of the page.
        about: What importance was estimated on.
        shape: (layers, heads) of the model.
        tasks: Its tasks; lists by task are in this order.
        wholes: Scores of the model with all heads in %, for each choice of examples.
        sets: The sets of heads that have been scored.
    """

    title: str
    about: str
    shape: tuple[int, int]
    tasks: list[TaskView]
    wholes: list[list[Estimate]]
    sets: list[HeadSet]


def task_views(tasks: Mapping[str, Task], maps: Mapping[str, Map]) -> list[TaskView]:
    """Return tasks with their maps of importance, in the order of the maps."""
    found = looks(list(maps)).items()
    return [TaskView(t, tasks[t].description, tasks[t].metric, maps[t], **how) for t, how in found]


def as_json(item: Any) -> Any:
    """Return data as JSON: flat lists for arrays, six digits of a number, None for NaN.

    Bytes (arrays of uint8) are in base64.
    """
    if is_dataclass(item):
        return as_json(vars(item))
    if isinstance(item, dict):
        return {key: as_json(value) for key, value in item.items()}
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8:
            return base64.b64encode(item.tobytes()).decode()
        return as_json(item.ravel().tolist())
    if isinstance(item, list | tuple):
        return [as_json(value) for value in item]
    if isinstance(item, float):
        return float(f"{item:.6g}") if np.isfinite(item) else None
    return item


def as_text(pattern: Pattern) -> dict[str, Any]:
    """Return what a model makes of a text, as the page takes it: weights are bytes."""
    return pattern._asdict() | {"weights": np.round(255 * pattern.weights).astype(np.uint8)}


def compare(sets: Iterable[NamedScores], number: int = 0) -> tuple[list[Estimate], list[HeadSet]]:
    """Return the scores of the whole model, and the effects of the other sets.

    Args:
        sets: No head first, then those that are compared with it on the same examples.
        number: Of this whole model among `View.wholes`.
    """
    (_, _, scores), *others = sets
    whole, found = [_measure(*item) for item in scores.items()], []
    for name, heads, scores in others:
        without = [_measure(*item) for item in scores.items()]
        lost = [_estimate(b - a) for b, a in zip(whole, without, strict=True)]
        found.append(HeadSet(name, heads, number, list(map(_estimate, without)), lost))
    return list(map(_estimate, whole)), found


def _measure(task: str, score: Score) -> Measure:
    return score_measure(task, score.metric, score.predictions[None], score.labels).scaled(100.0)


def _estimate(measure: Measure) -> Estimate:
    interval, (influence,) = measure.interval(), measure.influence.values()
    return Estimate(interval.value, interval.low, interval.high, influence.shape[1])


def pruned_sets(iap: IAP) -> Iterator[NamedScores]:
    """Return no head, then every task's top set at every fraction and its random controls."""
    yield "all heads", [], _scores(iap, {u: rows[0] for u, rows in iap.unpruned.items()})
    for f, t, c in np.ndindex(iap.heads.shape[1:4]):
        top = f"top {100 * iap.fractions[f]:g} % of {iap.tasks[t]}"
        name = f"random {c}, as many per layer as the {top}" if c else top
        heads = np.flatnonzero(iap.heads[0, f, t, c]).tolist()
        yield name, heads, _scores(iap, {u: rows[0, f, t, c] for u, rows in iap.lesioned.items()})


def lone_heads(lesions: HeadLesions) -> Iterator[NamedScores]:
    """Return no head, then every head alone."""
    names = [f"layer {layer + 1}, head {h + 1} alone" for layer, h in np.ndindex(*lesions.shape)]
    for number, name in enumerate(["all heads", *names]):
        heads = [number - 1] if number else []
        predictions = {u: rows[number] for u, rows in lesions.predictions.items()}
        yield name, heads, _scores(lesions, predictions)


def _scores(record: IAP | HeadLesions, predictions: Mapping[str, np.ndarray]) -> dict[str, Score]:
    """Return recorded predictions as `evaluate` returns them."""
    metrics = zip(record.tasks, record.metrics, strict=True)
    return {task: Score(metric, predictions[task], record.labels[task]) for task, metric in metrics}
