"""IAP: which heads are pruned, what is evaluated, and what dissociation, interval and relabelling make of it.

The statistics are tested on `IAP` objects made by hand, with so many right answers out of N that every score is known.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import one_thread

import fslib
from fslib import (
    IAP,
    evaluate,
    head_importance,
    mean_context,
    prune_important_heads,
    pruned,
    top_heads,
)

N = 100  # evaluation examples of a hand-made IAP: scores are whole per cents
SHAPE = (2, 12)  # of the model; layers != heads


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


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


class TestWhatIsPruned:
    def test_shapes_and_names(self, iap):
        assert iap.tasks == ("bbc", "bbc-pair")
        assert iap.metrics == ("accuracy", "accuracy")
        assert iap.fractions == (0.25, 0.5)  # sorted
        assert iap.controls == 3
        assert iap.heads.shape == (
            1,
            2,
            2,
            4,
            *SHAPE,
        )  # seeds, fractions, tasks, sets, layers, heads
        for task in iap.tasks:
            assert iap.labels[task].shape == (16,)
            assert iap.unpruned[task].shape == (1, 16)
            assert iap.lesioned[task].shape == (1, 2, 2, 4, 16)
        assert iap.scores().shape == (1, 2, 2, 4, 2)
        assert iap.baseline().shape == (1, 2)

    def test_first_set_is_the_tasks_top_heads(self, iap, importance):
        for f, fraction in enumerate(iap.fractions):
            for t, task in enumerate(iap.tasks):
                assert np.array_equal(iap.heads[0, f, t, 0], top_heads(importance[task], fraction))

    def test_controls_match_layer_counts_and_are_distinct(self, iap):
        for sets in iap.heads[0].reshape(-1, 4, *SHAPE):
            assert (sets.sum(-1) == sets[0].sum(-1)).all()
            assert len({control.tobytes() for control in sets[1:]}) == 3

    def test_sets_grow_with_the_fraction(self, iap):
        small, large = iap.heads[0]
        assert (small <= large).all()

    def test_predictions_are_those_of_evaluate_in_a_pruned_block(self, model, iap, two):
        for u, score in evaluate(model, two).items():
            assert np.array_equal(iap.unpruned[u][0], score.predictions)
            assert np.array_equal(iap.labels[u], score.labels)
        for place in np.ndindex(2, 2, 4):
            with pruned(model, iap.heads[(0, *place)]):
                for u, score in evaluate(model, two).items():
                    assert np.array_equal(iap.lesioned[u][(0, *place)], score.predictions)

    def test_lesions_change_predictions_each_in_its_own_way(self, iap):
        for u in iap.tasks:
            changed = (iap.lesioned[u] != iap.unpruned[u][:, None, None, None]).sum(-1)
            assert changed.min() > 0
            assert len(np.unique(iap.lesioned[u].reshape(-1, 16), axis=0)) > 4

    def test_importance_given_is_importance_computed(self, model, two):
        options = {"reduction": "example", "normalize": "layer", "examples": 10, "seed": 3}
        given = {name: head_importance(model, task, **options) for name, task in two.items()}
        whole = {name: head_importance(model, task) for name, task in two.items()}
        sets = [
            prune_important_heads(model, two, [0.25], 0, **kwargs).heads
            for kwargs in ({"importance": given}, options, {"importance": whole}, {})
        ]
        assert np.array_equal(sets[0], sets[1])
        assert np.array_equal(sets[2], sets[3])
        assert not np.array_equal(sets[0], sets[2])

    def test_iterative_scores_again_what_is_left(self, model, two):
        found = prune_important_heads(model, two, [0.25, 0.5], 0, iterative=True).heads[0, :, :, 0]
        for t, task in enumerate(two.values()):
            first = top_heads(head_importance(model, task), 0.25)
            with pruned(model, first):
                rest = np.where(first, -1, head_importance(model, task))
            assert np.array_equal(found[0, t], first)
            assert np.array_equal(found[1, t], first | top_heads(rest, 0.25))
        plain = prune_important_heads(model, two, [0.25, 0.5], 0).heads[0, :, :, 0]
        assert not np.array_equal(found, plain)

    def test_min_per_layer_leaves_heads_in_every_layer(self, model, two):
        early = {name: np.array([np.arange(12) + 20.0, np.arange(12) + 1.0]) for name in two}
        for least, expected in ((0, [12, 0]), (3, [9, 3])):
            found = prune_important_heads(
                model, two, [0.5], 0, importance=early, min_per_layer=least
            )
            assert (found.heads.sum(-1) == expected).all()

    def test_mean_ablation_uses_the_mean_of_the_task_that_is_evaluated(
        self, model, two, iap, importance
    ):
        mean = prune_important_heads(
            model, two, [0.5, 0.25], 3, importance=importance, ablation="mean"
        )
        for u, task in two.items():
            for place in np.ndindex(2, 2, 4):
                with pruned(
                    model, mean.heads[(0, *place)], ablation="mean", mean=mean_context(model, task)
                ):
                    expected = evaluate(model, task)[u].predictions
                assert np.array_equal(mean.lesioned[u][(0, *place)], expected)
            assert not np.array_equal(mean.lesioned[u], iap.lesioned[u])

    def test_all_heads_have_no_control(self, model, two, importance):
        assert prune_important_heads(model, two, [1.0], 0, importance=importance).heads.all()
        with refused("fraction 1.0", "the same one", "controls=0"):
            prune_important_heads(model, two, [1.0], 1, importance=importance)

    def test_a_fraction_of_no_head_is_refused(self, model, two, importance):
        with refused("fraction 0.04 of 2 x 12 heads is no head", "0.042"):
            prune_important_heads(model, two, [0.04, 0.5], 1, importance=importance)
        with refused("fraction 0.5", "no head of task bbc", "min_per_layer"):
            prune_important_heads(model, two, [0.5], 0, importance=importance, min_per_layer=12)


class TestSeedsAndState:
    def test_same_seed_repeats_and_another_has_other_controls(self, model, two, importance, iap):
        again = prune_important_heads(model, two, [0.25, 0.5], 3, importance=importance)
        other = prune_important_heads(model, two, [0.25, 0.5], 3, importance=importance, seed=1)
        for name, array in iap.arrays().items():
            assert np.array_equal(array, again.arrays()[name])
        assert np.array_equal(other.heads[..., 0, :, :], iap.heads[..., 0, :, :])
        assert not np.array_equal(other.heads, iap.heads)

    @pytest.mark.parametrize("training", [True, False])
    def test_model_is_left_as_it_came(self, model, two, training):
        model.train(training)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        rng = torch.get_rng_state()
        prune_important_heads(
            model, two, [0.25, 0.5], 1, iterative=True, ablation="mean", examples=8
        )
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), rng)
        assert (model.control.gate, model.control.fill, model.control.tap) == (None, None, None)
        model.eval()

    def test_arrays_round_trip(self, iap):
        back = IAP.from_arrays(iap.tasks, iap.metrics, iap.fractions, iap.arrays())
        assert (back.tasks, back.metrics, back.fractions) == (iap.tasks, iap.metrics, iap.fractions)
        assert back.arrays().keys() == iap.arrays().keys()
        assert all(
            np.array_equal(array, back.arrays()[name]) for name, array in iap.arrays().items()
        )
        assert repr(back.dissociation()) == repr(iap.dissociation())


class TestRefusals:
    @pytest.mark.parametrize("fraction", [0.0, 1.01, -0.5])
    def test_fraction_outside_0_1(self, model, two, importance, fraction):
        with refused(fraction, "(0, 1]"):
            prune_important_heads(model, two, [0.5, fraction], importance=importance)

    @pytest.mark.parametrize(
        ("fractions", "said"),
        [([], "at least one"), ([0.5, 0.51], "12 heads each"), ([0.3, 0.3], "7 heads each")],
    )
    def test_fractions_that_are_none_or_not_distinct(self, model, two, importance, fractions, said):
        with refused("fractions", said):
            prune_important_heads(model, two, fractions, importance=importance)

    def test_more_controls_than_distinct_sets(self, model, two, importance):
        early = dict.fromkeys(two, np.arange(24.0).reshape(2, 12))
        with refused("13 controls", "only 11 other"):
            prune_important_heads(model, two, [1 / 24], 13, importance=early)

    def test_negative_controls(self, model, two, importance):
        with refused("controls -1"):
            prune_important_heads(model, two, [0.5], -1, importance=importance)

    def test_importance_without_a_task(self, model, two, importance):
        with refused("bbc-pair", "missing", SHAPE):
            prune_important_heads(model, two, [0.5], 1, importance={"bbc": importance["bbc"]})

    @pytest.mark.parametrize("shape", [(1, 12), (12, 2)])
    def test_importance_of_another_model(self, model, two, importance, shape):
        with refused("bbc-pair", shape, SHAPE):
            prune_important_heads(
                model, two, [0.5], 1, importance=importance | {"bbc-pair": np.ones(shape)}
            )

    def test_one_task_has_scores_but_no_dissociation(self, model, two, importance):
        alone = prune_important_heads(model, two["bbc"], [0.5], 1, importance=importance)
        assert alone.scores().shape == (1, 1, 1, 2, 1)
        with refused("at least two tasks"):
            alone.dissociation()

    def test_unknown_convention(self, iap):
        with refused("'lesoin'", "did you mean 'lesion'"):
            iap.dissociation("lesoin")


def predictions(right: int | Sequence[int]) -> np.ndarray:
    """Predictions for N examples with labels 0, 1, 0, 1, ...: the first `right` are right; (*right.shape, N)."""
    labels = np.arange(N) % 2
    return np.where(np.arange(N) < np.asarray(right)[..., None], labels, 1 - labels)


def made(right: np.ndarray, base: np.ndarray, fractions: tuple[float, ...] | None = None) -> IAP:
    """An IAP from right answers: `right` (seeds, fractions, pruned, sets, scored), `base` (seeds, tasks)."""
    right, base = np.asarray(right), np.asarray(base)
    tasks = tuple("abcdef"[: base.shape[1]])
    return IAP(
        tasks,
        ("accuracy",) * len(tasks),
        fractions or tuple(0.1 * (f + 1) for f in range(right.shape[1])),
        np.zeros((*right.shape[:4], *SHAPE), dtype=bool),
        {u: np.arange(N) % 2 for u in tasks},
        {u: predictions(base[:, i]) for i, u in enumerate(tasks)},
        {u: predictions(right[..., i]) for i, u in enumerate(tasks)},
    )


# Without a's heads a scores 0.30 and b 0.80; without b's heads a scores 0.70 and b 0.40. Unpruned: 0.90 and 0.80.
OWN = np.array([[[[[30, 80]], [[70, 40]]]]])  # (1 seed, 1 fraction, 2 tasks, 1 set, 2 tasks)
BASE = np.array([[90, 80]])


class TestDissociation:
    def test_axes_of_scores_are_pruned_then_scored(self):
        iap = made(OWN, BASE)
        np.testing.assert_allclose(iap.baseline(), [[0.9, 0.8]])
        np.testing.assert_allclose(iap.chance(), [0.5, 0.5])
        np.testing.assert_allclose(iap.scores()[0, 0, :, 0], [[0.3, 0.8], [0.7, 0.4]])

    @pytest.mark.parametrize(
        ("convention", "some_lost", "none_lost"),
        [
            ("lesion", [100 * (0.7 - 0.3) / 0.9, 100 * (0.8 - 0.4) / 0.8], [0, 0]),
            (
                "released",
                [100 * (0.8 - 0.3) / 0.9, 100 * (0.7 - 0.4) / 0.8],
                [-100 * 0.1 / 0.9, 100 * 0.1 / 0.8],
            ),
            # R = (S - 0.5) / (S0 - 0.5): [[-0.5, 1], [0.5, -1/3]], and all 1 where nothing is lost
            ("retention", [100 * (1 + 0.5), 100 * (0.5 + 1 / 3)], [0, 0]),
        ],
    )
    def test_by_hand_with_both_means(self, convention, some_lost, none_lost):
        right = np.concatenate(
            [OWN, np.broadcast_to(BASE, OWN.shape)], 1
        )  # at a second fraction nothing is lost
        found = made(right, BASE, (0.1, 0.3)).dissociation(convention)
        rows = np.array([some_lost, none_lost])
        rows = np.vstack([rows, rows.mean(0)])
        np.testing.assert_allclose(
            found.top.values[0], np.column_stack([rows, rows.mean(1)]), atol=1e-9
        )

    def test_only_10_and_30_per_cent_are_averaged_where_they_are_pruned(self):
        lost = np.array([0, 1, 5, 7, 20])  # of task a, by its own lesion, at 10 to 50 %
        right = np.broadcast_to(BASE, (1, 5, 2, 1, 2)).copy()
        right[0, :, 0, 0, 0] -= lost
        d = 100 * lost / 90
        found = made(right, BASE).dissociation()
        np.testing.assert_allclose(found.along("a").value, d)
        assert found.of("a").value == pytest.approx((d[0] + d[2]) / 2)
        assert found.mean.value == pytest.approx((d[0] + d[2]) / 4)
        assert made(right[:, :2], BASE).dissociation().of("a").value == pytest.approx(d[0]), (
            "20 % is left out"
        )
        others = made(right[:, 3:], BASE, (0.4, 0.5)).dissociation()
        assert others.of("a").value == pytest.approx(d[3:].mean()), (
            "neither is there, so all are averaged"
        )

    def test_seeds_are_averaged_and_kept(self):
        seeds = np.concatenate(
            [OWN, OWN + np.array([10, 0])]
        )  # the second seed's a scores 10 more under any lesion
        found = made(seeds, np.array([[90, 80], [80, 80]])).dissociation()
        expected = [100 * 0.4 / 0.9, 100 * 0.4 / 0.8]  # a, seed by seed
        np.testing.assert_allclose(found.along("a").by_seed[:, 0], expected)
        assert found.along("a").value[0] == pytest.approx(np.mean(expected))
        row = found.frame().query("task == 'a'").iloc[0]
        assert (row["seed min"], row["seed max"]) == pytest.approx(tuple(expected))

    def test_task_that_scores_nothing_is_undefined_and_not_significant(self):
        right = np.zeros((1, 1, 2, 3, 2), dtype=int)
        right[..., 1] = [[80, 80, 80], [40, 80, 80]]
        found = made(right, np.array([[0, 80]])).dissociation()
        assert found.of("b").value == pytest.approx(50) and found.of("b").p == 0.5
        for field in set(FIELDS) - {"by_seed"}:
            assert np.isfinite(getattr(found.of("b"), field)), field
            for point in (found.of("a"), found.mean, found.along("a"), found.along()):
                assert np.isnan(getattr(point, field)).all(), field

    def test_frame(self):
        frame = made(OWN.repeat(3, 1).repeat(2, 3), BASE).dissociation("released").frame()
        assert list(frame) == [
            *("convention", "fraction", "task", "D", "low", "high", "random"),
            *("above random", "above low", "above high", "p", "p, shared", "seed min", "seed max"),
        ]
        assert set(frame["convention"]) == {"released"}
        assert list(frame["task"]) == ["a", "b", "mean"] * (len(frame) // 3)
        assert len(frame) == 3 * 4  # three fractions and their mean
        assert frame["D"][0] == frame["random"][0] == pytest.approx(100 * 0.5 / 0.9)
        assert frame["above random"].tolist() == [0] * 12

    def test_shows_itself(self):
        found = made(OWN, BASE).dissociation()
        assert "44.444" in repr(found)
        assert "<table" in found._repr_html_()


def uneven() -> tuple[IAP, np.ndarray, np.ndarray]:
    """An IAP of 2 seeds, 3 fractions, 2 tasks and 1 + 2 sets, no two alike; with its right answers, as in `made`."""
    rng = np.random.default_rng(0)
    right = rng.permutation(N - 1)[: 2 * 3 * 2 * 3 * 2].reshape(2, 3, 2, 3, 2)
    base = np.array([[90, 80], [85, 95]])
    iap = made(right, base)
    iap.heads[...] = rng.random(iap.heads.shape) < 0.5
    return iap, right, base


class TestTopAndRandom:
    def test_top_is_the_first_set_and_random_the_others(self):
        iap, right, _ = uneven()
        np.testing.assert_allclose(iap.top.scores, right[:, :, :, 0] / N)
        np.testing.assert_allclose(iap.random.scores, right[:, :, :, 1:] / N)
        assert np.array_equal(iap.top.heads, iap.heads[:, :, :, 0])
        assert np.array_equal(iap.random.heads, iap.heads[:, :, :, 1:])
        assert list(iap.top.predictions) == list(iap.random.predictions) == ["a", "b"]
        for u in iap.tasks:
            assert np.array_equal(iap.top.predictions[u], iap.lesioned[u][:, :, :, 0])
            assert np.array_equal(iap.random.predictions[u], iap.lesioned[u][:, :, :, 1:])

    def test_their_shapes_without_the_sets_axis_and_with_the_controls(self):
        iap, _, _ = uneven()
        assert (iap.top.heads.shape, iap.random.heads.shape) == (
            (2, 3, 2, *SHAPE),
            (2, 3, 2, 2, *SHAPE),
        )
        assert (iap.top.scores.shape, iap.random.scores.shape) == ((2, 3, 2, 2), (2, 3, 2, 2, 2))
        assert (iap.top.predictions["a"].shape, iap.random.predictions["a"].shape) == (
            (2, 3, 2, N),
            (2, 3, 2, 2, N),
        )

    def test_together_they_are_all_scores(self):
        iap, _, _ = uneven()
        assert np.array_equal(
            np.concatenate([iap.top.scores[:, :, :, None], iap.random.scores], 3), iap.scores()
        )

    def test_of_a_model_that_was_pruned(self, iap, importance):
        for t, task in enumerate(iap.tasks):
            assert np.array_equal(iap.top.heads[0, 1, t], top_heads(importance[task], 0.5))
        assert (iap.random.heads.sum(-1) == iap.top.heads.sum(-1)[:, :, :, None]).all()
        right = {u: (iap.lesioned[u] == iap.labels[u]).mean(-1) for u in iap.tasks}
        for i, u in enumerate(iap.tasks):
            np.testing.assert_allclose(iap.top.scores[..., i], right[u][:, :, :, 0])
            np.testing.assert_allclose(iap.random.scores[..., i], right[u][:, :, :, 1:])

    def test_without_controls_random_is_empty(self):
        iap = made(OWN, BASE)
        assert iap.random.heads.shape == (1, 1, 2, 0, *SHAPE) and iap.random.scores.shape == (
            1,
            1,
            2,
            0,
            2,
        )
        np.testing.assert_allclose(iap.top.scores[0, 0], [[0.3, 0.8], [0.7, 0.4]])


FIELDS = (
    *("value", "low", "high", "by_seed", "random", "random_low", "random_high"),
    *("above", "above_low", "above_high", "p", "p_shared"),
)


class TestPoints:
    """`Dissociation.mean`, `.of` and `.along` name places in its arrays: fractions by tasks, and their means."""

    @pytest.fixture(scope="class")
    def found(self):
        return uneven()[0].dissociation()

    @pytest.mark.parametrize("field", FIELDS)
    def test_each_is_its_place_in_the_arrays(self, found, field):
        cells = {"random": found.controls, "above": found.top - found.controls}.get(
            field.split("_")[0], found.top
        )
        array = {
            "by_seed": lambda: found.top.values,
            "p": lambda: found.p,
            "p_shared": lambda: found.p_shared,
            "low": lambda: cells.intervals()[0],
            "high": lambda: cells.intervals()[1],
        }.get(
            field if field in FIELDS[-2:] or field == "by_seed" else field.split("_")[-1],
            lambda: cells.values.mean(0),
        )()
        assert array.shape[-2:] == (4, 3)
        assert np.array_equal(getattr(found.mean, field), array[..., 3, 2])
        for i, task in enumerate(("a", "b")):
            assert np.array_equal(getattr(found.of(task), field), array[..., 3, i])
            assert np.array_equal(getattr(found.along(task), field), array[..., :3, i])
        assert np.array_equal(getattr(found.along(), field), array[..., :3, 2])
        assert np.array_equal(getattr(found.along("mean"), field), array[..., :3, 2])

    def test_a_point_has_all_fields_by_name(self, found):
        assert found.mean._fields == FIELDS
        assert found.mean.by_seed.shape == (2,) and found.along().by_seed.shape == (2, 3)
        assert np.ndim(found.mean.value) == np.ndim(found.of("a").p) == 0

    def test_by_hand_from_right_answers(self, found):
        _, right, base = uneven()

        def by_hand(sets: slice) -> tuple[np.ndarray, np.ndarray]:
            each = right[:, :, :, sets].mean(3)  # (seeds, fractions, pruned, scored)
            a = 100 * (each[:, :, 1, 0] - each[:, :, 0, 0]) / base[:, None, 0]
            return a, 100 * (each[:, :, 0, 1] - each[:, :, 1, 1]) / base[:, None, 1]

        a, b = by_hand(slice(1))
        np.testing.assert_allclose(found.along("a").value, a.mean(0))
        np.testing.assert_allclose(found.along("b").by_seed, b)
        np.testing.assert_allclose(found.along().value, (a + b).mean(0) / 2)
        headline = (a + b)[:, [0, 2]] / 2  # 10 and 30 % of 10, 20 and 30
        assert found.of("a").value == pytest.approx(a[:, [0, 2]].mean())
        assert found.mean.value == pytest.approx(headline.mean())
        np.testing.assert_allclose(found.mean.by_seed, headline.mean(1))
        random_a, random_b = by_hand(slice(1, None))
        np.testing.assert_allclose(found.along("b").random, random_b.mean(0))
        np.testing.assert_allclose(found.along("a").above, (a - random_a).mean(0))
        assert found.mean.above == pytest.approx(
            (headline - (random_a + random_b)[:, [0, 2]] / 2).mean()
        )

    def test_measures_are_of_the_same_numbers(self, found):
        for task, point in {"a": found.of("a"), "b": found.of("b"), "mean": found.mean}.items():
            d, above = found.measure(task), found.measure(task, above_random=True)
            assert (d.interval().value, *d.interval().at(0.95)) == pytest.approx(
                (point.value, point.low, point.high)
            )
            i = above.interval()
            assert (i.value, i.low, i.high) == pytest.approx(
                (point.above, point.above_low, point.above_high)
            )
            np.testing.assert_allclose(d.values, point.by_seed)
            assert {u: x.shape for u, x in d.influence.items()} == {"a": (2, N), "b": (2, N)}

    def test_another_task_is_refused(self, found):
        for ask in (found.of, found.along, found.measure):
            with refused("'aa'", "did you mean 'a'"):
                ask("aa")


class TestInterval:
    def test_two_lesions_alike_have_an_interval_of_no_width(self):
        right = np.array([[[[[47, 63]], [[47, 63]]]]])
        d = made(right, BASE).dissociation().mean
        assert (d.value, d.low, d.high) == pytest.approx((0, 0, 0))

    def test_lesions_alike_in_score_but_not_in_examples_have_one(self):
        iap = made(np.array([[[[[50, 80]], [[50, 80]]]]]), BASE)
        iap.lesioned["a"][0, 0, 1, 0] = iap.lesioned["a"][0, 0, 1, 0][
            ::-1
        ]  # b's heads: the other half is wrong
        iap.lesioned["a"][0, 0, 1, 0] ^= (
            1  # labels alternate, so reversed answers are turned around
        )
        d = iap.dissociation().of("a")
        assert d.value == pytest.approx(0) and d.low < -10 and d.high > 10

    def test_width_of_one_seed_is_that_of_a_t_interval_over_examples(self):
        # Unpruned and without b's heads a is always right, without its own half right: D = 100 (1 - share), and a share
        # of 50 in 100 has standard error sqrt(0.25 / 99) = 0.05025; t at 97.5 % with 99 degrees of freedom is 1.984
        found = made(
            np.array([[[[[50, 100]], [[100, 100]]]]]), np.array([[100, 100]])
        ).dissociation()
        d = found.of("a")
        assert (d.value, d.low, d.high) == pytest.approx((50, 50 - 9.971, 50 + 9.971), abs=1e-3)
        assert found.of("b").low == found.of("b").high == 0
        # the mean of a and b: half of a's, since b does not vary
        assert (found.mean.low, found.mean.high) == pytest.approx(
            (25 - 4.985, 25 + 4.985), abs=1e-3
        )

    def test_models_that_differ_widen_it_where_examples_do_not_vary(self):
        """Two models, one specialized (D = 100) and one not (D = 0): examples cannot tell, seeds can."""
        right = np.full((2, 1, 2, 1, 2), N)
        right[0, 0, [0, 1], 0, [0, 1]] = 0
        d = made(right, np.full((2, 2), N)).dissociation().mean
        # standard error 50 with one degree of freedom, whose t at 97.5 % is 12.706
        assert (d.value, d.low, d.high) == pytest.approx((50, 50 - 635.3, 50 + 635.3), abs=0.1)

    @pytest.mark.parametrize("convention", ["lesion", "released", "retention"])
    def test_influences_are_those_of_an_explicit_jackknife(self, convention):
        """Every example is really left out, one by one, and D computed anew from what is left."""
        rng, n = np.random.default_rng(0), {"a": 9, "b": 14}
        labels = {u: (np.arange(k) % 3 == 0).astype(int) for u, k in n.items()}
        wrong = {u: rng.random((2, 2, 2, 3, k)) < 0.3 for u, k in n.items()}
        unpruned = {
            u: np.where(np.arange(k) % 7 == 1, 1 - labels[u], labels[u]) for u, k in n.items()
        }
        iap = IAP(
            ("a", "b"),
            ("accuracy", "f1"),
            (0.1, 0.3),
            np.zeros((2, 2, 2, 3, *SHAPE), dtype=bool),
            labels,
            {u: np.stack([x, x]) for u, x in unpruned.items()},
            {u: np.where(wrong[u], 1 - y, y) for u, y in labels.items()},
        )

        def numbers(chosen: IAP) -> list[np.ndarray]:
            found = chosen.dissociation(convention)
            return [found.top.values, found.controls.values]

        whole, found = numbers(iap), iap.dissociation(convention)
        chance = iap.chance()
        for u in iap.tasks:
            for i in range(n[u]):
                rest = IAP(
                    iap.tasks,
                    iap.metrics,
                    iap.fractions,
                    iap.heads,
                    labels | {u: np.delete(labels[u], i)},
                    iap.unpruned | {u: np.delete(iap.unpruned[u], i, -1)},
                    iap.lesioned | {u: np.delete(iap.lesioned[u], i, -1)},
                )
                object.__setattr__(
                    rest, "chance", lambda: chance
                )  # a constant of the task, not of a sample
                for cells, value, without in zip(
                    (found.top, found.controls), whole, numbers(rest), strict=True
                ):
                    np.testing.assert_allclose(
                        cells.influence[u][:, i],
                        (n[u] - 1) * (value - without),
                        rtol=1e-9,
                        atol=1e-9,
                    )


def lesioned(tasks: int, sets: int, seeds: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Own top heads cost a task 80 points; others' and random heads cost nobody anything."""
    right = np.full((seeds, 1, tasks, sets, tasks), 90)
    for t in range(tasks):
        right[:, :, t, 0, t] = 10
    return right, np.full((seeds, tasks), 90)


