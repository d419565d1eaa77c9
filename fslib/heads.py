"""Which heads: the most important, random ones like them, how far sets overlap.

Plain numpy. A *head set* is a bool array (layers, heads), True = the head is in the set. What being
in the set means is said where the set is used: in `fslib.pruned` it means switched off, in IAT
trained.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from fslib.errors import FslibError, check_count, check_number, finite_array

HeadMap = Float[np.ndarray, "layers heads"]  # a number for every head
HeadSet = Bool[np.ndarray, "layers heads"]
Nested = Bool[np.ndarray, "*nested layers heads"]  # a head set, or sets that grow


def head_count(fraction: float, total: int) -> int:
    """Return k = floor(fraction * total). Raises FslibError outside (0, 1]."""
    check_number("fraction", fraction, "(0, 1]", "0.3 means the top 30 % of all heads")
    return math.floor(fraction * total + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point


def checked_fractions(
    fractions: Sequence[float], shape: tuple[int, int], controls: int = 0, what: str = "fraction"
) -> tuple[float, ...]:
    """Return fractions in rising order, each of some heads and of another number.

    Args:
        fractions: Shares of all heads, each in (0, 1].
        shape: (layers, heads per layer).
        controls: How many random sets are to be drawn like each fraction's top heads. Whether there
            are so many depends on how the top heads, not known yet, spread over the layers: evenly
            spread, they leave most choice.
        what: The word for a fraction in a message.

    Raises:
        FslibError: For no fraction, one of no head, two of one number of heads, and more controls
            than there are.
    """
    listed = isinstance(fractions, Sequence | np.ndarray) and not isinstance(fractions, str)
    if not listed or not len(fractions):
        raise FslibError(f"{what}s {fractions!r}: give a list of at least one, such as [0.1]")
    layers, heads = shape
    counts: dict[int, float] = {}
    for fraction in fractions:
        k = head_count(fraction, layers * heads)
        asked = f"{what} {fraction:g} of {layers} x {heads} heads"
        if k == 0:
            raise FslibError(f"{asked} is no head: give at least {1 / (layers * heads):.3f}")
        if k in counts:
            raise FslibError(f"{what}s {counts[k]:g} and {fraction:g} are {k} heads each: drop one")
        counts[k] = float(fraction)
        each, rest = divmod(k, layers)
        # minus one: a set of its own is no control of itself
        most = math.comb(heads, each) ** (layers - rest) * math.comb(heads, each + 1) ** rest - 1
        if controls > most:
            there_are = f"there are at most {most} other sets of {k} heads"
            raise FslibError(f"controls={controls} for {asked}: {there_are}; ask for fewer")
    return tuple(counts[k] for k in sorted(counts))


def head_name(layer: int, head: int) -> str:
    """Return a head's name in tables, L4H5: both count from 1, where arrays have 0."""
    return f"L{layer + 1}H{head + 1}"


def top_heads(importance: HeadMap, fraction: float, *, min_per_layer: int = 0) -> HeadSet:
    """Return the k = floor(fraction * layers * heads) most important heads.

    Source: Li et al. (2023). Ties go to the lower (layer, head).

    Args:
        importance: (layers, heads), finite, higher = more important.
        fraction: Share of all heads, in (0, 1].
        min_per_layer: Heads that every layer keeps *out of* the set, so that pruning the set leaves
            no layer without a head; the set is smaller than k if there is no room.

    Returns:
        Bool (layers, heads), True = chosen.
    """
    scores = finite_array("importance", importance)
    if scores.ndim != 2:
        raise FslibError(f"importance must be of shape (layers, heads); got shape {scores.shape}")
    layers, heads = scores.shape
    check_count("min_per_layer", min_per_layer, 0)
    if min_per_layer > heads:
        raise FslibError(f"min_per_layer {min_per_layer} is outside 0..{heads}, a layer's heads")
    # stable: ties in (layer, head) order
    order = np.argsort(-scores, axis=None, kind="stable")
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)  # in its layer
    free = order[ranks.flat[order] < heads - min_per_layer]
    chosen = np.zeros((layers, heads), dtype=bool)
    chosen.flat[free[: head_count(fraction, layers * heads)]] = True
    return chosen


def random_heads(
    like: Nested, n: int, rng: np.random.Generator, *, others: bool = False
) -> Bool[np.ndarray, "n *nested layers heads"]:
    """Draw random head sets with as many heads *in each layer*: matched controls.

    Matching by layer matters: early and late layers differ in what any head is worth, so an
    unmatched random set would answer which layers matter, not which heads. If `like` holds sets
    that grow, each inside the next (the top heads at rising fractions), a control grows in the same
    way, and controls differ at every step.

    Args:
        like: The head set, or sets that grow, to be matched.
        n: How many to draw.
        rng: The generator that draws.
        others: Leave out `like` itself, whose steps are no control of anything.

    Raises:
        FslibError: If fewer than n such sets exist.
    """
    check_count("controls", n, 0)
    if not isinstance(rng, np.random.Generator):
        raise FslibError(f"rng {rng!r:.80} is no generator: give numpy.random.default_rng(seed)")
    like = _head_sets(like)
    counts, heads = like.sum(-1), like.shape[-1]  # (*nested, layers)
    steps = counts.reshape(-1, counts.shape[-1])
    distinct = min(math.prod(math.comb(heads, int(c)) for c in step) for step in steps) - others
    asked = f"{n} controls asked, but"
    if n > distinct:
        kind = "other" if others else "distinct"
        raise FslibError(f"{asked} only {distinct} {kind} head set(s) have these heads per layer")
    drawn: list[np.ndarray] = []
    known = _steps(like) if others else set()
    seen = set(known)
    for attempt in range(1, 1000 * (n + 10)):
        if len(drawn) == n:
            break
        if attempt % (100 * (n + 10)) == 0:
            # sets that grow can leave no room for the last ones: begin again
            drawn.clear()
            seen = set(known)
        places = np.tile(np.arange(heads), (like.shape[-2], 1))
        order = rng.permuted(places, axis=1)  # each head's rank in its layer
        draw = order < counts[..., None]  # (*nested, layers, heads)
        taken = _steps(draw)
        if seen.isdisjoint(taken):
            seen |= taken
            drawn.append(draw)
    if len(drawn) < n:
        raise FslibError(f"{asked} no {n} that differ at every step were found: ask for fewer")
    return np.array(drawn, dtype=bool).reshape(n, *like.shape)


def _steps(nested: Nested) -> set[tuple[int, bytes]]:
    """Return each of nested sets, with its place, in a form that can be looked up."""
    return {(i, step.tobytes()) for i, step in enumerate(nested.reshape(-1, *nested.shape[-2:]))}


def overlap(a: HeadSet, b: HeadSet) -> float:
    """Return the Jaccard index of two head sets, |a and b| / |a or b|, in [0, 1].

    Two empty sets overlap fully (1).
    """
    a, b = _head_sets(a), _head_sets(b)
    if a.shape != b.shape:
        raise FslibError(f"head sets of different shapes cannot overlap: {a.shape} and {b.shape}")
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def _head_sets(given: object) -> Nested:
    """Return head sets as they are; refuse importance maps, as any score is true."""
    wanted = "a head set is a bool array (layers, heads)"
    try:
        sets = np.asarray(given)
    except ValueError:
        raise FslibError(f"{wanted}, but its rows differ in length") from None
    if sets.dtype != np.bool_ or sets.ndim < 2:
        found = f"not {sets.dtype} of shape {sets.shape}"
        raise FslibError(f"{wanted}, {found}: fslib.top_heads makes one of an importance map")
    return sets
