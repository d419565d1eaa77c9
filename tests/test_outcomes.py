"""Tables, claims and sentences of the questions: by hand, from the committed records of `mini`."""

import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from simulations import World, pruned_models

import fslib
from fslib import claims as rules
from fslib import plot as plots
from fslib.claims import NOT_TESTABLE, SESOI, entering, gate_half, halved, paired_differences
from fslib.claims import score_half as scored
from fslib.iap import dissociation
from fslib.intervals import Interval, Measure
from fslib.questions import q03_pruning as q03
from fslib.questions import q04_models as q04
from fslib.questions import q05_similarity as q05
from fslib.questions import q06_iat as q06
from fslib.questions import q07_transfer as q07
from fslib.questions import q08_claims as q08
from fslib.scoring import rank_correlation

ENDS = ["value", "low", "high"]
ENDINGS = ("IAT", "plain", "IAT, random heads")


@pytest.fixture(scope="module")
def study():
    return fslib.Study("mini")


@pytest.fixture(scope="module")
def claims(study):
    return q08.claims(study)


@pytest.fixture(scope="module")
def found(study):
    return q08.decide(study)


# --- paired differences


def steady(value: float, by_example: float) -> Measure:
    """A number of one model and two examples: its standard error is `by_example`, with 1 df."""
    return Measure(np.array([value]), {"examples": np.array([[-by_example, by_example]])})


def test_a_difference_is_the_method_minus_the_reference_example_by_example():
    t = 12.706205  # at 95 %
    made = {
        "new": {"x": steady(0.7, 0.01), "y": steady(0.2, -0.01)},
        "old": {"x": steady(0.5, 0.002), "y": steady(0.6, 0.01)},
    }
    expected = {  # value and its error, difference and its error
        ("new", "x"): (0.7, 0.01, 0.2, 0.008),
        ("new", "y"): (0.2, 0.01, -0.4, 0.02),  # influences of other signs add up
        ("new", "mean"): (0.45, 0, -0.1, 0.006),  # and cancel in the mean
        ("old", "x"): (0.5, 0.002, 0, 0),
        ("old", "y"): (0.6, 0.01, 0, 0),
        ("old", "mean"): (0.55, 0.006, 0, 0),
    }
    table = paired_differences(made, "old", ("how", "what")).set_index(["how", "what"])
    assert list(table) == ["score", "low", "high", "minus old", "diff low", "diff high"]
    for key, (value, error, difference, spread) in expected.items():
        numbers = [value, value - t * error, value + t * error]
        numbers += [difference, difference - t * spread, difference + t * spread]
        assert table.loc[key].tolist() == pytest.approx(numbers, abs=1e-6)
    parts = paired_differences(made, "old", ("how", "what"), value="D", with_mean=False)
    assert parts["D"].tolist() == [0.7, 0.2, 0.5, 0.6]
    made["new"]["x"] = steady(np.nan, np.nan)
    table = paired_differences(made, "old", ("how", "what")).set_index(["how", "what"])
    assert table.loc["new"].loc[["x", "mean"]].isna().all(axis=None), "undefined stays undefined"


# --- claims


def test_the_table_of_claims_says_what_the_evidence_says(claims, found, study):
    assert list(claims) == q08.COLUMNS
    assert claims["claim"].tolist() == [
        *["C1", "C1", "C2", "C2", "C3", "C3", "C4", "C4", "C5", "C5", "C6"]
    ]
    assert claims.groupby("claim")["n"].first().tolist() == [4, 3, 4, 4, 3, 4]
    decided = claims[claims["claim"] != "C6"]["verdict"]
    assert (decided == q08.LAPTOP).all(), "a laptop run decides nothing"
    assert claims["scope"].str.contains("training|every model").all()
    assert claims.groupby("claim")["SESOI"].first().tolist()[:5] == [2, 0.5, 1, 0.5, 1]
    assert list(found) == list(SESOI) == [f"C{i}" for i in range(1, 6)]
    for claim, evidence in found.items():
        rows = claims[claims["claim"] == claim]
        assert (rows[["scope", "why"]] == [evidence.scope, evidence.why]).all(axis=None)
        assert evidence.failed or evidence.verdict != NOT_TESTABLE
        numbers = []
        for part in evidence.parts:
            i = part.interval
            numbers.append([i.value, *i.at(0.95), part.tested, i.mde, evidence.p])
        np.testing.assert_allclose(rows[[*ENDS, "p", "MDE", "claim p"]].astype(float), numbers)
    c6 = claims[claims["claim"] == "C6"]
    (row,) = c6[[*ENDS, "MDE", "verdict", "why"]].to_numpy().tolist()
    assert row == [0, 0, 0, 0, "supported", ""]
    assert c6[["p", "SESOI", "claim p"]].isna().all(axis=None)


