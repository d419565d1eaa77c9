"""Notebooks are committed as executed, compare something, and run from scratch in `smoke`.

That their outputs are those of the committed records is nbval's part (pytest on notebooks/).
"""

import json
import re
from pathlib import Path

import nbformat
import pytest

from fslib import Study
from fslib.cli import main
from fslib.questions import q01_multitask, q03_pruning, q05_similarity, q06_iat, q07_transfer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = ("mini", "evidence")
PARAMETERS = ["profile", "seed", "overrides"]


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Why a notebook may not be committed as it is."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    lines = [line.split(" = ")[0] for cell in tagged for line in cell.source.splitlines()]
    texts = [o for o in outputs if o.output_type == "stream" or "text/html" in o.get("data", {})]
    counts = [cell.execution_count for cell in code]
    hidden = [c for c in code if "nbval-skip" in str(c.metadata.get("tags")) or "NBVAL" in c.source]
    found = {
        "not executed top to bottom": counts != list(range(1, len(code) + 1)),
        "holds an error": any(output.output_type == "error" for output in outputs),
        "holds standard error": any(output.get("name") == "stderr" for output in outputs),
        "compares no table or text": not texts,
        "does not end with assertions": "\nassert " not in f"\n{code[-1].source}",
        "hides a cell from comparison": bool(hidden),
        "has not one cell of parameters": lines != PARAMETERS,
    }
    return [fault for fault, is_there in found.items() if is_there]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_be_shown(path):
    """Its own outputs, and those of every profile, which are of the cells as they are now."""
    assert faults(read(path)) == []
    executed = ROOT / "results" / "mini" / "notebooks" / path.name
    # not `assert a == b`: pytest would spend minutes on drawing how two large notebooks differ
    same = path.read_bytes() == executed.read_bytes()
    assert same, f"{path.name} is not as executed: fslib run {path.stem[:2]} --in-place"
    sources = [cell.source for cell in read(path).cells]
    other = ROOT / "results" / "evidence" / "notebooks" / path.name
    if other.is_file():
        shown = [c for c in read(other).cells if "injected-parameters" not in str(c.metadata)]
        assert [cell.source for cell in shown] == sources, f"fslib run {path.stem[:2]} --profile"


def test_the_check_on_notebooks_can_fail():
    notebook = read(NOTEBOOKS[-1])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(execution_count=None, outputs=[nbformat.v4.new_output("error")])
            cell.update(source="# NBVAL_SKIP", metadata={})
    assert len(faults(notebook)) == 6, "all but standard error"


def test_all_notebooks_run_from_scratch_in_smoke(tmp_path, capsys):
    # by this process, which enforces the types of all signatures
    where = ["--profile", "smoke", "--results", str(tmp_path)]
    assert main(["run", *where, "--fresh", "--workers", "1"]) == 0
    study = Study("smoke", results=tmp_path)
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(10)]
    for path in NOTEBOOKS:
        code = [c for c in read(study.folder / "notebooks" / path.name).cells if "outputs" in c]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert all(study.store.find(unit) for unit in study.plan(path.stem))
    for part, kinds in (("tables", {".csv", ".md"}), ("figures", {".png", ".svg"})):
        files = list((study.folder / part).iterdir())
        assert {file.suffix for file in files} == kinds
        assert all(file.stat().st_size for file in files)
    capsys.readouterr()
    assert main(["list", *where]) == 0 and "missing" not in capsys.readouterr().out


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_results_are_of_committed_code_and_of_no_one_machine(profile):
    folder = ROOT / "results" / profile
    records = [json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")]
    assert records and all(record["seconds"] > 0 for record in records)
    assert all(re.fullmatch("[0-9a-f]{40}", record["commit"]) for record in records)
    for kind in ("json", "ipynb", "md"):
        texts = {path.name: path.read_text() for path in folder.rglob(f"*.{kind}")}
        assert [name for name, text in texts.items() if str(ROOT) in text] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_tables_are_written_again_as_they_are(tmp_path, profile):
    """The tables of `mini` are nbval's part, too; those of `evidence` are compared here alone."""
    study = Study(profile, results=tmp_path)
    study.store = Study(profile, results=ROOT / "results").store
    tables = {"01_scores": q01_multitask.scores, "03_pruning": q03_pruning.pruning}
    tables |= {"06_movement": q06_iat.movement, "07_transfer": q07_transfer.learning_curves}
    if profile == "evidence":
        tables |= {"05_pairs": q05_similarity.pairs, "06_doses": q06_iat.doses}
    for name, make in tables.items():
        study.table(name, make(study))
        committed = ROOT / "results" / profile / "tables"
        for kind in ("csv", "md"):
            again = (study.folder / "tables" / f"{name}.{kind}").read_text()
            assert again == (committed / f"{name}.{kind}").read_text()


def test_every_profile_has_its_notebooks_and_the_figures_of_readme_are_those_of_08():
    for profile in PROFILES:
        for part in ("tables", "figures", "notebooks"):
            files = (ROOT / "results" / profile / part).iterdir()
            assert {file.name[:2] for file in files} >= {f"{i:02d}" for i in range(9)}
    pictures = list((ROOT / "figures").glob("*.png"))
    assert len(pictures) == 8
    for path in pictures:
        drawn = ROOT / "results" / "mini" / "figures" / f"08_{path.name}"
        assert path.read_bytes() == drawn.read_bytes()
        assert path.with_suffix(".svg").read_bytes() == drawn.with_suffix(".svg").read_bytes()
