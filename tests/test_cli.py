"""The command line: what it says, what it writes, and exit codes that a script can trust."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from small_units import SMALL, write_tasks

from fslib import Study
from fslib.questions import main
from fslib.study import runner
from fslib.study.records import Store, cached_task

SETTINGS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
SMOKE = ["--profile", "smoke", *SETTINGS]
READS_RECORD = """
import json, os
from pathlib import Path
runs = Path(os.environ["FSLIB_RESULTS"]).glob(f"{profile}*/runs/importance-*.json")
print("examples", [json.loads(r.read_text())["result"]["examples"] for r in runs], "steps", overrides["steps"])
"""


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook with fslib's `parameters` cell and these."""
    parameters = nbformat.v4.new_code_cell('profile = "mini"\nseed = 0\noverrides = {}')
    parameters.metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def clone(data, tmp_path, monkeypatch) -> Path:
    """A clone with small notebooks of its own: 00 says hello, 02 reads a record."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "00_hello.ipynb", 'print("hello from", profile, seed)')
    write_notebook(tmp_path / "notebooks" / "02_heads.ipynb", READS_RECORD)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setenv("FSLIB_DATA", str(data))
    monkeypatch.delenv("FSLIB_RESULTS", raising=False)
    monkeypatch.setattr("fslib.study.records.git_commit", lambda: "unknown")
    cached_task.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    cached_task.cache_clear()


@pytest.fixture
def results(tmp_path) -> list[str]:
    return ["--results", str(tmp_path / "results")]


def folder_of(results: list[str]) -> Path:
    """Where the settings of these tests put their results."""
    return Study("smoke", overrides=SMALL, results=results[1]).folder


def records(results: list[str]) -> dict[str, int]:
    """Records by name, with the time they were written."""
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder_of(results).glob("runs/*.json"))}


def outputs(path: Path) -> str:
    """All that an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


# Bad input


