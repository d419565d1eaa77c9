"""The questions' tables and claims: differences by hand, and what the committed records of `mini` say."""

import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from refusal import refused

import fslib
from fslib import plot as plots
from fslib.claims import NOT_TESTABLE, SESOI, differences, entering, gate_half, halved, score_half
from fslib.iap import dissociation
from fslib.intervals import Interval, Measure, pooled
from fslib.questions import (
    q03_pruning,
    q04_models,
    q05_similarity,
    q06_iat,
    q07_transfer,
    q08_claims,
)
from fslib.scoring import rank_correlation
from fslib.study import evidence as rules
from fslib.study.units import recorded_iap


@pytest.fixture(scope="module")
def study():
    return fslib.Study("mini")


# --- differences


def steady(start: float, by_example: float) -> Measure:
    """A number of one model and two examples, so that its standard error is `by_example` and t at 95 % is 12.706.

    The variance of the mean over examples is (e**2 + e**2) / (2 - 1) / 2 = e**2, with one degree of freedom.
    """
    return Measure(np.array([start]), {"examples": np.array([[-by_example, by_example]])})


T = 12.706205
# all of the same two examples: what a method's influences are minus the reference's follows by hand
MADE = {
    "new": {"x": steady(0.7, 0.01), "y": steady(0.2, -0.01)},
    "reference": {"x": steady(0.5, 0.002), "y": steady(0.6, 0.01)},
}


def test_differences_are_paired_example_by_example():
    """A method that is better by 0.1 in every model and example differs by exactly 0.1, however wide its interval."""
    rng = np.random.default_rng(0)
    influence = rng.normal(0, 2, (3, 20))
    influence -= influence.mean(1, keepdims=True)
    values = {
        name: {
            task: Measure(np.array([0.3, 0.5, 0.7]) + shift, {"e": influence})
            for task, shift in by_task.items()
        }
        for name, by_task in {"a": {"x": 0, "y": -0.1}, "b": {"x": 0.1, "y": 0.1}}.items()
    }
    table = differences(values, "a", ("method", "task")).set_index(["method", "task"])
    for task, difference in {"x": 0.1, "y": 0.2, "mean": 0.15}.items():
        row = table.loc[("b", task)]
        assert [row[k] for k in ("minus a", "diff low", "diff high")] == pytest.approx(
            [difference] * 3
        )
        assert row["high"] - row["low"] > 0.5
    assert table.loc[("b", "mean"), "score"] == pytest.approx(0.6)
    assert (table.loc["a"][["minus a", "diff low", "diff high"]] == 0).all(axis=None)


def test_a_difference_is_the_method_minus_the_reference_by_hand():
    table = differences(MADE, "reference", ("how", "what")).set_index(["how", "what"])
    columns = ["score", "low", "high", "minus reference", "diff low", "diff high"]
    assert list(table) == columns
    assert list(table.index) == [(how, what) for how in MADE for what in ("x", "y", "mean")]
    expected = {
        # better by 0.2; the influences differ by 0.008
        ("new", "x"): (0.7, 0.7 - T * 0.01, 0.7 + T * 0.01, 0.2, 0.2 - T * 0.008, 0.2 + T * 0.008),
        # worse by 0.4; its influences have the other sign than the reference's, so they add up
        ("new", "y"): (0.2, 0.2 - T * 0.01, 0.2 + T * 0.01, -0.4, -0.4 - T * 0.02, -0.4 + T * 0.02),
        # of both, example by example: 0.01 and -0.01 cancel; the reference's mean has 0.006
        ("new", "mean"): (0.45, 0.45, 0.45, -0.1, -0.1 - T * 0.006, -0.1 + T * 0.006),
        ("reference", "x"): (0.5, 0.5 - T * 0.002, 0.5 + T * 0.002, 0, 0, 0),
        ("reference", "y"): (0.6, 0.6 - T * 0.01, 0.6 + T * 0.01, 0, 0, 0),
        ("reference", "mean"): (0.55, 0.55 - T * 0.006, 0.55 + T * 0.006, 0, 0, 0),
    }
    for row, numbers in expected.items():
        assert table.loc[row, columns].tolist() == pytest.approx(list(numbers), abs=1e-6)
    assert (table.loc["reference", columns[3:]] == 0).all(axis=None), "exactly"


