"""Two-way t intervals, influences, pooling, relabelling: by hand, against scipy, simulated."""

import itertools

import numpy as np
import pytest
from refusal import refused
from scipy import stats
from simulations import REGIMES, covers, crossed

from fslib.intervals import (
    Cells,
    Interval,
    Measure,
    constant,
    mean_of,
    relabelling_p,
    score_measure,
    weighted,
)
from fslib.scoring import metric_score


def measure(x, name: str = "e") -> Measure:
    """The mean over examples, of x (seeds, n)."""
    x = np.asarray(x, dtype=float)
    return Measure(x.mean(1), {name: x - x.mean(1, keepdims=True)})


class TestTwoWay:
    def test_two_seeds_and_three_examples_by_hand(self):
        # rows 1 2 6 and 5 4 6: means 3 and 5, grand mean 4, columns' means 3 3 6
        # SS seeds = 3 ((3-4)^2 + (5-4)^2) = 6, df 1, MS 6
        # SS examples = 2 ((3-4)^2 + (3-4)^2 + (6-4)^2) = 12, df 2, MS 6
        # residuals x - row - column + 4: -1 0 1 and 1 0 -1, SS 4, df 2, MS 2
        # Var(mean) = (6 + 6 - 2) / 6 = 5/3, of the parts 1, 1 and -1/3
        # df = (5/3)^2 / (1/1 + 1/2 + (1/9)/2) = (25/9) / (28/18) = 25/14 = 1.786;
        # the seeds' share in full: 1 (1 + 1) / 1 = 2, which is more
        found = measure([[1, 2, 6], [5, 4, 6]]).interval()
        assert found == pytest.approx((4, np.sqrt(5 / 3), 25 / 14))
        half = stats.t.ppf(0.975, 25 / 14) * np.sqrt(5 / 3)
        assert (found.low, found.high) == pytest.approx((4 - half, 4 + half))

    def test_seeds_that_happen_to_agree_do_not_lend_their_degrees_of_freedom(self):
        # two seeds of means 0 and 0.2: variance of the mean 0.01, one degree of freedom; no
        # residual; 101 examples, +-1 in turns and a 0: MS / n = 100 / 100 / 101 = 1/101, df 100
        x = np.array([*[-1.0, 1.0] * 50, 0.0])
        seeds, examples = 0.01, 1 / 101
        satterthwaite = (seeds + examples) ** 2 / (seeds**2 / 1 + examples**2 / 100)  # 3.9
        found = measure([x, x + 0.2]).interval()
        assert found == pytest.approx((0.1, np.sqrt(seeds + examples), (seeds + examples) / seeds))
        assert found.df < satterthwaite / 1.9

    def test_one_source_of_variation_leaves_the_plain_t_interval(self):
        x = np.random.default_rng(7).normal(1, 2, 7)
        expected = stats.ttest_1samp(x, 0)
        # one seed; seeds all alike; examples all alike
        for rows in ([x], [x, x, x], np.repeat(x[:, None], 9, 1)):
            found = measure(rows).interval()
            for level in (0.95, 0.5):
                assert found.at(level) == pytest.approx(tuple(expected.confidence_interval(level)))
            assert (found.p, found.df) == pytest.approx((expected.pvalue, 6))

    def test_no_component_of_the_variance_is_negative(self):
        # rows 1 -1 and -1 1: means are alike, and so are columns'; all is residual: no variance
        found = measure([[1, -1], [-1, 1]]).interval()
        assert found == (0, 0, 1) and (found.low, found.high) == (0, 0)
        # columns' means that are alike, and rows that differ: seeds alone
        rows = measure([[3, 1], [-1, 1]]).interval()
        assert rows == pytest.approx((1, 1, 1))  # means 2 and 0, standard error 1

    def test_variances_that_differ_by_rounding_alone_have_one_number_of_degrees_of_freedom(self):
        """Where seeds vary as the residual does, rounding must not decide on df."""
        rng = np.random.default_rng(3)
        x = rng.normal(size=(4, 30)) + 2 * rng.normal(size=30)
        x -= x.mean(1, keepdims=True)
        residual = ((x - x.mean(0)) ** 2).sum() / (3 * 29) / 120
        seeds = np.array([1.0, -1.0, 1.0, -1.0])
        seeds *= np.sqrt(residual * 4 / np.var(seeds, ddof=1))
        df = [Measure(seeds * scale, {"e": x}).interval().df for scale in (1 - 1e-13, 1, 1 + 1e-13)]
        assert df == pytest.approx([df[0]] * 3) and df[0] < 28
        assert Measure(seeds * 0.99, {"e": x}).interval().df == pytest.approx(29), "examples alone"

    def test_several_strata_add_up(self):
        # the sum of two scores of the same 3 seeds on examples of their own
        a, b = np.array([[0, 4], [2, 2], [7, 9]]), np.array([[1, 2, 6], [5, 4, 6], [3, 3, 3]])
        found = weighted([measure(a, "a"), measure(b, "b")], [1.0, 1.0]).interval()
        # of a, as above: examples 1 (df 1), residual 1/3 (df 2)
        # of b: columns' means 3 3 5, grand mean 11/3:
        # SS examples = 3 (4/9 + 4/9 + 16/9) = 8, df 2, MS 4, over 9 cells; rows' means 3 5 3;
        # residuals -4/3 -1/3 5/3, 2/3 -1/3 -1/3, 2/3 2/3 -4/3: SS 72 / 9 = 8, df 4, MS 2, over 9
        # the sums' means by seed: 5 7 11, variance 28/3, over 3 seeds 28/9, df 2
        parts = [(28 / 9, 2), (1, 1), (4 / 9, 2), (-1 / 3, 2), (-2 / 9, 4)]
        variance = sum(v for v, _ in parts)
        df = variance**2 / sum(v**2 / d for v, d in parts)
        capped = 2 * (28 / 9 + 1 + 4 / 9) / (28 / 9)
        assert found == pytest.approx((4 + 11 / 3, np.sqrt(variance), min(df, capped)))

    def test_nothing_varies(self):
        for value, p in ((0.5, 0), (0.0, 1)):
            found = measure(np.full((3, 4), value)).interval()
            assert (*found[:2], found.low, found.high) == pytest.approx((value, 0, value, value))
            assert found.p == p and found.mde == 0

    @pytest.mark.parametrize("x", [[[1.0, np.nan], [0, 1]], [[np.nan, np.nan]]])
    def test_what_is_not_defined_has_no_interval(self, x):
        found = measure(x).interval()
        assert np.isnan([*found, *found.at(0.9), found.p, found.mde]).all()
        only_influence = Measure(np.array([1.0]), {"e": np.array([[np.nan, 0.0]])}).interval()
        assert only_influence.value == 1 and np.isnan(only_influence.se)
        assert np.isnan(measure([[1.0], [2.0]]).interval().se), "one example is too few"


