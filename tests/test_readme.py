"""What README says of the claims is what notebook 08 has saved."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_the_claims_of_the_readme_are_those_that_notebook_08_has_saved():
    """Every number of README's table, as many digits as it shows, and every verdict."""
    table = re.search(
        r"\| claim of the paper \| `mini` \| `evidence` \|\n.*?\n\n", README.read_text(), re.S
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table[0].strip().splitlines()[2:]
    ]
    at = [i for i, (first, *_) in enumerate(rows) if first.startswith("**C")]
    assert [rows[i][0][2:4] for i in at] == [f"C{i}" for i in range(1, 7)]
    for column, profile in enumerate(("mini", "evidence"), start=1):
        saved = pd.read_csv(ROOT / "results" / profile / "tables" / "08_claims.csv").fillna(
            {"why": ""}
        )
        for i, end in zip(at, [*at[1:], len(rows)], strict=True):
            parts = saved[saved["claim"] == rows[i][0][2:4]]
            said = rows[i][column]
            assert said.startswith(f"**{parts['verdict'].iloc[0]}**") and said.endswith(
                parts["why"].iloc[0]
            )
            if claim_p := re.search(r"\(claim p (\S+)\)", said):
                assert same_p(claim_p[1], parts["claim p"].iloc[0])
            for row, (_, part) in zip(rows[i + 1 : end], parts.iterrows(), strict=True):
                assert same_numbers(row[column], part), (
                    f"{profile}, {part['claim']}, {part['measured here']}"
                )


def test_the_findings_of_the_readme_are_what_the_notebooks_of_evidence_have_saved():
    """Every sentence with a number under "What came out", written anew from the tables."""

    def row(table: str, **where: object) -> pd.Series:
        saved = pd.read_csv(ROOT / "results" / "evidence" / "tables" / f"{table}.csv")
        for column, value in where.items():
            saved = saved[saved[column.replace("_", " ")] == value]
        assert len(saved) == 1
        return saved.iloc[0]

    question = row("03_shared", lesion_of="another task with its question")
    shifts = [row("02_lesions", task=task) for task in ("bbc-shift", "sst-shift")]
    same = [
        row("05_shared", the_two_tasks_share=what) for what in ("question", "question and text")
    ]
    other = row("05_shared", the_two_tasks_share="not the question")
    late, early = (
        row("06_doses", claim="C4", difference="IAT minus plain training", delta=d, floor=0)
        for d in (0.1, 0.9)
    )
    ablation, integrated = (
        row("04_selections", selection=name) for name in ("ablation", "integrated")
    )
    assert shifts[0]["largest rise: head"] == shifts[1]["largest rise: head"]
    fewest, most = sorted(shifts, key=lambda found: found["points lost without it"])
    lowest, highest = (
        min(found["lowest D"] for found in same),
        max(found["highest D"] for found in same),
    )
    sentences = [
        f"A task loses {question['by']:.1f} points of accuracy more [{question['low']:.1f}, {question['high']:.1f}] to",
        f"without it, one task loses {fewest['points lost without it']:.0f} points [{fewest['lost low']:.0f}, "
        f"{fewest['lost high']:.0f}], the other {most['points lost without it']:.0f} [{most['lost low']:.0f}, "
        f"{most['lost high']:.0f}] (",
        f"that ask the same have a D of {lowest:.1f} to {highest:.1f} points; those that do not, {other['D']:.1f} in",
        f"correlation with D is {other['rank correlation']:.2f} [{other['low']:.2f}, {other['high']:.2f}].",
        f"where it changes {100 * early['changed']:.0f} % of the predictions, it costs",
        f"as in the paper, it changes {100 * late['changed']:.1f} % of the predictions",
        f"of the gradient's, {ablation['minus gradient']:.0f} and {integrated['minus gradient']:.0f} points "
        f"more [{ablation['diff low']:.0f}, {ablation['diff high']:.0f}], "
        f"[{integrated['diff low']:.0f}, {integrated['diff high']:.0f}].",
    ]
    text = " ".join(README.read_text().split())
    assert [sentence for sentence in sentences if sentence not in text] == []
    assert sum(found["pairs"] for found in same) == 9 and "The nine pairs" in text
    twice = [
        found["D"] / row("04_selections", selection="gradient")["D"]
        for found in (ablation, integrated)
    ]
    assert all(1.5 < times < 2.5 for times in twice), "about twice"


def test_the_dissociation_to_expect_is_that_of_notebook_03():
    text = " ".join(README.read_text().split())
    for profile, digits, said in (
        ("mini", 2, "D = {} points, 95 % interval [{}, {}]"),
        ("glue-mini", 1, "D = {} points [{}, {}]"),
    ):
        saved = pd.read_csv(ROOT / "results" / profile / "tables" / "03_dissociation.csv")
        (row,) = saved[
            (saved["convention"] == "lesion")
            & (saved["fraction"] == "mean")
            & (saved["task"] == "mean")
        ].to_dict("records")
        assert said.format(*(f"{row[name]:.{digits}f}" for name in ("D", "low", "high"))) in text


def test_the_hours_of_evidence_are_those_of_its_records():
    records = (ROOT / "results" / "evidence" / "runs").glob("*.json")
    hours = sum(json.loads(record.read_text())["seconds"] for record in records) / 3600
    assert re.findall(r"(\d+) hours of one core", README.read_text()) == [f"{hours:.0f}"]


def same_p(said: str, p: float) -> bool:
    """Whether p is told with the digits that are told: .28, or < .001."""
    if said.startswith("<"):
        return p < float(said.strip("< "))
    return f"{p:.2g}" == f"{float(said):.2g}"


def same_numbers(said: str, part: pd.Series) -> bool:
    """Whether a cell holds a part's estimate, interval, p and MDE; nothing, if there is no estimate; 0 of a count."""
    if np.isnan(part["value"]):
        return said == ""
    if said == "0 exactly":
        return part["value"] == part["low"] == part["high"] == 0
    told = re.fullmatch(r"(\S+) \[(\S+), (\S+)\], p (.+), (\S+)", said)
    if told is None:
        return False
    for name, text in zip(("value", "low", "high"), told.groups()[:3], strict=True):
        rounded = f"{part[name]:.{len(text.partition('.')[2])}f}"
        if text != re.sub(r"^-(0\.0*)$", r"\1", rounded):
            return False
    return same_p(told[4], part["p"]) and told[5] == f"{part['MDE']:.2g}"