def test_another_reference_turns_the_sign():
    one, other = (
        differences(MADE, name, ("how", "what")).set_index(["how", "what"])
        for name in ("reference", "new")
    )
    for what in ("x", "y", "mean"):
        there, back = one.loc[("new", what)], other.loc[("reference", what)]
        assert back["minus new"] == pytest.approx(-there["minus reference"])
        assert (back["diff low"], back["diff high"]) == pytest.approx(
            (-there["diff high"], -there["diff low"])
        )
    assert (other.loc["new", ["minus new", "diff low", "diff high"]] == 0).all(axis=None)


def test_differences_name_the_value_and_leave_out_the_mean_on_request():
    whole, named = (
        differences(MADE, "reference", ("how", "what"), value=value) for value in ("score", "D")
    )
    assert "score" not in named and named.rename(columns={"D": "score"}).equals(whole)
    parts = differences(MADE, "reference", ("how", "what"), with_mean=False)
    assert parts.equals(whole[whole["what"] != "mean"].reset_index(drop=True)) and len(parts) == 4


def test_a_value_that_is_not_defined_stays_undefined():
    values = MADE | {"none": {"x": steady(np.nan, np.nan), "y": steady(0.6, 0.01)}}
    table = differences(values, "reference", ("how", "what")).set_index(["how", "what"])
    assert table.loc["none"].loc[["x", "mean"]].isna().all(axis=None)
    assert table.loc[("none", "y"), "minus reference"] == 0 and table.drop(
        "none", level=0
    ).notna().all(axis=None)


# --- claims, on the committed records


COLUMNS = [
    "claim",
    "the paper says",
    "measured here",
    "value",
    "low",
    "high",
    "p",
    "MDE",
    "SESOI",
    "claim p",
    "verdict",
]


@pytest.fixture(scope="module")
def claims(study):
    return q08_claims.claims(study)


@pytest.fixture(scope="module")
def found(study):
    return q08_claims.evidence(study)


def test_the_table_of_claims_has_one_row_per_number_that_a_claim_stands_on(claims):
    assert list(claims) == [*COLUMNS, "why", "seeds", "notebook"]
    assert claims["claim"].tolist() == ["C1", "C1", "C2", "C3", "C3", "C4", "C4", "C5", "C5", "C6"]
    assert claims.groupby("claim")["seeds"].first().tolist() == [4, 1, 4, 4, 3, 4]
    assert (claims.groupby("claim")[["verdict", "the paper says", "notebook"]].nunique() == 1).all(
        axis=None
    )
    assert claims.groupby("claim")["SESOI"].first().tolist()[:5] == [2, 0.5, 1, 0.5, 1]
    assert claims["measured here"].tolist()[:7] == [
        "own lesion against others'",
        "top heads against random ones",
        "minus the rank correlation",
        *["IAT minus plain training", "IAT minus IAT with random heads"] * 2,
    ]


def test_every_row_is_what_the_evidence_says(claims, found):
    assert list(found) == list(SESOI) == [f"C{i}" for i in range(1, 6)]
    for claim, evidence in found.items():
        rows = claims[claims["claim"] == claim]
        assert len(rows) == len(evidence.parts)
        for (_, row), part in zip(rows.iterrows(), evidence.parts, strict=True):
            i = part.interval
            expected = [i.value, *i.at(0.95), part.tested, i.mde, evidence.claim_p]
            assert row[["value", "low", "high", "p", "MDE", "claim p"]].tolist() == pytest.approx(
                expected, nan_ok=True
            )
            assert (row["verdict"], row["why"]) == (evidence.verdict, evidence.failed)
            assert not row["low"] > row["value"] and not row["value"] > row["high"]


