"""The command line: what it says, what it writes, and exit codes that a script can trust."""

import asyncio
import errno
import gc
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from small_units import SMALL, hear_interrupts, small, start
from tinymodels import one_thread

from fslib import Study, cli
from fslib.cli import main
from fslib.study import runner
from fslib.study.store import Store, content_checksum
from fslib.study.units import ImportanceUnit, TrainUnit

READS_RECORD = """
import json, os
from pathlib import Path
runs = Path(os.environ["FSLIB_RESULTS"]).glob(f"{profile}*/runs/importance-*.json")
found = [json.loads(run.read_text())["result"]["examples"] for run in runs]
print("examples", found, overrides["steps"])
"""


SMOKE = small()


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook with fslib's `parameters` cell and these."""
    parameters = nbformat.v4.new_code_cell('profile = "mini"\nseed = 0\noverrides = {}')
    parameters.metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.metadata["kernelspec"] = kernel
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
    with one_thread():
        yield tmp_path


@pytest.fixture
def results(tmp_path) -> list[str]:
    return ["--results", str(tmp_path / "results")]


@pytest.fixture
def no_kernel(monkeypatch) -> list[str]:
    """Give the names of notebooks that would be executed: a kernel takes seconds."""
    executed = []
    run = lambda study, source, **options: executed.append(source.stem)  # noqa: E731
    monkeypatch.setattr(runner, "run_notebook", run)
    return executed


@pytest.fixture
def recorded(results) -> Path:
    """The study's folder, with the records of notebook 02."""
    study = Study("smoke", overrides=SMALL, results=results[1])
    for unit in study.plan("02"):
        study.store.get(unit)
    return study.folder


def records(folder: Path) -> dict[str, int]:
    """Records by name, with the time they were written."""
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("runs/*.json"))}


