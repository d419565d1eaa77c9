"""Data whose truth is known, for the tests and `benchmarks/calibration.py`.

Made-up models, examples, lesions and tasks. Every simulator takes its own generator. A model is
right about an example if a latent number is above 0: the example's ease, what the model is like,
and noise of the two, minus the harm of the heads that were pruned.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fslib.claims import SUPPORTED, Claim, Part, decided, entering, mantel, score_half
from fslib.heads import random_heads, top_heads
from fslib.iap import IAP
from fslib.intervals import Interval, Measure
from fslib.questions import q03_pruning

# standard deviations of what a seed, an example and the two together add to a value
REGIMES = {"examples": (0.02, 1.0, 0.3), "seeds": (1.0, 1.0, 1.0), "interaction": (0.05, 0.2, 1.0)}
N = 50  # examples
SHAPE = (6, 12)  # layers, heads


def crossed(
    rng: np.random.Generator,
    seeds: int,
    spread: tuple[float, float, float],
    truth: float = 0.0,
    n: int = N,
) -> Measure:
    """A mean over examples of every seed's model, whose true value is `truth`."""
    by_seed, by_example, by_both = spread
    x = truth + rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_example, n)
    x = x + rng.normal(0, by_both, (seeds, n))
    values = x.mean(1)
    return Measure(values, {"examples": x - values[:, None]})


def covers(interval: tuple[float, float], truth: float = 0.0) -> bool:
    """Whether an interval holds the truth."""
    return interval[0] <= truth <= interval[1]


def share(found: list[bool]) -> tuple[float, float]:
    """The share of simulations in which something was found, and its standard error."""
    p = float(np.mean(found))
    return p, float(np.sqrt(p * (1 - p) / len(found)))


def within(p: float, n: int, errors: float = 3) -> float:
    """How high a share may come out in n simulations whose true share is p."""
    return p + errors * float(np.sqrt(p * (1 - p) / n))


class World(NamedTuple):
    """What is true of the models in which heads are pruned.

    Args:
        specific: How much more a head harms the task for which it ranks high.
        shared: Whether all tasks rank heads alike.
        at_chance: Whether the last task is not learned, so that its ranking and its answers mean
            nothing.
    """

    specific: float = 0.0
    shared: bool = False
    at_chance: bool = False


WORLDS = {
    "nothing special": World(),
    "a task at chance": World(at_chance=True),
    "one ranking shared by all": World(shared=True),
    "shared ranking, a task at chance": World(shared=True, at_chance=True),
}


def pruned_models(rng: np.random.Generator, world: World, *, n: int = 200) -> IAP:
    """What pruning 10 and 30 % of the heads does to three models of four tasks in such a world."""
    names, fractions, tasks, seeds, controls = tuple("abcd"), (0.1, 0.3), 4, 3, 2
    labels = np.arange(n) // 2 % 2  # both halves of the examples have as many of either class
    heads = np.zeros((seeds, 2, tasks, 1 + controls, *SHAPE), dtype=bool)
    right = np.empty((seeds, 2, tasks, 1 + controls, tasks, n), dtype=bool)
    unpruned = np.empty((seeds, tasks, n), dtype=bool)
    ease = rng.normal(1.5, 1, (tasks, n))
    for s in range(seeds):
        harm = rng.exponential(1, SHAPE)  # of a head, to every task
        own = rng.exponential(1, (tasks, *SHAPE))
        ranking = (harm if world.shared else 0) + (0.3 if world.shared else 1) * own
        if world.at_chance:
            ranking[-1] = rng.random(SHAPE)
        latent = ease + rng.normal(0, 0.3, (tasks, 1)) + rng.normal(0, 0.7, (tasks, n))
        guess, luck = rng.random(n) < 0.5, rng.normal(1, 1, n)
        for f, fraction in enumerate(fractions):
            for t in range(tasks):
                top = top_heads(ranking[t], fraction)
                heads[s, f, t] = np.concatenate([top[None], random_heads(top, controls, rng)])
        lost = 2 * heads[s].reshape(2, tasks, 1 + controls, -1) @ harm.ravel() / harm.sum()
        special = heads[s].reshape(2, tasks, 1 + controls, -1) @ own.reshape(tasks, -1).T
        lost = lost[..., None] + world.specific * special / own.sum((1, 2))
        noise = rng.normal(0, 0.4, (*lost.shape, n))
        right[s] = latent - lost[..., None] + noise > 0
        unpruned[s] = latent > 0
        if world.at_chance:  # a lesion turns some of the guesses, whatever heads it is of
            unpruned[s, -1] = guess
            right[s, ..., -1, :] = guess ^ (luck - lost[..., -1, None] + noise[..., -1, :] < 0)
    lesioned = {u: np.where(right[..., i, :], labels, 1 - labels) for i, u in enumerate(names)}
    plain = {u: np.where(unpruned[:, i], labels, 1 - labels) for i, u in enumerate(names)}
    metrics, known = ("accuracy",) * tasks, dict.fromkeys(names, labels)
    return IAP(names, metrics, fractions, heads, known, plain, lesioned)