def test_a_claim_whose_gate_failed_is_not_testable_and_says_why(claims):
    testable = claims["verdict"] != NOT_TESTABLE
    assert (claims.loc[testable, "why"] == "").all() and (claims.loc[~testable, "why"] != "").all()
    assert claims.loc[~testable, "claim p"].isna().all()


def test_p_of_a_claim_is_corrected_for_the_five(claims, study):
    c1 = claims[claims["claim"] == "C1"]
    others = claims[(claims["claim"] > "C1") & (claims["claim"] < "C6")]
    assert not (others["p"] < c1["p"].max()).any(), "C1 has the smallest p, and counts five times"
    assert c1["claim p"].iloc[0] == pytest.approx(min(1, 5 * c1["p"].max()))


def test_parameters_are_counted_and_none_is_added(claims, study):
    c6 = claims.set_index("claim").loc["C6"]
    assert (c6["value"], c6["verdict"], c6["why"]) == (0, "supported", "")
    assert q06_iat.parameters(study)["parameters"].nunique() == 1


def right(study, name: str, half) -> np.ndarray:
    """Whether every seed's model is right after an ending: (tasks, seeds, n)."""
    records = [study.store.get(q06_iat.endings_unit(study, s)) for s in q06_iat.seeds(study)]
    evaluated = {
        t: q06_iat.cached_task(t).limited(eval=study.profile.ending_examples)
        for t in study.ending_tasks
    }
    tasks = {t: halved(task.eval.labels, half) for t, task in evaluated.items()}
    return np.array(
        [
            [halved(r.arrays[f"predictions/{name}/{t}"], half) == y for r in records]
            for t, y in tasks.items()
        ]
    )


def test_the_score_of_iat_minus_plain_by_hand(claims, study, monkeypatch):
    endings = ("IAT", "plain", "IAT, random heads")
    iat, plain, random = (right(study, name, score_half).mean((0, 1, 2)) for name in endings)
    rows = claims[claims["claim"] == "C4"]["value"].tolist()
    assert rows == pytest.approx([100 * (iat - plain), 100 * (iat - random)])
    # what changed at all is counted on the other half; none of these tasks is a regression
    records = [study.store.get(q06_iat.endings_unit(study, s)) for s in q06_iat.seeds(study)]
    differ = [
        halved(r.arrays[f"predictions/IAT/{t}"] != r.arrays[f"predictions/plain/{t}"], gate_half)
        for r in records
        for t in study.ending_tasks
    ]
    assert q06_iat.changed(study, q06_iat.deciding(study)) == pytest.approx(np.mean(differ))
    assert np.mean(differ) >= 0.03 and (claims[claims["claim"] == "C4"]["why"] == "").all()
    monkeypatch.setattr(q06_iat, "LEAST_CHANGED", 0.5)
    why = q06_iat.evidence(study)["C4"].failed
    assert why.startswith(f"{100 * np.mean(differ):.1f} % of predictions changed") and "50 %" in why


def test_a_treatment_of_any_dose_is_tested_on_both_parts(study, monkeypatch):
    monkeypatch.setattr(q06_iat, "LEAST_CHANGED", 0.0)
    found = q06_iat.evidence(study)
    assert list(found) == ["C3", "C4"] and all(
        e.failed == "" and len(e.parts) == 2 for e in found.values()
    )
    table = q06_iat.scores(study).set_index(["ending", "task"]).loc[("IAT", "mean")]
    i = found["C4"].parts[0].interval
    expected = [100 * table[k] for k in ("minus plain", "diff low", "diff high")]
    assert [i.value, i.low, i.high] == pytest.approx(expected)
    against = q06_iat.dissociation(study, q06_iat.RANDOM).set_index(["ending", "task"])
    assert "mean" in against.loc["IAT"].index
    # D of the mean over tasks is the mean of the tasks' D
    rows = q06_iat.dissociation(study, q06_iat.RANDOM).query("ending == 'IAT'").set_index("task")
    tasks = rows.drop("mean")[f"minus {q06_iat.RANDOM}"].iloc[: len(rows) - 1]
    assert found["C3"].parts[1].interval.value == pytest.approx(float(tasks.mean()))