def test_a_parameter_that_is_added_contradicts_c6(study, found, monkeypatch):
    monkeypatch.setattr(q08, "decide", lambda study: found)
    more = pd.DataFrame({"parameters": [5, 7]})
    monkeypatch.setattr(q06, "parameters", lambda study: more)
    row = q08.claims(study).iloc[-1]
    assert (row["value"], row["verdict"]) == (2, "contradicted")


def test_the_score_of_iat_minus_plain_by_hand(claims, study, monkeypatch):
    """Scores are of one half of the examples; what changed at all is counted on the other."""
    records = [study.store.get(study.endings_unit(s)) for s in study.ending_seeds]
    tasks = q06.evaluated_tasks(study, study.ending_tasks)
    right, changed = {name: [] for name in ENDINGS}, []
    for record, (t, task) in itertools.product(records, tasks.items()):
        answers = {name: record.arrays[f"predictions/{name}/{t}"] for name in ENDINGS}
        changed.append(halved(answers["IAT"] != answers["plain"], gate_half).mean())
        for name in ENDINGS:
            right[name].append(halved(answers[name] == task.eval.labels, scored).mean())
    iat, plain, random = (100 * np.mean(right[name]) for name in ENDINGS)
    rows = claims[claims["claim"] == "C4"]["value"].tolist()
    assert rows == pytest.approx([iat - plain, iat - random])
    assert q06.changed(study, q06.deciding(study)) == pytest.approx(np.mean(changed))
    monkeypatch.setattr(rules, "LEAST_CHANGED", 0.5)
    said = f"{100 * np.mean(changed):.1f} % of predictions changed"
    assert q06.decide(study)["C4"].weak.startswith(said)


def test_iat_may_choose_heads_only_where_all_tasks_are_learned(study, monkeypatch):
    monkeypatch.setattr(rules, "learned", lambda above: list(above)[:1])
    parts = q06.decide(study)
    said = f"at chance when IAT chooses heads: {study.ending_tasks[1]}"
    assert [parts[claim].failed for claim in ("C3", "C4")] == [said, said]
    shown = set(q06.dissociation(study)["task"])
    assert shown == {*study.ending_tasks, "mean"}, "all the same"


def test_plain_training_says_which_tasks_enter_d_after_every_ending(study, monkeypatch):
    """The last task is at chance after plain training, and learned after the ending."""
    rng = np.random.default_rng(0)
    found = {
        q06.PLAIN: pruned_models(rng, World(specific=1.0, at_chance=True)),
        "IAT": pruned_models(rng, World(specific=1.0)),
    }
    monkeypatch.setattr(q06.Dose, "pruned", lambda _, name: found[name])
    measures = q06.dissociation_measures(study, q06.deciding(study), ["IAT"])
    assert [*measures["IAT"]] == ["a", "b", "c"]
    assert entering(found["IAT"]).tasks == ("a", "b", "c", "d")


def test_the_gate_of_c3_sees_no_example_that_its_d_is_scored_on(study, monkeypatch):
    """D is scored on half of fewer examples than C4; its gate is the other half of those."""
    seen, dose = [], q06.deciding(study)
    monkeypatch.setattr(rules, "changed_share", lambda a, b: seen.append(a) or 1.0)
    assert q06.changed_beside_d(dose) == 1.0
    iap = dose.pruned("IAT")
    for t, task in q06.evaluated_tasks(study, study.ending_tasks).items():
        labels = task.limited(eval=study.profile.prune_examples).eval.labels
        assert np.array_equal(iap.apart[t].labels, halved(labels, gate_half))
        assert np.array_equal(iap.labels[t], halved(labels, scored))
        assert np.array_equal(seen[0][t], iap.apart[t].predictions)


