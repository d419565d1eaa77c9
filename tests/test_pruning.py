"""IAP: which heads are pruned, what is evaluated, and what the statistics make of it.

The statistics are tested on `IAP` objects made by hand, with so many right answers out of N that
every score is known.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import disturbed, trace

import fslib
from fslib import (
    IAP,
    dissociation,
    evaluate,
    head_importance,
    mean_context,
    prune_important_heads,
    pruned,
    top_heads,
)
from fslib.iap import CONVENTIONS, Point

N = 100  # evaluation examples of a hand-made IAP: scores are whole per cents
SHAPE = (2, 12)  # of the model; layers != heads


@pytest.fixture(scope="module")
def two(tasks):
    """A task of single texts with 5 classes, and one of pairs with 2."""
    return {name: tasks[name].limited(train=24, eval=16) for name in ("bbc", "bbc-pair")}


@pytest.fixture(scope="module")
def model(tasks):
    """A model whose predictions depend on every head: strong attention, large classifiers."""
    model = fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention." in name and "LayerNorm" not in name:
                parameter.mul_(10)
            if name.startswith("classifiers"):
                parameter.mul_(50)
    return model


@pytest.fixture(scope="module")
def importance(two):
    """Made-up importance, different for each task."""
    rng = np.random.default_rng(0)
    return {name: rng.random(SHAPE) for name in two}


@pytest.fixture(scope="module")
def iap(model, two, importance):
    return prune_important_heads(model, two, [0.5, 0.25], controls=3, importance=importance)


# --- what is pruned -----------------------------------------------------------------------------


def test_sets_are_top_heads_and_distinct_controls_with_their_layer_counts(iap, importance):
    assert (iap.tasks, iap.metrics) == (("bbc", "bbc-pair"), ("accuracy", "accuracy"))
    assert iap.fractions == (0.25, 0.5) and iap.controls == 3
    assert iap.heads.shape == (1, 2, 2, 4, *SHAPE)  # seeds, fractions, tasks, sets, layers, heads
    for f, fraction in enumerate(iap.fractions):
        for t, task in enumerate(iap.tasks):
            top, *controls = iap.heads[0, f, t]
            assert np.array_equal(top, top_heads(importance[task], fraction))
            assert all(np.array_equal(c.sum(-1), top.sum(-1)) for c in controls)
            assert len({heads.tobytes() for heads in (top, *controls)}) == 4
    assert (iap.heads[0, 0] <= iap.heads[0, 1]).all(), "sets grow with the fraction"
    assert repr(iap) == "IAP(bbc, bbc-pair; fractions (0.25, 0.5); 1 seed(s), 3 control(s))"


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_predictions_are_those_of_evaluate_in_a_pruned_block(model, two, importance, ablation):
    options = {"importance": importance, "ablation": ablation, "batch_size": 5}
    iap = prune_important_heads(model, two, [0.5, 0.25], 3, **options)
    for u, task in two.items():
        mean = mean_context(model, task) if ablation == "mean" else None
        whole = evaluate(model, task)[u]
        assert np.array_equal(iap.unpruned[u][0], whole.predictions)
        assert np.array_equal(iap.labels[u], whole.labels)
        for place in np.ndindex(2, 2, 4):
            with pruned(model, iap.heads[(0, *place)], ablation=ablation, mean=mean):
                expected = evaluate(model, task)[u].predictions
            assert np.array_equal(iap.lesioned[u][(0, *place)], expected)
        assert (iap.lesioned[u] != iap.unpruned[u][:, None, None, None]).any(-1).all()
        assert len(np.unique(iap.lesioned[u].reshape(-1, 16), axis=0)) > 4


def test_importance_given_is_importance_computed(model, two):
    options = {"reduction": "example", "normalize": "layer", "examples": 10, "seed": 3}
    maps = [{n: head_importance(model, t, **o) for n, t in two.items()} for o in (options, {})]
    sets = [
        prune_important_heads(model, two, [0.25], 0, **chosen).heads
        for chosen in ({"importance": maps[0]}, options, {"importance": maps[1]}, {})
    ]
    assert np.array_equal(sets[0], sets[1]) and np.array_equal(sets[2], sets[3])
    assert not np.array_equal(sets[0], sets[2])


def test_iterative_scores_again_what_is_left(model, two):
    found = prune_important_heads(model, two, [0.25, 0.5], 0, iterative=True).heads[0, :, :, 0]
    for t, task in enumerate(two.values()):
        first = top_heads(head_importance(model, task), 0.25)
        with pruned(model, first):
            rest = np.where(first, -1, head_importance(model, task))
        assert np.array_equal(found[0, t], first)
        assert np.array_equal(found[1, t], first | top_heads(rest, 0.25))
    plain = prune_important_heads(model, two, [0.25, 0.5], 0).heads[0, :, :, 0]
    assert not np.array_equal(found, plain)


def test_the_same_seed_repeats_and_another_has_other_controls(model, two, importance, iap):
    def drawn(seed):
        options = {"importance": importance, "seed": seed}
        return prune_important_heads(model, two, [0.25, 0.5], 3, **options)

    again, other = drawn(0).arrays(), drawn(1)
    assert all(np.array_equal(x, again[name]) for name, x in iap.arrays().items())
    assert np.array_equal(other.heads[..., 0, :, :], iap.heads[..., 0, :, :])
    assert not np.array_equal(other.heads, iap.heads)


def test_the_model_is_left_as_it_came(bert, zoo):
    before = trace(disturbed(bert))
    options = {"iterative": True, "ablation": "mean", "examples": 8}
    prune_important_heads(bert, zoo.tasks, [0.25, 0.5], 1, **options)
    assert trace(bert) == before


EARLY = dict.fromkeys(("bbc", "bbc-pair"), np.arange(24.0).reshape(2, 12))
REFUSALS = [
    (([0.04, 0.5], 1), {}, ["fraction 0.04 of 2 x 12 heads is no head", "0.042"]),
    (([0.5, 0.51], 1), {}, ["fractions 0.5 and 0.51", "12 heads each"]),
    (([1.0], 1), {}, ["controls=1 for fraction 1 ", "at most 0 other sets"]),
    (([0.5], 0), {"min_per_layer": 12}, ["fraction 0.5", "no head of task bbc", "min_per_layer"]),
    (([1 / 24], 13), {}, ["controls=13", "at most 11 other"]),
    (([0.5], 1), {"ablation": "men"}, ["unknown ablation 'men': did you mean 'mean'"]),
    (
        ([0.5], 1),
        {"importance": {"bbc": EARLY["bbc"]}},
        ["unknown task of the importance given 'bbc-pair'"],
    ),
    (([0.5], 1), {"importance": EARLY | {"bbc-pair": np.ones((12, 2))}}, ["bbc-pair", (12, 2)]),
    (([0.5], 1), {"importance": EARLY | {"bbc-pair": np.full(SHAPE, np.nan)}}, ["finite"]),
]


@pytest.mark.parametrize(("given", "options", "words"), REFUSALS, ids=lambda x: str(x)[:40])
def test_what_cannot_be_pruned_is_refused(model, two, given, options, words):
    with refused(*words):
        prune_important_heads(model, two, *given, **{"importance": EARLY} | options)


# --- scores and D by hand -----------------------------------------------------------------------


def predictions(right):
    """Predictions for labels 0, 1, 0, 1, ...: the first `right` are right; (*right.shape, N)."""
    labels = np.arange(N) % 2
    return np.where(np.arange(N) < np.asarray(right)[..., None], labels, 1 - labels)


def made(right, base, fractions=None) -> IAP:
    """Make an IAP of right answers: (seeds, fractions, pruned, sets, scored) and (seeds, tasks)."""
    right, base = np.asarray(right), np.asarray(base)
    tasks = tuple("abcdef"[: base.shape[1]])
    heads = np.random.default_rng(0).random((*right.shape[:4], *SHAPE)) < 0.5
    return IAP(
        tasks,
        ("accuracy",) * len(tasks),
        fractions or tuple(0.1 * (f + 1) for f in range(right.shape[1])),
        heads,
        {u: np.arange(N) % 2 for u in tasks},
        {u: predictions(base[:, i]) for i, u in enumerate(tasks)},
        {u: predictions(right[..., i]) for i, u in enumerate(tasks)},
    )


# Without a's heads a scores 0.30 and b 0.80; without b's heads a scores 0.70 and b 0.40.
OWN = np.array([[[[[30, 80]], [[70, 40]]]]])  # (1 seed, 1 fraction, 2 tasks, 1 set, 2 tasks)
BASE = np.array([[90, 80]])


@pytest.fixture(scope="module")
def uneven():
    """An IAP of 2 seeds, 3 fractions, 2 tasks and 1 + 2 sets, no two alike, and its numbers."""
    right = np.random.default_rng(0).permutation(N - 1)[:72].reshape(2, 3, 2, 3, 2)
    base = np.array([[90, 80], [85, 95]])
    return made(right, base), right, base


def test_top_is_the_first_set_and_random_the_others(uneven):
    iap, right, base = uneven
    np.testing.assert_allclose(iap.baseline(), base / N)
    np.testing.assert_allclose(iap.chance(), [0.5, 0.5])
    for found, sets in ((iap.top, 0), (iap.random, slice(1, None))):
        np.testing.assert_allclose(found.scores, right[:, :, :, sets] / N)
        assert np.array_equal(found.heads, iap.heads[:, :, :, sets])
        for u in iap.tasks:
            assert np.array_equal(found.predictions[u], iap.lesioned[u][:, :, :, sets])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_d_has_both_means(uneven, convention):
    iap, right, base = uneven
    chance = np.array([0.5, 0.5])
    d = dissociation(right[:, :, :, 0] / N, base[:, None] / N, convention, chance)
    expected = np.concatenate([d, d.mean(-1, keepdims=True)], -1)
    expected = np.concatenate([expected, expected[:, [0, 2]].mean(1, keepdims=True)], 1)
    found = iap.dissociation(convention).top.values
    np.testing.assert_allclose(
        found, expected
    )  # rows: 10, 20, 30 %, 10 and 30; columns: a, b, both


def test_where_10_and_30_per_cent_are_not_pruned_all_are_averaged():
    right = np.broadcast_to(BASE, (1, 2, 2, 1, 2)).copy()
    right[0, :, 0, 0, 0] -= [7, 20]  # lost by task a, without its own heads
    found = made(right, BASE, (0.4, 0.5)).dissociation()
    assert found.of("a").value == pytest.approx(100 * 13.5 / 90)


def test_a_task_that_scores_nothing_is_undefined_and_not_significant():
    right = np.zeros((1, 1, 2, 3, 2), dtype=int)
    right[..., 1] = [[80, 80, 80], [40, 80, 80]]
    found = made(right, np.array([[0, 80]])).dissociation()
    assert found.of("b").value == pytest.approx(50) and found.of("b").p == 0.5
    for field in set(Point._fields) - {"by_seed"}:
        assert np.isfinite(getattr(found.of("b"), field)), field
        for point in (found.of("a"), found.mean, found.along("a"), found.along()):
            assert np.isnan(getattr(point, field)).all(), field


def test_points_by_hand_and_as_they_stand_in_the_frame(uneven):
    iap, right, base = uneven
    found, frame = iap.dissociation(), iap.dissociation().frame().set_index(["fraction", "task"])

    def by_hand(sets):
        each = right[:, :, :, sets].mean(3)  # (seeds, fractions, pruned, scored)
        a = 100 * (each[:, :, 1, 0] - each[:, :, 0, 0]) / base[:, None, 0]
        b = 100 * (each[:, :, 0, 1] - each[:, :, 1, 1]) / base[:, None, 1]
        return {"a": a, "b": b, "mean": (a + b) / 2}

    tops, randoms = by_hand(slice(1)), by_hand(slice(1, None))
    for column, (task, top) in enumerate(tops.items()):
        along, chance = found.along(task), randoms[task]
        point = found.mean if task == "mean" else found.of(task)
        np.testing.assert_allclose(along.by_seed, top)
        np.testing.assert_allclose(point.by_seed, top[:, [0, 2]].mean(1))  # 10 and 30 %
        for each, of in ((along, lambda x: x.mean(0)), (point, lambda x: x[:, [0, 2]].mean())):
            np.testing.assert_allclose(each.value, of(top))
            np.testing.assert_allclose(each.random, of(chance))
            np.testing.assert_allclose(each.above, of(top - chance))
        own = found.measure(task).interval()
        above = found.measure(task, above_random=True).interval()
        assert (own.value, own.low, own.high) == pytest.approx(point[:3])
        expected = (point.above, point.above_low, point.above_high)
        assert (above.value, above.low, above.high) == pytest.approx(expected)
        for row, fraction in enumerate([*map(str, iap.fractions), "mean"]):
            at, shown = found._point(row, column), frame.loc[fraction, task]
            pairs = {"D": "value", "above random": "above", "p, shared": "p_shared"}
            for name in ("low", "high", "random", "p", "above low", "above high", *pairs):
                assert shown[name] == getattr(at, pairs.get(name, name.replace(" ", "_"))), name
            assert (shown["seed min"], shown["seed max"]) == (min(at.by_seed), max(at.by_seed))
    assert found.p[3, 2] == found.mean.p and found.p_shared[3, 2] == found.mean.p_shared
    assert set(frame["convention"]) == {"lesion"} and len(frame) == 4 * 3
    assert f"{found.mean.value:.3f}" in repr(found) and "<table" in found._repr_html_()


def test_what_an_iap_cannot_tell_is_refused(uneven, model, two, importance):
    found = made(OWN, BASE).dissociation()  # without controls
    for field in ("random", "random_low", "random_high", "above", "above_low", "above_high"):
        assert np.isnan(getattr(found.mean, field)), field
    assert found.controls is None and found.mean.p == 0.5
    with refused("nothing to compare with", "controls=1"):
        found.measure(above_random=True)
    for ask in (found.of, found.along, found.measure):
        with refused("'aa'", "did you mean 'a'"):
            ask("aa")
    with refused("'lesoin'", "did you mean 'lesion'"):
        uneven[0].dissociation("lesoin")
    alone = prune_important_heads(model, two["bbc"], [0.5], 1, importance=importance)
    assert alone.top.scores.shape == (1, 1, 1, 1)
    with refused("at least two tasks"):
        alone.dissociation()


# --- intervals ----------------------------------------------------------------------------------


def test_the_width_of_one_seed_is_that_of_a_t_interval_over_examples():
    # a is right about all without b's heads and about half without its own: D = 100 (1 - share),
    # whose standard error is sqrt(0.25 / 99) = 0.05025; t at 97.5 %, 99 degrees of freedom: 1.984
    right = np.array([[[[[50, 100]], [[100, 100]]]]])
    found = made(right, np.array([[100, 100]])).dissociation()
    assert found.of("a")[:3] == pytest.approx((50, 50 - 9.971, 50 + 9.971), abs=1e-3)
    assert found.of("b").low == found.of("b").high == 0
    # the mean of a and b: half of a's, since b does not vary
    assert found.mean[:3] == pytest.approx((25, 25 - 4.985, 25 + 4.985), abs=1e-3)


@pytest.mark.parametrize("convention", ["lesion", "retention"])
def test_influences_are_those_of_an_explicit_jackknife(convention, monkeypatch):
    """Every example is really left out, one by one, and D computed anew from what is left."""
    rng, n = np.random.default_rng(0), {"a": 9, "b": 14}
    labels = {u: (np.arange(k) % 3 == 0).astype(int) for u, k in n.items()}
    iap = IAP(
        ("a", "b"),
        ("accuracy", "f1"),
        (0.1, 0.3),
        np.zeros((2, 2, 2, 3, *SHAPE), dtype=bool),
        labels,
        {u: y ^ (rng.random((2, len(y))) < 0.1) for u, y in labels.items()},
        {u: y ^ (rng.random((2, 2, 2, 3, len(y))) < 0.3) for u, y in labels.items()},
    )
    chance = iap.chance()
    monkeypatch.setattr(IAP, "chance", lambda self: chance)  # of the task, not of a sample
    whole = iap.dissociation(convention)
    for u, i in ((task, i) for task in iap.tasks for i in range(n[task])):
        without = {
            name: (arrays := getattr(iap, name)) | {u: np.delete(arrays[u], i, -1)}
            for name in ("labels", "unpruned", "lesioned")
        }
        rest = replace(iap, **without).dissociation(convention)
        for part in ("top", "controls"):
            cells = getattr(whole, part)
            expected = (n[u] - 1) * (cells.values - getattr(rest, part).values)
            np.testing.assert_allclose(cells.influence[u][:, i], expected, rtol=1e-9, atol=1e-9)


# --- relabelling --------------------------------------------------------------------------------


def lesioned(tasks, sets, seeds=1):
    """Own top heads cost a task 80 points; others' and random heads cost nobody anything."""
    right = np.full((seeds, 1, tasks, sets, tasks), 90)
    for t in range(tasks):
        right[:, :, t, 0, t] = 10
    return right, np.full((seeds, tasks), 90)


