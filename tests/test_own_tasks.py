"""Own tasks get through all notebooks: numbers, rare labels, labels that look like formulas, two tasks alone."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import IPython.display
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import fslib
from fslib.questions import q06_iat
from fslib.study import records
from fslib.study.profiles import PROFILES
from fslib.training import lr_share

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WORDS = (
    "red",
    "green",
    "blue",
    "old",
    "new",
    "cold",
    "warm",
    "small",
    "large",
    "early",
    "late",
    "odd",
    "even",
)
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


def text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(3, 8))))


def write(
    place: Path, name: str, label: Callable[[int, str], object], column: str = "label", n: int = 24
) -> str:
    """A task in GLUE's layout; `label(i, side)` is the label of row i."""
    rng = np.random.default_rng(len(name))
    (place / name).mkdir(parents=True)
    for side in ("train", "dev"):
        rows = [f"sentence\t{column}", *(f"{text(rng)}\t{label(i, side)}" for i in range(n))]
        (place / name / f"{side}.tsv").write_text("\n".join(rows) + "\n")
    return name


def plain(i: int, side: str) -> str:
    return "yes" if i % 2 else "no"


def ratings(place: Path) -> dict[str, object]:
    """A regression task, whose score is a rank correlation that may be negative, or undefined and then 0."""
    return {
        "tasks": [
            write(place, "sts-b", lambda i, side: i % 6, "score"),
            write(place, "plain", plain),
            "bbc-shift",
        ]
    } | {"transfer_targets": ["plain"]}


def grammar(place: Path) -> dict[str, object]:
    """Matthews' correlation: 0 for a constant answer, so that retention and D can be undefined; rare labels."""
    rare = write(place, "rare", lambda i, side: "rare" if i % 12 == 0 else "common")
    return {
        "tasks": [write(place, "cola", plain), rare, write(place, "plain", plain)],
        "transfer_targets": ["cola"],
    }


def formulas(place: Path) -> dict[str, object]:
    """Label names with signs that a plot may take for a formula, long ones, and a long name."""
    names = [
        "$\\nothing_b^$",
        "100 %",
        "a\\frac{1}{2}",
        "<script>alert(1)</script>",
        "a label of a great many words, " * 3,
    ]
    long = "a-task-whose-name-is-as-long-as-a-name-can-be"
    tasks = [write(place, "prices", lambda i, side: names[i % 5]), write(place, long, plain)]
    return {"tasks": tasks, "transfer_targets": ["bbc"]}


def one_sided(place: Path) -> dict[str, object]:
    """An evaluation side of one class, blank texts, and one text on both sides."""
    constant = write(place, "constant", lambda i, side: "yes" if side == "dev" or i % 2 else "no")
    same = write(place, "same", plain)
    for side in ("train", "dev"):
        path = place / same / f"{side}.tsv"
        path.write_text(path.read_text() + "the same text on both sides\tyes\n \tno\n")
    return {"tasks": [constant, same, write(place, "plain", plain)], "transfer_targets": ["plain"]}


def two(place: Path) -> dict[str, object]:
    """Two tasks: one pair, and none to leave out."""
    return {
        "tasks": [write(place, "plain", plain), write(place, "other", plain)],
        "transfer_targets": ["plain"],
    }


def wordless(place: Path) -> dict[str, object]:
    """A task whose texts hold no word, classes or numbers; sizes that its few examples do not reach."""
    names = []
    for name, column in (("signs", "label"), ("sts-b", "score")):
        names.append(write(place, name, lambda i, side: i % 3, column))
        for side in ("train", "dev"):
            rows = [f"{'!?'[i % 2] * (1 + i // 2)} {i % 10}\t{i % 3}" for i in range(24)]
            (place / name / f"{side}.tsv").write_text(
                "\n".join([f"sentence\t{column}", *rows]) + "\n"
            )
    names.append(write(place, "plain", plain))
    return {"tasks": names, "transfer_targets": ["signs"], "transfer_sizes": [2, 6, 1000]}


def crowd(place: Path) -> dict[str, object]:
    """More tasks than a batch has examples; no size that the target reaches."""
    names = [write(place, name, plain) for name in ("plain", "other", "third")]
    return {
        "tasks": names,
        "batch_size": 2,
        "transfer_targets": ["plain"],
        "transfer_sizes": [1000],
    }