def test_the_dissociation_of_c1_by_hand(claims, study):
    iap, gate = study.iap(), q03.gate(study).set_index("task")
    for t in iap.tasks:  # a task enters if it is above the best constant answer on the other half
        labels, predictions = iap.apart[t]
        assert np.array_equal(labels, halved(study.tasks[t].eval.labels, gate_half))
        chance = np.unique(labels, return_counts=True)[1].max() / len(labels)
        above = (predictions == labels).mean() - chance
        assert gate.loc[t, "above the best constant answer"] == pytest.approx(above)
        assert gate.loc[t, "enters"] == (gate.loc[t, "low"] > 0)
    names = [t for t in iap.tasks if gate.loc[t, "enters"]]
    at = [iap.fractions.index(f) for f in (0.1, 0.3)]
    d = []
    for u in names:
        y = iap.labels[u]
        base = (iap.unpruned[u] == y).mean(-1)[:, None, None]
        left = (iap.lesioned[u][:, at] == y).mean(-1)  # (seeds, fractions, pruned, sets)
        own = left[:, :, iap.tasks.index(u)]
        others = np.mean([left[:, :, iap.tasks.index(s)] for s in names if s != u], axis=0)
        d.append(100 * (others - own) / base)
    d = np.mean(d, (0, 1, 2))  # of every set, top heads first
    rows = claims[claims["claim"] == "C1"]["value"].tolist()
    assert rows == pytest.approx([d[0], d[0] - d[1:].mean()])


def test_c1_is_said_by_task_by_seed_and_by_order(study):
    iap = study.iap()
    result = entering(iap).dissociation(draws=study.profile.draws)
    of = q03.scope_of(study, result.tasks)
    first, carried, single = q03.sentence(result, of, q03.not_testable(iap)).splitlines()
    assert first == f"C1 {q03.decide(result, of, '')}" and "own lesion against others'" in first
    assert "one contrastively tuned checkpoint; 4 trainings of 500 steps" in first
    table = q03.by_task(result).set_index("task")
    alone = table.drop("mean")
    both = ((alone["low"] > 0) & (alone["above low"] > 0)).sum()
    assert carried.startswith(f"Both intervals lie above 0 in {both} of {len(alone)} tasks")
    assert single.endswith(f"p = {result.mean.p:.3f}.")
    whole = [result.mean.value, result.mean.above, result.mean.p, result.mean.random]
    assert table.loc["mean", ["D", "above random", "p", "random heads"]].tolist() == whole
    seeds = q03.by_seed(result, study.seeds).set_index("seed")
    assert seeds.index.tolist() == study.seeds
    np.testing.assert_allclose(seeds[table.index].mean(), table["D"])
    # all tasks: pairs that cross over, and orders of the lesions with a larger D
    left = np.mean(list(q03.retained(study).values()), axis=0)
    pairs = itertools.combinations(range(4), 2)
    cross = [p for p in pairs if all(left[i, i] < left[j, i] for i, j in (p, p[::-1]))]
    named = ", ".join(f"{iap.tasks[i]} and {iap.tasks[j]}" for i, j in cross)
    said = q03.crossings(iap)
    assert said.startswith(f"{len(cross)} of 6 pairs") and said.endswith(f": {named or 'none'}")
    scores, base = iap.top.scores[:, iap.headline], iap.baseline()[:, None]
    orders = itertools.permutations(range(4))
    d = {order: dissociation(scores[:, :, list(order)], base).mean() for order in orders}
    larger = sum(value > d[0, 1, 2, 3] + 1e-9 for value in d.values())
    count, _, listed = q03.orders_above(iap).partition(": ")
    assert count.startswith(f"{larger} of 24 orders")
    assert listed.count(";") == min(larger, 4) - 1
    moved = {iap.tasks[i] for i, j in enumerate(max(d, key=d.get)) if i != j}
    assert set(re.split(", | with ", listed.split(";")[0])) == moved