def test_c3_needs_two_tasks_that_are_learned_and_c4_none(study, monkeypatch):
    monkeypatch.setattr(q06_iat, "LEAST_CHANGED", 0.0)
    for module in (q06_iat, rules):
        monkeypatch.setattr(module, "learned", lambda above: list(above)[:1])
    found = q06_iat.evidence(study)
    assert (found["C3"].failed, found["C4"].failed) == ("fewer than two tasks are learned", "")
    assert found["C3"].verdict == NOT_TESTABLE
    assert set(q06_iat.dissociation(study)["task"]) == {*study.ending_tasks, "mean"}, (
        "shown all the same, of all tasks"
    )


def test_the_dissociation_of_c1_by_hand(claims, study):
    iap = study.iap()
    tasks = q03_pruning.gate(study).set_index("task")["enters"]
    names = [t for t in iap.tasks if tasks[t]]
    at = [iap.fractions.index(f) for f in (0.1, 0.3)]
    d = []
    for u in names:
        y = iap.labels[u]  # lesions are evaluated on the half that is scored, and on no other
        base = (iap.unpruned[u] == y).mean(-1)[:, None]
        lesioned = {s: iap.lesioned[u][:, at, iap.tasks.index(s)] for s in names}
        share = {s: (predictions == y).mean(-1) for s, predictions in lesioned.items()}
        others = np.mean([share[s] for s in names if s != u], axis=0)
        d.append(100 * (others - share[u]) / base[..., None])  # (seeds, fractions, sets)
    d = np.array(d).mean((0, 1, 2))
    rows = claims[claims["claim"] == "C1"]["value"].tolist()
    assert rows == pytest.approx([d[0], d[0] - d[1:].mean()])


def test_a_task_enters_if_it_is_above_the_best_constant_answer_on_the_other_half(study):
    iap, table = study.iap(), q03_pruning.gate(study).set_index("task")
    assert list(table.index) == list(iap.tasks)
    for task in iap.tasks:
        labels, predictions = iap.apart[task].labels, iap.apart[task].predictions
        whole = study.tasks[task].eval.labels
        assert np.array_equal(labels, halved(whole, gate_half))
        assert np.array_equal(iap.labels[task], halved(whole, score_half))
        score = (predictions == labels).mean()
        chance = np.unique(labels, return_counts=True)[1].max() / len(labels)
        assert table.loc[task, "above the best constant answer"] == pytest.approx(score - chance)
        assert table.loc[task, "enters"] == (table.loc[task, "low"] > 0)


def test_c1_says_its_evidence_its_tasks_and_the_stricter_test(study):
    result = entering(study.iap()).dissociation(draws=study.profile.draws)
    said = q03_pruning.sentence(result, q03_pruning.not_testable(study.iap()))
    first, carried, shared = said.splitlines()
    assert first == f"C1 {q03_pruning.evidence(result, '')}"
    assert "own lesion against others'" in first and ", MDE " in first
    assert carried.startswith("Both intervals lie above 0 in ") and shared.endswith(
        f"p = {result.mean.p_shared:.3f}."
    )
    table = q03_pruning.by_task(result)
    assert table["task"].tolist() == [*result.tasks, "mean"]
    assert table.iloc[-1][["D", "above random", "p"]].tolist() == pytest.approx(
        [result.mean.value, result.mean.above, result.mean.p]
    )
    seeds = q03_pruning.by_seed(result, study.seeds).set_index("seed")
    assert seeds.index.tolist() == study.seeds
    np.testing.assert_allclose(seeds[table["task"]].mean(), table["D"])


def test_pairs_that_cross_over_are_counted(study):
    said = q03_pruning.crossings(study.iap())
    left = np.mean(list(q03_pruning.retained(study).values()), axis=0)
    names = study.iap().tasks
    crossing = [
        f"{a} and {b}"
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
        if left[i, i] < left[j, i] and left[j, j] < left[i, j]
    ]
    assert said.startswith(f"{len(crossing)} of 6 pairs") and all(pair in said for pair in crossing)


