"""Notebooks: committed as executed, comparing something, and running from scratch in the smoke profile.

That their outputs are those of the committed records is nbval's part, which pytest runs on notebooks/.
"""

import json
import re
from pathlib import Path

import nbformat
import pytest

from fslib import Study
from fslib.questions import main, q01_multitask, q03_pruning

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Why a notebook may not be committed as it is."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not executed top to bottom")
    outputs = [output for cell in code for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        found.append("holds an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("holds output on standard error")
    compared = [o for o in outputs if o.output_type == "stream" or "text/html" in o.get("data", {})]
    if not compared:
        found.append("compares no table or text")
    if not code or "\nassert " not in "\n" + code[-1].source:
        found.append("does not end with assertions about its own result")
    if [c for c in code if "nbval-skip" in str(c.metadata.get("tags")) or "NBVAL" in c.source]:
        found.append("hides a cell from comparison")
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1 or [line.split(" = ")[0] for line in tagged[0].source.splitlines()] != [
        "profile",
        "seed",
        "overrides",
    ]:
        found.append("has not one cell of parameters: profile, seed, overrides")
    return found


def test_there_are_notebooks():
    assert [p.stem[:2] for p in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))] and len(
        NOTEBOOKS
    ) == 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_is_fit_to_be_shown(path):
    assert faults(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_the_committed_results(path):
    executed = ROOT / "results" / "mini" / "notebooks" / path.name
    # not `assert a == b`: pytest would spend minutes on drawing how two large notebooks differ
    same = path.read_bytes() == executed.read_bytes()
    assert same, (
        f"{path.name} is not as executed: fslib run {path.stem[:2]} --in-place, and commit both"
    )


@pytest.mark.parametrize("profile", ["glue-mini", "evidence"])
def test_notebooks_of_other_profiles_are_executed_as_they_are_now(profile):
    executed = sorted((ROOT / "results" / profile / "notebooks").glob("*.ipynb"))
    assert executed
    for path in executed:
        found = nbformat.read(path, as_version=4).cells
        sources = [
            cell.source
            for cell in found
            if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        same = sources == [
            cell.source
            for cell in nbformat.read(ROOT / "notebooks" / path.name, as_version=4).cells
        ]
        assert same, (
            f"{path.name} has changed: fslib run {path.stem[:2]} --profile {profile}, and commit it"
        )


def spoilt(change) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS[-1], as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    change(notebook, code)
    return notebook


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nb, code: code[2].update(execution_count=None), "not executed"),
        (lambda nb, code: code[2].update(execution_count=1), "not executed"),
        (
            lambda nb, code: code[0].outputs.append(nbformat.v4.new_output("error", ename="E")),
            "holds an error",
        ),
        (lambda nb, code: [cell.update(outputs=[]) for cell in code], "compares no"),
        (lambda nb, code: code[-1].update(source="1 + 1"), "does not end with"),
        (lambda nb, code: code[2].update(source="# NBVAL_SKIP"), "hides a cell"),
        (lambda nb, code: code[0].metadata.update(tags=[]), "cell of parameters"),
    ],
)
def test_the_check_on_notebooks_can_fail(change, fault):
    assert any(fault in found for found in faults(spoilt(change)))


def test_all_notebooks_run_from_scratch_in_smoke(tmp_path, capsys):
    # by this process, which enforces the types of all signatures
    assert (
        main(["run", "--profile", "smoke", "--fresh", "--workers", "1", "--results", str(tmp_path)])
        == 0
    )
    study = Study("smoke", results=tmp_path)
    for path in NOTEBOOKS:
        executed = nbformat.read(tmp_path / "smoke" / "notebooks" / path.name, as_version=4)
        code = [cell for cell in executed.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert all(study.store.find(unit) for unit in study.plan(path.stem))
    tables, figures = (
        sorted((tmp_path / "smoke" / part).iterdir()) for part in ("tables", "figures")
    )
    assert {p.suffix for p in tables} == {".csv", ".md"} and {p.suffix for p in figures} == {
        ".png",
        ".svg",
    }
    assert all(p.stat().st_size for p in [*tables, *figures])
    capsys.readouterr()
    assert main(["list", "--profile", "smoke", "--results", str(tmp_path)]) == 0
    assert "missing" not in capsys.readouterr().out


def test_committed_records_are_those_that_the_notebooks_ask_for():
    study = Study("mini", results=ROOT / "results")
    units = {f"{u.kind}-{u.key}.json": u for path in NOTEBOOKS for u in study.plan(path.stem)}
    runs = ROOT / "results" / "mini" / "runs"
    assert {p.name for p in runs.glob("*.json")} == set(units)
    for name in units:
        record = json.loads((runs / name).read_text())
        assert record["seconds"] > 0 and record["commit"] not in ("", "unknown")
        assert not record["commit"].endswith("+changes"), (
            "a result counts if it was computed by committed code"
        )


def test_committed_tables_are_written_again_as_they_are(tmp_path):
    """Every table follows from the committed records."""
    study = Study("mini", results=tmp_path)
    study.store = Study("mini", results=ROOT / "results").store
    study.table("01_scores", q01_multitask.scores(study))
    study.table("03_pruning", q03_pruning.pruning(study))
    for name in ("01_scores", "03_pruning"):
        again = (study.folder / "tables" / f"{name}.md").read_text()
        assert again == (ROOT / "results" / "mini" / "tables" / f"{name}.md").read_text()


@pytest.mark.parametrize("profile", ["mini", "glue-mini", "evidence"])
def test_committed_results_are_of_committed_code_and_of_no_one_machine(profile):
    folder = ROOT / "results" / profile
    records = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    assert records and all(re.fullmatch("[0-9a-f]{40}", record["commit"]) for record in records)
    for path in [*folder.rglob("*.json"), *folder.rglob("*.ipynb"), *folder.rglob("*.md")]:
        assert str(ROOT) not in path.read_text(), f"{path.name} tells where it was made"


@pytest.mark.parametrize(("profile", "last"), [("glue-mini", 3), ("evidence", 8)])
def test_a_profile_has_the_notebooks_it_is_for(profile, last):
    folder = ROOT / "results" / profile
    for number in (f"{n:02d}" for n in range(last + 1)):
        for part in ("tables", "figures", "notebooks"):
            assert list((folder / part).glob(f"{number}_*")), (
                f"nothing of notebook {number} in {part}"
            )


def test_the_figures_of_the_readme_are_those_of_notebook_08():
    kept = {
        "teaser",
        "claims",
        "importance_maps",
        "pruning_curves",
        "dissociation",
        "dissociation_by_model",
        "similarity",
        "endings",
    }
    pictures = {f"{n}{s}" for n in kept for s in (".png", ".svg")}
    assert {p.name for p in (ROOT / "figures").iterdir()} == pictures | {"explorer.html"}
    for path in (ROOT / "figures").glob("*.png"):
        assert (
            path.read_bytes()
            == (ROOT / "results" / "mini" / "figures" / f"08_{path.name}").read_bytes()
        )