class TestRelabelling:
    def test_two_tasks_by_hand(self):
        # one model: as labelled, or exchanged, which turns both D around
        found = made(*lesioned(tasks=2, sets=2)).dissociation()
        np.testing.assert_allclose(found.p[0], [1 / 2, 1 / 2, 1 / 2])
        assert sorted(found.null[:, 0, 0]) == pytest.approx([-100 * 8 / 9, 100 * 8 / 9])
        # three models: 2 x 2 x 2 relabellings one by one; of all alike, two
        three = made(*lesioned(tasks=2, sets=2, seeds=3)).dissociation()
        np.testing.assert_allclose(three.p[0], 1 / 8)
        np.testing.assert_allclose(three.p_shared[0], 1 / 2)

    def test_three_tasks_by_hand(self):
        # of 6 orders, 2 leave a task's own lesion with it; all three keep theirs in the true one alone
        one = made(*lesioned(tasks=3, sets=1)).dissociation()
        np.testing.assert_allclose(one.p[0], [1 / 3, 1 / 3, 1 / 3, 1 / 6])
        two = made(*lesioned(tasks=3, sets=1, seeds=2)).dissociation()
        np.testing.assert_allclose(two.p[0], [1 / 9, 1 / 9, 1 / 9, 1 / 36])
        np.testing.assert_allclose(two.p_shared[0], [1 / 3, 1 / 3, 1 / 3, 1 / 6])

    def test_p_is_small_if_own_lesions_destroy_their_own_task(self):
        found = made(*lesioned(tasks=4, sets=2, seeds=3)).dissociation(draws=2000)  # of 24**3
        assert found.mean.p <= 2 / 2000
        np.testing.assert_allclose(found.p[0, :-1], 1 / 64, atol=0.01)

    def test_p_is_one_if_all_lesions_are_alike(self):
        right = np.broadcast_to(np.array([70, 60]), (2, 2, 2, 4, 2))
        found = made(right, np.array([[90, 80]] * 2)).dissociation()
        assert (found.p == 1).all() and (found.p_shared == 1).all()

    def test_p_is_one_if_own_heads_matter_least(self):
        right, base = lesioned(tasks=3, sets=1)
        assert (made(100 - right, base).dissociation().p[:, -1] == 1).all()

    def test_p_keeps_its_promise_where_labels_mean_nothing(self):
        rng = np.random.default_rng(0)
        p = [
            made(rng.integers(20, 90, size=(2, 1, 3, 1, 3)), np.full((2, 3), 90))
            .dissociation()
            .p[0, -1]
            for _ in range(300)  # all 36 relabellings
        ]
        for level in (2 / 36, 9 / 36, 0.5):
            share = np.mean(np.array(p) <= level + 1e-9)
            assert abs(share - level) <= 2.6 * np.sqrt(level * (1 - level) / 300)

    def test_more_orders_of_tasks_than_draws(self):
        right = np.random.default_rng(0).integers(20, 90, size=(2, 1, 6, 1, 6))  # 720 orders
        found = made(right, np.full((2, 6), 90)).dissociation(draws=99)
        assert found.null.shape == (99, 2, 7)
        np.testing.assert_allclose(found.null[0], found.top.values.mean(0))
        np.testing.assert_allclose((found.p * 99) % 1, 0, atol=1e-9)

    def test_random_heads_are_the_mean_of_the_controls_and_no_part_of_it(self):
        right = np.array([[[[[10, 90], [60, 90], [80, 90]], [[90, 10], [70, 80], [90, 80]]]]])
        found = made(right, np.array([[90, 90]])).dissociation()
        expected = [100 * (0.8 - 0.7) / 0.9, 100 * (0.9 - 0.8) / 0.9]
        np.testing.assert_allclose([found.of(t).random for t in "ab"], expected)
        assert found.mean.random == pytest.approx(np.mean(expected))
        assert found.mean.above == pytest.approx(found.mean.value - np.mean(expected))
        alone = made(right[:, :, :, :1], np.array([[90, 90]])).dissociation()
        assert np.array_equal(alone.p, found.p)

    def test_without_controls_nothing_is_said_of_random_heads(self):
        found = made(OWN, BASE).dissociation()
        for field in ("random", "random_low", "random_high", "above", "above_low", "above_high"):
            assert np.isnan(getattr(found.mean, field)), field
        assert found.controls is None and found.mean.p == 0.5
        with refused("without random controls", "controls=1"):
            found.measure(above_random=True)

    def test_seed_repeats(self):
        right = np.random.default_rng(0).integers(
            20, 90, size=(3, 1, 4, 1, 4)
        )  # 24**3: too many to take all
        iap = made(right, np.full((3, 4), 90))
        one, again, other = (iap.dissociation(draws=60, seed=s) for s in (0, 0, 1))
        assert np.array_equal(one.p, again.p) and np.array_equal(one.null, again.null)
        assert not np.array_equal(one.null, other.null)
        assert one.mean[:3] == other.mean[:3], "the interval is computed, not drawn"


class TestOverSeeds:
    def test_runs_are_joined_in_order(self):
        one, other = made(OWN, BASE), made(OWN + 10, BASE)
        both = IAP.over_seeds([one, other])
        np.testing.assert_allclose(both.scores(), np.concatenate([one.scores(), other.scores()]))
        np.testing.assert_allclose(both.baseline(), [[0.9, 0.8], [0.9, 0.8]])
        assert both.heads.shape[0] == 2
        assert list(both.labels) == ["a", "b"]

    def test_no_runs(self):
        with refused("no runs"):
            IAP.over_seeds([])

    @pytest.mark.parametrize("what", ["tasks", "fractions", "controls", "labels"])
    def test_runs_that_differ(self, what):
        other = {
            "tasks": made(np.full((1, 1, 3, 1, 3), 50), np.full((1, 3), 90)),
            "fractions": made(OWN, BASE, fractions=(0.4,)),
            "controls": made(OWN.repeat(2, 3), BASE),
            "labels": made(OWN, BASE),
        }[what]
        if what == "labels":
            other.labels["b"] = 1 - other.labels["b"]
        with refused("differ"):
            IAP.over_seeds([made(OWN, BASE), other])