def crossed(place: Path) -> dict[str, object]:
    """A design like that of `evidence`: other tasks for pairs, endings and transfer, doses at fewer seeds."""
    place.mkdir()
    few = dict.fromkeys(("eval_examples", "small_eval_examples", "ending_examples"), 24)
    return few | {
        "tasks": ["bbc", "bbc-headline", "bbc-shift", "bbc-next"],
        "pair_tasks": ["bbc", "bbc-pair", "bbc-shift"],
        "pair_seeds": 2,
        "ending_tasks": ["bbc-headline", "bbc-shift"],
        "ending_seeds": 3,
        "ending_fractions": [0.1, 0.3],
        "prune_examples": 16,
        "dose_seeds": 2,
        "doses": [0.3, 0.5],
        "dose_floors": [0.3],
        "floor_delta": 0.6,
        "delta": 0.8,
        "other_deltas": [],
        "other_endings": ["IAT, least heads"],
        "transfer_targets": ["bbc", "bbc-next"],
        "transfer_sizes": [6, 12],
        "lesioned_on": "scored",
        "first_seed": 100,
        "seeds": 2,
        "alone_seeds": 1,
        "small_steps": 20,
        "encoder_seeds": 2,
    }


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
    monkeypatch.setattr(
        IPython.display, "display", lambda *things: [str(getattr(t, "data", "")) for t in things]
    )
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    plt.switch_backend(backend)
    records.cached_task.cache_clear()


@pytest.mark.parametrize(
    "kind",
    [ratings, grammar, formulas, one_sided, two, wordless, crowd, crossed],
    ids=lambda kind: kind.__name__,
)
def test_every_notebook_goes_through(kind, calm, tmp_path, monkeypatch):
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FSLIB_RESULTS", str(tmp_path / "results"))
    records.cached_task.cache_clear()
    monkeypatch.setitem(PROFILES, "smoke", PROFILES["smoke"] | TINY)
    overrides = kind(tmp_path / "data")
    said = {
        p.stem[:2]: execute(p, {"profile": "smoke", "seed": 0, "overrides": overrides})
        for p in NOTEBOOKS
    }
    study = fslib.Study("smoke", overrides=overrides)
    claims = (study.folder / "tables" / "08_claims.md").read_text()
    assert all(claim in claims for claim in ("C1", "C2", "C3", "C4", "C5", "C6"))
    if kind is wordless:
        assert "left: (6,)" in said["07"]
    if kind is crowd:
        assert "no PCGrad" in said["06"] and "left: (None,)" in said["07"]
    if kind is crossed:
        doses = pd.read_csv(study.folder / "tables" / "06_doses.csv")
        steps = q06_iat.endings_unit(study, 100).steps
        wanted = [(0.3, 0.0), (0.5, 0.0), (0.6, 0.3), (0.8, 0.0)]
        found = sorted(
            doses[["delta", "floor", "dose"]].drop_duplicates().itertuples(index=False, name=None)
        )
        assert np.allclose(found, [(d, floor, lr_share(steps, d, floor)) for d, floor in wanted])
        assert doses.groupby("decides")["seeds"].unique().map(list).to_dict() == {
            False: [2],
            True: [3],
        }
        endings = (
            pd.read_csv(study.folder / "tables" / "06_endings.csv")
            .groupby("ending")["seeds"]
            .unique()
            .map(tuple)
        )
        assert endings.to_dict() == {
            "single-task": (1,),
            **dict.fromkeys(["trunk", "IAT", "plain", "IAT, random heads"], (3,)),
            **dict.fromkeys(["IAT, least heads", "IAT, delta 0.3", "IAT, delta 0.5"], (2,)),
            **dict.fromkeys(["IAT, random heads, delta 0.3", "IAT, random heads, delta 0.5"], (2,)),
        }
        shared = pd.read_csv(study.folder / "tables" / "03_shared.csv")
        # all four are on BBC's texts, so none shares neither; two ask whether texts belong together
        assert set(shared["lesion of"]) <= {"the task itself"}
        pairs = pd.read_csv(study.folder / "tables" / "05_pairs.csv")
        assert pairs["shared"].value_counts().to_dict() == {"text": 2, "question and text": 1}
        assert pd.read_csv(study.folder / "tables" / "07_transfer.csv")["target"].unique().tolist() == [
            "bbc", "bbc-next", "mean",
        ]  # fmt: skip
        assert {u.seed for u in study.plan("06")} == {100, 101, 102}
        assert "no such ending" in (study.folder / "tables" / "08_differences.md").read_text()
    if kind is two:
        assert "not testable" in said["07"] and "not testable" in claims