class TestInterval:
    def test_levels_p_and_minimum_detectable_effect_by_hand(self):
        # of 10 degrees of freedom: t at 97.5 % 2.2281, at 95 % 1.8125, at 80 % 0.8791
        i = Interval(3.0, 2.0, 10.0)
        assert (i.low, i.high) == pytest.approx((3 - 4.4563, 3 + 4.4563), abs=1e-4)
        assert i.at(0.9) == pytest.approx((3 - 3.6249, 3 + 3.6249), abs=1e-4)
        assert i.mde == pytest.approx(2 * (2.2281 + 0.8791), abs=2e-4)
        assert i.p == pytest.approx(2 * stats.t.sf(1.5, 10))
        assert Interval(2.2281 * 2, 2.0, 10.0).p == pytest.approx(0.05, abs=1e-4)
        assert i.scaled(-2.0) == (-6, 4, 10)
        x = np.array([[1, 2, 6], [5, 4, 6]])
        assert measure(x).scaled(-2.0).interval() == measure(-2 * x).interval()


class TestTogether:
    def test_differences_and_means_are_those_of_the_values(self):
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(2, 4, 9))
        assert (measure(x) - measure(y)).interval() == pytest.approx(measure(x - y).interval())
        mean = mean_of([measure(x), measure(y)]).interval()
        assert mean == pytest.approx(measure((x + y) / 2).interval())
        once = (measure(x) - measure(y[:1])).interval()  # it stands for every seed
        assert once == pytest.approx(measure(x - y[0]).interval())
        own = measure(x).interval()
        found = (measure(x) - constant(0.25, measure(x))).interval()
        assert found == pytest.approx((own.value - 0.25, own.se, own.df))
        assert constant(0.25, measure(x)).interval() == (0.25, 0, 1)

    def test_measures_that_do_not_belong_together_are_refused(self):
        with refused("measures of [2, 3] models", "cannot be paired"):
            weighted([measure(np.eye(2)), measure(np.eye(3)[:, :2])], [1.0, 1.0])
        with refused("measures of [2, 3] examples of e", "cannot be paired"):
            mean_of([measure(np.eye(2)), measure(np.eye(3)[:2])])
        with refused("mean of no measure"):
            mean_of([])

    def test_cells_are_measures_at_their_place(self):
        rng = np.random.default_rng(4)
        x, y = rng.normal(size=(2, 3, 5, 2, 4))  # (seeds, n, rows, cols)

        def cells(of: np.ndarray) -> Cells:
            return Cells(of.mean(1), {"e": of - of.mean(1, keepdims=True)})

        low, high = (cells(x) - cells(y)).intervals()
        for i, j in np.ndindex(2, 4):
            expected = measure((x - y)[:, :, i, j]).interval()
            assert (low[i, j], high[i, j]) == pytest.approx((expected.low, expected.high))
            one = cells(x).measure(i, j).interval()
            assert one == pytest.approx(measure(x[:, :, i, j]).interval())


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "spearman"])
def test_influences_of_a_score_are_those_of_an_explicit_jackknife(metric):
    rng, n = np.random.default_rng(0), 17
    labels = rng.integers(2, size=n) if metric != "spearman" else rng.integers(5, size=n) / 4
    predictions = rng.integers(2, size=(3, n)) if metric != "spearman" else rng.normal(size=(3, n))
    found = score_measure("t", metric, predictions, labels)
    np.testing.assert_allclose(found.values, metric_score(metric, predictions, labels))
    for s, i in np.ndindex(3, n):
        whole = metric_score(metric, predictions[s], labels)
        rest = metric_score(metric, np.delete(predictions[s], i), np.delete(labels, i))
        assert found.influence["t"][s, i] == pytest.approx((n - 1) * (whole - rest), abs=1e-12)


