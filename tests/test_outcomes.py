"""The tables of notebooks 04 to 08, on arrays small enough to check by hand and on the committed records."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from refusal import refused

import fslib
from fslib import charts, outcomes, reading
from fslib.dissociation import IAP
from fslib.scoring import exchanged_correlations, p_value, rank_correlation


@pytest.fixture(scope="module")
def study():
    return fslib.Study("mini")


# --- statistics


def test_differences_are_paired_draw_by_draw():
    """A method that is better by 0.1 in every resample differs by exactly 0.1, however wide its own interval is."""
    draws = np.random.default_rng(0).normal(0.5, 0.2, 500)
    found = {"a": {"x": (0.5, draws), "y": (0.4, draws)}, "b": {"x": (0.6, draws + 0.1), "y": (0.6, draws + 0.2)}}
    table = outcomes.compared(found, "method", "task", "a", 3).set_index(["method", "task"])
    for task, difference in {"x": 0.1, "y": 0.2, "mean": 0.15}.items():
        row = table.loc[("b", task)]
        assert [row[k] for k in ("minus a", "diff low", "diff high")] == pytest.approx([difference] * 3)
        assert row["high"] - row["low"] > 0.5 and row["seeds"] == 3
    assert table.loc[("b", "mean"), "score"] == pytest.approx(0.6)
    assert (table.loc["a"][["minus a", "diff low", "diff high"]] == 0).all(axis=None)


def resampled(labels: np.ndarray, seeds: int, draws: int = 4000) -> outcomes.Resampled:
    return outcomes.Resampled({"t": labels}, seeds, draws)


def test_scores_are_resampled_over_seeds_and_examples():
    labels = np.arange(400) % 2
    steady = np.stack([np.where(np.arange(400) < 300, labels, 1 - labels)] * 4)  # 75 % right, every seed alike
    value, draws = resampled(labels, 4).score("t", "accuracy", steady)
    assert value == 0.75 and draws.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.1)
    # all right or all wrong: what varies is the seed, and examples add nothing
    split = np.stack([labels, labels, 1 - labels, 1 - labels])
    value, draws = resampled(labels, 4).score("t", "accuracy", split)
    assert value == 0.5 and draws.std() == pytest.approx(0.5 / 2, rel=0.1)
    assert set(np.unique(draws)) <= {0, 0.25, 0.5, 0.75, 1}


def test_methods_are_scored_in_the_same_resamples():
    labels, rng = np.arange(100) % 2, np.random.default_rng(1)
    predictions = rng.integers(2, size=(3, 100))
    both = resampled(labels, 3)
    assert np.array_equal(both.score("t", "accuracy", predictions)[1], both.score("t", "accuracy", predictions)[1])
    assert np.array_equal(
        both.score("t", "accuracy", predictions)[1], resampled(labels, 3).score("t", "accuracy", predictions)[1]
    )


def test_exchanges_of_three_tasks_by_hand():
    similarity = np.array([[1, 0.9, 0.5], [0.9, 1, 0.1], [0.5, 0.1, 1]])
    pairs, values = [(0, 1), (0, 2), (1, 2)], np.array([1.0, 2.0, 3.0])
    found, exact = exchanged_correlations(similarity, pairs, values, np.random.default_rng(0))
    # the more similar the pair, the smaller the value: -1 as they are; six orders of three similarities
    assert exact and found[0] == -1
    every = [rank_correlation(np.array(order), values) for order in itertools.permutations([0.9, 0.5, 0.1])]
    assert sorted(found) == pytest.approx(sorted(every))
    assert p_value(-found, np.asarray(-found[0]), exact) == pytest.approx(1 / 6)


def test_too_many_exchanges_are_drawn_at_random_and_repeat():
    rng = np.random.default_rng(0)
    similarity = rng.random((8, 8))
    pairs = list(itertools.combinations(range(8), 2))
    values = rng.random(len(pairs))
    runs = [exchanged_correlations(similarity, pairs, values, np.random.default_rng(s), 300) for s in (0, 0, 1)]
    assert not runs[0][1] and len(runs[0][0]) == 301
    assert np.array_equal(runs[0][0], runs[1][0]) and not np.array_equal(runs[0][0], runs[2][0])
    own = rank_correlation(np.array([similarity[p] for p in pairs]), values)
    assert all(run[0][0] == pytest.approx(own) for run in runs)


def test_resampling_seeds_widens_the_interval_when_models_differ():
    """Two models, one specialized (D = 100) and one not (D = 0): examples cannot tell, seeds can."""
    labels = {t: np.arange(40) % 2 for t in "ab"}
    heads = np.zeros((2, 1, 2, 1, 1, 4), dtype=bool)
    unpruned = {t: np.stack([y, y]) for t, y in labels.items()}
    lesioned = {t: np.broadcast_to(y, (2, 1, 2, 1, 40)).copy() for t, y in labels.items()}
    for i, t in enumerate("ab"):
        lesioned[t][0, 0, i, 0] = 1 - labels[t]  # its own lesion leaves nothing in the first model
    iap = IAP(("a", "b"), ("accuracy",) * 2, (0.25,), heads, labels, unpruned, lesioned)
    assert iap.dissociation(draws=50).mean.value == 50
    fixed, both = (iap.bootstrap(draws=500, over_seeds=over)["mean"].draws for over in (False, True))
    assert np.unique(fixed) == [50] and set(np.unique(both)) == {0, 50, 100}


# --- verdicts


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.1, 2.0, 0.01, "supported"),
        (0.1, 2.0, 0.2, "undecided at this scale"),
        (-0.1, 2.0, 0.01, "undecided at this scale"),
        (0.0, 0.0, 0.01, "undecided at this scale"),
        (-2.0, -0.1, 0.01, "not supported"),
        (np.nan, np.nan, np.nan, "undecided at this scale"),
    ],
)
def test_a_verdict_follows_from_its_interval(low, high, p, verdict):
    assert reading.decided(low, high, p) == verdict


def test_every_claim_has_a_verdict_that_follows_from_its_row(study):
    claims = reading.claims(study).set_index("claim")
    assert list(claims.index) == [f"C{i}" for i in range(1, 7)]
    for claim in ("C3", "C4", "C5"):
        row = claims.loc[claim]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["verdict"] == reading.decided(row["low"], row["high"])
    c2 = claims.loc["C2"]
    assert c2["verdict"] == reading.decided(-c2["high"], -c2["low"], c2["p"])
    assert claims.loc["C6", "value"] == 0 and claims.loc["C6", "verdict"] == "supported"
    assert claims["seeds"].tolist() == [2, 1, 5, 5, 3, 5]


def test_every_difference_from_the_release_says_what_was_measured(study):
    table = reading.differences(study).set_index("what")["measured effect"]
    assert len(table) == 9
    measured = table[~table.str.startswith("not measured")]
    assert len(measured) == 6 and measured.str.contains(r"\d").all()


# --- tables of the committed records


def test_plain_training_differs_from_itself_by_nothing(study):
    scores = outcomes.endings(study).set_index(["ending", "task"])
    assert (scores.loc["plain"][["minus plain", "diff low", "diff high"]] == 0).all(axis=None)
    assert set(scores.index.get_level_values("task")) == {*study.profile.tasks, "mean"}
    means = scores.drop("mean", level="task")["score"].groupby("ending").mean()
    assert means.to_numpy() == pytest.approx(scores.xs("mean", level="task")["score"].loc[means.index].to_numpy())


def test_a_row_of_no_set_stays_where_it_was_unless_the_freeze_leaks(study):
    moved = outcomes.movement(study).set_index("ending")["rows of heads in no set"]
    assert moved["IAT"] == moved["IAT, others frozen"] == 0 and moved["plain"] == 1
    assert moved["IAT, leaky"] > 0.1


def test_one_trunk_costs_less_than_every_ending_alone(study):
    steps = outcomes.counted_steps(study).set_index("how")["steps"]
    config = study.endings_unit(0).config
    ends = {name: 0 if spec is None else round(spec["delta"] * config.steps) for name, spec in config.endings.items()}
    ends["plain"] = min(e for e in ends.values() if e)  # it leaves the trunk last
    assert steps["every ending from the first step"] == len(ends) * config.steps
    assert steps["one trunk, all endings"] == config.steps - min(ends.values()) + sum(ends.values())


def test_selections_are_compared_with_the_first(study):
    table = outcomes.selections(study)
    assert table["selection"][0] == "gradient" and table["minus the first"][0] == 0
    assert table.set_index("selection").loc["ablation", "forward passes"] == 3 * 12 + 1
    left = outcomes.random_controls(study)
    assert left["score left (%)"].between(0, 150).all()


# --- plots


def test_plots_take_what_is_not_defined(study):
    """A model that has learned nothing has no D: the rest of the figure is drawn."""
    table = outcomes.encoders(study)
    table.loc[0, ["D", "low", "high", "p", "random heads"]] = np.nan
    for figure in (charts.encoders(table), charts.selections(outcomes.selections(study))):
        assert figure.get_axes()
        plt.close(figure)


def test_a_missing_pruning_is_named(study):
    record = study.store.get(study.endings_unit(0))
    with refused("no pruning of 'PCGrad'"):
        outcomes.read_named_iap(record, "PCGrad")


def test_tables_are_frames_with_one_row_a_thing(study):
    assert len(outcomes.encoders(study)) == len(study.profile.encoders)
    assert len(outcomes.similarity(study)) == 6
    transfer = outcomes.transfer(study)
    assert isinstance(transfer, pd.DataFrame) and len(transfer) == 3 * 2 * 5
    assert not transfer.duplicated(["part", "source", "size"]).any()
