"""Own tasks get through all notebooks: numbers, rare labels, labels like formulas, two tasks."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
from tinymodels import one_thread

import fslib
from fslib.study.fingerprints import cached_task
from fslib.study.profiles import PROFILES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WORDS = ("red", "green", "blue", "old", "new", "cold", "warm", "small", "large", "early", "odd")
TINY = {
    "seeds": 1,
    "steps": 6,
    "max_length": 16,
    "curve_points": 1,
    "curve_examples": 8,
    "eval_examples": None,
    "importance_examples": 8,
    "fractions": [0.1, 0.3],
    "small_fractions": [0.1, 0.3],
    "controls": 1,
    "draws": 99,
    "small_steps": 10,
    "small_examples": 4,
    "selection_examples": 4,
    "selection_randoms": 2,
    "ending_seeds": 2,
    "other_alphas": [],
    "other_deltas": [0.3],
    "transfer_sizes": [6, None],
    "transfer_min_steps": 1,
    "transfer_max_steps": 2,
    "batch_size": 8,
}


FORMULAS = ("$\\nothing_b^$", "100 %", "a\\frac{1}{2}", "<script>alert(1)</script>", "long, " * 15)
LONG = "a-task-whose-name-is-as-long-as-a-name-can-be"


def write(place: Path, name: str, label: Callable[[int, str], object], wordless=False) -> str:
    """Write a task in GLUE's layout; `label(i, side)` is the label of row i."""
    rng = np.random.default_rng(len(name))
    (place / name).mkdir(parents=True)
    for side in ("train", "dev"):
        rows = ["sentence\t" + ("score" if name == "sts-b" else "label")]
        for i in range(24):
            text = " ".join(rng.choice(WORDS, size=int(rng.integers(3, 8))))
            if wordless:
                text = f"{'!?'[i % 2] * (1 + i // 2)} {i % 10}"
            rows.append(f"{text}\t{label(i, side)}")
        (place / name / f"{side}.tsv").write_text("\n".join(rows) + "\n")
    return name


def odd(place: Path) -> dict[str, object]:
    """Tasks that are odd in every way, more of them than a batch has examples.

    Matthews' correlation is 0 for a constant answer, so that D can be undefined, and a label is
    rare; label names that a plot may take for formulas, long ones, and a text on both sides; texts
    without a word, classes and numbers; a size that the target does not reach.
    """
    rare = write(place, "cola", lambda i, side: "rare" if i % 12 == 0 else "common")
    strange = write(place, LONG, lambda i, side: FORMULAS[i % 5])
    for side in ("train", "dev"):
        with (place / LONG / f"{side}.tsv").open("a") as file:
            file.write(f"the same text on both sides\t{FORMULAS[0]}\n \t{FORMULAS[1]}\n")
    names = [strange, rare, write(place, "sts-b", lambda i, side: i % 3, wordless=True)]
    signs = write(place, "signs", lambda i, side: i % 3, wordless=True)
    few = {"batch_size": 2, "transfer_sizes": [2, 6, 1000]}
    return few | {"tasks": names, "transfer_targets": [signs]}


def two(place: Path) -> dict[str, object]:
    """Two tasks: one pair, and none to leave out; scored on one class, or on numbers."""
    constant = write(place, "constant", lambda i, side: "yes" if side == "dev" or i % 2 else "no")
    names = [constant, write(place, "sts-b", lambda i, side: i % 6)]
    return {"tasks": names, "transfer_targets": [constant]}


def execute(path: Path, parameters: dict[str, object]) -> str:
    """Run a notebook's code here, with other parameters; returns what it printed and showed."""
    shown: list[str] = []
    names: dict[str, object] = {"print": lambda *words: shown.append(" ".join(map(str, words)))}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.filterwarnings("error", "constrained_layout not applied")
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    return "\n".join(shown)


@pytest.fixture
def calm(monkeypatch):
    """Nothing is shown, and no task is known from another folder."""

    def told(*things: object) -> list[str]:
        return [str(getattr(thing, "data", "")) for thing in things]

    monkeypatch.setattr(IPython.display, "display", told)
    plt.switch_backend("agg")
    cached_task.cache_clear()
    with one_thread():
        yield
    cached_task.cache_clear()


@pytest.mark.parametrize(
    ("design", "notebooks", "parts"),
    [(odd, range(10), {6: "no PCGrad", 7: "left: (6,)"}), (two, (5, 7, 8), {7: "not testable"})],
)
def test_notebooks_go_through(design, notebooks, parts, calm, tmp_path, monkeypatch):
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FSLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setitem(PROFILES, "smoke", PROFILES["smoke"] | TINY)
    overrides = design(tmp_path / "data")
    settings = {"profile": "smoke", "seed": 0, "overrides": overrides}
    said = {number: execute(NOTEBOOKS[number], settings) for number in notebooks}
    assert all(part in said[number] for number, part in parts.items())
    study = fslib.Study("smoke", overrides=overrides)
    claims = (study.folder / "tables" / "08_claims.md").read_text()
    assert all(f"C{number}" in claims for number in range(1, 7))
    assert design is not two or "there are fewer than two tasks to train a source on" in claims
