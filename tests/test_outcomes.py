"""The questions' statistics, verdicts and tables, on arrays to check by hand and on the committed records."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from refusal import refused

import fslib
from fslib.dissociation import IAP
from fslib.questions import q03_pruning, q04_models, q05_similarity, q06_iat, q07_transfer, q08_claims
from fslib.scoring import Bootstrap, p_value, rank_correlation
from fslib.study.evidence import SharedSamples, differences, exchanged_correlations, verdict
from fslib.study.units import recorded_iap


@pytest.fixture(scope="module")
def study():
    return fslib.Study("mini")


# --- statistics


def test_differences_are_paired_draw_by_draw():
    """A method that is better by 0.1 in every resample differs by exactly 0.1, however wide its own interval is."""
    draws = np.random.default_rng(0).normal(0.5, 0.2, 500)
    values = {
        "a": {"x": Bootstrap(0.5, draws), "y": Bootstrap(0.4, draws)},
        "b": {"x": Bootstrap(0.6, draws + 0.1), "y": Bootstrap(0.6, draws + 0.2)},
    }
    table = differences(values, "a", ("method", "task")).set_index(["method", "task"])
    for task, difference in {"x": 0.1, "y": 0.2, "mean": 0.15}.items():
        row = table.loc[("b", task)]
        assert [row[k] for k in ("minus a", "diff low", "diff high")] == pytest.approx([difference] * 3)
        assert row["high"] - row["low"] > 0.5
    assert table.loc[("b", "mean"), "score"] == pytest.approx(0.6)
    assert (table.loc["a"][["minus a", "diff low", "diff high"]] == 0).all(axis=None)


def steps(start: float, step: float) -> Bootstrap:
    """A number whose 41 draws go up and down from it by one step each: its 95 % interval ends 19 steps away."""
    return Bootstrap(start, start + step * np.arange(-20, 21))


# in the order of the draws: what a method's draws are minus the reference's follows by hand
MADE = {
    "new": {"x": steps(0.7, 0.01), "y": steps(0.2, -0.01)},
    "reference": {"x": steps(0.5, 0.002), "y": steps(0.6, 0.01)},
}


def test_a_difference_is_the_method_minus_the_reference_by_hand():
    table = differences(MADE, "reference", ("how", "what")).set_index(["how", "what"])
    columns = ["score", "low", "high", "minus reference", "diff low", "diff high"]
    assert list(table) == columns
    assert list(table.index) == [(how, what) for how in MADE for what in ("x", "y", "mean")]
    expected = {
        # better by 0.2, by a step of 0.008 a draw
        ("new", "x"): (0.7, 0.51, 0.89, 0.2, 0.2 - 19 * 0.008, 0.2 + 19 * 0.008),
        # worse by 0.4; its draws fall where the reference's rise, so the steps add up
        ("new", "y"): (0.2, 0.01, 0.39, -0.4, -0.4 - 19 * 0.02, -0.4 + 19 * 0.02),
        # of both draw by draw: 0.01 and -0.01 a draw cancel; the reference's mean moves by 0.006 a draw
        ("new", "mean"): (0.45, 0.45, 0.45, -0.1, -0.1 - 19 * 0.006, -0.1 + 19 * 0.006),
        ("reference", "x"): (0.5, 0.5 - 19 * 0.002, 0.5 + 19 * 0.002, 0, 0, 0),
        ("reference", "y"): (0.6, 0.41, 0.79, 0, 0, 0),
        ("reference", "mean"): (0.55, 0.55 - 19 * 0.006, 0.55 + 19 * 0.006, 0, 0, 0),
    }
    for row, numbers in expected.items():
        assert table.loc[row, columns].tolist() == pytest.approx(list(numbers), abs=1e-12)
    assert (table.loc["reference", columns[3:]] == 0).all(axis=None), "exactly"


def test_another_reference_turns_the_sign():
    one, other = (differences(MADE, name, ("how", "what")).set_index(["how", "what"]) for name in ("reference", "new"))
    for what in ("x", "y", "mean"):
        there, back = one.loc[("new", what)], other.loc[("reference", what)]
        assert back["minus new"] == pytest.approx(-there["minus reference"])
        assert (back["diff low"], back["diff high"]) == pytest.approx((-there["diff high"], -there["diff low"]))
    assert (other.loc["new", ["minus new", "diff low", "diff high"]] == 0).all(axis=None)


def test_differences_name_the_value_and_leave_out_the_mean_on_request():
    whole, named = (differences(MADE, "reference", ("how", "what"), value=value) for value in ("score", "D"))
    assert "score" not in named and named.rename(columns={"D": "score"}).equals(whole)
    parts = differences(MADE, "reference", ("how", "what"), with_mean=False)
    assert parts.equals(whole[whole["what"] != "mean"].reset_index(drop=True)) and len(parts) == 4


def test_a_value_that_is_not_defined_stays_undefined():
    values = MADE | {"none": {"x": Bootstrap(np.nan, np.full(41, np.nan)), "y": steps(0.6, 0.01)}}
    table = differences(values, "reference", ("how", "what")).set_index(["how", "what"])
    assert table.loc["none"].loc[["x", "mean"]].isna().all(axis=None)
    assert table.loc[("none", "y"), "minus reference"] == 0 and table.drop("none", level=0).notna().all(axis=None)


def resampled(labels: np.ndarray, seeds: int, draws: int = 4000) -> SharedSamples:
    return SharedSamples({"t": labels}, seeds, draws)


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


YES, NO, OPEN = "supported", "not supported", "undecided at this scale"
# What is decided for p far below 0.05, just below it, exactly 0.05, just above, far above, and NaN.
P = (0.01, np.nextafter(0.05, 0), 0.05, np.nextafter(0.05, 1), 0.2, np.nan)
DECISIONS = {
    "above 0": ((0.1, 2.0), (YES, YES, OPEN, OPEN, OPEN, OPEN)),
    "just above 0": ((np.nextafter(0, 1), 2.0), (YES, YES, OPEN, OPEN, OPEN, OPEN)),
    "touching 0 from above": ((0.0, 2.0), (OPEN,) * 6),
    "holding 0": ((-1.0, 3.0), (OPEN,) * 6),
    "0 alone": ((0.0, 0.0), (OPEN,) * 6),
    "touching 0 from below": ((-2.0, 0.0), (OPEN,) * 6),
    "just below 0": ((-2.0, -np.nextafter(0, 1)), (NO,) * 6),
    "below 0": ((-2.0, -0.1), (NO,) * 6),
    "not defined": ((np.nan, np.nan), (OPEN,) * 6),
}


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("place", range(len(P)), ids=map(str, P))
def test_a_verdict_follows_from_its_interval_and_its_p(where, place):
    (low, high), decisions = DECISIONS[where]
    assert verdict(low, high, P[place]) == decisions[place]


@pytest.mark.parametrize("where", DECISIONS)
def test_without_a_null_the_interval_decides(where):
    (low, high), decisions = DECISIONS[where]
    assert verdict(low, high) == decisions[0]


def test_a_large_p_alone_refutes_nothing():
    assert verdict(-1.0, 3.0, 0.2) == "undecided at this scale"


def made(value: float, low: float, high: float, p: float) -> fslib.Dissociation:
    """A dissociation whose mean over tasks and fractions is this, and everything else a number never to be read."""

    def cells(number: float) -> np.ndarray:
        return np.array([[777.0] * 3, [777.0, 777.0, number]])

    numbers = (cells(value), cells(low), cells(high), cells(value)[None], *map(cells, (0.5, 0.1, 0.9, p)))
    return fslib.Dissociation("lesion", ("a", "b"), (0.3,), *numbers)


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("place", range(len(P)), ids=map(str, P))
def test_every_question_with_a_null_says_the_same_of_the_same_numbers(where, place):
    (low, high), decisions = DECISIONS[where]
    p, decided = P[place], decisions[place]
    assert q03_pruning.sentence(made(1.0, low, high, p)).startswith(f"C1 {decided} for this model: mean D = 1.0 points")
    rows = pd.DataFrame({"low": [low], "high": [high], "p": [p]})
    assert q04_models.holds(rows).tolist() == [decided == YES]
    # C2 says that a number is below 0
    mirrored = {"similarity": [q05_similarity.PRIMARY], "low": [-high], "high": [-low], "p": [p]}
    correlations = pd.DataFrame(mirrored | {"rank correlation with D": [-1.0]})
    assert q05_similarity.claim(correlations) == decided
    assert q05_similarity.sentence(correlations).startswith(f"C2 {decided}: -1.00 ")


@pytest.mark.parametrize("where", DECISIONS)
def test_every_question_without_a_null_says_the_same_of_the_same_numbers(where):
    (low, high), decisions = DECISIONS[where]
    numbers = {"diff low": [low, 9.0], "diff high": [high, 9.0]}
    rows = pd.DataFrame({"ending": "IAT", "task": ["mean", "a"], "minus plain": [1.0, 9.0]} | numbers)
    found = q06_iat.sentences(rows, rows).splitlines()
    assert [line.split(": ")[0] for line in found] == [f"C3 {decisions[0]}", f"C4 {decisions[0]}"]
    assert ": D +1.00 points" in found[0] and ": score +100.00 points" in found[1]
    sizes = {"part": "full", "source": "IAT", "size": ["mean", "8"], "minus multi-task": [1.0, 9.0]}
    assert q07_transfer.sentence(pd.DataFrame(sizes | numbers)).startswith(f"C5 {decisions[0]}: +100.00 points ")


def test_every_claim_has_a_verdict_that_follows_from_its_row(study):
    claims = q08_claims.claims(study).set_index("claim")
    assert list(claims.index) == [f"C{i}" for i in range(1, 7)]
    for claim in ("C3", "C4", "C5"):
        row = claims.loc[claim]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["verdict"] == verdict(row["low"], row["high"])
    c2 = claims.loc["C2"]
    assert c2["verdict"] == verdict(-c2["high"], -c2["low"], c2["p"])
    c1 = claims.loc["C1"]
    assert c1["low"] <= c1["value"] <= c1["high"] and c1["verdict"] == verdict(c1["low"], c1["high"], c1["p"])
    assert claims.loc["C6", "value"] == 0 and claims.loc["C6", "verdict"] == "supported"
    assert claims["seeds"].tolist() == [2, 1, 5, 5, 3, 5]


def test_every_difference_from_the_release_says_what_was_measured(study):
    table = q08_claims.release_differences(study).set_index("what")["measured effect"]
    assert len(table) == 9
    measured = table[~table.str.startswith("not measured")]
    assert len(measured) == 6 and measured.str.contains(r"\d").all()


# --- tables of the committed records


def test_plain_training_differs_from_itself_by_nothing(study):
    scores = q06_iat.scores(study).set_index(["ending", "task"])
    assert (scores["seeds"] == 5).all()
    assert (scores.loc["plain"][["minus plain", "diff low", "diff high"]] == 0).all(axis=None)
    assert set(scores.index.get_level_values("task")) == {*study.profile.tasks, "mean"}
    means = scores.drop("mean", level="task")["score"].groupby("ending").mean()
    assert means.to_numpy() == pytest.approx(scores.xs("mean", level="task")["score"].loc[means.index].to_numpy())


def test_a_row_of_no_set_stays_where_it_was_unless_the_freeze_leaks(study):
    moved = q06_iat.movement(study).set_index("ending")["rows of heads in no set"]
    assert moved["IAT"] == moved["IAT, others frozen"] == 0 and moved["plain"] == 1
    assert moved["IAT, leaky"] > 0.1


def test_one_trunk_costs_less_than_every_ending_alone(study):
    steps = q06_iat.counted_steps(study).set_index("how")["steps"]
    unit = q06_iat.endings_unit(study, 0)
    ends = {name: 0 if spec is None else round(spec["delta"] * unit.steps) for name, spec in unit.endings.items()}
    ends["plain"] = min(e for e in ends.values() if e)  # it leaves the trunk last
    assert steps["every ending from the first step"] == len(ends) * unit.steps
    assert steps["one trunk, all endings"] == unit.steps - min(ends.values()) + sum(ends.values())


def test_selections_are_compared_with_the_first(study):
    table = q04_models.selections(study)
    assert table["selection"][0] == "gradient" and table["minus gradient"][0] == 0
    assert table.set_index("selection").loc["ablation", "forward passes"] == 3 * 12 + 1
    left = q04_models.random_controls(study)
    assert left["score left (%)"].between(0, 150).all()


# --- plots


def test_plots_take_what_is_not_defined(study):
    """A model that has learned nothing has no D: the rest of the figure is drawn."""
    table = q04_models.dissociation_by_encoder(study)
    table.loc[0, ["D", "low", "high", "p", "random heads"]] = np.nan
    for figure in (q04_models.plot_encoders(table), q04_models.plot_selections(q04_models.selections(study))):
        assert figure.get_axes()
        plt.close(figure)


def test_a_missing_pruning_is_named(study):
    record = study.store.get(q06_iat.endings_unit(study, 0))
    with refused("no pruning of 'PCGrad'"):
        recorded_iap(record, "PCGrad")


def test_tables_are_frames_with_one_row_a_thing(study):
    assert len(q04_models.dissociation_by_encoder(study)) == len(study.profile.encoders)
    assert len(q05_similarity.pairs(study)) == 6
    transfer = q07_transfer.learning_curves(study)
    assert isinstance(transfer, pd.DataFrame) and len(transfer) == 3 * 2 * 5
    assert not transfer.duplicated(["part", "source", "size"]).any()
