"""Metrics, dissociation scores and the interval of one score, against other libraries and by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fslib import FslibError, Score, dissociation, rank_correlation
from fslib.iap import CONVENTIONS
from fslib.scoring import bootstrap_counts, chance_level, interval, left_out_scores, metric_score

REFERENCE = {
    "accuracy": accuracy_score,
    "f1": lambda y, p: f1_score(y, p, zero_division=0),
    "matthews": matthews_corrcoef,
    "spearman": lambda y, p: spearmanr(y, p).statistic,
}
QUICK = settings(max_examples=40, deadline=None)


def made_up(metric: str, classes: int, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """(predictions (2, 3, n), labels (n,)), related but not equal; few values, so that ranks tie."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=n)
    predictions = np.where(
        rng.random((2, 3, n)) < 0.6, labels, rng.integers(classes, size=(2, 3, n))
    )
    return (predictions / 2, labels / 4) if metric == "spearman" else (predictions, labels)


@pytest.mark.parametrize(
    ("metric", "classes"),
    [
        ("accuracy", 2),
        ("accuracy", 5),
        ("f1", 2),
        ("matthews", 2),
        ("matthews", 4),
        ("spearman", 4),
        ("spearman", 99),
    ],
)
class TestMetricsAgainstReference:
    def test_on_every_leading_axis(self, metric, classes):
        predictions, labels = made_up(metric, classes)
        expected = [[REFERENCE[metric](labels, p) for p in row] for row in predictions]
        np.testing.assert_allclose(metric_score(metric, predictions, labels), expected, atol=1e-12)
        np.testing.assert_allclose(
            metric_score(metric, predictions[0, 1], labels), expected[0][1], atol=1e-12
        )

    def test_counts_are_explicit_resampling(self, metric, classes):
        predictions, labels = made_up(metric, classes)
        counts = bootstrap_counts(len(labels), 4, np.random.default_rng(1))
        found = metric_score(metric, predictions, labels, counts)
        assert found.shape == (2, 3, 4)
        for draw, count in enumerate(counts):
            drawn = np.repeat(np.arange(len(labels)), count)
            for place in np.ndindex(2, 3):
                expected = REFERENCE[metric](labels[drawn], predictions[place][drawn])
                assert found[(*place, draw)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "predictions", "labels"),
    [
        ("f1", [0, 0, 0], [0, 0, 0]),
        ("f1", [0, 0, 0], [1, 1, 0]),
        ("matthews", [1, 1, 1], [0, 1, 0]),
        ("matthews", [0, 1, 0], [1, 1, 1]),
        ("matthews", [2, 2, 2], [2, 2, 2]),
        ("spearman", [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]),
        ("spearman", [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]),
    ],
)
def test_undefined_metric_is_zero(metric, predictions, labels):
    predictions, labels = np.array(predictions), np.array(labels)
    assert metric_score(metric, predictions, labels) == 0
    assert (metric_score(metric, predictions, labels, np.array([[3, 0, 0], [1, 1, 1]])) == 0).all()


def test_unknown_metric_names_the_nearest():
    with pytest.raises(FslibError, match="did you mean 'accuracy'"):
        metric_score("acuracy", np.array([1]), np.array([1]))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_chance_is_what_the_best_constant_answer_scores(metric):
    labels = np.array([0, 1, 1, 0, 0, 0, 0, 1, 0, 0])
    constants = np.array([np.full(10, k) for k in (0, 1)])
    assert chance_level(metric, labels) == pytest.approx(
        metric_score(metric, constants, labels).max()
    )


@pytest.mark.parametrize(
    ("metric", "expected"), [("accuracy", 0.7), ("f1", 0.6 / 1.3), ("matthews", 0)]
)
def test_chance_level_by_hand(metric, expected):
    labels = np.array(
        [0] * 7 + [1] * 3
    )  # f1 of all-positive: precision 0.3, recall 1, so 2 * 0.3 / 1.3
    assert chance_level(metric, labels) == pytest.approx(expected)


def test_chance_of_a_regression_is_zero():
    assert chance_level("spearman", np.array([0.1, 0.9, 2.0])) == 0