class Decided(NamedTuple):
    """What was concluded: by the whole rule, and by the label permutation of all tasks alone."""

    supported: bool
    permutation_alone: bool


def decide_specialization(iap: IAP, draws: int = 999) -> Decided:
    """Decide C1 by itself, as notebook 03 does."""
    result = entering(iap).dissociation(draws=draws)
    found = q03_pruning.decide(result, "made-up models", q03_pruning.not_testable(iap))
    alone = iap.part(examples=score_half).dissociation(draws=draws)
    return Decided(found.verdict == SUPPORTED, bool(alone.mean.p < 0.05))


def matrix_of_tasks(rng: np.random.Generator, tasks: int) -> np.ndarray:
    """A symmetric matrix over pairs of tasks; some tasks have larger entries than others."""
    by_task = rng.normal(0, 1, tasks)
    noise = np.triu(rng.normal(0, 1, (tasks, tasks)), 1)
    return by_task[:, None] + by_task + noise + noise.T


def mantel_p(rng: np.random.Generator, tasks: int) -> float:
    """p of two matrices that have nothing to do with each other."""
    return mantel(matrix_of_tasks(rng, tasks), matrix_of_tasks(rng, tasks), rng).p


def asks_the_same(tasks: int) -> np.ndarray:
    """Which pairs of tasks ask the same question: 1, else 0; two or three tasks ask each."""
    question = np.arange(tasks) // 2 % (tasks // 2 - 1)
    return (question[:, None] == question).astype(float)


def mantel_given_p(
    rng: np.random.Generator, tasks: int, effect: float = 3.0
) -> tuple[float, float]:
    """p, of Mantel and of partial Mantel, where the question alone makes both matrices alike."""
    same = asks_the_same(tasks)
    similarity, d = (matrix_of_tasks(rng, tasks) + sign * effect * same for sign in (1, -1))
    return mantel(similarity, d, rng).p, mantel(similarity, d, rng, same).p


TREATED = (0.5, 1.0, 0.8)  # seeds, examples, both: of a difference of two scores, in points


def two_parts(rng: np.random.Generator, truths: tuple[float, float], name: str = "C4") -> Claim:
    """A claim that a treatment beats two controls; its own noise is in both differences."""
    spread = tuple(x / np.sqrt(2) for x in TREATED)
    treated = crossed(rng, 5, spread)
    controls = [crossed(rng, 5, spread, -truth) for truth in truths]
    parts = (Part("minus a control", (treated - control).interval()) for control in controls)
    return Claim(name, tuple(parts), "made-up models", 5)


Errors = dict[str, list[tuple[float, float]]]  # of each part of each claim: se, degrees of freedom


def profile_of_claims(
    rng: np.random.Generator, errors: Errors, truths: Callable[[str], list[float]]
) -> dict[str, Claim]:
    """Claims of one profile, decided together; half of a part's variance is its claim's.

    Args:
        rng: Draws the estimates and their standard errors.
        errors: What a profile measured them with.
        truths: The true value of each part of a claim.
    """
    claims = {}
    for name, parts in errors.items():
        common, found = rng.normal(), []
        for truth, (se, df) in zip(truths(name), parts, strict=True):
            value = truth + se * (common + rng.normal()) / np.sqrt(2)
            own = Interval(value, se * np.sqrt(rng.chisquare(df) / df), df)
            found.append(Part("a number", own))
        claims[name] = Claim(name, tuple(found), "made-up claims", 10)
    return decided(claims)


def many(simulate: Callable[[np.random.Generator], bool], n: int, seed: int) -> list[bool]:
    """Simulate n times, each with a generator of its own."""
    return [simulate(np.random.default_rng([seed, i])) for i in range(n)]
