"""What the head explorer shows of one model, as JSON: importance, scores with and without heads, what heads attend to.

All of it is measured: importance by the gradient estimator, a score by switching the heads off. Nothing is
interpolated, and a set of heads that was not tried has no score here.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from fslib.iap import IAP
from fslib.intervals import Interval, Measure, score_measure
from fslib.lesions import HeadLesions
from fslib.plot import looks
from fslib.study.units import Pattern


class Effect(NamedTuple):
    """A task's score without some heads, in %, and what is lost of the whole model's, in points; over examples."""

    score: Interval
    lost: Interval


@dataclass(frozen=True, eq=False)
class Whole:
    """The model with all heads, on the examples that it is compared on: what lesions are lesions of.

    metrics: {task: name}. labels, predictions: {task: (n,)}.
    """

    metrics: Mapping[str, str]
    labels: Mapping[str, Num[np.ndarray, " n"]]
    predictions: Mapping[str, Num[np.ndarray, " n"]]

    @cached_property
    def _scored(self) -> dict[str, Measure]:
        return {u: self._measure(u, self.predictions[u]) for u in self.metrics}

    def _measure(self, task: str, predictions: Num[np.ndarray, " n"]) -> Measure:
        return score_measure(task, self.metrics[task], predictions[None], self.labels[task]).scaled(
            100.0
        )

    def effects(self, without: Mapping[str, Num[np.ndarray, " n"]]) -> tuple[Effect, ...]:
        """Return, per task, what predictions `without` some heads are worth beside these, paired by example."""
        after = [self._measure(u, without[u]) for u in self.metrics]
        before = self._scored.values()
        return tuple(
            Effect(a.interval(), (b - a).interval()) for b, a in zip(before, after, strict=True)
        )

    def json(self) -> list[dict[str, float | None]]:
        """Return, per task, the score in % with its interval, and over how many examples it is."""
        return [
            interval_json(m.interval()) | {"examples": len(self.labels[u])}
            for u, m in self._scored.items()
        ]


@dataclass(frozen=True, eq=False)
class HeadSet:
    """Heads that were switched off together (flat positions) beside the whole model, and the effect on every task."""

    name: str
    heads: tuple[int, ...]
    whole: Whole
    effects: tuple[Effect, ...]


@dataclass(frozen=True, eq=False)
class View:
    """What there is to see of one model.

    importance: {task: (layers, heads)}. metrics, descriptions: {task: text}. sets: those that have been scored, each
    beside the whole model on the same examples. rise: {task: (layers, heads)}, by how much the loss rises without a
    head alone. texts: how many texts of each task can be looked at. patterns: {task: those that are there already}.
    """

    title: str
    about: str
    importance: Mapping[str, Float[np.ndarray, "layers heads"]]
    metrics: Mapping[str, str]
    descriptions: Mapping[str, str]
    sets: Sequence[HeadSet]
    rise: Mapping[str, Float[np.ndarray, "layers heads"]]
    texts: Mapping[str, int]
    patterns: Mapping[str, Sequence[Pattern]]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        layers, heads = next(iter(self.importance.values())).shape
        return layers, heads

    def json(self) -> dict[str, Any]:
        """Return the same in what JSON can say; six digits of a number."""
        style = looks(list(self.importance))
        tasks = [
            {
                "name": name,
                "description": self.descriptions[name],
                "metric": self.metrics[name],
                "importance": rounded(values),
                "rise": rounded(self.rise[name]) if name in self.rise else None,
                **style[name],
            }
            for name, values in self.importance.items()
        ]
        wholes = list(dict.fromkeys(s.whole for s in self.sets))
        sets = [
            {
                "name": s.name,
                "heads": list(s.heads),
                "whole": wholes.index(s.whole),
                "scores": [effect_json(e) for e in s.effects],
            }
            for s in self.sets
        ]
        patterns = {
            f"{t}/{i}": pattern_json(pattern)
            for t, name in enumerate(self.importance)
            for i, pattern in enumerate(self.patterns.get(name, ()))
        }
        layers, heads = self.shape
        return {
            "title": self.title,
            "about": self.about,
            "layers": layers,
            "heads": heads,
            "tasks": tasks,
            "wholes": [whole.json() for whole in wholes],
            "sets": sets,
            "texts": [self.texts.get(name, 0) for name in self.importance],
            "patterns": patterns,
        }


def rounded(values: np.ndarray) -> list[float | None]:
    """Return all values in one list, with six digits each; None for what is not defined (NaN)."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in np.ravel(values)]


def interval_json(interval: Interval) -> dict[str, float | None]:
    """Return value, low and high, with six digits."""
    ends = rounded(np.array([interval.value, interval.low, interval.high]))
    return dict(zip(("value", "low", "high"), ends, strict=True))


def effect_json(effect: Effect) -> dict[str, float | None]:
    """Return a score and what is lost, each with its interval."""
    lost = interval_json(effect.lost)
    return interval_json(effect.score) | {
        "lost": lost["value"],
        "lostLow": lost["low"],
        "lostHigh": lost["high"],
    }


def pattern_json(pattern: Pattern) -> dict[str, Any]:
    """Return tokens, answers, weights (one byte each, in base64) and every token's part in every head's importance."""
    weights = np.round(255 * pattern.weights).astype(np.uint8)
    return {
        "tokens": list(pattern.tokens),
        "label": pattern.label,
        "predicted": pattern.predicted,
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "importance": [
            rounded(head) for head in pattern.importance.reshape(-1, len(pattern.tokens))
        ],
    }


def pruned_sets(iap: IAP) -> list[HeadSet]:
    """Return the top sets of every task and fraction, and their random controls, of a pruning of one model."""
    metrics = dict(zip(iap.tasks, iap.metrics, strict=True))
    whole = Whole(metrics, iap.labels, {u: rows[0] for u, rows in iap.unpruned.items()})
    found = []
    for f, t, c in np.ndindex(len(iap.fractions), len(iap.tasks), 1 + iap.controls):
        top = f"top {100 * iap.fractions[f]:g} % of {iap.tasks[t]}"
        heads = tuple(np.flatnonzero(iap.heads[0, f, t, c]).tolist())
        effects = whole.effects({u: rows[0, f, t, c] for u, rows in iap.lesioned.items()})
        found.append(
            HeadSet(
                f"random {c}, as many per layer as the {top}" if c else top, heads, whole, effects
            )
        )
    return found


def single_heads(lesions: HeadLesions) -> list[HeadSet]:
    """Return every head alone as a set."""
    metrics = dict(zip(lesions.tasks, lesions.metrics, strict=True))
    whole = Whole(metrics, lesions.labels, {u: rows[0] for u, rows in lesions.predictions.items()})
    found = []
    for at, (layer, head) in enumerate(np.ndindex(*lesions.shape)):
        effects = whole.effects({u: rows[1 + at] for u, rows in lesions.predictions.items()})
        found.append(HeadSet(f"layer {layer + 1}, head {head + 1} alone", (at,), whole, effects))
    return found