def test_orders_of_the_lesions_that_give_a_larger_d_are_counted_and_named(study):
    iap = study.iap()
    scores, base = iap.top.scores[:, iap.headline], iap.baseline()[:, None]
    d = {
        o: dissociation(scores[:, :, list(o)], base).mean()
        for o in itertools.permutations(range(len(iap.tasks)))
    }
    larger = [order for order, value in d.items() if value > d[tuple(range(len(iap.tasks)))] + 1e-9]
    said = q03_pruning.orders_above(iap)
    assert (
        said.startswith(f"{len(larger)} of 24 orders ")
        and said.count(";") == min(len(larger), 4) - 1
    )
    best = max(larger, key=d.get)
    moved = [iap.tasks[i] for i, j in enumerate(best) if i != j]
    first = said.partition(": ")[2].split(";")[0]
    assert all((task in re.split(", | with ", first)) == (task in moved) for task in iap.tasks)
    assert q03_pruning._cycles((1, 0, 2, 4, 5, 3), "abcdef") == ["a with b", "d with e with f"]


def test_scores_under_lesions_by_hand(study):
    iap, table = study.iap(), q03_pruning.pruning(study).set_index(["scored", "pruned", "fraction"])
    assert len(table) == 4 * 5 * (1 + len(iap.fractions))
    for u, task in enumerate(iap.tasks):
        y = iap.labels[task]
        assert table.loc[(task, "random", 0.0), "score"] == pytest.approx(
            (iap.unpruned[task] == y).mean()
        )
        for f, fraction in enumerate(iap.fractions):
            sets = (iap.lesioned[task][:, f] == y).mean((0, -1))  # (pruned, sets)
            found = [table.loc[(task, t, fraction), "score"] for t in (*iap.tasks, "random")]
            assert found == pytest.approx([*sets[:, 0], sets[u, 1:].mean()])
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()


@pytest.mark.parametrize(("tasks", "rho", "se", "p", "verdict"), [
    (8, -0.9, 0.2, 0.001, "supported"),
    (8, -0.9, 0.2, 0.051, "inconclusive"),
    (8, 0.9, 0.2, 0.999, "contradicted"),
    (8, 0.0, 0.2, 0.4, "no effect of 0.5 or more"),  # t at 90 % with 7 degrees of freedom is 1.895: within 0.38
    (8, -0.2, 0.2, 0.2, "inconclusive"),
    (7, -0.9, 0.2, 0.001, NOT_TESTABLE),
])  # fmt: skip
def test_c2_says_that_a_correlation_is_below_0(tasks, rho, se, p, verdict):
    row = {
        "similarity": q05_similarity.PRIMARY,
        "rank correlation with D": rho,
        "se": se,
        "p": p,
        "tasks": tasks,
    }
    other = row | {"similarity": "CKA", "rank correlation with D": 0.77, "p": 0.77}
    found = q05_similarity.evidence(pd.DataFrame([other, row]))
    assert found.verdict == verdict and found.parts[0].interval == Interval(-rho, se, tasks - 1)
    assert found.failed == (
        "" if tasks == 8 else "7 tasks are learned, and a correlation over pairs needs 8"
    )


def test_similarity_is_correlated_with_dissociation_over_the_tasks_that_are_learned(
    study, monkeypatch
):
    few = q05_similarity.correlations(study, q05_similarity.pairs(study))
    assert few["rank correlation with D"].isna().all() and (few["tasks"] == 3).all()
    monkeypatch.setattr(q05_similarity, "learned", list)  # as if all four were
    table = q05_similarity.pairs(study)
    assert table["enters"].all()
    found = q05_similarity.correlations(study, table).set_index("similarity")
    tasks, d = (
        study.profile.tasks,
        dict(zip(q05_similarity.task_pairs(study), table["D"], strict=True)),
    )
    for measure, row in found.iterrows():
        similar = dict(zip(d, table[measure], strict=True))
        rho = rank_correlation(np.array(list(similar.values())), np.array(list(d.values())))
        assert row["rank correlation with D"] == pytest.approx(rho)
        assert -1 <= row["low"] <= rho <= row["high"] <= 1
        below = 0
        for order in itertools.permutations(tasks):
            renamed = dict(zip(tasks, order, strict=True))
            exchanged = [
                next(v for other, v in similar.items() if set(other) == {renamed[t] for t in pair})
                for pair in d
            ]
            below += rank_correlation(np.array(exchanged), np.array(list(d.values()))) <= rho + 1e-9
        assert row["p"] == pytest.approx(below / 24)


