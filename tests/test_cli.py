"""The command line: what it says, what it writes, and exit codes that a script can trust."""

import asyncio
import errno
import gc
import json
import logging
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from small_units import SMALL

from fslib import Study
from fslib.questions import main
from fslib.study import runner
from fslib.study.store import Store, content_checksum
from fslib.study.units import ImportanceUnit, TrainUnit

SETTINGS = [
    word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")
]
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
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(made, path)


@pytest.fixture(autouse=True)
def clone(small_tasks, tmp_path, monkeypatch) -> Path:
    """A clone with small notebooks of its own: 00 says hello, 02 reads a record."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "00_hello.ipynb", 'print("hello from", profile, seed)')
    write_notebook(tmp_path / "notebooks" / "02_heads.ipynb", READS_RECORD)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.delenv("FSLIB_RESULTS", raising=False)
    monkeypatch.setattr("fslib.study.store.git_commit", lambda: "unknown")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


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
        (
            ["--set", "tasks=[bbc, bbc-pears]", "02"],
            ["task 'bbc-pears'", "did you mean 'bbc-pair'"],
        ),
        (["--seed", "-1"], ["seed -1"]),
        (["--seed", "9" * 30], ["seed 999", "2**31"]),
        (["--set", "steps=3", "--set", "steps=4"], ["steps=4", "twice"]),
        (["--set", "steps=true"], ["steps=True", "true and false"]),
        (["--set", "fractions=[true]"], ["fractions", "true and false"]),
        (["--set", "lr=.inf"], ["lr=inf", "finite"]),
        (["--set", "lr=2.5"], ["lr=2.5", "less than or equal to 1"]),
        (["--set", "fractions=[]"], ["fractions=[]"]),
        (["--set", "small_fractions=[]"], ["small_fractions=[]"]),
        (["--set", "transfer_sizes=[]"], ["transfer_sizes=[]"]),
        (["--set", "transfer_sizes=[0]"], ["transfer_sizes", "=0"]),
        (["--set", "encoders=[]"], ["encoders=[]"]),
        (["--set", "encoders=[minilm-l1, minilm-l1]"], ["encoders", "minilm-l1", "twice"]),
        (["--set", "fractions=[.1, .1]"], ["fractions", "0.1", "twice"]),
        (
            ["--set", "tasks=[bbc, bbc-pears]", "00"],
            ["task 'bbc-pears'", "did you mean 'bbc-pair'"],
        ),
        (["--set", "seeds=1000000000000"], ["seeds=1000000000000"]),
        (["--set", "steps=2020-01-01"], ["steps=", "date"]),
        (["--set", "steps=2020-13-45"], ["2020-13-45", "YAML"]),
        (["--set", "steps=" + "9" * 5000], ["--set", "YAML"]),
        (["--set", "tasks=" + "[" * 5000], ["--set", "YAML"]),
        (["--set", "tasks=[&a [x, x], *a]"], ["--set", "YAML"]),
        (["--set", "tasks=[" + "x, " * 5000 + "y z]"], ["task", "'x'"]),
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


def test_no_command_at_all_shows_what_there_is(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert all(
        re.search(rf"^    {word} +\w", said, re.M)
        for word in ("run", "list", "plan", "verify", "explore", "site")
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["rum"], ["run", "--seed", "one"], ["run", "--frsh"], ["verify", "--sample", "x"]],
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


IMPOSSIBLE = [
    (["02", "--set", "encoder=minilm-l7"], ["'minilm-l7'", "did you mean 'minilm-l"]),
    (
        ["04", "--set", "encoders=[tiny-random, minilm-l7]"],
        ["'minilm-l7'", "did you mean 'minilm-l"],
    ),
    (["03", "--set", "fractions=[0.01]"], ["fraction 0.01 of 2 x 12 heads", "no head"]),
    (["03", "--set", "fractions=[0.1, 0.11]"], ["fractions 0.1 and 0.11", "2 heads each"]),
    (["03", "--set", "fractions=[1.0]"], ["controls=1", "at most 0 other"]),
    (
        ["03", "--set", "controls=144", "--set", "fractions=[0.1]"],
        ["controls=144", "at most 143 other sets of 2 heads"],
    ),
    (
        ["04", "--set", "selection_randoms=100", "--set", "small_fractions=[0.05]"],
        ["fraction 0.05", "100", "11 other"],
    ),
    (["06", "--set", "other_alphas=[0.02]"], ["alpha 0.02 of 2 x 12 heads", "no head"]),
    (["01", "--set", "steps=9223372036854775807"], ["steps=9223372036854775807", "10000000"]),
    (["06", "--set", "alpha=1"], ["alpha 1 takes all heads"]),
    (["06", "--set", "delta=0.001"], ["delta 0.001 of", "steps"]),
    (["06", "--set", "alpha=0.02"], ["0.02 of 2 x 12 heads", "no head"]),
]


@pytest.mark.parametrize(("arguments", "parts"), IMPOSSIBLE)
def test_the_impossible_is_refused_before_the_first_training(
    clone, arguments, parts, results, monkeypatch, capsys
):
    def begin(unit, store):
        raise AssertionError("something was computed")

    monkeypatch.setattr(TrainUnit, "compute", begin)
    for number in ("03", "04", "06"):
        write_notebook(clone / "notebooks" / f"{number}_x.ipynb", "1")
    assert (
        main(
            ["run", "00", *arguments, "--profile", "smoke", *without(SETTINGS, arguments), *results]
        )
        == 2
    )
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err
    assert not Path(results[1]).exists()


def without(settings: list[str], arguments: list[str]) -> list[str]:
    """Settings (--set key=value ...) but for those that the arguments set."""
    given = {word.partition("=")[0] for word in arguments}
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return [
        word for flag, pair in pairs if pair.partition("=")[0] not in given for word in (flag, pair)
    ]


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_run_refuses_fewer_than_one_worker(workers, results, capsys):
    assert main(["run", "02", *SMOKE, *results, "--workers", workers]) == 2
    assert capsys.readouterr().err == f"fslib: --workers {workers}: give 1 or more\n"


@pytest.mark.parametrize("option", ["--sample", "--draw"])
def test_verify_refuses_negative_numbers(option, results, capsys):
    assert main(["run", "02", *SMOKE, *results]) == 0
    assert main(["verify", "02", *SMOKE, *results, option, "-1"]) == 2
    assert f"{option} -1: give 0" in capsys.readouterr().err


# Run and list


def test_list_shows_what_is_missing_then_what_run_recorded_and_run_reuses_it(results, capsys):
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "00_hello" in said
    assert said.count("missing") == 2  # train and importance of one seed
    assert "0 of 2 units recorded" in said and "about" not in said, (
        "nothing is known of what they take"
    )
    assert not Path(results[1]).exists()

    assert main(["run", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "[1/2] 00_hello: nothing to compute" in said
    assert "[2/2] 02_heads: 2 to compute" in said
    folder = folder_of(results)
    assert set(json.loads((folder / "data.json").read_text())["tasks"]) == {"left", "right"}
    assert str(folder / "tables") in said
    assert {p.name for p in (folder / "notebooks").iterdir()} == {
        "00_hello.ipynb",
        "02_heads.ipynb",
    }
    assert "hello from smoke 0" in outputs(folder / "notebooks" / "00_hello.ipynb")
    assert "examples [{'left': 4, 'right': 4}] steps 2" in outputs(
        folder / "notebooks" / "02_heads.ipynb"
    )
    cells = nbformat.read(folder / "notebooks" / "02_heads.ipynb", as_version=4).cells
    assert [c.execution_count for c in cells] == [
        1,
        2,
        3,
    ]  # the parameters, those of this run, and the cell

    before = records(results)
    assert [name.split("-")[0] for name in before] == ["importance", "train"]
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "missing" not in said
    seconds = json.loads((folder / "runs" / next(n for n in before if "train" in n)).read_text())[
        "seconds"
    ]
    assert (
        f"recorded {seconds:12.1f} s  left+right, seed 0" in said
        and "2 of 2 units recorded" in said
    )

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
    changed = Study("smoke", overrides={"steps": 7}, results=tmp_path / "results").folder
    assert changed.name.startswith("smoke+steps=7-")
    assert {p.name for p in (tmp_path / "results").iterdir()} == {
        "smoke",
        "smoke+seed=3",
        changed.name,
    }
    settings = json.loads((changed / "settings.json").read_text())
    assert settings == {"profile": "smoke", "seed": 0, "overrides": {"steps": 7}}
    assert [p.parent for p in (tmp_path / "results").rglob("settings.json")] == [changed]
    assert "hello from smoke 3" in outputs(
        tmp_path / "results" / "smoke+seed=3" / "notebooks" / "00_hello.ipynb"
    )


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
    assert (
        source.read_bytes()
        == (Path(results[1]) / "mini" / "notebooks" / "00_hello.ipynb").read_bytes()
    )


@pytest.mark.parametrize("words", [["--profile", "smoke"], ["--seed", "1"], ["--set", "steps=3"]])
def test_in_place_is_refused_for_other_settings_before_anything_is_lost(
    clone, results, capsys, words
):
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


def test_an_interrupted_fresh_run_leaves_what_it_has_not_replaced(results, monkeypatch, capsys):
    assert main(["run", "02", *SMOKE, *results]) == 0
    before = records(results)
    (scored,), (trained,) = (
        [name for name in before if name.startswith(kind)] for kind in ("importance", "train")
    )

    def interrupt(unit, store):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImportanceUnit, "compute", interrupt)
        assert main(["run", "02", "--fresh", *SMOKE, *results]) == 130
    after = records(results)
    assert after[scored] == before[scored] and after[trained] > before[trained]
    capsys.readouterr()
    assert main(["run", "02", *SMOKE, *results]) == 0
    assert "nothing to compute" in capsys.readouterr().out
    assert records(results) == after


def test_a_fresh_run_measures_the_model_that_it_has_trained(results):
    study = Study("smoke", overrides=SMALL, results=results[1])
    unit = study.plan("02")[1]
    honest = study.store.get(unit)
    other = unit.model.model_copy(update={"seed": 9})
    study.store.get(other)
    checkpoint = study.store.checkpoint(unit.model)
    shutil.rmtree(checkpoint)
    shutil.copytree(
        study.store.checkpoint(other), checkpoint
    )  # as if the code that trains were another by now
    assert main(["run", "02", "--fresh", *SMOKE, *results]) == 0
    again = Store(study.folder).find(unit)
    assert all((again.arrays[name] == values).all() for name, values in honest.arrays.items())


def test_a_failing_notebook_exits_with_1_and_spoils_nothing(clone, results, capsys):
    source = clone / "notebooks" / "00_hello.ipynb"
    assert main(["run", "00", "--profile", "smoke", *results]) == 0
    folder = Path(results[1]) / "smoke" / "notebooks"
    good = (folder / "00_hello.ipynb").read_bytes()
    write_notebook(source, 'print("so far")', 'raise RuntimeError("two\\nlines")', "print('never')")
    broken = source.read_bytes()
    write_notebook(clone / "notebooks" / "10_more.ipynb", 'print("went on")')
    capsys.readouterr()

    assert main(["run", "00", "10", "--profile", "smoke", *results]) == 1
    said = capsys.readouterr()
    line = next(x for x in said.err.splitlines() if x.startswith("fslib: "))
    assert "00_hello failed in cell" in line
    assert "RuntimeError: two lines" in line
    assert "00_hello.failed.ipynb" in line
    assert "all done" not in said.out
    assert said.err.splitlines()[-1] == "fslib: 1 of 2 notebooks failed: 00_hello"
    assert (folder / "00_hello.ipynb").read_bytes() == good
    kept = nbformat.read(folder / "00_hello.failed.ipynb", as_version=4)
    assert "so far" in outputs(folder / "00_hello.failed.ipynb")
    assert any(
        o.output_type == "error" for c in kept.cells if c.cell_type == "code" for o in c.outputs
    )
    assert source.read_bytes() == broken
    assert outputs(folder / "10_more.ipynb") == "went on\n"

    write_notebook(source, 'print("mended")')
    assert main(["run", "00", "--profile", "smoke", *results]) == 0
    assert "mended" in outputs(folder / "00_hello.ipynb")
    assert not (folder / "00_hello.failed.ipynb").exists()


def test_a_kernel_that_dies_exits_with_1(clone, results, capsys):
    write_notebook(clone / "notebooks" / "00_hello.ipynb", "import os; os._exit(3)")
    assert main(["run", "00", "--profile", "smoke", *results]) == 1
    assert "00_hello failed: its kernel died (out of memory?)" in capsys.readouterr().err
    assert not (Path(results[1]) / "smoke" / "notebooks" / "00_hello.ipynb").exists()


def test_a_file_where_results_should_go_exits_with_2(results, capsys):
    Path(results[1]).write_text("in the way")
    assert main(["run", "02", *SMOKE, *results]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["list", *SMOKE, *results]) == 0
    assert Path(results[1]).read_text() == "in the way"


def test_two_settings_never_share_a_folder_and_no_name_is_too_long(tmp_path):
    def folder(**changes):
        return Study("smoke", overrides=changes, results=tmp_path).folder.name

    one, two = folder(encoder="a/b"), folder(encoder="a_b")
    assert one != two and one.startswith("smoke+encoder=a_b-")
    long = folder(encoders=[f"encoder-number-{i}" for i in range(100)])
    assert len(long) < 80
    assert long != folder(encoders=[f"encoder-number-{i}" for i in range(101)])
    assert folder(tasks=["BBC", "bbc-pair"]) == folder(tasks=["bbc", "bbc-pair"])
    assert Study("smoke", overrides={"steps": 7}, seed=2, results=tmp_path).folder.name.endswith(
        "+seed=2"
    )


def test_relative_places_mean_the_same_in_the_command_and_in_the_kernel(
    clone, data, tmp_path, monkeypatch
):
    told = "import os; print(os.environ['FSLIB_DATA'], os.environ['FSLIB_RESULTS'], overrides['encoder'])"
    write_notebook(clone / "notebooks" / "00_hello.ipynb", told)
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FSLIB_DATA", os.path.relpath(data))
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(Path(runner.__file__).parents[2]))
    assert (
        main(["run", "00", "--profile", "smoke", "--set", "encoder=model", "--results", "out"]) == 0
    )
    (executed,) = (tmp_path / "here" / "out").rglob("00_hello.ipynb")
    data_there, results_there, encoder = outputs(executed).split()
    assert Path(data_there).samefile(data) and Path(data_there).is_absolute()
    assert (results_there, encoder) == (
        str(tmp_path / "here" / "out"),
        str(tmp_path / "here" / "model"),
    )
    monkeypatch.setenv("FSLIB_RESULTS", "out")
    study = Study("smoke", overrides={"encoder": "model"})
    monkeypatch.chdir(tmp_path)
    assert study.folder == executed.parent.parent


@pytest.mark.parametrize(
    "argv",
    [["/nowhere/python", "-m", "none"], [sys.executable, "-c", "raise SystemExit('broken')"]],
)
def test_another_kernel_of_this_name_is_not_taken(argv, results, tmp_path, monkeypatch):
    foreign = tmp_path / "share" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(foreign.parents[1]))
    assert main(["run", "00", "--profile", "smoke", *results]) == 0


def test_a_kernel_that_cannot_be_started_is_told_in_one_line(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert main(["run", "00", "--profile", "smoke", *results]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert (
        "00_hello failed: FileNotFoundError" in said and "in the kernel of /nowhere/python" in said
    )


def test_a_full_temporary_folder_is_not_blamed_on_the_results(results, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fslib.study.files.tempfile.TemporaryDirectory", full)
    assert main(["run", "00", "--profile", "smoke", *results]) == 2
    said = capsys.readouterr().err
    assert "set TMPDIR" in said and "--results" not in said and "No space left" in said


def test_an_error_in_one_unit_is_one_line_and_the_next_notebook_runs(
    clone, results, monkeypatch, capsys
):
    def broken(unit, store):
        raise RuntimeError("size mismatch\nand more")

    monkeypatch.setattr(TrainUnit, "compute", broken)
    write_notebook(clone / "notebooks" / "10_more.ipynb", "print('went on')")
    assert main(["run", *SMOKE, *results]) == 1
    said = capsys.readouterr().err.splitlines()
    assert (
        "02_heads failed, computing train-" in said[0] and "RuntimeError: size mismatch" in said[0]
    )
    assert said[1:] == ["fslib: 1 of 3 notebooks failed: 02_heads"]
    assert (folder_of(results) / "notebooks" / "10_more.ipynb").is_file()


def test_run_clears_away_what_dead_processes_left(results, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert main(["run", "02", *SMOKE, *results]) == 0
    assert not list((tmp_path / "tmp").iterdir())
    folder = folder_of(results)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = [f".partial-{platform.node()}-{pid}" for pid in (dead.pid, os.getpid())] + [
        ".partial-elsewhere-1"
    ]
    places = ["runs/.train-0.json", "tables/.a.csv", "figures/.a.svg", "notebooks/.02.ipynb"]
    files = [folder / f"{place}{end}" for place in places for end in ours]
    folders = [folder / "checkpoints" / f"train-0{end}" for end in ours]
    folders += [tmp_path / "tmp" / f"fslib-tmp-x{end}" for end in ours]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    for path in folders:
        (path / "inside").mkdir(parents=True)
    assert main(["run", "00", *SMOKE, *results]) == 0
    left = {path for path in [*files, *folders] if path.exists()}
    assert left == {path for path in [*files, *folders] if not path.name.endswith(ours[0])}


# Verify


def test_what_cannot_be_read_is_counted_and_left_where_it_is(results, monkeypatch, capsys):
    assert main(["run", "02", *SMOKE, *results]) == 0
    folder = folder_of(results)
    record = next(folder.glob("runs/train-*.json"))
    good = record.read_bytes()
    for hurt in (
        lambda: record.write_bytes(good[:-40]),
        lambda: edit(record, config={**json.loads(good)["config"], "steps": 9}),
        lambda: edit(record, data={"left": "0", "right": "0"}),
        lambda: edit(record, commit="0" * 40),
        record.with_suffix(".npz").unlink,
    ):
        record.write_bytes(good)
        hurt()
        before = sorted(
            (p.name, p.read_bytes()) for p in (folder / "runs").iterdir() if p.is_file()
        )
        capsys.readouterr()
        assert main(["verify", "02", *SMOKE, *results, "--sample", "1"]) == 1
        said = capsys.readouterr().out
        assert f"record {record} is damaged" in said
        assert "1 of 1 records verified, 0 differ, 1 more could not be read" in said
        assert main(["list", "02", *SMOKE, *results]) == 0
        said = capsys.readouterr().out
        assert "DAMAGED" in said and str(record) in said
        assert (
            sorted((p.name, p.read_bytes()) for p in (folder / "runs").iterdir() if p.is_file())
            == before
        )

    with pytest.warns(UserWarning, match="set aside"):
        assert main(["run", "02", *SMOKE, *results]) == 0
    capsys.readouterr()
    assert main(["list", "02", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert f"set aside, damaged: {record}.corrupt" in said and "DAMAGED" not in said


def edit(record: Path, **changes) -> None:
    """Change fields of a record's JSON, as an editor would."""
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


