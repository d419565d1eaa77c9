"""Tasks that share their question, their text, both or neither: lesions and pairs, by hand."""

from collections import Counter
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fslib.iap import IAP
from fslib.questions import q03_pruning, q05_similarity, q06_iat
from fslib.study.profiles import QUESTION_AND_TEXT, SHARED, make_profile, shared_by

N = 100


def pruned(left: dict[str, dict[str, int]]) -> IAP:
    """Two models of which `left[scored][lesion]` of 100 answers are right, at two fractions."""
    tasks, known = tuple(left), dict.fromkeys(left, np.zeros(N, dtype=np.int64))

    def answers(right: int, *shape: int) -> np.ndarray:
        return np.broadcast_to((np.arange(N) >= right).astype(np.int64), (*shape, N)).copy()

    # (seeds, fractions, tasks, sets, n)
    lesioned = {u: np.stack([answers(left[u][t], 2, 2, 1) for t in tasks], 2) for u in tasks}
    heads = np.zeros((2, 2, len(tasks), 1, 1, 4), dtype=bool)
    unpruned = {u: answers(90, 2) for u in tasks}
    metrics = ("accuracy",) * len(tasks)
    return IAP(tasks, metrics, (0.1, 0.3), heads, known, unpruned, lesioned)


def test_what_ten_tasks_share():
    counted = Counter(shared_by(a, b) for a, b in combinations(QUESTION_AND_TEXT, 2))
    assert counted == {"question and text": 3, "question": 6, "text": 13, "neither": 23}
    assert shared_by("sst-2", "sst-shift") == "text"
    assert shared_by("bbc-shift", "sst-shift") == "question"
    assert shared_by("bbc", "bbc-pair") == "question and text"
    assert shared_by("bbc", "mine") is None
    profile = make_profile("evidence", {})
    assert set(profile.pair_tasks) == set(QUESTION_AND_TEXT) > set(profile.tasks)
    assert set(profile.ending_tasks) | set(profile.transfer_targets) == set(profile.tasks)


def test_lesions_that_share_a_text_or_a_question_by_hand():
    """Own lesions leave 10 of 100, the same question 50, the same text 60, neither 80 (or 70)."""
    leaves = {"question": 50, "text": 60, "neither": 80}
    tasks = ("sst-2", "sst-shift", "bbc-shift", "qnli")
    left = {u: {t: 10 if t == u else leaves[shared_by(t, u)] for t in tasks} for u in tasks}
    left["sst-2"]["bbc-shift"] = 70  # of neither: with qnli's 80, 75 in the mean
    table = q03_pruning.shared_lesions(pruned(left)).set_index("lesion of")
    question, text = "another task with its question", "another task on its text"
    own = "the task itself"
    # text: sst-2 (60 against 75), sst-shift (60 against 80); question: two of 50 against 80
    assert table["by"].to_dict() == pytest.approx({question: 30, text: (15 + 20) / 2, own: 50 - 10})
    assert table["by task"].to_dict() == {
        question: "sst-shift +30.0, bbc-shift +30.0",
        text: "sst-2 +15.0, sst-shift +20.0",
        own: "sst-shift +40.0, bbc-shift +40.0",
    }
    assert (table["low"] <= table["by"]).all() and (table["high"] >= table["by"]).all()


def test_tasks_that_share_both_have_the_question_of_the_other_and_of_ones_own_nobody_knows():
    def table(*tasks: str) -> pd.DataFrame:
        left = {u: {t: 20 if t == u else 60 for t in tasks} for u in tasks}
        return q03_pruning.shared_lesions(pruned(left))

    (row,) = table("bbc", "bbc-pair").to_dict("records")
    assert (row["lesion of"], row["by"]) == ("the task itself", pytest.approx(40))
    assert table("mine", "bbc", "sst-2").empty


def test_pairs_are_counted_by_what_they_share():
    columns = ["pair", "shared", "importance", "enters", "D"]
    rows = [("a + b", "neither", 0.1, True, 9.0), ("a + c", "neither", 0.2, True, 7.0)]
    rows += [("b + c", "neither", 0.3, True, 8.0), ("a + d", "question", 0.8, True, 1.0)]
    rows += [("a + e", "text", 0.5, False, 5.0), ("a + f", "", 0.5, True, 5.0)]
    table = q05_similarity.by_shared(pd.DataFrame(rows, columns=columns))
    found = table[["the two tasks share", "pairs", "D", "lowest D", "highest D"]].to_numpy()
    wanted = [["question", 1, 1, 1, 1], ["neither", 3, 8, 7, 9]]
    assert found.tolist() == wanted, "learned and known"
    assert table["importance"].tolist() == pytest.approx([0.8, 0.2])
    assert table["rank correlation"].tolist() == pytest.approx([np.nan, -0.5], nan_ok=True)
    assert table[["low", "high"]].isna().all(axis=None), "fewer than eight tasks have no interval"