@pytest.mark.parametrize(
    ("tasks", "seeds", "p", "shared"),
    [
        # one model: as labelled, or exchanged, which turns both D around
        (2, 1, [1 / 2] * 3, [1 / 2] * 3),
        (2, 3, [1 / 8] * 3, [1 / 2] * 3),
        # of 6 orders, 2 leave a task's own lesion with it; all three keep theirs in the true one
        (3, 1, [1 / 3] * 3 + [1 / 6], [1 / 3] * 3 + [1 / 6]),
        (3, 2, [1 / 9] * 3 + [1 / 36], [1 / 3] * 3 + [1 / 6]),
    ],
)
def test_relabelling_by_hand(tasks, seeds, p, shared):
    right, base = lesioned(tasks, 2, seeds)
    found, alone = made(right, base).dissociation(), made(right[:, :, :, :1], base).dissociation()
    np.testing.assert_allclose(found.p[0], p)
    np.testing.assert_allclose(found.p_shared[0], shared)
    assert np.array_equal(alone.p, found.p), "random heads are no part of it"
    assert found.null[:, 0, 0].max() == pytest.approx(100 * 8 / 9)
    assert (made(100 - right, base).dissociation().p[:, -1] == 1).all(), "own heads matter least"
    assert (made(np.full_like(right, 70), base).dissociation().p == 1).all(), "all lesions alike"