def test_a_record_that_may_not_be_read_is_left_alone_by_all(results, monkeypatch, capsys):
    assert main(["run", "02", *SMOKE, *results]) == 0
    before = records(results)
    read = Path.read_bytes

    def refuse(path):
        if path.name.startswith("train-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    capsys.readouterr()
    for action, code in (("run", 2), ("list", 0), ("verify", 1)):
        assert main([action, "02", *SMOKE, *results]) == code
        said = "".join(capsys.readouterr())
        assert "cannot read" in said and "Permission denied" in said
    assert records(results) == before
    assert not list(folder_of(results).rglob("*.corrupt"))


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
    content["content_sha256"] = content_checksum(content)
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


COMMAND = [sys.executable, "-c", "import sys, fslib_command; sys.exit(fslib_command.main())"]


def start(words: list[str], **options) -> subprocess.Popen:
    """Start the command in a process of its own; the code under test is found first."""
    here = str(Path(runner.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": here} | options.pop("env", {})
    # what a shell starts in the background ignores Ctrl-C, and so would what it starts
    shared = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_interrupts}
    return subprocess.Popen([*COMMAND, *words], env=environment, text=True, **shared | options)


def hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


OPENED = """
import signal, sys, fslib_command

def noted(number, handler, change=signal.signal):
    if handler is signal.default_int_handler:
        print("fslib.cli" in sys.modules)
    return change(number, handler)

signal.signal, sys.argv = noted, ["fslib", "list", "--profile", "nano"]
sys.exit(fslib_command.main())
"""


def test_nothing_is_left_to_open_when_an_interrupt_is_an_exception_again():
    """One that came in the middle of an import would end in a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED], capture_output=True, text=True, preexec_fn=hear_interrupts
    )
    assert (done.stdout, done.returncode) == ("True\n", 2)


def test_a_reader_that_goes_away_ends_the_command_without_a_word(results):
    process = start(["list", "--profile", "mini", *results])
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


@pytest.mark.parametrize("words", [["list", "--profile", "smoke"], ["--help"]])
def test_an_output_that_is_full_is_told_in_one_line(words):
    with Path("/dev/full").open("w") as full:
        process = start(words, stdout=full)
        said = process.stderr.read()
    assert process.wait(60) == 2
    assert said == "fslib: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_of_few_characters_shows_the_rest_as_escapes(env, tmp_path):
    process = start(["list", "00", "--profile", "smoke", "--results", str(tmp_path / "é")], env=env)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert said.startswith("profile smoke") and said.isascii()
    assert (
        "\\xe9" in said or "\\udcc3\\udca9" in said
    )  # é as a letter, or as the bytes of a name that cannot be read


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.parametrize("moment", ["while it is imported", "while it computes"])
def test_a_signal_is_answered_in_one_line(number, code, word, moment, results):
    words = ["run", "01", "--profile", "smoke", "--set", "steps=20000", "--workers", "2"]
    process = start([*words, *results])
    if moment == "while it computes":
        assert "to compute" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    said = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("fslib: ")]
    assert len(said) == 1 and word in said[0]
    assert "Traceback" not in errors
    assert not [p for p in Path(results[1]).rglob("*") if ".partial-" in p.name]


@pytest.mark.parametrize("limit", [40, 100])
def test_too_few_file_handles_are_told_in_one_line(limit, results):
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    process = start(["run", "00", "--profile", "smoke", *results], preexec_fn=few)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == f"fslib: too few open files are allowed ({limit}): ulimit -n 256, or more\n"


def test_help_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for code in ("0 done", "1 a notebook failed", "2 bad input", "130 interrupted"):
        assert code in said


def test_an_interrupt_inside_a_notebook_leaves_nothing_to_complain_of(
    tmp_path, monkeypatch, caplog
):
    """nbclient's tasks then fail with nobody waiting for them, of which asyncio would print a traceback."""

    def interrupted(*words, **options):
        async def wait():
            raise RuntimeError("Kernel died")

        loop = asyncio.new_event_loop()
        task = loop.create_task(wait())
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()
        left.append(task)
        raise KeyboardInterrupt

    left = []
    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(Study("smoke", results=tmp_path), tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    try:
        left.clear()
        gc.collect()
        assert not caplog.records
    finally:
        logging.getLogger("asyncio").setLevel(logging.NOTSET)
