"""Metrics, dissociation and the interval of a score, against other libraries and by hand."""

import tracemalloc

import numpy as np
import pytest
from refusal import refused
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fslib import dissociation, rank_correlation
from fslib.evaluation import Score
from fslib.iap import CONVENTIONS
from fslib.scoring import chance_level, left_out_scores, metric_score

REFERENCE = {
    "accuracy": accuracy_score,
    "f1": lambda y, p: f1_score(y, p, zero_division=0),
    "matthews": matthews_corrcoef,
    "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
}
METRICS = pytest.mark.parametrize("metric", REFERENCE)


@METRICS
@pytest.mark.parametrize("classes", [2, 5, 99])
def test_metrics_against_other_libraries_on_every_leading_axis(metric, classes):
    rng, n = np.random.default_rng(classes), 30
    labels, other = rng.integers(classes, size=n), rng.integers(classes, size=(2, 3, n))
    predictions = np.where(rng.random((2, 3, n)) < 0.6, labels, other)
    if metric == "f1":
        predictions, labels = predictions % 2, labels % 2
    if metric == "spearman":
        predictions, labels = predictions / 2, labels / 4
    expected = [[REFERENCE[metric](labels, p) for p in row] for row in predictions]
    np.testing.assert_allclose(metric_score(metric, predictions, labels), expected, atol=1e-12)
    one = metric_score(metric, predictions[0, 1], labels)
    np.testing.assert_allclose(one, expected[0][1], atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "predictions", "labels"),
    [
        ("f1", [0, 0, 0], [1, 1, 0]),
        ("matthews", [1, 1, 1], [0, 1, 0]),
        ("matthews", [0, 1, 0], [1, 1, 1]),
        ("spearman", [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]),
    ],
)
def test_an_undefined_metric_is_zero(metric, predictions, labels):
    assert metric_score(metric, np.array(predictions), np.array(labels)) == 0


def test_what_cannot_be_scored_is_refused():
    one, broken = np.array([1]), np.array([np.nan])
    for score in (metric_score, left_out_scores):
        with refused("unknown metric 'acuracy'", "did you mean 'accuracy'"):
            score("acuracy", one, one)
        for pair in ((broken, one), (one, broken)):
            with refused("spearman", "NaN"):
                score("spearman", *pair)


@pytest.mark.parametrize(
    ("metric", "expected"), [("accuracy", 0.7), ("f1", 0.6 / 1.3), ("matthews", 0)]
)
def test_chance_is_what_the_best_constant_answer_scores(metric, expected):
    # f1 of all-positive: precision 0.3, recall 1, so 2 * 0.3 / 1.3
    labels = np.array([0] * 7 + [1] * 3)
    constants = np.array([np.full(10, k) for k in (0, 1)])
    best = metric_score(metric, constants, labels).max()
    assert chance_level(metric, labels) == pytest.approx(expected) == pytest.approx(best)
    assert chance_level("spearman", np.array([0.1, 0.9, 2.0])) == 0


@METRICS
@pytest.mark.parametrize("classes", [2, 3, 60])
def test_leaving_each_example_out_is_scoring_the_others(metric, classes):
    rng, n = np.random.default_rng(classes), 13
    labels, predictions = rng.integers(classes, size=n), rng.integers(classes, size=(2, 4, n))
    predictions[1, 3], predictions[0, 0] = 1, labels  # a constant answer; all right
    found = left_out_scores(metric, predictions, labels)
    rest = [np.delete(np.arange(n), i) for i in range(n)]
    expected = [metric_score(metric, predictions[..., kept], labels[kept]) for kept in rest]
    assert np.array_equal(found, np.stack(expected, -1)), "the same bits"
    assert np.isnan(left_out_scores(metric, predictions[..., :1], labels[:1])).all()


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize(("classes", "sets", "n"), [(2, 3, 40_430), (77, 50, 400)])
def test_leaving_out_needs_little_memory(metric, classes, sets, n):
    """Else n x n numbers would be 13 GB, and 77 x 77 cells, each without one of them, 14."""
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(classes, size=n), rng.integers(classes, size=(sets, n))
    tracemalloc.start()
    left_out_scores(metric, predictions, labels)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# Two tasks, S[pruned, scored]. Lesion reads down a column, released along a row.
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
    # R with c = 0: [[0.5, 1, 1.4], [0.75, 0.25, 1], [1, 0.75, 0.6]]
    "retention": [70.0, 62.5, 27.5],
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_dissociation_by_hand(convention):
    found = dissociation(TWO, TWO_BASE, convention, TWO_CHANCE)
    np.testing.assert_allclose(found, TWO_EXPECTED[convention])
    for axes in ((), (3, 2)):  # leading axes, of each of which every task has a base
        scores, bases = np.tile(THREE, (*axes, 1, 1)), np.tile(THREE_BASE, (*axes, 1))
        found = dissociation(scores, bases, convention, np.zeros(3))
        np.testing.assert_allclose(found, np.tile(THREE_EXPECTED[convention], (*axes, 1)))


def test_a_task_without_a_score_has_no_dissociation():
    for convention in ("lesion", "released"):
        for base in (0.0, -0.1):
            found = dissociation(TWO, np.array([base, 0.8]), convention)
            assert np.isnan(found[0]) and found[1] == pytest.approx(TWO_EXPECTED[convention][1])
    # task 0 at chance: R[t, 0] is undefined, and both tasks' scores hold it
    assert np.isnan(dissociation(TWO, np.array([0.5, 0.8]), "retention", TWO_CHANCE)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.array([[0.5]]), np.array([0.9])), ["at least two tasks", "(1, 1)"]),
        ((TWO, TWO_BASE, "retention"), ["chance level"]),
        ((TWO, TWO_BASE, "leson"), ["did you mean 'lesion'"]),
        ((np.ones((4, 2, 2)), np.ones((3, 2))), ["(3, 2) does not belong to", "(4, 2, 2)"]),
    ],
)
def test_what_has_no_dissociation_is_refused(arguments, words):
    with refused(*words):
        dissociation(*arguments)


def test_the_interval_of_a_score_is_the_t_interval_over_examples():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=40)
    predictions = np.where(rng.random(40) < 0.7, labels, 1 - labels)
    score, right = Score("accuracy", predictions, labels), predictions == labels
    expected = stats.ttest_1samp(right, 0)
    for level in (0.95, 0.5):
        interval = expected.confidence_interval(level)
        assert score.interval(level) == pytest.approx(tuple(interval))
    assert float(score) == score.value == right.mean()
    for level in (0.0, 1.0, 95.0):
        with refused(f"level {level!r} is outside"):
            score.interval(level)


def test_a_score_prints_as_one_line():
    score = Score("f1", np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]), "only a guess")
    low, high = score.interval()
    text = f"Score(f1 {score.value:.3f}, 95 % [{low:.3f}, {high:.3f}], n=4; only a guess)"
    assert repr(score) == text


def test_rank_correlation_by_hand():
    a = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    b = np.array([[0.1, 0.2, 0.4], [0.3, 0.5, 0.6]])  # ranks 3 and 4 swapped: 1 - 6 * 2 / (6 * 35)
    assert rank_correlation(a, b) == pytest.approx(1 - 12 / 210)
    assert rank_correlation(a, -(a**3)) == pytest.approx(-1)
    with refused("finite"):
        rank_correlation(a, a * np.nan)