# Two tasks, S[pruned, scored].  Lesion reads down a column, released along a row.
TWO = np.array([[0.5, 0.8], [0.7, 0.4]])
TWO_BASE, TWO_CHANCE = np.array([0.9, 0.8]), np.array([0.5, 0.3])
TWO_EXPECTED = {
    "lesion": [100 * (0.7 - 0.5) / 0.9, 100 * (0.8 - 0.4) / 0.8],  # 22.2, 50
    "released": [100 * (0.8 - 0.5) / 0.9, 100 * (0.7 - 0.4) / 0.8],  # 33.3, 37.5
    # R = (S - c) / (S0 - c), with S0 - c = 0.4 and 0.5: [[0, 1], [0.5, 0.2]]; then along a row
    "retention": [100 * (1 - 0), 100 * (0.5 - 0.2)],
}
# Three tasks: the mean over the two others.
THREE = np.array([[0.4, 0.8, 0.7], [0.6, 0.2, 0.5], [0.8, 0.6, 0.3]])
THREE_BASE = np.array([0.8, 0.8, 0.5])
THREE_EXPECTED = {
    # ((0.6 + 0.8)/2 - 0.4)/0.8, ((0.8 + 0.6)/2 - 0.2)/0.8, ((0.7 + 0.5)/2 - 0.3)/0.5
    "lesion": [37.5, 62.5, 60.0],
    # ((0.8 + 0.7)/2 - 0.4)/0.8, ((0.6 + 0.5)/2 - 0.2)/0.8, ((0.8 + 0.6)/2 - 0.3)/0.5
    "released": [43.75, 43.75, 80.0],
    # R with c = 0: [[0.5, 1, 1.4], [0.75, 0.25, 1], [1, 0.75, 0.6]]; 1.2 - 0.5, 0.875 - 0.25, 0.875 - 0.6
    "retention": [70.0, 62.5, 27.5],
}


@pytest.mark.parametrize("convention", CONVENTIONS)
class TestDissociationByHand:
    def test_two_tasks(self, convention):
        found = dissociation(TWO, TWO_BASE, convention, TWO_CHANCE)
        np.testing.assert_allclose(found, TWO_EXPECTED[convention])

    def test_three_tasks(self, convention):
        found = dissociation(THREE, THREE_BASE, convention, np.zeros(3))
        np.testing.assert_allclose(found, THREE_EXPECTED[convention])

    def test_leading_axes(self, convention):
        scores = np.stack(
            [[TWO, TWO / 2], [TWO, 1 - TWO], [TWO / 4, TWO]]
        )  # (3, 2, pruned, scored)
        bases = np.array([[0.9, 0.8], [0.8, 0.7], [0.6, 0.9]])  # one for each of the first axis
        found = dissociation(scores, bases[:, None], convention, TWO_CHANCE)
        assert found.shape == (3, 2, 2)
        for i, j in np.ndindex(3, 2):
            np.testing.assert_allclose(
                found[i, j], dissociation(scores[i, j], bases[i], convention, TWO_CHANCE)
            )

    def test_one_task_is_refused(self, convention):
        with pytest.raises(FslibError, match="at least two tasks"):
            dissociation(np.array([[0.5]]), np.array([0.9]), convention, np.array([0.0]))


@pytest.mark.parametrize("convention", ["lesion", "released"])
@pytest.mark.parametrize("base", [0.0, -0.1])
def test_task_without_a_score_has_no_dissociation(convention, base):
    found = dissociation(TWO, np.array([base, 0.8]), convention)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(TWO_EXPECTED[convention][1])


def test_retention_of_a_task_at_chance_is_undefined():
    # task 0 is at chance: R[t, 0] is undefined, and both tasks' scores hold it
    assert np.isnan(dissociation(TWO, np.array([0.5, 0.8]), "retention", TWO_CHANCE)).all()


def test_retention_needs_chance_levels():
    with pytest.raises(FslibError, match="chance level"):
        dissociation(TWO, TWO_BASE, "retention")


def test_unknown_convention_names_the_nearest():
    with pytest.raises(FslibError, match="did you mean 'lesion'"):
        dissociation(TWO, TWO_BASE, "leson")


def test_easy_task_reads_as_negative_in_the_released_convention_only():
    nothing_lost = np.array([[0.95, 0.8], [0.95, 0.8]])
    base = np.array([0.95, 0.8])
    np.testing.assert_allclose(
        dissociation(nothing_lost, base, "released"), [-100 * 0.15 / 0.95, 100 * 0.15 / 0.8]
    )
    np.testing.assert_allclose(dissociation(nothing_lost, base, "lesion"), 0)


