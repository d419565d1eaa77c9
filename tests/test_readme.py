"""What README says of the claims is what notebook 08 has saved."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_the_claims_of_the_readme_are_those_that_notebook_08_has_saved():
    """Every number of README's table, as many digits as it shows, and every verdict."""
    table = re.search(r"\| claim of the paper \| `mini` \| `evidence` \|\n.*?\n\n", README.read_text(), re.S)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()[2:]]
    at = [i for i, (first, *_) in enumerate(rows) if first.startswith("**C")]
    assert [rows[i][0][2:4] for i in at] == [f"C{i}" for i in range(1, 7)]
    for column, profile in enumerate(("mini", "evidence"), start=1):
        saved = pd.read_csv(ROOT / "results" / profile / "tables" / "08_claims.csv").fillna({"why": ""})
        for i, end in zip(at, [*at[1:], len(rows)], strict=True):
            parts = saved[saved["claim"] == rows[i][0][2:4]]
            said = rows[i][column]
            assert said.startswith(f"**{parts['verdict'].iloc[0]}**") and said.endswith(parts["why"].iloc[0])
            if claim_p := re.search(r"\(claim p (\S+)\)", said):
                assert same_p(claim_p[1], parts["claim p"].iloc[0])
            for row, (_, part) in zip(rows[i + 1 : end], parts.iterrows(), strict=True):
                assert same_numbers(row[column], part), f"{profile}, {part['claim']}, {part['measured here']}"


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