def test_scores_under_lesions_by_hand(study):
    iap, table = study.iap(), q03.pruning(study).set_index(["scored", "pruned", "fraction"])
    assert len(table) == 4 * 5 * (1 + len(iap.fractions))
    for u, task in enumerate(iap.tasks):
        y = iap.labels[task]
        unpruned = (iap.unpruned[task] == y).mean()
        assert table.loc[(task, "random", 0.0), "score"] == pytest.approx(unpruned)
        for f, fraction in enumerate(iap.fractions):
            sets = (iap.lesioned[task][:, f] == y).mean((0, -1))  # (pruned, sets)
            rows = [table.loc[(task, t, fraction), "score"] for t in (*iap.tasks, "random")]
            assert rows == pytest.approx([*sets[:, 0], sets[u, 1:].mean()])
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()


@pytest.mark.parametrize(("tasks", "rho", "se", "p", "verdict"), [
    (8, -0.9, 0.2, 0.001, "supported"),
    (8, -0.9, 0.2, 0.051, "inconclusive"),
    (8, 0.9, 0.2, 0.001, "contradicted"),
    (8, 0.0, 0.2, 0.4, "no effect of 0.5 or more"),  # t at 90 % with 7 df is 1.895
    (8, -0.2, 0.2, 0.2, "inconclusive"),
    (7, -0.9, 0.2, 0.001, NOT_TESTABLE),
])  # fmt: skip
def test_c2_says_that_a_correlation_is_below_0(tasks, rho, se, p, verdict):
    rows = [("CKA", "", 0.77, 0.1, 0.77, tasks), (q05.PRIMARY, "", rho, se, p, tasks)]
    rows.append((q05.PRIMARY, q05.GIVEN, rho, se, p, tasks))
    columns = ["similarity", "given", q05.CORRELATION, "se", "p", "tasks"]
    evidence = q05.decide(pd.DataFrame(rows, columns=columns), "ten tasks")
    intervals = [part.interval for part in evidence.parts]
    assert evidence.verdict == verdict and intervals == [(-rho, se, tasks - 1)] * 2
    rows[-1] = (q05.PRIMARY, q05.GIVEN, 0.4, 0.5, 0.5, tasks)  # nothing beyond the question
    alone = q05.decide(pd.DataFrame(rows, columns=columns), "ten tasks")
    assert alone.verdict in ("inconclusive", NOT_TESTABLE) or rho > 0
    few = "7 tasks are learned, and a correlation over pairs needs 8"
    assert evidence.failed == ("" if tasks == 8 else few)
    none = pd.DataFrame(rows, columns=columns).assign(tasks=0)
    assert q05.decide(none, "ten tasks").failed.startswith("fewer than two tasks are learned")


def test_similarity_is_correlated_with_d_over_the_tasks_that_are_learned(study, monkeypatch):
    few = q05.correlations(study, q05.pairs(study))
    assert few[q05.CORRELATION].isna().all() and (few["tasks"] == 3).all()
    monkeypatch.setattr(rules, "learned", list)
    table = q05.pairs(study)
    assert table["enters"].all() and len(table) == 6
    pairs = [frozenset(pair.split(q05.BETWEEN)) for pair in table["pair"]]
    whole = q05.correlations(study, table)
    for row in whole[whole["given"] == ""].to_dict("records"):
        similar = dict(zip(pairs, table[row["similarity"]], strict=True))
        exchanged = []
        for order in itertools.permutations(study.pair_tasks):
            renamed = dict(zip(study.pair_tasks, order, strict=True))
            values = [similar[frozenset(renamed[t] for t in pair)] for pair in pairs]
            exchanged.append(rank_correlation(np.array(values), table["D"].to_numpy()))
        rho = exchanged[0]
        assert row[q05.CORRELATION] == pytest.approx(rho)
        assert -1 <= row["low"] <= rho <= row["high"] <= 1
        assert row["p"] == pytest.approx(np.mean(np.abs(exchanged) >= abs(rho) - 1e-9))
    # two of the four ask the same, one pair of six: it has no other to be compared with
    given = whole[whole["given"] != ""].set_index("similarity").loc[q05.PRIMARY, q05.CORRELATION]
    rest = table[table["shared"] != "question and text"]
    d, alike = (rankdata(table[k])[rest.index] for k in ("D", q05.PRIMARY))
    assert given == pytest.approx(np.corrcoef(d, alike)[0, 1])