def test_encoders_are_pooled_and_never_counted_one_by_one(study):
    table = q04_models.dissociation_by_encoder(study)
    known = table[table["pre-trained"] & (table["tasks"] > 1)]
    assert len(known) == 2 and table.loc[table["tasks"] < 2, ["D", "above random", "p"]].isna().all(
        axis=None
    )
    effect = q04_models.pooled_effect(table)
    studies = [
        Interval(v, s, 9.0) for v, s in zip(known["above random"], known["above se"], strict=True)
    ]
    assert tuple(effect) == pytest.approx(tuple(pooled(studies))) and effect.df == 1
    assert known["above random"].min() < effect.value < known["above random"].max()
    said = q04_models.sentences(table)
    assert (
        said.startswith("Pooled over 2 pre-trained encoders") and "Without pre-training" not in said
    )
    random = pd.concat(
        [table, table.tail(1).assign(**{"encoder": "minilm-l6-random", "pre-trained": False})]
    )
    assert "Without pre-training (minilm-l6-random)" in q04_models.sentences(random)
    nothing = q04_models.sentences(random.assign(**{"above se": np.nan, "D": np.nan}))
    assert nothing.startswith("Nothing to pool: 0 pre-trained encoders") and NOT_TESTABLE in nothing


def test_c5_is_not_testable_where_a_source_is_at_the_floor(study, monkeypatch):
    found = q07_transfer.evidence(study)
    assert found.failed == "" and found.verdict != NOT_TESTABLE
    with monkeypatch.context() as patch:
        patch.setattr(q07_transfer, "above_best_constant", lambda *words: Interval(0.0, 0.1, 9.0))
        floor = q07_transfer.evidence(study)
    assert (
        floor.verdict == NOT_TESTABLE
        and "512 examples of bbc a source is not above the best" in floor.failed
    )
    curves = q07_transfer.learning_curves(study)
    row = curves[
        (curves["part"] == "full") & (curves["source"] == "IAT") & (curves["size"] == "mean")
    ].iloc[0]
    i = found.parts[0].interval
    expected = [100 * row[k] for k in ("minus multi-task", "diff low", "diff high")]
    assert [i.value, i.low, i.high] == pytest.approx(expected)


def test_every_difference_from_the_release_says_what_was_measured(study):
    table = q08_claims.release_differences(study).set_index("what")["measured effect"]
    assert len(table) == 8
    measured = table[~table.str.startswith("not measured")]
    assert len(measured) == 5 and measured.str.contains(r"\d").all()
    assert not measured.str.contains("nan").any(), "what is not defined is said so"


# --- other tables of the committed records


def test_plain_training_differs_from_itself_by_nothing(study):
    scores = q06_iat.scores(study).set_index(["ending", "task"])
    p, whole = (
        study.profile,
        scores[scores["seeds"] == study.profile.ending_seeds].index.get_level_values("ending"),
    )
    assert set(whole) == {"plain", "IAT", "IAT, random heads", "trunk"}, (
        "what claims are decided on, at every seed"
    )
    assert set(scores["seeds"]) == {p.alone_seeds, p.dose_seeds, p.ending_seeds}
    assert (scores.loc["plain"][["minus plain", "diff low", "diff high"]] == 0).all(axis=None)
    assert set(scores.index.get_level_values("task")) == {*study.ending_tasks, "mean"}
    means = scores.drop("mean", level="task")["score"].groupby("ending").mean()
    assert means.to_numpy() == pytest.approx(
        scores.xs("mean", level="task")["score"].loc[means.index].to_numpy()
    )


