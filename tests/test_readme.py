"""README's numbers are those that the notebooks have saved."""

import json
import re
from functools import partial

import pandas as pd
import pytest
from readme_tables import BEGIN, README, ROOT, with_tables

TEXT = README.read_text()
WORDS = " ".join(TEXT.split())


def saved(profile: str, table: str, **where: object) -> pd.Series:
    """The one row of a table that a notebook of a profile has saved; where: its values."""
    rows = pd.read_csv(ROOT / "results" / profile / "tables" / f"{table}.csv")
    for column, value in where.items():
        rows = rows[rows[column.replace("_", " ")] == value]
    return rows.squeeze(axis=0)


def test_tables_are_as_the_command_writes_them():
    assert with_tables(TEXT) == TEXT, "python tests/readme_tables.py"


def test_the_command_mends_a_table_and_needs_its_mark():
    begin = TEXT.index(BEGIN)
    assert with_tables(TEXT[:begin] + TEXT[begin:].replace("1", "7", 1)) == TEXT
    with pytest.raises(SystemExit, match="one line <!-- table: claims -->"):
        with_tables(TEXT[:begin] + TEXT[begin + 1 :])


def test_the_findings_are_what_the_notebooks_of_evidence_have_saved():
    """Every sentence with a number under "What came out", written anew from the tables."""
    row = partial(saved, "evidence")
    asked = row("03_shared", lesion_of="another task with its question")
    shifts = [row("02_lesions", task=task) for task in ("bbc-shift", "sst-shift")]
    fewest, most = sorted(shifts, key=lambda found: found["points lost without it"])
    alike = ("question", "question and text")
    same = pd.DataFrame([row("05_shared", the_two_tasks_share=what) for what in alike])
    other = row("05_shared", the_two_tasks_share="not the question")
    part = {"claim": "C4", "difference": "IAT minus plain training", "floor": 0}
    late, early = (row("06_doses", delta=delta, **part) for delta in (0.1, 0.9))
    names = ("gradient", "ablation", "integrated")
    usual, ablation, integrated = (row("04_selections", selection=name) for name in names)
    assert shifts[0]["largest rise: head"] == shifts[1]["largest rise: head"]
    assert same["pairs"].sum() == 9 and "The nine pairs" in WORDS
    assert all(1.5 < found["D"] / usual["D"] < 2.5 for found in (ablation, integrated)), "twice"
    sentences = [
        "A task loses {by:.1f} points of accuracy more [{low:.1f}, {high:.1f}] to".format(**asked),
        "one task loses {points lost without it:.0f} points [{lost low:.0f}, "
        "{lost high:.0f}], the other".format(**fewest),
        "the other {points lost without it:.0f} [{lost low:.0f}, {lost high:.0f}] (".format(**most),
        f"have a D of {same['lowest D'].min():.1f} to {same['highest D'].max():.1f} points; those",
        "those that do not, {D:.1f} in".format(**other),
        "with D is {rank correlation:.2f} [{low:.2f}, {high:.2f}].".format(**other),
        f"where it changes {100 * early['changed']:.0f} % of the predictions, it costs",
        f"as in the paper, it changes {100 * late['changed']:.1f} % of the predictions",
        f"{ablation['minus gradient']:.0f} and {integrated['minus gradient']:.0f} points more "
        "[{diff low:.0f}, {diff high:.0f}], ".format(**ablation)
        + "[{diff low:.0f}, {diff high:.0f}].".format(**integrated),
    ]
    assert [sentence for sentence in sentences if sentence not in WORDS] == []


def test_the_dissociation_to_expect_is_that_of_notebook_03():
    whole = {"convention": "lesion", "fraction": "mean", "task": "mean"}
    row = saved("mini", "03_dissociation", **whole)
    said = "D = {D:.2f} points, 95 % interval [{low:.2f}, {high:.2f}]"
    assert said.format(**row) in WORDS


def test_the_hours_of_evidence_are_those_of_its_records():
    records = (ROOT / "results" / "evidence" / "runs").glob("*.json")
    hours = sum(json.loads(record.read_text())["seconds"] for record in records) / 3600
    assert re.findall(r"(\d+) hours of one core", TEXT) == [f"{hours:.0f}"]