def test_c5_by_hand_and_its_floor(study, monkeypatch):
    """Which source is which, and which half is scored; a source at the floor is named."""
    (task,) = q07.target_tasks(study).values()
    records = [study.store.get(unit) for unit in study.plan("07")]
    y = halved(task.eval.labels, scored)

    def score(source: str) -> float:
        name = f"transfer/{task.name}/{source}/full/512"
        return 100 * np.mean([(halved(r.arrays[name], scored) == y).mean() for r in records])

    evidence, curves = q07.decide(study), q07.learning_curves(study)
    values = [part.interval.value for part in evidence.parts]
    assert values == pytest.approx([score("IAT") - score(name) for name in ENDINGS[1:]])
    assert evidence.failed == "multi-task training itself is no better start than none: bbc"
    full = curves.query("part == 'full' and size == 'mean'").set_index("source")
    expected = [score(recorded) for recorded in q07.SOURCES.values()]
    assert (100 * full.loc[list(q07.SOURCES), "score"]).tolist() == pytest.approx(expected)
    row, i = full.loc["IAT"], evidence.parts[0].interval
    assert (100 * row[list(q07.DIFFERENCE)]).tolist() == pytest.approx([i.value, i.low, i.high])
    monkeypatch.setattr(rules, "above_best_constant", lambda *words: Interval(0.0, 0.1, 9.0))
    assert q07.decide(study).failed.startswith("with 512 examples of bbc a source is not above")


# --- other tables


def test_depths_of_one_checkpoint_are_not_pooled(study):
    table = q04.dissociation_by_encoder(study)
    assert table["encoder"].tolist() == list(study.profile.encoders)
    assert q04.sentences(table) == "", "every encoder is pre-trained"
    changes = {"encoder": "minilm-l6-random", "pre-trained": False, "D": np.nan}
    changed = pd.concat([table, table.tail(1).assign(**changes)])
    nan = dict.fromkeys(["low", "high", "random heads"], np.nan)
    lines = q04.sentences(changed.assign(**nan)).splitlines()
    assert lines[0].startswith("Without pre-training (minilm-l6-random)")
    assert lines[0].endswith(f"{NOT_TESTABLE}.")
    q04.plot_encoders(changed.assign(**nan))  # what is not defined is left out
    q04.plot_selections(q04.selections(study))
    plt.close("all")