def test_a_row_of_no_set_stays_where_it_was_unless_the_freeze_leaks(study):
    moved = q06_iat.movement(study).set_index("ending")["rows of heads in no set"]
    assert moved["IAT"] == 0 and moved["plain"] == 1
    assert moved["IAT, leaky"] > 0.1


def test_one_trunk_costs_less_than_every_ending_alone(study):
    steps = q06_iat.counted_steps(study).set_index("how")["steps"]
    unit = q06_iat.endings_unit(study, 0)
    ends = {
        name: 0 if spec is None else round(spec["delta"] * unit.steps)
        for name, spec in unit.endings.items()
    }
    ends["plain"] = min(e for e in ends.values() if e)  # it leaves the trunk last
    stopped = ends.pop("trunk")  # it takes no step of its own
    assert (
        steps["every ending from the first step"] == len(ends) * unit.steps + unit.steps - stopped
    )
    assert steps["one trunk, all endings"] == unit.steps - ends["plain"] + sum(ends.values())


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
    table.loc[1, ["D", "low", "high", "p", "random heads"]] = np.nan
    for figure in (
        q04_models.plot_encoders(table),
        q04_models.plot_selections(q04_models.selections(study)),
    ):
        assert figure.get_axes()
        plt.close(figure)


def limits(value: list, low: list, high: list, which: str = "y") -> tuple[float, float]:
    figure, (ax,) = plots.panels(1, 1.0)
    before = ax.get_xlim(), ax.get_ylim()
    plots.set_limits(ax, value, low, high, which)
    assert (ax.get_ylim() if which == "x" else ax.get_xlim()) == before[which == "x"]
    plt.close(figure)
    return ax.get_xlim() if which == "x" else ax.get_ylim()


@pytest.mark.parametrize("which", ["x", "y"])
def test_an_axis_shows_all_values_and_cuts_vast_intervals(which):
    low, high = limits([2.0, 10.0], [1.0, 8.0], [3.0, 11.0], which)
    assert (low, high) == pytest.approx((-0.4, 11.4)), "a margin of 4 % around 0 and the interval"
    low, high = limits([2.0, 10.0], [-600.0, 8.0], [600.0, 11.0], which)
    assert (low, high) == pytest.approx((-12, 22)), (
        "1.2 times the values' range, from 0 to 10, on either side"
    )
    low, high = limits([-2.0, 10.0, np.nan], [-3.0, 8.0, np.nan], [0.0, 11.0, np.nan], which)
    assert low < -3 and high > 11


def test_an_axis_without_a_value_or_without_a_range_is_left_in_peace():
    figure, (ax,) = plots.panels(1, 1.0)
    plots.set_limits(ax, [np.nan], [np.nan], [np.nan])
    assert ax.get_ylim() == (0, 1)
    plots.set_limits(ax, [0.0], [0.0], [0.0])
    low, high = ax.get_ylim()
    assert low < 0 < high
    plt.close(figure)


def test_a_missing_pruning_is_named(study):
    record = study.store.get(q06_iat.endings_unit(study, 0))
    with refused("no pruning of 'PCGrad'"):
        recorded_iap(record, "PCGrad")


def test_tables_are_frames_with_one_row_a_thing(study):
    assert len(q04_models.dissociation_by_encoder(study)) == len(study.profile.encoders)
    assert len(q05_similarity.pairs(study)) == 6
    transfer = q07_transfer.learning_curves(study)
    assert isinstance(transfer, pd.DataFrame) and len(transfer) == 4 * 2 * 2
    assert not transfer.duplicated(["part", "source", "size"]).any()