def test_pairs_without_the_question_in_common_have_a_correlation_of_their_own():
    rng, pairs = np.random.default_rng(0), list(combinations(QUESTION_AND_TEXT, 2))
    names = [f"{a} + {b}" for a, b in pairs]
    table = pd.DataFrame({"pair": names, "shared": [shared_by(*pair) for pair in pairs]})
    table = table.assign(importance=rng.random(len(pairs)), D=rng.random(len(pairs)), enters=True)
    rows = q05_similarity.by_shared(table).set_index("the two tasks share")
    assert list(rows.index) == [*SHARED, "not the question"]
    left = table[~table["shared"].isin(["question", "question and text"])]
    row = rows.loc["not the question"]

    def of(part):
        return part["importance"].corr(part["D"], method="spearman")

    assert (row["pairs"], row["rank correlation"]) == (len(left), pytest.approx(of(left)))
    tasks = list(QUESTION_AND_TEXT)
    without = [of(left[[task not in pair.split(" + ") for pair in left["pair"]]]) for task in tasks]
    half = stats.t.ppf(0.975, len(tasks) - 1) * np.std(without) * np.sqrt(len(tasks) - 1)
    assert row[["low", "high"]].tolist() == pytest.approx([of(left) - half, of(left) + half])
    assert rows["low"].min() >= -1 and rows["high"].max() <= 1


def test_many_pairs_are_told_apart_by_what_they_share_and_a_few_by_name():
    pairs = list(combinations(QUESTION_AND_TEXT, 2))
    many = pd.DataFrame({"pair": [" + ".join(pair) for pair in pairs]})
    many["shared"] = [shared_by(*pair) for pair in pairs]
    known = {"D": 1.0, "low": 0.0, "high": 2.0} | dict.fromkeys(q05_similarity.MEASURES, 0.5)
    many = many.assign(enters=[pair[0] != "bbc-somo" for pair in pairs], **known)
    correlations = pd.DataFrame({"similarity": q05_similarity.MEASURES, "given": ""})
    correlations[["rank correlation with D", "low", "high"]] = -0.2, -1.0, 0.5
    for table, names in (
        (many, set(SHARED)),
        (many[:6], set(many["pair"][:6])),
        (many.assign(shared=""), {q05_similarity.UNKNOWN}),
    ):
        legend = q05_similarity.plot_similarity(table, correlations).axes[-1].get_legend()
        assert {text.get_text() for text in legend.get_texts()} == names


def test_the_curve_over_dose_shows_every_dose_and_marks_the_one_that_decides():
    doses = ((0.1, 0.0, 0.01, 1.0), (0.9, 0.0, 0.9, np.nan), (0.3, 0.3, 0.2, 4.0))
    rows = [
        (claim, what, *dose, 0.1, -1.0, dose[0] == 0.9)
        for claim, what, dose in product(("C3", "C4"), ("IAT minus this", "minus that"), doses)
    ]
    columns = ["claim", "difference", "delta", "floor", "dose", "high", "value", "low", "decides"]
    figure = q06_iat.plot_doses(pd.DataFrame(rows, columns=columns))
    assert [ax.get_title() for ax in figure.axes][:2] == ["C3: IAT minus this", "C3: minus that"]
    for ax in figure.axes:
        texts = sorted(text.get_text() for text in ax.texts)
        assert texts == [rf"$\delta$ {delta}" for delta in (0.1, 0.3, 0.9)]
        low, high = ax.get_ylim()
        assert low < -1 and high > 4
        marked = [line for line in ax.lines if line.get_marker() in ("o", "s")]
        dots = [line for line in marked if len(line.get_xdata())]
        filled = [line.get_xdata()[0] for line in dots if line.get_markerfacecolor() != "white"]
        assert len(dots) == 3 and filled == [0.9], "one dose decides"
