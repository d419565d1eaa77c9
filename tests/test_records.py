"""Records: whole or not there, whoever is killed and whatever fails; computed once; known by their contents."""

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import small_units
import torch
from matplotlib.figure import Figure
from PIL import Image
from refusal import refused
from small_units import TASKS, NumbersConfig, training, write_tasks

from fslib import Study, experiments, runner
from fslib.experiments import DataConfig, ImportanceConfig, Store, TrainConfig, Unit
from fslib.results import Record, Records, save_figure, save_table
from fslib.runner import tidy, verify_unit

NUMBERS = [Unit("numbers", NumbersConfig(tasks=TASKS, n=n)) for n in range(40)]
UNIT = NUMBERS[0]
SMALL = {
    "tasks": list(TASKS),
    "seeds": 1,
    "steps": 2,
    "max_length": 16,
    "curve_points": 1,
    "curve_examples": 4,
    "eval_examples": None,
    "importance_examples": 4,
    "fractions": [0.25],
    "controls": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(data, monkeypatch):
    """Small tasks, and units that compute themselves at once, in this process."""
    monkeypatch.setenv("FSLIB_DATA", str(data))
    monkeypatch.setitem(experiments.UNITS, "numbers", (NumbersConfig, small_units.numbers))
    monkeypatch.setattr(experiments, "git_commit", lambda: "unknown")
    experiments.cached_task.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    experiments.cached_task.cache_clear()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def computed(folder: Path) -> list[int]:
    """Which `numbers` units were computed in a folder, in order, repeats included."""
    log = folder / "computed"
    return [int(line) for line in log.read_text().split()] if log.is_file() else []


def whole_records(folder: Path) -> dict[str, Record]:
    """All records of a folder by file name; fails if one of them is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {p.stem: Records(folder).load(*p.stem.rsplit("-", 1)) for p in (folder / "runs").glob("*.json")}
    assert None not in found.values()
    return found


def leftovers(folder: Path) -> list[Path]:
    """Files that are neither whole nor a lock."""
    return [p for p in folder.rglob("*") if ".partial-" in p.name or p.name.endswith(".corrupt")]


def same(one: Record, other: Record) -> bool:
    """Whether two records hold the same, down to the last bit, but for the time that they took."""
    return (
        (one.kind, one.key, one.config, one.data) == (other.kind, other.key, other.config, other.data)
        and one.result == other.result
        and {k: (v.dtype, v.shape, v.tobytes()) for k, v in one.arrays.items()}
        == {k: (v.dtype, v.shape, v.tobytes()) for k, v in other.arrays.items()}
    )


def record_of(arrays: dict[str, np.ndarray] | None = None, **result) -> Record:
    about = {"versions": {"python": "3"}, "commit": "unknown", "machine": {"threads": 1}}
    return Record("numbers", "0" * 16, {"n": 1}, {"left": "f"}, result, arrays or {}, 0.5, **about)


# There and back


def test_a_record_comes_back_bit_by_bit(tmp_path):
    arrays = {
        "floats": np.array([0.1, -0.0, np.nan, np.inf, 1e-320]),
        "small": np.arange(6, dtype=np.int8).reshape(2, 3),
        "flags": np.array([[True, False]]),
        "empty": np.empty((0, 3), np.float32),
        "predictions/bbc-pair": np.array([1, 2], np.int64),
    }
    result = {"mean": 0.1 + 0.2, "none": None, "list": [1, 2.5, {"é": "…"}], "yes": True}
    record = record_of(arrays, **result)
    Records(tmp_path).save(record)
    found = Records(tmp_path).load(record.kind, record.key)
    assert same(found, record)
    assert (found.seconds, found.versions, found.commit) == (0.5, {"python": "3"}, "unknown")
    assert found.machine == {"threads": 1}
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {f"numbers-{record.key}.{s}" for s in ("json", "npz")}


def test_a_record_without_arrays_is_one_file(tmp_path):
    Records(tmp_path).save(record_of(mean=1.5))
    assert [p.suffix for p in (tmp_path / "runs").iterdir()] == [".json"]
    assert same(Records(tmp_path).load("numbers", "0" * 16), record_of(mean=1.5))


def test_a_unit_is_computed_once_and_then_read(store):
    assert store.find(UNIT) is None
    first = store.get(UNIT)
    assert store.get(UNIT) is first
    again = Store(store.folder).get(UNIT)
    assert same(again, first)
    assert again.seconds == first.seconds
    assert computed(store.folder) == [0]
    assert first.config == {"tasks": list(TASKS), "eval_examples": None, "n": 0}
    assert set(first.data) == set(TASKS)
    assert set(first.machine) >= {"processor", "capability", "threads"}
    assert {"torch", "numpy", "transformers"} <= set(first.versions)


def test_a_forgotten_unit_is_computed_again_and_the_others_stay(store):
    for unit in NUMBERS[:2]:
        store.get(unit)
    store.forget(UNIT)
    assert store.find(UNIT) is None
    assert Store(store.folder).find(UNIT) is None
    store.get(UNIT)
    store.get(NUMBERS[1])
    assert computed(store.folder) == [0, 1, 0]


def test_a_unit_that_fails_leaves_no_record(store, monkeypatch):
    def broken(config, store):
        raise ZeroDivisionError

    monkeypatch.setitem(experiments.UNITS, "numbers", (NumbersConfig, broken))
    with pytest.raises(ZeroDivisionError):
        store.get(UNIT)
    assert whole_records(store.folder) == {}
    monkeypatch.setitem(experiments.UNITS, "numbers", (NumbersConfig, small_units.numbers))
    assert store.get(UNIT).result["n"] == 0  # and its lock is free


def test_an_unknown_kind_of_unit_is_refused(store):
    with refused("kind of unit", "'trian'", "did you mean 'train'"):
        store.get(Unit("trian", DataConfig(tasks=TASKS)))


# What a key depends on


def test_the_key_knows_kind_and_every_part_of_the_config():
    base = training().model_dump()
    changes = [
        {"steps": 3}, {"seed": 1}, {"lr": 2e-3}, {"encoder": "minilm-l1"}, {"sampling": "sqrt"}, {"epochs": 1},
        {"batch_size": 4}, {"max_length": 8}, {"eval_examples": 4}, {"curve_points": 2}, {"tasks": ["left"]},
        {"tasks": ["right", "left"]}, {"curve_examples": 2},
    ]  # fmt: skip
    units = [Unit("train", TrainConfig(**base | change)) for change in [{}, *changes]]
    units.append(Unit("words", TrainConfig(**base)))
    scored = ImportanceConfig(model=training(), examples=4)
    units += [Unit("importance", scored), Unit("importance", ImportanceConfig(model=training(1), examples=4))]
    elsewhere = {"machine": honest.machine | {"processor": "other"}}
    for change in (elsewhere, {"versions": honest.versions | {"torch": "0"}}):
        other = Study("smoke", overrides=SMALL, results=tmp_path)
        other.store.records.save(replace(honest, arrays=honest.arrays | shifted, **change))
        verdict = verify_unit(other, unit)
        assert not verdict.exact
        assert verdict.problems == []


# Tables, figures and notebooks


def test_a_table_is_whole_as_csv_and_rounded_as_markdown(tmp_path):
    table = pd.DataFrame({"task": ["bbc", "é"], "D": [1 / 3, -0.0001], "n": [3, 4]})
    shown = save_table(tmp_path, "t", table)
    assert shown["D"].tolist() == [0.333, 0.0]
    assert not np.signbit(shown["D"][1])
    assert (tmp_path / "tables" / "t.csv").read_text() == "task,D,n\nbbc,0.3333333333,3\né,-0.0001,4\n"
    assert "| bbc    | 0.333 |   3 |" in (tmp_path / "tables" / "t.md").read_text()
    assert table["D"][0] == 1 / 3
    assert save_table(tmp_path, "t", table, digits=1)["D"][0] == 0.3


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1.5))
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], label="line")
    axes.fill_between([0, 1], [0, 0], [1, 1], hatch="/")
    axes.legend()
    return figure


def test_a_figure_has_the_same_bytes_twice_and_its_caption_inside(tmp_path):
    caption = "Heads of layer 2 → α < 0.3 & more"
    for place in ("one", "two"):
        with matplotlib.rc_context({"svg.hashsalt": place}):
            save_figure(tmp_path / place, "f", drawing(), caption, "fslib run 03")
    for kind in ("png", "svg"):
        one, two = ((tmp_path / place / "figures" / f"f.{kind}").read_bytes() for place in ("one", "two"))
        assert one == two
    with Image.open(tmp_path / "one" / "figures" / "f.png") as image:
        assert image.text["Title"] == caption
        assert image.text["Description"] == "made by: fslib run 03"
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    svg = (tmp_path / "one" / "figures" / "f.svg").read_text()
    assert "Heads of layer 2 → α &lt; 0.3 &amp; more" in svg
    assert "made by: fslib run 03" in svg
    assert "<text" in svg  # letters, not outlines


def notebook(stamp: str, value: str, minor: int = 5) -> nbformat.NotebookNode:
    """An executed notebook as papermill leaves it."""
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell["id"] = f"random-{len(stamp + value)}"
    cell.outputs = [nbformat.v4.new_output("stream", text=value)]
    cell.metadata = {"tags": [], "papermill": {"start_time": stamp}, "execution": {"iopub.execute_input": stamp}}
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    made.nbformat_minor = minor
    made.metadata = {
        "papermill": {"duration": stamp, "input_path": f"/somewhere/{stamp}"},
        "language_info": {"name": "python", "version": stamp},
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    }
    return made


def tidied(tmp_path: Path, *of: str) -> bytes:
    path = tmp_path / f"{of[0]}.ipynb"
    nbformat.write(notebook(*of), path)
    return tidy(path)


def test_a_tidied_notebook_forgets_when_and_where_it_ran_but_not_what_it_said(tmp_path):
    one, two = tidied(tmp_path, "3.11", "hello"), tidied(tmp_path, "3.12", "hello")
    other = tidied(tmp_path, "3.11", "bye")
    assert one == two != other
    read = nbformat.reads(one.decode(), as_version=4)
    nbformat.validate(read)
    assert read.cells[1].outputs[0].text == "hello"
    assert read.cells[1].execution_count == 1
    assert "3.11" not in one.decode()
    assert read.metadata.kernelspec.name == "python3"


def test_tidying_twice_changes_nothing(tmp_path):
    once = tidied(tmp_path, "3.11", "hello")
    path = tmp_path / "once.ipynb"
    path.write_bytes(once)
    assert tidy(path) == once


def test_the_tolerances_are_tighter_than_chance():
    assert 0 < runner.SCORE_TOLERANCE < 0.1 < 0.5 < runner.AGREEMENT < 1
    assert 0 < runner.RANK_TOLERANCE < 1
