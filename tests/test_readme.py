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
    within = row("03_shared", lesion_of="the task itself")
    assert within["low"] < 0 < within["high"], "within a question there is none"
    apart = row("03_without_question", without_tasks_that_ask_about="belonging")
    alike = ("question", "question and text")
    same = pd.DataFrame([row("05_shared", the_two_tasks_share=what) for what in alike])
    other = row("05_shared", the_two_tasks_share="not the question")
    given = row("05_correlations", similarity="importance", given="given whether they ask the same")
    both = pd.read_csv(ROOT / "results" / "evidence" / "tables" / "05_correlations.csv")
    rest = both[both["similarity"].isin(["TextEmb", "CKA"]) & both["given"].isna()]
    assert ((rest["low"] < 0) & (rest["high"] > 0)).all() and len(rest) == 2
    part = {"claim": "C4", "difference": "IAT minus plain training", "floor": 0}
    late = row("06_doses", delta=0.1, **part)
    start = row("07_transfer", part="full", source="pre-trained", target="mean")
    assert same["pairs"].sum() == 9 and "The nine pairs" in WORDS
    sentences = [
        "A task loses {by:.1f} points of accuracy more [{low:.1f}, {high:.1f}] to".format(**asked),
        "belonging, D is {D:.1f} [{low:.1f}, {high:.1f}];".format(**apart),
        f"have a D of {same['lowest D'].min():.1f} to {same['highest D'].max():.1f} points; the",
        "the others, {D:.1f} in".format(**other),
        "with D is {rank correlation with D:.2f} [{low:.2f}, {high:.2f}].".format(**given),
        f"it changes {100 * late['changed']:.1f} % of the predictions",
        f"by {100 * start['minus multi-task']:.1f} points [{100 * start['diff low']:.1f}, "
        f"{100 * start['diff high']:.1f}]",
    ]
    for sentence in sentences:
        assert sentence in WORDS, sentence


def test_the_dissociation_to_expect_is_that_of_notebook_03():
    whole = {"convention": "lesion", "fraction": "mean", "task": "mean"}
    row = saved("mini", "03_dissociation", **whole)
    said = "D = {D:.2f} points, 95 % interval [{low:.2f}, {high:.2f}]"
    assert said.format(**row) in WORDS


def test_the_hours_of_evidence_are_those_of_its_records():
    records = (ROOT / "results" / "evidence" / "runs").glob("*.json")
    hours = sum(json.loads(record.read_text())["seconds"] for record in records) / 3600
    assert re.findall(r"(\d+) hours of one core", TEXT) == [f"{hours:.0f}"]