def test_relabellings_are_drawn_where_they_are_too_many_and_repeat():
    six = np.random.default_rng(0).integers(20, 90, size=(2, 1, 6, 1, 6))  # 720 orders of tasks
    iap = made(six, np.full((2, 6), 90))
    one, again, other = (iap.dissociation(draws=99, seed=seed) for seed in (0, 0, 1))
    assert one.null.shape == (99, 2, 7)
    np.testing.assert_allclose(one.null[0], one.top.values.mean(0))
    np.testing.assert_allclose((one.p * 99) % 1, 0, atol=1e-9)
    assert np.array_equal(one.null, again.null) and not np.array_equal(one.null, other.null)
    assert one.mean[:3] == other.mean[:3], "the interval is computed, not drawn"


# --- put away and put together ------------------------------------------------------------------


def test_arrays_round_trip_and_runs_are_joined_in_order(uneven):
    iap = uneven[0]
    back = IAP.from_arrays(iap.tasks, iap.metrics, iap.fractions, iap.arrays())
    assert repr(back) == repr(iap) and back.metrics == iap.metrics
    assert back.arrays().keys() == iap.arrays().keys()
    assert all(np.array_equal(x, back.arrays()[name]) for name, x in iap.arrays().items())
    one, other = made(OWN, BASE), made(OWN + 10, BASE + 5)
    both = IAP.over_seeds([one, other])
    np.testing.assert_allclose(both.top.scores, [one.top.scores[0], other.top.scores[0]])
    np.testing.assert_allclose(both.baseline(), [[0.9, 0.8], [0.95, 0.85]])
    assert both.heads.shape[0] == 2 and list(both.labels) == ["a", "b"]


def test_runs_that_differ_in_more_than_the_seed_are_refused():
    one = made(OWN, BASE)
    others = [
        made(np.full((1, 1, 3, 1, 3), 50), np.full((1, 3), 90)),
        made(OWN, BASE, fractions=(0.4,)),
        made(OWN.repeat(2, 3), BASE),
        replace(one, labels=one.labels | {"b": 1 - one.labels["b"]}),
        replace(one, metrics=("accuracy", "f1")),
    ]
    for other in others:
        with refused("differ"):
            IAP.over_seeds([one, other])
    with refused("no runs"):
        IAP.over_seeds([])
