"""What the head explorer shows of one model, as JSON: importance, scores with and without heads, what heads attend to.

All of it is measured: importance by the gradient estimator, a score by switching the heads off. Nothing is
interpolated, and a set of heads that was not tried has no score here.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from fslib.dissociation import IAP
from fslib.intervals import Interval, score_measure
from fslib.lesions import HeadLesions
from fslib.study.headwise import Pattern
from fslib.study.plots import looks


class Effect(NamedTuple):
    """A task's score without some heads, in %, and what is lost of the whole model's, in points; over examples."""

    score: Interval
    lost: Interval


def effect(
    task: str, metric: str, labels: Num[np.ndarray, " n"], whole: Num[np.ndarray, " n"], without: Num[np.ndarray, " n"]
) -> Effect:
    """Return what predictions `without` some heads are worth beside those of the `whole` model, paired by example."""
    before, after = (score_measure(task, metric, rows[None], labels) for rows in (whole, without))
    return Effect(after.interval().scaled(100.0), (before - after).interval().scaled(100.0))


@dataclass(frozen=True, eq=False)
class HeadSet:
    """Heads that were switched off together: what the set is, its heads (flat positions), and every task's effect."""

    name: str
    heads: tuple[int, ...]
    effects: tuple[Effect, ...]


@dataclass(frozen=True, eq=False)
class View:
    """What there is to see of one model.

    importance: {task: (layers, heads)}. metrics, descriptions: {task: text}. whole: {task: score in %}, of those that
    have been scored. rise: {task: (layers, heads)}, by how much the loss rises without a head alone. texts: how many
    texts of each task can be looked at. patterns: {task: those that are there already}.
    """

    title: str
    about: str
    importance: Mapping[str, Float[np.ndarray, "layers heads"]]
    metrics: Mapping[str, str]
    descriptions: Mapping[str, str]
    whole: Mapping[str, Interval]
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
                "whole": interval_json(self.whole[name]) if name in self.whole else None,
                "rise": rounded(self.rise[name]) if name in self.rise else None,
                **style[name],
            }
            for name, values in self.importance.items()
        ]
        sets = [
            {"name": s.name, "heads": list(s.heads), "scores": [effect_json(e) for e in s.effects]} for s in self.sets
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
            "sets": sets,
            "texts": [self.texts.get(name, 0) for name in self.importance],
            "patterns": patterns,
        }


def rounded(values: np.ndarray) -> list[float]:
    """Return all values in one list, with six digits each."""
    return [float(f"{value:.6g}") for value in np.ravel(values)]


def interval_json(interval: Interval) -> dict[str, float]:
    """Return value, low and high, with six digits."""
    return dict(
        zip(("value", "low", "high"), rounded(np.array([interval.value, interval.low, interval.high])), strict=True)
    )


def effect_json(effect: Effect) -> dict[str, float]:
    """Return a score and what is lost, each with its interval."""
    lost = interval_json(effect.lost)
    return interval_json(effect.score) | {"lost": lost["value"], "lostLow": lost["low"], "lostHigh": lost["high"]}


def pattern_json(pattern: Pattern) -> dict[str, Any]:
    """Return tokens, answers, weights (one byte each, in base64) and every token's part in every head's importance."""
    weights = np.round(255 * pattern.weights).astype(np.uint8)
    return {
        "tokens": list(pattern.tokens),
        "label": pattern.label,
        "predicted": pattern.predicted,
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "importance": [rounded(head) for head in pattern.importance.reshape(-1, len(pattern.tokens))],
    }


def pruned_sets(iap: IAP) -> list[HeadSet]:
    """Return the top sets of every task and fraction, and their random controls, of a pruning of one model."""
    found = []
    for f, t, c in np.ndindex(len(iap.fractions), len(iap.tasks), 1 + iap.controls):
        top = f"top {100 * iap.fractions[f]:g} % of {iap.tasks[t]}"
        effects = [
            effect(u, m, iap.labels[u], iap.unpruned[u][0], iap.lesioned[u][0, f, t, c])
            for u, m in zip(iap.tasks, iap.metrics, strict=True)
        ]
        heads = tuple(np.flatnonzero(iap.heads[0, f, t, c]).tolist())
        found.append(HeadSet(f"random {c}, as many per layer as the {top}" if c else top, heads, tuple(effects)))
    return found


def single_heads(lesions: HeadLesions) -> list[HeadSet]:
    """Return every head alone as a set."""
    found = []
    for layer, head in np.ndindex(*lesions.shape):
        at = layer * lesions.shape[1] + head
        effects = [
            effect(u, m, lesions.labels[u], lesions.predictions[u][0], lesions.predictions[u][1 + at])
            for u, m in zip(lesions.tasks, lesions.metrics, strict=True)
        ]
        found.append(HeadSet(f"layer {layer + 1}, head {head + 1} alone", (at,), tuple(effects)))
    return found


def whole_scores(iap: IAP) -> dict[str, Interval]:
    """Return every task's score with all heads, in %, of a pruning of one model."""
    return {
        u: score_measure(u, m, iap.unpruned[u][:1], iap.labels[u]).interval().scaled(100.0)
        for u, m in zip(iap.tasks, iap.metrics, strict=True)
    }