@pytest.mark.parametrize("action", ["run", "list", "verify"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--profile", "smok"], ["profile 'smok'", "did you mean 'smoke'"]),
        (["04"], ["notebook '04'", "00_hello", "02_heads"]),
        (["02_haeds"], ["notebook '02_haeds'", "did you mean '02_heads'"]),
        (["--set", "stepps=3"], ["setting 'stepps'", "did you mean 'steps'"]),
        (["--set", "steps"], ["--set 'steps'", "key=value"]),
        (["--set", "=3"], ["--set '=3'", "key=value"]),
        (["--set", "tasks=[bbc"], ["--set 'tasks=[bbc'", "YAML"]),
        (["--set", "steps=0"], ["steps=0"]),
        (["--set", "steps="], ["steps=None"]),
        (["--set", "steps=many"], ["steps='many'"]),
        (["--set", "sampling=anealed"], ["sampling 'anealed'", "did you mean 'annealed'"]),
        (["--set", "fractions=[0.5, 1.5]"], ["fraction 1.5"]),
        (["--set", "tasks=[bbc]"], ["bbc", "at least two"]),
        (["--set", "tasks=[bbc, BBC]"], ["two tasks", "'bbc'"]),
        (["--set", "tasks=[bbc, bbc-pears]", "02"], ["task 'bbc-pears'", "did you mean 'bbc-pair'"]),
        (["--seed", "-1"], ["seed -1"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(action, arguments, parts, results, capsys):
    assert main([action, *arguments, *results]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fslib: ")
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err
    assert not Path(results[1]).exists()


@pytest.mark.parametrize(
    "arguments", [[], ["rum"], ["run", "--seed", "one"], ["run", "--frsh"], ["verify", "--sample", "x"]]
)
def test_a_malformed_command_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: fslib" in capsys.readouterr().err


def test_an_unknown_encoder_is_told_before_anything_is_written(results, capsys):
    assert main(["run", "02", *SMOKE, "--set", "encoder=minilm-l7", *results]) == 2
    assert "did you mean 'minilm-l" in capsys.readouterr().err
    assert not list(Path(results[1]).rglob("*.json"))
    assert not list(Path(results[1]).rglob("*.ipynb"))


def test_notebooks_are_looked_for_in_a_clone(clone, results, capsys):
    (clone / "notebooks").rename(clone / "elsewhere")
    assert main(["run", *results]) == 2
    assert "clone of the repository" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch, results, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "get", interrupt)
    assert main(["run", "02", *SMOKE, *results]) == 130
    assert "interrupted" in capsys.readouterr().err


# Run and list


def test_list_shows_what_is_missing_then_what_run_recorded_and_run_reuses_it(results, capsys):
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "00_hello" in said
    assert said.count("missing") == 2  # train and importance of one seed
    assert "recorded" not in said
    assert not Path(results[1]).exists()

    assert main(["run", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "[1/2] 00_hello: nothing to compute" in said
    assert "[2/2] 02_heads: 2 to compute" in said
    folder = folder_of(results)
    assert str(folder / "tables") in said
    assert {p.name for p in (folder / "notebooks").iterdir()} == {"00_hello.ipynb", "02_heads.ipynb"}
    assert "hello from smoke 0" in outputs(folder / "notebooks" / "00_hello.ipynb")
    assert "examples [{'left': 4, 'right': 4}] steps 2" in outputs(folder / "notebooks" / "02_heads.ipynb")
    cells = nbformat.read(folder / "notebooks" / "02_heads.ipynb", as_version=4).cells
    assert [c.execution_count for c in cells] == [1, 2, 3]  # the parameters, those of this run, and the cell

    before = records(results)
    assert [name.split("-")[0] for name in before] == ["importance", "train"]
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "missing" not in said
    seconds = json.loads((folder / "runs" / next(n for n in before if "train" in n)).read_text())["seconds"]
    assert f"recorded {seconds:8.1f} s  left+right, seed 0" in said

    assert main(["run", "heads", *SMOKE, *results]) == 0
    assert "[1/1] 02_heads: nothing to compute" in capsys.readouterr().out
    assert records(results) == before

    assert main(["run", "02", "--fresh", *SMOKE, *results]) == 0
    assert "02_heads: 2 to compute" in capsys.readouterr().out
    after = records(results)
    assert after.keys() == before.keys()
    assert all(after[name] > before[name] for name in before)


def test_settings_and_seed_write_into_a_folder_of_their_own(results, tmp_path):
    for words in ([], ["--seed", "3"], ["--set", "steps=7"]):
        assert main(["run", "00", "--profile", "smoke", *words, *results]) == 0
    found = {p.name for p in (tmp_path / "results").iterdir()}
    assert found == {"smoke", "smoke+seed=3", "smoke+steps=7"}
    assert "hello from smoke 3" in outputs(tmp_path / "results" / "smoke+seed=3" / "notebooks" / "00_hello.ipynb")


def test_results_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FSLIB_RESULTS", str(tmp_path / "other"))
    assert main(["run", "00", "--profile", "smoke"]) == 0
    assert (tmp_path / "other" / "smoke" / "notebooks" / "00_hello.ipynb").is_file()
    assert os.environ["FSLIB_RESULTS"] == str(tmp_path / "other")


def test_the_source_is_not_changed_and_in_place_is_for_the_default_profile(clone, results, capsys):
    source = clone / "notebooks" / "00_hello.ipynb"
    before = source.read_bytes()
    assert main(["run", "00", *results]) == 0
    assert source.read_bytes() == before
    assert main(["run", "00", "--in-place", *results]) == 0
    assert outputs(source) == "hello from mini 0\n"
    assert source.read_bytes() == (Path(results[1]) / "mini" / "notebooks" / "00_hello.ipynb").read_bytes()


@pytest.mark.parametrize("words", [["--profile", "smoke"], ["--seed", "1"], ["--set", "steps=3"]])
def test_in_place_is_refused_for_other_settings_before_anything_is_lost(clone, results, capsys, words):
    source = clone / "notebooks" / "00_hello.ipynb"
    before = source.read_bytes()
    study = Study(results=results[1], **({"profile": "smoke"} if "smoke" in words else {}))
    kept = study.folder / "runs" / "train-0.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    assert main(["run", "--in-place", "--fresh", *words, *results]) == 2
    assert "--in-place" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert kept.is_file()
    assert not list(Path(results[1]).rglob("*.ipynb"))


def test_fresh_forgets_nothing_when_the_command_is_refused(results, capsys):
    assert main(["run", "02", *SMOKE, *results]) == 0
    before = records(results)
    assert main(["run", "02", "--fresh", "--in-place", *SMOKE, *results]) == 2
    assert main(["run", "02", "05", "--fresh", *SMOKE, *results]) == 2
    assert records(results) == before


def test_a_failing_notebook_exits_with_1_and_spoils_nothing(clone, results, capsys):
    source = clone / "notebooks" / "00_hello.ipynb"
    assert main(["run", "00", "--profile", "smoke", *results]) == 0
    folder = Path(results[1]) / "smoke" / "notebooks"
    good = (folder / "00_hello.ipynb").read_bytes()
    write_notebook(source, 'print("so far")', 'raise RuntimeError("two\\nlines")', "print('never')")
    broken = source.read_bytes()
    capsys.readouterr()

    assert main(["run", "--profile", "smoke", *results]) == 1
    said = capsys.readouterr()
    line = next(x for x in said.err.splitlines() if x.startswith("fslib: "))
    assert "00_hello failed in cell" in line
    assert "RuntimeError: two lines" in line
    assert "00_hello.failed.ipynb" in line
    assert "all done" not in said.out
    assert (folder / "00_hello.ipynb").read_bytes() == good
    kept = nbformat.read(folder / "00_hello.failed.ipynb", as_version=4)
    assert "so far" in outputs(folder / "00_hello.failed.ipynb")
    assert any(o.output_type == "error" for c in kept.cells if c.cell_type == "code" for o in c.outputs)
    assert source.read_bytes() == broken
    assert not (folder / "02_heads.ipynb").exists()

    write_notebook(source, 'print("mended")')
    assert main(["run", "00", "--profile", "smoke", *results]) == 0
    assert "mended" in outputs(folder / "00_hello.ipynb")
    assert not (folder / "00_hello.failed.ipynb").exists()


def test_a_kernel_that_dies_exits_with_1(clone, results, capsys):
    write_notebook(clone / "notebooks" / "00_hello.ipynb", "import os; os._exit(3)")
    assert main(["run", "00", "--profile", "smoke", *results]) == 1
    assert "00_hello failed: its kernel died" in capsys.readouterr().err
    assert not (Path(results[1]) / "smoke" / "notebooks" / "00_hello.ipynb").exists()


def test_a_file_where_results_should_go_exits_with_2(results, capsys):
    Path(results[1]).write_text("in the way")
    assert main(["run", "02", *SMOKE, *results]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["list", *SMOKE, *results]) == 0
    assert Path(results[1]).read_text() == "in the way"


# Verify


def test_verify_exits_with_0_then_1_after_tampering_and_2_without_records(results, capsys):
    assert main(["verify", "02", *SMOKE, *results]) == 2
    assert "no record" in capsys.readouterr().err
    assert main(["run", "02", *SMOKE, *results]) == 0
    capsys.readouterr()
    assert main(["verify", "02", *SMOKE, *results, "--sample", "0"]) == 0
    said = capsys.readouterr().out
    assert said.count("bit-equal") == 2
    assert "2 of 2 records verified, 0 differ" in said

    assert main(["verify", "02", *SMOKE, *results, "--sample", "1"]) == 0
    assert "1 of 2 records verified" in capsys.readouterr().out
    assert main(["verify", "02", *SMOKE, *results, "--sample", "-1"]) == 2

    record = next(folder_of(results).glob("runs/train-*.json"))
    content = json.loads(record.read_text())
    content["result"]["scores"]["left"] += 0.01
    record.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["verify", "02", *SMOKE, *results, "--sample", "0"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERS" in said
    assert "result.scores.left" in said
    assert "2 of 2 records verified, 1 differ" in said


# In a process of its own


def test_the_command_passes_its_exit_code_to_the_shell(results):
    words = [Path(sys.executable).with_name("fslib"), "list", "--profile", "nano", *results]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "valid: smoke, mini" in done.stderr


def test_help_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for code in ("0 done", "1 a notebook failed", "2 bad input", "130 interrupted"):
        assert code in said