def outputs(path: Path) -> str:
    """All that an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


def refuses(words: list[str], *parts: str, code: int = 2, capsys: pytest.CaptureFixture) -> None:
    """The command ends with a code and one line on standard error that holds all parts."""
    capsys.readouterr()
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.startswith("fslib: ") and said.count("\n") == 1
    for part in parts:
        assert part in said


# Bad input

BAD = [
    (["list", "--profile", "smok"], ["profile 'smok'", "did you mean 'smoke'"]),
    (["list", "04"], ["notebook '04'", "00_hello", "02_heads"]),
    (["list", "02_haeds"], ["notebook '02_haeds'", "did you mean '02_heads'"]),
    (["list", "--set", "stepps=3"], ["setting 'stepps'", "did you mean 'steps'"]),
    (["list", "--set", "steps"], ["--set 'steps'", "key=value"]),
    (["list", "--set", "tasks=[&a [x, x], *a]"], ["setting tasks.0", "valid string"]),
    (["list", "--seed", "9" * 30], ["seed 999", "2**31"]),
    (["list", "--profil", "mini"], ["'--profil'", "Did you mean '--profile'"]),
    (["rum"], ["'rum'", "Did you mean 'run'"]),
    (["run", "--workers", "0"], ["'--workers'", "0", "x>=1"]),
    (["run", "--ray", "local", "--workers", "2"], ["--workers are processes of this machine"]),
    (["run", "--gpus-per-unit", "1"], ["--gpus-per-unit goes with --ray"]),
    (["run", "--ray", "x", "--gpus-per-unit", "1.5"], ["--gpus-per-unit 1.5: give a whole"]),
    (["run", "--ray", "x", "--gpus-per-unit", "nan"], ["--gpus-per-unit nan"]),
    (["run", "--in-place", "--profile", "smoke"], ["--in-place is for the default"]),
    (["run", "--in-place", "--fresh", "--set", "steps=3"], ["--in-place"]),
    (["verify"], ["no record in", "run fslib run --profile mini first"]),
]


@pytest.mark.parametrize(("words", "parts"), BAD)
def test_bad_input_gets_one_line_and_exit_code_2(clone, words, parts, results, capsys):
    source = (clone / "notebooks" / "00_hello.ipynb").read_bytes()
    refuses([*words, *(results if words != ["rum"] else [])], *parts, capsys=capsys)
    assert not Path(results[1]).exists()
    assert (clone / "notebooks" / "00_hello.ipynb").read_bytes() == source


IMPOSSIBLE = [
    ("04", {"encoders": ["tiny-random", "minilm-l7"]}, ["'minilm-l7'", "did you mean 'minilm-l"]),
    ("03", {"fractions": [0.01]}, ["fraction 0.01 of 2 x 12 heads", "no head"]),
    ("03", {"fractions": [0.1, 0.11]}, ["fractions 0.1 and 0.11", "2 heads each"]),
    ("03", {"fractions": [1.0]}, ["controls=1", "at most 0 other"]),
    ("03", {"controls": 144, "fractions": [0.1]}, ["controls=144", "143 other sets of 2 heads"]),
    ("04", {"selection_randoms": 100, "small_fractions": [0.05]}, ["0.05", "100", "11 other"]),
    ("06", {"other_alphas": [0.02]}, ["alpha 0.02 of 2 x 12 heads", "no head"]),
    ("01", {"steps": 2**63 - 1}, ["steps=9223372036854775807", "10000000"]),
    ("06", {"alpha": 1}, ["alpha 1 leaves no choice"]),
    ("06", {"delta": 0.001}, ["delta 0.001 of", "steps"]),
]


@pytest.mark.parametrize(("notebook", "changes", "parts"), IMPOSSIBLE)
def test_the_impossible_is_refused_before_the_first_training(
    clone, notebook, changes, parts, results, monkeypatch, capsys
):
    monkeypatch.setattr(TrainUnit, "compute", None)
    for number in ("01", "03", "04", "06"):
        write_notebook(clone / "notebooks" / f"{number}_x.ipynb", "1")
    refuses(["run", "00", notebook, *small(**changes), *results], *parts, capsys=capsys)
    assert not Path(results[1]).exists()


def test_notebooks_are_looked_for_in_a_clone(clone, results, capsys):
    (clone / "notebooks").rename(clone / "elsewhere")
    refuses(["run", *results], "clone of the repository", capsys=capsys)


def test_a_file_where_results_should_go_is_told(results, capsys):
    Path(results[1]).write_text("in the way")
    refuses(["run", "02", *SMOKE, *results], "cannot write", capsys=capsys)
    assert main(["list", *SMOKE, *results]) == 0
    assert Path(results[1]).read_text() == "in the way"


def test_a_full_temporary_folder_is_not_blamed_on_the_results(results, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fslib.study.files.tempfile.TemporaryDirectory", full)
    refuses(["run", "00", "--profile", "smoke", *results], "set TMPDIR", capsys=capsys)


def test_other_trouble_of_the_system_names_the_file(results, monkeypatch, capsys):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")

    monkeypatch.setattr(runner, "find_notebooks", refuse)
    refuses(["list", *results], "Permission denied: /x", capsys=capsys)


# Help


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_names_every_command_and_exit_code(words, capsys):
    assert main(words) == (0 if words else 2)
    said = " ".join(capsys.readouterr().out.split())
    for part in ("0 done", "1 a notebook failed", "2 bad input", "130 inter", "143 term", "141 no"):
        assert part in said
    for name in ("run", "list", "verify", "check", "explore", "site"):
        assert f" {name} " in said and main([name, "--help"]) == 0


def test_help_is_there_before_anything_heavy():
    code = "import sys; from fslib.cli import main; main(['run', '--help'])\n"
    code += "print({'torch', 'numpy', 'pandas', 'fslib.errors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n") and done.stdout.startswith("Usage: fslib run")


# Run and list


def test_list_says_what_is_missing_and_run_computes_it_and_executes_notebooks(results, capsys):
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "00_hello" in said and said.count("  missing  ") == 2  # train and importance of one seed
    assert "0 of 2 units recorded" in said and "about" not in said, "nothing is known of the time"
    assert not Path(results[1]).exists()

    assert main(["run", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "[1/2] 00_hello: nothing to compute" in said and "[2/2] 02_heads: 2 to compute" in said
    folder = Study("smoke", overrides=SMALL, results=results[1]).folder
    assert set(json.loads((folder / "data.json").read_text())["tasks"]) == {"left", "right"}
    assert str(folder) in said and "2 units computed, 0 failed" in said
    notebooks = folder / "notebooks"
    assert {p.name for p in notebooks.iterdir()} == {"00_hello.ipynb", "02_heads.ipynb"}
    assert "hello from smoke 0" in outputs(notebooks / "00_hello.ipynb")
    assert "examples [{'left': 4, 'right': 4}] 2" in outputs(notebooks / "02_heads.ipynb")
    cells = nbformat.read(notebooks / "02_heads.ipynb", as_version=4).cells
    # the parameters, those of this run, and the cell
    assert [cell.execution_count for cell in cells] == [1, 2, 3]


def test_run_reuses_what_list_says_is_recorded(recorded, results, no_kernel, capsys):
    before = records(recorded)
    assert [name.split("-")[0] for name in before] == ["importance", "train"]
    assert main(["list", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    seconds = json.loads(next(recorded.glob("runs/train-*.json")).read_text())["seconds"]
    assert f"recorded {seconds:12.1f} s  left+right, seed 0" in said and "missing" not in said
    assert said.endswith("2 of 2 units recorded\n")
    for name in ("2", "heads", "02_heads.ipynb"):
        assert main(["run", name, *SMOKE, *results]) == 0
    assert "[1/1] 02_heads: nothing to compute" in capsys.readouterr().out
    assert records(recorded) == before and no_kernel == ["02_heads"] * 3


def test_list_estimates_missing_units_by_those_of_their_kind(recorded, results, capsys):
    for path in recorded.glob("runs/*.json"):
        content = json.loads(path.read_text())
        content["seconds"] = 5400.0 if path.name.startswith("train") else 1.0
        path.write_text(json.dumps(content))
    other = Study("smoke", overrides=SMALL | {"seeds": 3}, results=results[1])
    recorded.rename(other.folder)
    assert main(["list", "02", *small(seeds=3), *results]) == 0
    said = capsys.readouterr().out
    assert said.count("missing, about   5400 s") == 2 and said.count("missing, about      1 s") == 2
    workers = len(os.sched_getaffinity(0))
    assert f"2 of 6 units recorded; about {3 / workers:.1f} hours with --workers {workers}" in said


def test_a_fresh_run_replaces_records_one_by_one(recorded, results, no_kernel, monkeypatch, capsys):
    def interrupt(unit, store):
        raise KeyboardInterrupt

    before = records(recorded)
    scored, trained = sorted(before)
    fresh = ["run", "02", "--fresh", *SMOKE, *results]
    with monkeypatch.context() as patch:
        patch.setattr(ImportanceUnit, "compute", interrupt)
        refuses(fresh, "interrupted; finished units are recorded", code=130, capsys=capsys)
    after = records(recorded)
    assert after[scored] == before[scored] and after[trained] > before[trained]
    assert main(["run", "02", *SMOKE, *results]) == 0
    assert "nothing to compute" in capsys.readouterr().out and records(recorded) == after
    assert main(fresh) == 0
    assert "02_heads: 2 to compute" in capsys.readouterr().out
    assert all(records(recorded)[name] > after[name] for name in after)


def test_a_fresh_run_measures_the_model_that_it_has_trained(results, no_kernel):
    study = Study("smoke", overrides=SMALL, results=results[1])
    unit = study.plan("02")[1]
    honest = study.store.get(unit)
    other = unit.model.model_copy(update={"seed": 9})
    study.store.get(other)
    checkpoint = study.store.checkpoint(unit.model)
    shutil.rmtree(checkpoint)
    # as if the code that trains were another by now
    shutil.copytree(study.store.checkpoint(other), checkpoint)
    assert main(["run", "02", "--fresh", *SMOKE, *results]) == 0
    again = Store(study.folder).find(unit)
    assert all((again.arrays[name] == values).all() for name, values in honest.arrays.items())


def test_settings_and_seed_write_into_a_folder_of_their_own(results, tmp_path, monkeypatch):
    monkeypatch.setenv("FSLIB_RESULTS", results[1])
    changes = ["--seed", "3", "--set", "steps=7"]
    for words in ([], changes):
        assert main(["run", "00", "--profile", "smoke", *words]) == 0
    changed = Study("smoke", overrides={"steps": 7}, seed=3, results=results[1]).folder
    assert changed.name.startswith("smoke+steps=7-")
    assert {p.name for p in Path(results[1]).iterdir()} == {"smoke", changed.name}
    settings = json.loads((changed / "settings.json").read_text())
    assert settings == {"profile": "smoke", "seed": 3, "overrides": {"steps": 7}}
    assert [p.parent for p in Path(results[1]).rglob("settings.json")] == [changed]
    assert "hello from smoke 3" in outputs(changed / "notebooks" / "00_hello.ipynb")


def test_two_settings_never_share_a_folder_and_no_name_is_too_long(tmp_path):
    def folder(seed=0, **changes):
        return Study("smoke", overrides=changes, seed=seed, results=tmp_path).folder.name

    one, two = folder(encoder="a/b"), folder(encoder="a_b")
    assert one != two and one.startswith("smoke+encoder=a_b-")
    long = folder(encoders=[f"encoder-number-{i}" for i in range(100)])
    assert len(long) < 80
    assert long != folder(encoders=[f"encoder-number-{i}" for i in range(101)])
    assert folder(tasks=["BBC", "bbc-pair"]) == folder(tasks=["bbc", "bbc-pair"])
    assert folder(steps=7, seed=2).endswith("+seed=2")


def test_the_source_is_changed_in_place_only(clone, results):
    source = clone / "notebooks" / "00_hello.ipynb"
    assert main(["run", "00", "--in-place", *results]) == 0
    assert outputs(source) == "hello from mini 0\n"
    written = Path(results[1]) / "mini" / "notebooks" / "00_hello.ipynb"
    assert source.read_bytes() == written.read_bytes()


def test_relative_places_mean_the_same_in_the_command_and_in_the_kernel(
    clone, data, tmp_path, monkeypatch
):
    """And another kernel of this name is not taken."""
    shown = "import os; print(os.environ['FSLIB_DATA'], os.environ['FSLIB_RESULTS'], overrides)"
    write_notebook(clone / "notebooks" / "00_hello.ipynb", shown)
    (tmp_path / "here" / "model").mkdir(parents=True)
    foreign = tmp_path / "share" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python", "-m", "none"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("JUPYTER_PATH", str(foreign.parents[1]))
    monkeypatch.setenv("FSLIB_DATA", os.path.relpath(data))
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(Path(runner.__file__).parents[2]))
    words = ["run", "00", "--profile", "smoke", "--set", "encoder=model", "--results", "out"]
    assert main(words) == 0
    (executed,) = (tmp_path / "here" / "out").rglob("00_hello.ipynb")
    data_there, results_there, overrides = outputs(executed).split(maxsplit=2)
    assert Path(data_there).samefile(data) and Path(data_there).is_absolute()
    assert results_there == str(tmp_path / "here" / "out")
    assert overrides == f"{{'encoder': {str(tmp_path / 'here' / 'model')!r}}}\n"


def test_run_clears_away_what_dead_processes_left(recorded, results, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, *ours = (f".partial-{platform.node()}-{pid}" for pid in (dead.pid, os.getpid()))
    kept, swept = [], []
    places = ["runs/.train-0.json", "tables/.a.csv", "figures/.a.svg", "notebooks/.02.ipynb"]
    places = [recorded / place for place in (*places, "checkpoints/train-0/inside")]
    for place in (*places, tmp_path / "tmp" / "fslib-tmp-x" / "inside"):
        for end in (gone, *ours, ".partial-elsewhere-1"):
            is_folder = place.name == "inside"
            path = Path(f"{place.parent if is_folder else place}{end}")
            (path / "inside" if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
            if not is_folder:
                path.write_text("half")
            (swept if end == gone else kept).append(path)
    assert main(["run", "00", *SMOKE, *results]) == 0
    assert [path for path in [*kept, *swept] if path.exists()] == kept


# Notebooks and units that fail


def test_a_failing_notebook_spoils_nothing_and_the_next_one_runs(clone, results, capsys):
    source = clone / "notebooks" / "00_hello.ipynb"
    folder = Path(results[1]) / "smoke" / "notebooks"
    folder.mkdir(parents=True)
    (folder / "00_hello.ipynb").write_text("good")
    write_notebook(source, 'print("so far")', 'raise RuntimeError("two\\nlines")', "print('never')")
    broken = source.read_bytes()
    write_notebook(clone / "notebooks" / "09_dies.ipynb", "import os; os._exit(3)")
    assert main(["run", "00", "09", "--profile", "smoke", *results]) == 1
    said = capsys.readouterr()
    first, second, last = [x for x in said.err.splitlines() if x.startswith("fslib: ")]
    for part in ("00_hello failed in cell", "RuntimeError: two lines", "00_hello.failed.ipynb"):
        assert part in first
    assert "09_dies failed: its kernel died (out of memory?)" in second
    assert last == "fslib: 2 of 2 notebooks failed: 00_hello, 09_dies"
    assert "all done" not in said.out
    assert (folder / "00_hello.ipynb").read_text() == "good" and source.read_bytes() == broken
    assert "so far" in outputs(folder / "00_hello.failed.ipynb")
    write_notebook(source, 'print("mended")')
    assert main(["run", "00", "--profile", "smoke", *results]) == 0
    assert "mended" in outputs(folder / "00_hello.ipynb")
    assert not (folder / "00_hello.failed.ipynb").exists()


def test_a_kernel_that_cannot_be_started_is_told_in_one_line(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert main(["run", "00", "--profile", "smoke", *results]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "in the kernel of /nowhere/python" in said
    assert "00_hello failed: FileNotFoundError" in said


def test_an_error_in_one_unit_is_one_line_and_the_next_notebook_runs(
    clone, results, monkeypatch, no_kernel, capsys
):
    def broken(unit, store):
        raise RuntimeError("size mismatch\nand more")

    monkeypatch.setattr(TrainUnit, "compute", broken)
    write_notebook(clone / "notebooks" / "10_more.ipynb", "1")
    assert main(["run", *SMOKE, *results]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "02_heads failed, computing train-" in said[0]
    assert "RuntimeError: size mismatch" in said[0]
    assert said[1:] == ["fslib: 1 of 3 notebooks failed: 02_heads"]
    assert no_kernel == ["00_hello", "10_more"]


def test_an_interrupt_inside_a_notebook_leaves_nothing_to_complain_of(
    tmp_path, monkeypatch, caplog
):
    """nbclient's tasks then fail with nobody waiting for them: asyncio would print a traceback."""

    async def die():
        raise RuntimeError("Kernel died")

    def interrupted(*words, **options):
        loop = asyncio.new_event_loop()
        left.append(loop.create_task(die()))
        loop.run_until_complete(asyncio.wait(left))
        loop.close()
        raise KeyboardInterrupt

    left = []
    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(Study("smoke", results=tmp_path), tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    left.clear()
    gc.collect()
    logging.getLogger("asyncio").setLevel(logging.NOTSET)
    assert not caplog.records


# Verify


def test_damage_is_counted_and_only_run_moves_it(recorded, results, no_kernel, capsys):
    record = next(recorded.glob("runs/train-*.json"))
    record.write_bytes(record.read_bytes()[:-40])
    runs = recorded / "runs"
    before = sorted((p.name, p.read_bytes()) for p in runs.iterdir() if p.is_file())
    assert main(["verify", "02", *SMOKE, *results, "--sample", "1"]) == 1
    said = capsys.readouterr().out
    assert f"record {record} is damaged" in said
    assert "1 of 1 records verified, 0 differ, 1 more could not be read" in said
    assert main(["list", "02", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert "DAMAGED" in said and str(record) in said
    assert sorted((p.name, p.read_bytes()) for p in runs.iterdir() if p.is_file()) == before
    with pytest.warns(UserWarning, match="set aside"):
        assert main(["run", "02", *SMOKE, *results]) == 0
    capsys.readouterr()
    assert main(["list", "02", *SMOKE, *results]) == 0
    said = capsys.readouterr().out
    assert f"set aside, damaged: {record}.corrupt" in said and "DAMAGED" not in said


def test_a_record_that_may_not_be_read_is_left_alone_by_all(recorded, results, monkeypatch, capsys):
    before, read = records(recorded), Path.read_bytes

    def refuse(path):
        if path.name.startswith("train-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for action, code in (("run", 2), ("list", 0), ("verify", 1)):
        assert main([action, "02", *SMOKE, *results]) == code
        said = "".join(capsys.readouterr())
        assert "cannot read" in said and "Permission denied" in said
        assert action != "list" or "UNREADABLE" in said
    assert records(recorded) == before and not list(recorded.rglob("*.corrupt"))


def test_verify_exits_with_0_then_1_after_tampering(recorded, results, capsys):
    words = ["verify", "02", *SMOKE, *results, "--sample"]
    assert main([*words, "0"]) == 0
    said = capsys.readouterr().out
    assert said.count("bit-equal") == 2 and "2 of 2 records verified, 0 differ" in said
    assert main([*words, "1"]) == 0
    assert "1 of 2 records verified" in capsys.readouterr().out
    record = next(recorded.glob("runs/train-*.json"))
    content = json.loads(record.read_text())
    content["result"]["scores"]["left"] += 0.01
    content["content_sha256"] = content_checksum(content)
    record.write_text(json.dumps(content))
    assert main([*words, "0"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERS" in said and "result.scores.left" in said
    assert "2 of 2 records verified, 1 differ" in said


# In a process of its own


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


def test_a_terminal_of_few_characters_shows_the_rest_as_escapes(tmp_path):
    words = ["list", "00", "--profile", "smoke", "--results", str(tmp_path / "é")]
    process = start(words, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert said.startswith("profile smoke") and said.isascii()
    assert "\\xe9" in said or "\\udcc3\\udca9" in said  # a letter, or bytes of an unreadable name


STRUCK = """
import os, signal, sys
from fslib import cli

def struck(name):
    os.kill(os.getpid(), signal.{})
    raise KeyError("lost in a library's start-up")

cli.import_module = struck
sys.argv = ["fslib", "list"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_a_signal_ends_an_import_at_once(name, code, word):
    words = [sys.executable, "-c", STRUCK.format(name)]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=hear_interrupts)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"fslib: {word} before anything was begun\n"


def test_a_missing_package_is_told(monkeypatch, capsys):
    def missing(name):
        raise ImportError("no torch\nanywhere")

    monkeypatch.setattr(cli, "import_module", missing)
    refuses(["list"], "cannot be started (no torch anywhere)", "pip install", capsys=capsys)
