"""From intervals to claims: the verdict, its gates and tests, by hand and on simulated data."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from refusal import refused
from scipy import stats
from simulations import (
    WORLDS,
    World,
    decide_specialization,
    mantel_given_p,
    many,
    matrix_of_tasks,
    profile_of_claims,
    pruned_models,
    within,
)

import fslib
from fslib import claims
from fslib.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_TESTABLE,
    SESOI,
    SUPPORTED,
    Claim,
    Part,
    above_constant,
    changed_share,
    correlation_over_pairs,
    decided,
    entering,
    gate_half,
    holm,
    interval_text,
    learned,
    mantel,
    p_text,
    score_half,
    scored,
)
from fslib.iap import IAP, Unlesioned
from fslib.intervals import Interval
from fslib.questions import q03_pruning
from fslib.scoring import rank_correlation
from fslib.study.units import prune_on

NONE = "no effect of 1 point or more"  # of C5, whose smallest effect of interest is 1 point

# --- the verdict

# With df infinite and standard error 1 a 95 % interval ends 1.96 away, a 90 % one 1.645.
DECISIONS = [
    # value, standard error, p of a permutation (None: there is none), verdict
    (1.97, 1.0, None, SUPPORTED),
    (1.95, 1.0, None, INCONCLUSIVE),
    (-1.95, 1.0, None, INCONCLUSIVE),
    (-1.97, 1.0, None, CONTRADICTED),
    (3.0, 1.0, np.nextafter(0.05, 0), SUPPORTED),
    (3.0, 1.0, 0.05, INCONCLUSIVE),  # the interval alone supports nothing
    (1.95, 1.0, 0.001, INCONCLUSIVE),  # nor does p
    (-3.0, 1.0, 0.2, INCONCLUSIVE),  # both are needed below 0, too
    # standard error 0.3: the 90 % interval ends 0.493 away, the 95 % one 0.588
    (0.5, 0.3, None, NONE),
    (0.51, 0.3, None, INCONCLUSIVE),
    (-0.5, 0.3, None, NONE),
    (-0.55, 0.3, None, INCONCLUSIVE),
    # order: a small effect that is there is supported or contradicted first
    (0.4, 0.1, None, SUPPORTED),
    (0.4, 0.1, 0.2, NONE),  # where its own test does not support it
    (-0.4, 0.1, None, CONTRADICTED),
    (0.0, 0.0, None, NONE),  # nothing varies
    (1.0, 0.0, 1.0, INCONCLUSIVE),  # the smallest effect of interest is one
    (np.nan, np.nan, None, NOT_TESTABLE),
    (1.0, np.nan, 0.001, NOT_TESTABLE),
    (3.0, 1.0, np.nan, INCONCLUSIVE),  # a test that says nothing supports nothing
]


def part(value: float, se: float, p: float | None = None) -> Part:
    return Part("it", Interval(value, se, np.inf), p)


def claim(name: str, *parts: Part, **options) -> Claim:
    return Claim(name, parts, "four models", **({"n": 4} | options))


@pytest.mark.parametrize(("value", "se", "p", "verdict"), DECISIONS)
def test_a_verdict_follows_from_its_one_part_unless_a_gate_failed(value, se, p, verdict):
    it = part(value, se, p)
    assert claim("C5", it).verdict == verdict
    found = claim("C5", it, failed="the gate")
    assert found.verdict == NOT_TESTABLE and np.isnan(found.p) and found.why == "the gate"
    few = claim("C5", it, n=2)
    assert few.verdict == (NOT_TESTABLE if verdict == NOT_TESTABLE else INCONCLUSIVE)
    assert few.why == "2 training(s), and 3 are needed"
    weak = claim("C5", it, weak="too weak")
    tiny = verdict if verdict in (NOT_TESTABLE, NONE) else INCONCLUSIVE
    assert weak.verdict == (NONE if abs(value) == 0.4 else tiny) and weak.why == "too weak"


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ((3.0, 1.0), (3.0, 1.0), SUPPORTED),
        ((3.0, 1.0), (1.9, 1.0), INCONCLUSIVE),  # both are needed
        ((3.0, 1.0), (-3.0, 1.0), CONTRADICTED),  # one is enough
        ((3.0, 1.0), (-2.2, 1.0), INCONCLUSIVE),  # p .028, twice: there were two to choose from
        ((3.0, 1.0), (0.0, 0.3), INCONCLUSIVE),  # no effect needs both
        ((0.0, 0.3), (0.5, 0.3), NONE),
        ((0.0, 0.3), (-3.0, 1.0), CONTRADICTED),
        ((3.0, 1.0), (np.nan, np.nan), NOT_TESTABLE),
        ((3.0, 1.0, 0.01), (3.0, 1.0, 0.04), SUPPORTED),
        ((3.0, 1.0, 0.01), (3.0, 1.0, np.nan), INCONCLUSIVE),
    ],
)
def test_a_claim_of_two_parts_needs_both_and_is_contradicted_by_one(one, other, verdict):
    for parts in ((part(*one), part(*other)), (part(*other), part(*one))):
        assert claim("C5", *parts).verdict == verdict


def test_the_p_of_what_is_said_by_hand():
    # 1.96 and 2.5758 standard errors: p .05 and .01, two-sided
    both = claim("C4", part(1.96, 1.0), part(2.5758, 1.0))
    assert both.tests == pytest.approx((0.05, 1.0, stats.norm.sf(0.5 - 2.5758)), abs=1e-5)
    below = claim("C4", part(-1.96, 1.0), part(2.5758, 1.0))
    assert below.tests[:2] == pytest.approx((1.0, 2 * 0.05), abs=1e-5)
    assert below.p == pytest.approx(0.1, abs=1e-4) and both.p == pytest.approx(0.05, abs=1e-4)
    none = claim("C5")
    assert none.verdict == NOT_TESTABLE and np.isnan(none.p)


@pytest.mark.parametrize(
    ("name", "size"),
    [("C1", "2 points of D"), ("C2", "0.5"), ("C3", "1 point of D"), ("C4", "0.5 points")],
)
def test_no_effect_says_of_what_size(name, size):
    largest = float(size.split()[0])
    assert claim(name, part(0.0, largest / 1.644)).verdict == INCONCLUSIVE
    found = claim(name, part(0.0, largest / 1.646))
    assert found.verdict == f"no effect of {size} or more"


def test_it_says_its_verdict_with_its_scope_and_every_number():
    this, that = Part("this", Interval(3.0, 1.0, np.inf), 0.012), part(-1.0, 1.0)
    numbers = "this +3.00 [+1.04, +4.96], p = 0.012, MDE 2.8; it -1.00 [-2.96, +0.96], p = 0.317"
    assert str(claim("C4", this, that)) == f"inconclusive (four models): {numbers}, MDE 2.8"
    weak = str(claim("C4", this, that, weak="a whiff"))
    assert weak.startswith("inconclusive (four models): a whiff; this")
    assert interval_text(this.interval, 1) == "+3.0 [+1.0, +5.0]"
    texts = [p_text(p) for p in (0.0, 0.0004, 0.001, 0.022, 1.0)]
    assert texts == ["p < 0.001", "p < 0.001", "p = 0.001", "p = 0.022", "p = 1.000"]


# --- several claims


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # sorted: 0.01 to 0.04 of four: 4 x 0.01, 3 x 0.02, 2 x 0.03, 1 x 0.04, never falling
        ([0.03, 0.01, 0.04, 0.02], [0.06, 0.04, 0.06, 0.06]),
        ([0.6, 0.7], [1, 1]),
        ([np.nan, 0.01, 0.2], [np.nan, 0.03, 0.4]),  # 0.01 is the first of three
        ([], []),
    ],
)
def test_holm_by_hand(p, expected):
    np.testing.assert_allclose(holm(p), expected)


def test_claims_are_corrected_together_in_each_direction():
    found = {
        "C1": claim("C1", part(3.0, 1.0, 0.02)),
        "C2": claim("C2", part(-4.0, 1.0)),
        "C3": claim("C3", part(5.0, 1.0, 0.001), part(9.0, 1.0, 0.03)),
        "C4": claim("C4", part(0.0, 0.2)),
        "C5": claim("C5", part(3.0, 1.0, 0.001), failed="the gate"),
    }
    after = decided(found)
    above, below, within = zip(*(c.corrected for c in after.values()), strict=True)
    # above: .02 and .03 of five: 5 x .02, then 4 x .03; below: 5 x p; the gate's counts as 1
    assert above == pytest.approx((0.1, 1, 0.12, 1, np.nan), nan_ok=True)
    assert below[1] == pytest.approx(5 * 2 * stats.norm.sf(4.0)) and below[0] == 1
    assert within[3] == pytest.approx(5 * stats.norm.sf(0.5 / 0.2))
    verdicts = [c.verdict for c in after.values()]
    none = "no effect of 0.5 points or more"
    assert verdicts == [INCONCLUSIVE, CONTRADICTED, INCONCLUSIVE, none, NOT_TESTABLE]
    assert found["C1"].verdict == SUPPORTED, "by itself"


# --- gates


def made(right: dict[str, int], n: int = 40, seeds: int = 2) -> IAP:
    """Models right about the first so many examples of either half; pruned, about none."""
    place = np.empty(n, dtype=int)  # of an example within its half
    place[gate_half(n)], place[score_half(n)] = np.arange(n // 2), np.arange(n // 2)
    labels = place % 2

    def answers(count: int, shape: tuple[int, ...]) -> np.ndarray:
        answered = np.where(place < count, labels, 1 - labels)
        return np.broadcast_to(answered, (*shape, n)).copy()

    sets = (seeds, 1, len(right), 2)
    return IAP(
        tuple(right),
        ("accuracy",) * len(right),
        (0.1,),
        np.zeros((*sets, 1, 4), dtype=bool),
        dict.fromkeys(right, labels),
        {u: answers(k, (seeds,)) for u, k in right.items()},
        {u: answers(0, sets) for u in right},
    )


def test_a_task_is_learned_if_it_is_above_the_best_constant_answer_beyond_its_interval():
    # of 20 examples 20, 16, 14 and 10 are right, of the constant answer 10. A seed's standard error
    # is sqrt(0.8 x 0.2 / 19) = 0.092 and sqrt(0.7 x 0.3 / 19) = 0.105; t with df 19 is 2.093
    found = above_constant(made({"all": 20, "most": 16, "some": 14, "half": 10}))
    assert [i.value for i in found.values()] == pytest.approx([0.5, 0.3, 0.2, 0])
    lows = [found[u].low for u in ("all", "most", "some")]
    assert lows == pytest.approx([0.5, 0.3 - 0.192, 0.2 - 0.220], abs=1e-3)
    assert learned(found) == ["all", "most"]


def test_the_gate_sees_one_half_of_the_examples_and_the_score_the_other():
    iap, other = (made({"a": 20, "b": 16, "c": 4}) for _ in range(2))
    half, gate, score = score_half(40), above_constant(iap), entering(iap)
    for u in iap.tasks:
        for answers in (other.unpruned[u], other.lesioned[u]):
            answers[..., half] = 1 - answers[..., half]
    assert above_constant(other) == gate, "scores on the other half changed"
    np.testing.assert_allclose(entering(other).baseline(), 1 - score.baseline())
    for u in iap.tasks:
        other.unpruned[u][:] = 1 - other.unpruned[u]
    assert learned(above_constant(other)) == ["c"]
    kept = other.part(["a", "b"], score_half)
    assert np.array_equal(kept.baseline(), score.baseline()) and score.tasks == ("a", "b")


def test_c1_needs_two_learned_tasks_and_random_heads():
    for iap, said in (
        (made({"a": 20, "b": 16, "c": 4}), ""),
        (made({"a": 20, "b": 10, "c": 4}), "1 of 3 tasks are learned"),
    ):
        assert q03_pruning.not_testable(iap).startswith(said)
        assert bool(q03_pruning.not_testable(iap)) == bool(said)
    assert entering(made({"a": 20, "b": 10})).tasks == ("a", "b"), "shown all the same"
    iap = made({"a": 20, "b": 20})
    tops = {u: x[:, :, :, :1] for u, x in iap.lesioned.items()}
    alone = replace(iap, heads=iap.heads[:, :, :, :1], lesioned=tops)
    assert q03_pruning.not_testable(alone) == "there are no random heads to compare with"
    assert len(q03_pruning.decide(alone.dissociation(), "some models", "").parts) == 1


def test_a_part_of_a_pruning_needs_its_tasks_and_examples():
    iap = made({"a": 20, "b": 16, "c": 4})
    assert all(np.array_equal(x, iap.part().arrays()[k]) for k, x in iap.arrays().items())
    iap.heads[:] = np.arange(iap.heads.size).reshape(iap.heads.shape) % 5 == 0
    assert np.array_equal(iap.part(["c", "a"]).heads, iap.heads[:, :, [2, 0]])
    for tasks, examples, said in (
        (["a", "d"], np.arange, "'d'"),
        (["a", "c"], lambda n: np.arange(39, n), "fewer than two examples of task"),
    ):
        with refused(said):
            iap.part(tasks, examples)


def test_lesions_of_the_scored_half_alone_say_the_same_as_those_of_all_examples(small_tasks):
    """Gate and D of `prune_on(..., "scored")`, also when read from a record."""
    tasks = fslib.load_tasks(["left", "right"])
    model = fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=16)
    options = {"fractions": (0.25,), "controls": 1, "examples": 8}
    whole, half = (prune_on(model, tasks, on, **options) for on in ("all", "scored"))
    assert {u: x.shape[-1] for u, x in half.lesioned.items()} == {"left": 5, "right": 5}
    kept = IAP.from_arrays(whole.tasks, whole.metrics, whole.fractions, half.arrays())
    for found in (half, kept):
        assert above_constant(found) == above_constant(whole)
        for one, other in ((scored(found), scored(whole)), (entering(found), entering(whole))):
            arrays = one.arrays()
            assert all(np.array_equal(arrays[k], v) for k, v in other.arrays().items())
    two = IAP.over_seeds([half, kept])
    assert two.apart["left"].predictions.shape == (2, 5) and two.apart["left"].labels.shape == (5,)
    turned = {u: Unlesioned(1 - x.labels, x.predictions) for u, x in kept.apart.items()}
    for other in (replace(kept, apart=turned), scored(whole)):
        with refused("runs differ"):
            IAP.over_seeds([half, other])


@pytest.mark.parametrize("n", [2, 3, 40, 597])
def test_the_two_halves_share_no_example_and_are_random(n):
    gate, scored = gate_half(n), score_half(n)
    assert sorted([*gate, *scored]) == list(range(n)) and len(gate) - len(scored) in (0, 1)
    assert np.array_equal(gate, gate_half(n)), "the same for every model"
    if n > 10:  # labels may stand by turns, or one class before the other
        assert 0.3 < np.mean(gate % 2) < 0.7 and 0.3 < np.mean(gate < n / 2) < 0.7
        assert 0.3 < np.mean(scored % 2) < 0.7 and 0.3 < np.mean(scored < n / 2) < 0.7


def test_the_share_of_changed_predictions_by_hand():
    a = {"x": np.array([[0, 1, 1, 0], [0, 0, 0, 0]]), "y": np.array([[1, 1], [1, 1]])}
    b = {"x": np.array([[0, 1, 1, 1], [0, 0, 0, 0]]), "y": np.array([[1, 0], [0, 1]])}
    assert changed_share(a, b) == pytest.approx((1 / 8 + 2 / 4) / 2)
    assert changed_share(a, a) == 0
    numbers = {"number": np.array([[0.0, 2.0, 0.0, 2.0]])}  # their standard deviation is 1
    moved = {"number": numbers["number"] + np.array([[1e-7, 0.09, -0.11, 0.5]])}
    assert changed_share(moved, numbers) == 0.5, "from a tenth of the spread on"


# --- Mantel's test


class TestMantel:
    A = np.array([[0, 6, 5, 4], [6, 0, 3, 2], [5, 3, 0, 1], [4, 2, 1, 0]], dtype=float)
    B = np.array([[0, 1, 2, 3], [1, 0, 5, 4], [2, 5, 0, 6], [3, 4, 6, 0]], dtype=float)

    @staticmethod
    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        pairs = np.triu_indices(len(a), 1)
        return rank_correlation(a[pairs], b[pairs])

    def test_four_tasks_by_hand(self):
        # pairs 01 02 03 12 13 23: A has 6 5 4 3 2 1, B 1 2 3 5 4 6: d = 5 3 1 -2 -2 -5, squares 68
        found = mantel(self.A, self.B, np.random.default_rng(0))
        assert found.interval.value == pytest.approx(1 - 6 * 68 / (6 * 35))
        assert found.interval.df == 3
        orders = [np.ix_(order, order) for order in itertools.permutations(range(4))]
        null = [self.correlation(self.A[order], self.B) for order in orders]
        assert len(null) == 24 and found.p == np.mean(np.array(null) <= found.interval.value + 1e-9)

    def test_ranks_decide_and_the_order_of_tasks_does_not(self):
        rng = np.random.default_rng(2)
        a, b = matrix_of_tasks(rng, 5), matrix_of_tasks(rng, 5)
        order, found = np.ix_(*[rng.permutation(5)] * 2), mantel(a, b, rng)
        for other in (mantel(np.exp(a), b**3, rng), mantel(a[order], b[order], rng)):
            assert (*other.interval, other.p) == pytest.approx((*found.interval, found.p))

    def test_fewer_than_four_tasks_and_undefined_entries_say_nothing(self):
        broken = self.B.copy()
        broken[1, 3] = broken[3, 1] = np.nan
        for a, b in ((self.A[:3, :3], self.B[:3, :3]), (self.A, broken), (broken, self.A)):
            found = mantel(a, b, np.random.default_rng(0))
            assert np.isnan([*found.interval, found.p]).all()
        diagonal = self.B + np.diag([np.nan] * 4)  # of a task and itself nothing is read
        one, other = (mantel(self.A, b, np.random.default_rng(0)).p for b in (self.B, diagonal))
        assert one == other

    def test_unknown_pairs_and_tasks_without_a_pair_are_left_out(self):
        rng = np.random.default_rng(4)
        a, b = matrix_of_tasks(rng, 6), matrix_of_tasks(rng, 6)
        full = correlation_over_pairs(a, b)
        assert full == mantel(a, b, rng).interval
        wide = np.full((8, 8), np.nan)  # of two tasks nothing is known
        wide[:6, :6] = a
        assert correlation_over_pairs(wide, np.pad(b, (0, 2))) == full
        three = correlation_over_pairs(a[:3, :3], b[:3, :3])  # one pair is left without a task
        assert np.isfinite(three.value) and np.isnan(three.se)
        pairs = np.triu_indices(6, 1)
        expected = rank_correlation(a[pairs][1:], b[pairs][1:])
        a[0, 1] = a[1, 0] = np.nan
        assert correlation_over_pairs(a, b).value == pytest.approx(expected)
        assert np.isnan(correlation_over_pairs(a * np.nan, b).value), "nothing is known at all"

    def test_more_than_seven_tasks_are_exchanged_at_random_and_repeat(self, monkeypatch):
        monkeypatch.setattr(claims, "EXCHANGES", 199)
        rng = np.random.default_rng(3)
        a, b = matrix_of_tasks(rng, 8), matrix_of_tasks(rng, 8)
        p = [mantel(a, b, np.random.default_rng(seed)).p for seed in (0, 0, 1, 2, 3)]
        assert p[0] == p[1] and len(set(p)) > 1
        assert mantel(a, -a, rng).p == pytest.approx(1 / 199), "the observed order counts"


# --- data whose truth is known


@pytest.mark.parametrize("world", list(WORLDS)[2:])
def test_traps_are_not_called_specialization(world):
    """They look like specialization to the relabelling alone."""
    rngs = (np.random.default_rng([3, i]) for i in range(30))
    found = [decide_specialization(pruned_models(r, WORLDS[world], n=80), 199) for r in rngs]
    assert np.mean([x.supported for x in found]) <= within(0.05, 30)
    if world == "shared ranking, a task at chance":
        assert np.mean([x.permutation_alone for x in found]) > 0.3, "it is a trap"


def test_specialization_that_is_there_is_found():
    rngs = (np.random.default_rng([4, i]) for i in range(8))
    found = [decide_specialization(pruned_models(r, World(specific=3.0)), 199) for r in rngs]
    assert np.mean([x.supported for x in found]) > 0.8


@pytest.mark.parametrize(
    ("word", "truths"),
    [
        (SUPPORTED, (0.0, 0.0)),
        (SUPPORTED, (0.0, 9.0)),
        (CONTRADICTED, (0.0, 0.0)),
        ("no effect", (0.0, 1.0)),
    ],
)
def test_each_decisive_word_is_wrong_in_at_most_5_of_100_profiles(word, truths):
    errors = {name: [(0.2 * SESOI[name][0], 10.0)] * 2 for name in SESOI}

    def wrong(rng: np.random.Generator) -> bool:
        found = profile_of_claims(rng, errors, lambda name: [t * SESOI[name][0] for t in truths])
        return any(c.verdict.startswith(word) for c in found.values())

    assert np.mean(many(wrong, 300, 7)) <= within(0.05, 300)


def test_partial_mantel_sees_no_more_than_the_question():
    drawn = [mantel_given_p(np.random.default_rng([5, i]), 8) for i in range(60)]
    plain, partial = (np.mean([p < 0.05 for p in ps]) for ps in zip(*drawn, strict=True))
    assert plain > 0.3 and partial <= within(0.05, 60)