@st.composite
def score_tables(draw):
    """(scores (tasks, tasks), unpruned (tasks,)) with scores in [0, 1]."""
    tasks = draw(st.integers(2, 5))
    scores = draw(arrays(float, (tasks, tasks), elements=st.floats(0, 1)))
    return scores, draw(arrays(float, tasks, elements=st.floats(0.1, 1)))


class TestDissociationProperties:
    @QUICK
    @given(score_tables())
    def test_zero_if_a_task_suffers_alike_from_all_lesions(self, table):
        scores, base = table
        alike = np.broadcast_to(scores[0], scores.shape)
        np.testing.assert_allclose(dissociation(alike, base, "lesion"), 0, atol=1e-9)

    @QUICK
    @given(score_tables(), st.floats(0.2, 5), st.data())
    def test_lesion_does_not_depend_on_a_tasks_scale(self, table, factor, data):
        scores, base = table
        scale = np.ones(len(base))
        scale[data.draw(st.integers(0, len(base) - 1))] = factor
        np.testing.assert_allclose(
            dissociation(scores * scale, base * scale, "lesion"),
            dissociation(scores, base, "lesion"),
            atol=1e-7,
        )

    @QUICK
    @given(score_tables(), st.sampled_from(CONVENTIONS), st.data())
    def test_permuting_tasks_permutes_the_scores(self, table, convention, data):
        scores, base = table
        order = np.array(data.draw(st.permutations(range(len(base)))))
        chance = base / 2
        np.testing.assert_allclose(
            dissociation(scores[np.ix_(order, order)], base[order], convention, chance[order]),
            dissociation(scores, base, convention, chance)[order],
            atol=1e-7,
        )

    @QUICK
    @given(score_tables(), st.sampled_from(["lesion", "released"]))
    def test_bounded_by_the_unpruned_score(self, table, convention):
        scores, base = table
        assert (np.abs(dissociation(scores, base, convention)) <= 100 / base + 1e-7).all()

    @QUICK
    @given(score_tables(), st.sampled_from(CONVENTIONS))
    def test_rises_if_the_own_lesion_hurts_more(self, table, convention):
        scores, base = table
        chance = base / 2
        worse = dissociation(scores - 0.1 * np.eye(len(base)), base, convention, chance)
        assert (worse > dissociation(scores, base, convention, chance)).all()


class TestBootstrap:
    def test_rows_sum_to_n_and_every_example_is_drawn_alike(self):
        counts = bootstrap_counts(7, 4000, np.random.default_rng(0))
        assert counts.shape == (4000, 7)
        assert (counts.sum(1) == 7).all()
        assert (counts >= 0).all()
        np.testing.assert_allclose(counts.mean(0), 1, atol=0.06)  # standard error 0.015
        np.testing.assert_allclose(counts.var(0), 6 / 7, atol=0.1)  # of a binomial (7, 1/7)

    def test_same_seed_repeats_and_another_differs(self):
        one, again, other = (bootstrap_counts(20, 5, np.random.default_rng(s)) for s in (3, 3, 4))
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)

    def test_one_example(self):
        assert (bootstrap_counts(1, 3, np.random.default_rng(0)) == 1).all()

    @QUICK
    @given(
        st.integers(2, 12),
        st.sampled_from(["accuracy", "f1", "matthews", "spearman"]),
        st.integers(0, 99),
    )
    def test_scores_are_bounded_and_intervals_in_order(self, n, metric, seed):
        rng = np.random.default_rng(seed)
        labels, predictions = rng.integers(2, size=n), rng.integers(2, size=(3, n))
        draws = metric_score(metric, predictions, labels, bootstrap_counts(n, 20, rng))
        assert (draws >= (0 if metric in ("accuracy", "f1") else -1) - 1e-12).all()
        assert (draws <= 1 + 1e-12).all()
        low, high = interval(draws)
        assert (low <= high).all()

    @QUICK
    @given(
        st.integers(1, 12),
        st.sampled_from(["accuracy", "f1", "matthews", "spearman"]),
        st.integers(0, 99),
    )
    def test_drawing_every_example_once_changes_nothing(self, n, metric, seed):
        rng = np.random.default_rng(seed)
        labels, predictions = rng.integers(2, size=n), rng.integers(2, size=(3, n))
        once = metric_score(metric, predictions, labels, np.ones((1, n), dtype=int))
        np.testing.assert_allclose(once[:, 0], metric_score(metric, predictions, labels))


