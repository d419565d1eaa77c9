"""Records open without their data: what data.json tells of them is enough for keys and tables, and for nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from small_units import SMALL, TASKS, NumbersUnit, training, write_tasks

import fslib
from fslib import Study
from fslib.data.tasks import make_task
from fslib.errors import NotAtHandError
from fslib.questions import main, q01_multitask, q03_pruning
from fslib.study import fingerprints
from fslib.study.files import save_table
from fslib.study.fingerprints import FILE, cached_task, card_of, read_cards, recorded_task
from fslib.study.store import Store

ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT / "results" / "glue-mini"


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Nothing but the embedded tasks is at hand."""
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(fingerprints, "_consulted", [])
    cached_task.cache_clear()
    yield
    cached_task.cache_clear()


@pytest.fixture
def glue(tmp_path) -> Path:
    """A results folder with the committed records of glue-mini."""
    shutil.copytree(
        GLUE,
        tmp_path / "glue-mini",
        ignore=shutil.ignore_patterns("checkpoints", ".locks", "figures"),
    )
    return tmp_path


REGRESSION = make_task("length", (["a", "b c", "d"], [1.5, -2.0, 1e-9]), (["e", "f"], [0.1, 3.0]))
CLASSES = make_task(
    "mood", (list("abcdef"), list("xyzxyz")), (list("gh"), list("yx")), label_names=["x", "y", "z"]
)


@pytest.mark.parametrize("task", [REGRESSION, CLASSES], ids=lambda task: task.name)
def test_a_card_tells_everything_of_a_task_but_its_texts(task):
    told = recorded_task(task.name, json.loads(json.dumps(card_of(task))), "they are elsewhere")
    for field in (
        "name",
        "label_names",
        "metric",
        "description",
        "source",
        "fingerprint",
        "n_outputs",
    ):
        assert getattr(told, field) == getattr(task, field)
    for side in ("train", "eval"):
        one, two = getattr(told, side), getattr(task, side)
        assert len(one) == len(two)
        assert np.array_equal(one.labels, two.labels) and one.labels.dtype == two.labels.dtype
        for what in ("texts", "pairs", "documents"):
            with refused("they are elsewhere"):
                getattr(one, what)
    limited = told.limited(train=2, eval=1)
    assert np.array_equal(limited.train.labels, task.limited(train=2).train.labels)
    assert np.array_equal(limited.eval.labels, task.limited(eval=1).eval.labels)
    with refused("they are elsewhere"):
        limited.train.texts  # noqa: B018
    assert "6 labels" in repr(told) or "3 labels" in repr(told)


def test_a_model_cannot_be_trained_or_measured_on_labels_alone():
    told = recorded_task("mood", card_of(CLASSES), "they are elsewhere")
    model = fslib.MultiTaskModel.from_pretrained("tiny-random", CLASSES, max_length=16)
    for call in (
        lambda: fslib.MultiTaskModel.from_pretrained("tiny-random", told),
        lambda: fslib.train(model, told, steps=1),
        lambda: fslib.evaluate(model, told),
        lambda: fslib.head_importance(model, told),
    ):
        with refused("they are elsewhere"):
            call()


def test_the_records_of_glue_mini_open_without_its_data(glue, capsys):
    study = Study("glue-mini", results=glue)
    units = [unit for notebook in ("01", "02", "03") for unit in study.plan(notebook)]
    assert {f"{u.kind}-{u.key}" for u in units} == {
        path.stem for path in (GLUE / "runs").glob("*.json")
    }
    assert all(study.store.find(unit) for unit in units)
    where = (
        f"are not at hand: records are found by the fingerprint in {glue.name}/glue-mini/data.json"
    )
    said = sorted(capsys.readouterr().err.splitlines())
    assert said == [f"fslib: data of {task} {where}" for task in ("ag-pair", "qnli", "sst-2")]
    tables = {"01_scores": q01_multitask.scores(study), "03_pruning": q03_pruning.pruning(study)}
    for name, table in tables.items():
        save_table(study.folder, name, table)
        written, committed = (
            (folder / "tables" / f"{name}.md").read_text() for folder in (glue / "glue-mini", GLUE)
        )
        assert written == committed
    assert study.chance()["sst-2"] == pytest.approx(0.5, abs=0.1)
    assert list(study.example_tasks) == fslib.task_names(), (
        "texts to show a method on: the embedded ones"
    )
    assert capsys.readouterr().err == ""  # said once


