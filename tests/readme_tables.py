"""Write README's table of claims anew from what the notebooks have saved.

`python tests/readme_tables.py` writes it between its marks, `<!-- table: claims -->` and
`<!-- end -->`; `pytest tests/test_readme.py` says whether it would change anything.
"""

from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ENDS = ("value", "low", "high")
PROFILE, DIGITS = "evidence", 2  # what decides, and how many digits of an estimate are shown
WORDS = {  # what README calls each claim, and the numbers that it stands on
    "C1": ("heads are special after multi-task training", "own lesion against others', points of D",
           "top heads against random ones"),
    "C2": ("similar tasks specialize less", "minus the rank correlation over pairs of tasks",
           "the same, given whether the two ask the same question"),
    "C3": ("IAT raises specialization", "IAT minus plain training, points of D",
           "minus IAT with random heads"),
    "C4": ("IAT beats plain training", "IAT minus plain training, points of score",
           "minus IAT with random heads"),
    "C5": ("IAT transfers better", "from IAT minus from plain, points of score on a new task",
           "from IAT minus from IAT with random heads"),
    "C6": ("no parameter is added", "parameters"),
}  # fmt: skip


def p_value(p: float) -> str:
    """Write a p value as README does: .28, 1, or < .001."""
    return "< .001" if p < 0.001 else f"{p:.2g}".removeprefix("0")


def verdict(part: pd.Series) -> str:
    """Write what became of a claim, and of what models that is said."""
    text = f"**{part['verdict']}**" + (f" ({part['why']})" if part["why"] else "")
    if np.isfinite(part["claim p"]):
        text += f", claim p {p_value(part['claim p'])}"
    return f"{text}. *{part['scope']}*"


def number(part: pd.Series) -> str:
    """Write one number of a claim: estimate, interval, p, and minimum detectable effect."""
    value, low, high = (f"{round(part[k], DIGITS) + 0.0:.{DIGITS}f}" for k in ENDS)
    if np.isnan(part["value"]):
        return ""
    if part["low"] == part["value"] == part["high"]:
        return f"{part['value']:g} exactly"
    return f"{value} [{low}, {high}], p {p_value(part['p'])}, {part['MDE']:.2g}"


def claims() -> list[list[str]]:
    """Return the claims with their verdicts, scopes and numbers."""
    rows = [["claim of the paper", f"`{PROFILE}`"], ["---"] * 2]
    table = pd.read_csv(ROOT / "results" / PROFILE / "tables" / "08_claims.csv")
    saved = dict(list(table.fillna({"why": ""}).groupby("claim")))
    for claim, (title, *numbers) in WORDS.items():
        parts = list(saved[claim].iloc)
        rows.append([f"**{claim} {title}**", verdict(parts[0])])
        rows += [[words, number(parts[i])] for i, words in enumerate(numbers)]
    return rows


BEGIN, END = "<!-- table: claims -->\n", "<!-- end -->"


def with_tables(text: str) -> str:
    """Return README's text with its table as it follows from the records."""
    if text.count(BEGIN) != 1:
        raise SystemExit(f"README needs one line {BEGIN.strip()}, and {END} below it")
    before, _, rest = text.partition(BEGIN)
    table = "".join(f"| {' | '.join(row)} |\n" for row in claims())
    return before + BEGIN + table + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