class TestInterval:
    def test_percentiles_by_hand(self):
        draws = np.stack([np.arange(101.0), 2 * np.arange(101.0)[::-1]])
        low, high = interval(draws, 0.9)
        np.testing.assert_allclose(low, [5, 10])
        np.testing.assert_allclose(high, [95, 190])

    @pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
    def test_level_outside_0_1(self, level):
        with pytest.raises(FslibError, match=f"level {level} is outside"):
            interval(np.zeros((1, 3)), level)

    def test_two_examples_one_right(self):
        # resamples score 0, 1/2, 1 with probability 1/4, 1/2, 1/4: the middle 95 % is all, the middle 40 % is 1/2
        score = Score("accuracy", np.array([1, 1]), np.array([1, 0]))
        assert score.value == 0.5
        assert score.interval(0.95) == (0, 1)
        assert score.interval(0.4) == (0.5, 0.5)

    def test_all_right_has_no_width(self):
        labels = np.array([0, 1, 1, 2])
        assert Score("accuracy", labels, labels).interval() == (1, 1)

    def test_score_repeats_for_a_seed(self):
        rng = np.random.default_rng(0)
        score = Score("spearman", rng.random(40), rng.random(40))
        assert score.interval(draws=50, seed=1) == score.interval(draws=50, seed=1)
        assert score.interval(draws=50, seed=1) != score.interval(draws=50, seed=2)
        assert float(score) == score.value

    def test_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(300):
            right = (rng.random(80) < 0.7).astype(int)
            draws = metric_score(
                "accuracy", right, np.ones(80, dtype=int), bootstrap_counts(80, 300, rng)
            )
            low, high = interval(draws, 0.9)
            hits += low <= 0.7 <= high
        assert (
            0.84 <= hits / 300 <= 0.95
        )  # standard error 0.017; the percentile interval is a little short


def test_rank_correlation_by_hand():
    a = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    b = np.array([[0.1, 0.2, 0.4], [0.3, 0.5, 0.6]])  # ranks 3 and 4 swapped: 1 - 6 * 2 / (6 * 35)
    assert rank_correlation(a, b) == pytest.approx(1 - 12 / 210)
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a.ravel(), b.ravel()) == pytest.approx(rank_correlation(a, b))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "spearman"])
@pytest.mark.parametrize("classes", [2, 3, 60])
def test_leaving_each_example_out_is_scoring_the_others(metric, classes):
    rng, n = np.random.default_rng(classes), 13
    labels, predictions = rng.integers(classes, size=n), rng.integers(classes, size=(2, 4, n))
    predictions[1, 3], predictions[0, 0] = 1, labels  # a constant answer; all right
    found = left_out_scores(metric, predictions, labels)
    rest = [np.delete(np.arange(n), i) for i in range(n)]
    expected = np.stack(
        [metric_score(metric, predictions[..., kept], labels[kept]) for kept in rest], -1
    )
    assert np.array_equal(found, expected), "the same bits"
    assert found.shape == predictions.shape


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_leaving_each_of_forty_thousand_out_needs_little_memory(metric):
    labels = np.arange(40_430) % 2
    predictions = np.tile(np.arange(40_430) % 3 % 2, (3, 1))
    tracemalloc.start()
    left_out_scores(metric, predictions, labels)
    assert tracemalloc.get_traced_memory()[1] < 50e6, "40,430 x 40,430 numbers would be 13 GB"
    tracemalloc.stop()


def test_one_example_cannot_be_left_out():
    assert np.isnan(left_out_scores("accuracy", np.array([[1], [0]]), np.array([1]))).all()


def test_leaving_out_with_many_classes_needs_little_memory():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(77, size=400), rng.integers(77, size=(50, 400))
    tracemalloc.start()
    left_out_scores("matthews", predictions, labels)
    assert tracemalloc.get_traced_memory()[1] < 50e6, (
        "77 x 77 cells, each without one of them, would be 14 GB"
    )
    tracemalloc.stop()