class TestRelabelling:
    def test_two_labellings_of_two_models_by_hand(self):
        # the true one first: model 0 has 3, else 1; model 1 has 5, else 4: means 4, 3.5, 3, 2.5
        values = np.array([[3.0, 5.0], [1.0, 4.0]])
        p, shared, each = relabelling_p(values, 99, np.random.default_rng(0))
        assert sorted(each.tolist()) == [2.5, 3, 3.5, 4] and each[0] == 4
        assert (p, shared) == (1 / 4, 1 / 2)
        # where model 1 is exchanged: its 4 is the true one; 3.5, with 4 as large or larger
        values = np.array([[3.0, 4.0], [1.0, 5.0]])
        p, shared, each = relabelling_p(values, 99, np.random.default_rng(0))
        assert each[0] == 3.5 and (p, shared) == (2 / 4, 1 / 2)

    def test_ties_count_even_after_rounding_errors(self):
        values = np.array([[0.1 + 0.2], [0.3], [0.0]])
        p, shared, _ = relabelling_p(values, 99, np.random.default_rng(0))
        assert p == shared == pytest.approx(2 / 3)

    def test_every_cell_has_its_own_p_and_what_is_not_defined_none(self):
        # (labellings, models, cells)
        values = np.stack([[[2.0, 1.0, np.nan]], [[1.0, 2.0, np.nan]]])
        p, shared, _ = relabelling_p(values, 99, np.random.default_rng(0))
        np.testing.assert_allclose([p, shared], [[0.5, 1, np.nan]] * 2)

    def test_all_combinations_if_they_are_few_else_as_many_as_are_asked_for(self):
        values = np.random.default_rng(0).normal(size=(3, 4))
        _, _, every = relabelling_p(values, 81, np.random.default_rng(0))
        orders = itertools.product(range(3), repeat=4)
        expected = [np.mean([values[c, m] for m, c in enumerate(chosen)]) for chosen in orders]
        np.testing.assert_allclose(every, expected)
        rngs = [np.random.default_rng(seed) for seed in (0, 0, 1)]
        drawn, again, other = (relabelling_p(values, 80, rng)[2] for rng in rngs)
        assert drawn.shape == (80,) and drawn[0] == pytest.approx(values[0].mean())
        assert np.array_equal(drawn, again) and not np.array_equal(drawn, other)

    def test_the_smallest_p_counts_the_true_one(self):
        values = np.zeros((10, 6))
        values[0] = 1
        p, shared, _ = relabelling_p(values, 99, np.random.default_rng(0))
        assert p == pytest.approx(1 / 99) and shared == pytest.approx(1 / 10)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seeds", [3, 10])
def test_the_interval_holds_the_truth_as_often_as_it_says(regime, seeds):
    """Of 400 simulations, whose standard error is 0.011: 0.93 to 0.985."""
    rngs = (np.random.default_rng([seeds, i]) for i in range(400))
    found = (crossed(rng, seeds, REGIMES[regime], 0.4).interval().at(0.95) for rng in rngs)
    assert 0.93 <= np.mean([covers(interval, 0.4) for interval in found]) <= 0.985