def test_profiles_stand_side_by_side_by_what_is_measured(claims, tmp_path):
    study = fslib.Study("mini", results=tmp_path)
    assert list(q08_claims.by_profile(study, claims)) == ["mini"], "nothing else was computed here"
    other = claims.assign(**{k: claims[k] + 1 for k in ("value", "low", "high")}).iloc[::-1]
    (tmp_path / "evidence" / "tables").mkdir(parents=True)
    other.to_csv(tmp_path / "evidence" / "tables" / "08_claims.csv", index=False)
    tables = q08_claims.by_profile(study, claims)
    assert list(tables) == ["mini", "evidence"]
    shown = q08_claims.side_by_side(tables)
    assert shown[["claim", "measured here"]].equals(claims[["claim", "measured here"]])
    for _, row in shown[shown["mini: estimate"] != "none"].iterrows():
        here, there = (float(row[f"{name}: estimate"].split()[0]) for name in tables)
        assert there - here == pytest.approx(1, abs=0.011)
    assert shown["mini: verdict"].equals(shown["evidence: verdict"]) and shown["mini: p"].equals(
        claims["p"]
    )
    c2 = shown.set_index("claim").loc["C2"]
    assert c2["evidence: estimate"] == "none" and c2["evidence: verdict"] == NOT_TESTABLE
    figure = q08_claims.plot_claims(tables)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "mini",
        "evidence",
    ]
    overridden = fslib.Study("mini", overrides={"seeds": 1}, results=tmp_path)
    assert list(q08_claims.by_profile(overridden, claims)) == ["mini"], (
        "other settings are not compared"
    )


def test_c5_by_hand(study):
    """Both parts of C5 from the records: which source is which, and which half is scored."""
    task = next(iter(q07_transfer.target_tasks(study).values()))
    labels, sizes = halved(task.eval.labels, score_half), study.profile.transfer_sizes
    records = [study.store.get(unit) for unit in study.plan("07")]

    def mean(source: str) -> float:
        names = [f"transfer/{task.name}/{source}/full/{size or 'all'}" for size in sizes]
        return 100 * np.mean(
            [[(halved(r.arrays[n], score_half) == labels).mean() for n in names] for r in records]
        )

    found = [part.interval.value for part in q07_transfer.evidence(study).parts]
    expected = [mean("IAT") - mean("plain"), mean("IAT") - mean("IAT, random heads")]
    assert found == pytest.approx(expected) and found[0] != found[1]
    table = (
        q07_transfer.learning_curves(study)
        .query("part == 'full' and size == 'mean'")
        .set_index("source")["score"]
    )
    assert 100 * table["multi-task"] == pytest.approx(mean("plain"))
    assert 100 * table["pre-trained"] == pytest.approx(mean("pre-trained"))


def test_the_dose_that_decides_is_the_evidence(study):
    every = q06_iat.doses(study)
    assert sorted(set(every["delta"])) == sorted({study.profile.delta, *study.profile.doses})
    table = every[every["decides"]]
    assert (table["delta"] == study.profile.delta).all() and (
        table["seeds"] == study.profile.ending_seeds
    ).all()
    found = {
        claim: [part.interval.value for part in e.parts]
        for claim, e in q06_iat.evidence(study).items()
    }
    for claim, values in found.items():
        assert table[table["claim"] == claim]["value"].tolist() == pytest.approx(values)
    assert table["changed"].unique() == pytest.approx(
        [q06_iat.changed(study, q06_iat.deciding(study))]
    )


def test_the_gate_of_c3_sees_no_example_that_its_d_is_scored_on(study, monkeypatch):
    """D is scored on half of fewer examples than C4; its gate must not look at the others' other half."""
    seen = {}

    def look(a, b):
        seen["shapes"] = {task: values.shape for task, values in a.items()}
        return 1.0

    monkeypatch.setattr(q06_iat, "changed_share", look)
    dose = q06_iat.deciding(study)
    q06_iat.changed_beside_d(study, dose)
    iap = q06_iat._pruned(study, dose, "plain")
    n, seeds = {task: len(y) for task, y in iap.labels.items()}, study.profile.ending_seeds
    assert seen["shapes"] == {task: (seeds, len(iap.apart[task].labels)) for task in n}
    for task in n:
        evaluated = q06_iat.cached_task(task).limited(eval=study.profile.ending_examples)
        whole = evaluated.limited(eval=study.profile.prune_examples).eval.labels
        assert np.array_equal(iap.apart[task].labels, halved(whole, gate_half)), (
            "the rest is what D is scored on"
        )
        assert np.array_equal(iap.labels[task], halved(whole, score_half))