def test_every_difference_from_the_release_says_what_was_measured(study):
    table = q08.release_differences(study).set_index("what")["measured effect"]
    measured = table[~table.str.startswith("not measured")]
    assert (len(table), len(measured)) == (11, 5) and measured.str.contains(r"\d").all()
    assert not measured.str.contains("nan").any(), "what is not defined is said so"
    n, batch = len(study.tasks["bbc"].train), study.profile.batch_size
    share = 100 * (1 - batch / n) ** (n // batch)
    assert abs(float(re.search(r"misses (\d+) %", table["batches"])[1]) - share) < 3


def test_endings_are_compared_on_the_seeds_that_have_them(study):
    table, p = q06.scores(study).set_index(["ending", "task"]), study.profile
    seeds = table.groupby("ending")["seeds"].unique().map(list)
    assert seeds["single-task"] == [p.alone_seeds] and seeds["IAT, leaky"] == [p.dose_seeds]
    assert set(seeds.index[seeds.map(lambda s: s == [p.ending_seeds])]) == {*ENDINGS, "trunk"}
    assert (table.loc["plain"][["minus plain", "diff low", "diff high"]] == 0).all(axis=None)
    means = table.drop("mean", level="task")["score"].groupby("ending").mean()
    np.testing.assert_allclose(table.xs("mean", level="task")["score"].loc[means.index], means)
    moved = q06.movement(study).set_index("ending")["rows of heads in no set"]
    assert (moved["IAT"], moved["plain"]) == (0, 1) and moved["IAT, leaky"] > 0.1
    counts = q06.parameters(study)
    assert counts["parameters"].nunique() == 1 and set(counts["seed"]) == set(study.ending_seeds)
    unit = study.endings_unit(0)
    ends = {n: round(e["delta"] * unit.steps) for n, e in unit.endings.items() if e}
    longest = ends.pop("trunk")  # it takes no step of its own, and plain goes on from there
    alone, shared = (len(ends) + 2) * unit.steps - longest, unit.steps + sum(ends.values())
    assert {alone, shared} <= set(q06.counted_steps(study)["steps"])


def test_doses_hold_the_one_that_decides(study):
    table, p = q06.doses(study), study.profile
    assert set(table["delta"]) == {p.delta, *p.doses}
    mine = table[table["decides"]]
    assert set(mine["seeds"]) == {p.ending_seeds} and set(mine["delta"]) == {p.delta}
    for claim, evidence in q06.decide(study).items():
        rows = mine[mine["claim"] == claim]
        assert rows["difference"].tolist() == [f"IAT minus {c}" for c in q06.CONTROLS]
        values = [part.interval.value for part in evidence.parts]
        assert rows["value"].tolist() == pytest.approx(values)
    assert set(mine["changed"]) == {q06.changed(study, q06.deciding(study))}


def test_selections_are_compared_with_the_first(study):
    table = q04.selections(study).set_index("selection")
    assert table.index[0] == "gradient" and table.loc["gradient", "minus gradient"] == 0
    assert table.loc["gradient", "rank correlation"] == pytest.approx(1)
    assert table.loc["ablation", "forward passes"] == 3 * 12 + 1
    draws = table.filter(like="random, draw", axis=0)
    assert len(draws) == study.profile.selection_randoms and draws["forward passes"].eq(0).all()
    left = q04.random_controls(study).set_index("random sets")["score left (%)"]
    assert left["(top heads)"] < left["matched by layer"] < 105


def test_profiles_stand_side_by_side_by_what_is_measured(claims, tmp_path):
    study = fslib.Study("mini", results=tmp_path)
    assert list(q08.by_profile(study, claims)) == ["mini"], "nothing else was computed here"
    other = claims.assign(**{k: claims[k] + 1 for k in ENDS}).iloc[::-1]
    (tmp_path / "evidence" / "tables").mkdir(parents=True)
    other.to_csv(tmp_path / "evidence" / "tables" / "08_claims.csv", index=False)
    (shown,) = q08.by_profile(study, claims).items()
    assert shown[0] == "evidence" and len(shown[1]) == len(claims), "a laptop run decides nothing"
    tables = {"mini": claims, "evidence": shown[1]}
    shown = q08.side_by_side(tables)
    assert set(shown["measured here"]) == set(claims["measured here"])
    for row in shown.to_dict("records"):
        here, there = (row[f"{name}: estimate"].split()[0] for name in ("mini", "evidence"))
        assert here == there == "none" or float(there) - float(here) == pytest.approx(1, abs=0.011)
    assert shown["mini: verdict"].equals(shown["evidence: verdict"])
    figure = q08.plot_claims(tables)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == list(tables)
    overridden = fslib.Study("mini", overrides={"seeds": 1}, results=tmp_path)
    assert list(q08.by_profile(overridden, claims)) == ["mini"], "other settings are not compared"


# --- limits of an axis


@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize(("ends", "limits"), [
    (([2.0, 10.0], [1.0, 8.0], [3.0, 11.0]), (-0.4, 11.4)),  # a margin of 4 % around 0 and all
    (([2.0, 10.0], [-600.0, 8.0], [600.0, 11.0]), (-12, 22)),  # 1.2 times the values' range
    (([np.nan], [np.nan], [np.nan]), (0, 1)),  # as it was
    (([0.0], [0.0], [0.0]), (-0.1, 0.1)),
])  # fmt: skip
def test_an_axis_shows_all_values_and_cuts_vast_intervals(which, ends, limits):
    figure, (ax,) = plots.panels(1, 1.0)
    plots.set_limits(ax, *ends, which)
    mine, other = (ax.get_xlim(), ax.get_ylim())[:: 1 if which == "x" else -1]
    assert mine == pytest.approx(limits) and other == (0, 1)
    plt.close(figure)