def test_nothing_is_computed_without_data(glue, capsys):
    study = Study("glue-mini", results=glue)
    for compute in (study.store.get, study.store.renew):
        with refused(
            "train-",
            "has no record and cannot be computed",
            "data of sst-2 are not at hand",
            "FSLIB_DATA",
        ):
            compute(study.training(7))
    capsys.readouterr()
    before = {
        p: p.stat().st_mtime_ns for p in glue.rglob("*") if p.is_file() and ".locks" not in str(p)
    }
    for words in (["run", "05"], ["run", "01", "--fresh"]):
        assert main([*words, "--profile", "glue-mini", "--results", str(glue)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert "has no record and cannot be computed: the data of" in said[-1]
        assert sum("cannot be computed" in line for line in said) == 1
    assert (
        main(["verify", "01", "--profile", "glue-mini", "--sample", "1", "--results", str(glue)])
        == 1
    )
    assert "cannot be computed again" in capsys.readouterr().out
    assert before == {
        p: p.stat().st_mtime_ns for p in glue.rglob("*") if p.is_file() and ".locks" not in str(p)
    }


def test_without_data_and_without_data_json_the_hub_is_named(glue):
    (glue / "glue-mini" / FILE).unlink()
    with pytest.raises(NotAtHandError, match="task sst-2: the Hub did not supply"):
        Study("glue-mini", results=glue).plan("02")[0].key  # noqa: B018


@pytest.mark.parametrize("content", ["", "[]", '{"tasks": {"sst-2": {}}}', '{"tasks": 3}'])
def test_a_damaged_data_json_is_named(glue, content):
    path = glue / "glue-mini" / FILE
    path.write_text(content)
    with refused(path, "is damaged"):
        Study("glue-mini", results=glue).plan("02")[0].key  # noqa: B018


def test_data_that_are_others_than_the_records_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSLIB_DATA", str(write_tasks(tmp_path / "data")))
    store = Store(tmp_path / "runs")
    store.tell_data(TASKS)
    path = tmp_path / "runs" / FILE
    before = path.read_bytes()
    assert set(read_cards(path)) == set(TASKS)
    assert str(tmp_path) not in path.read_text()
    path.touch()
    stamp = path.stat().st_mtime_ns
    store.tell_data(TASKS[:1])
    assert path.stat().st_mtime_ns == stamp  # nothing new

    table = tmp_path / "data" / "right" / "dev.tsv"
    table.write_text(table.read_text().replace("dev number 3\t1", "dev number 3\t0"))
    cached_task.cache_clear()
    fingerprints.consult(tmp_path / "runs")
    NumbersUnit(tasks=TASKS, n=0).key  # noqa: B018
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        "data of right at hand" in said and "are not those in" in said and "computed anew" in said
    )
    store.tell_data(TASKS)
    after = read_cards(path)
    assert (
        after["right"]["fingerprint"]
        == cached_task("right").fingerprint
        != json.loads(before)["tasks"]["right"]["fingerprint"]
    )
    path.write_text("damaged")
    store.tell_data(TASKS)
    assert read_cards(path) == after


def test_run_writes_what_it_computes_on_beside_the_records(tmp_path, monkeypatch):
    monkeypatch.setenv("FSLIB_DATA", str(write_tasks(tmp_path / "data")))
    study = Study("smoke", overrides=SMALL, results=tmp_path)
    study.store.tell_data(TASKS)
    record = study.store.get(training())
    assert {
        name: card["fingerprint"] for name, card in read_cards(study.folder / FILE).items()
    } == record.data


@pytest.mark.parametrize("profile", ["mini", "glue-mini"])
def test_every_committed_record_is_of_the_data_that_data_json_tells(profile):
    cards = read_cards(ROOT / "results" / profile / FILE)
    records = [
        json.loads(path.read_text())
        for path in (ROOT / "results" / profile / "runs").glob("*.json")
    ]
    told = {name: card["fingerprint"] for name, card in cards.items()}
    assert {item for record in records for item in record["data"].items()} == set(told.items())
    if profile == "mini":
        assert all(
            cached_task(name).fingerprint == fingerprint for name, fingerprint in told.items()
        )
