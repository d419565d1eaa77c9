"""Records open without their data: data.json is enough for keys and tables, and no more."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from small_units import TASKS, NumbersUnit, write_tasks

import fslib
from fslib import Study
from fslib.data.tasks import make_task
from fslib.errors import NotAtHandError
from fslib.study import fingerprints
from fslib.study.fingerprints import FILE, cached_task, card_of, read_cards, recorded_task
from fslib.study.store import Store

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "results" / "evidence"


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Nothing but the embedded tasks is at hand."""
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(fingerprints, "_consulted", [])
    cached_task.cache_clear()
    yield
    cached_task.cache_clear()


@pytest.fixture
def evidence(tmp_path) -> Path:
    """The results folder of `evidence` with no record."""
    (tmp_path / "evidence").mkdir()
    shutil.copy(EVIDENCE / FILE, tmp_path / "evidence")
    return tmp_path


REGRESSION = make_task("length", (["a", "b c", "d"], [1.5, -2.0, 1e-9]), (["e", "f"], [0.1, 3.0]))
PAIRS = (list("abcdef"), list("xyzxyz")), (list("gh"), list("yx"))
CLASSES = make_task("mood", *PAIRS, label_names=["x", "y", "z"])


@pytest.mark.parametrize("task", [REGRESSION, CLASSES], ids=lambda task: task.name)
def test_a_card_tells_everything_of_a_task_but_its_texts(task):
    told = recorded_task(task.name, json.loads(json.dumps(card_of(task))), "they are elsewhere")
    kept = ("name", "label_names", "metric", "description", "source", "fingerprint", "n_outputs")
    for field in kept:
        assert getattr(told, field) == getattr(task, field)
    limited, wanted = told.limited(train=2, eval=1), task.limited(train=2, eval=1)
    for one, two in ((told, task), (limited, wanted)):
        for split, other in ((one.train, two.train), (one.eval, two.eval)):
            assert np.array_equal(split.labels, other.labels) and len(split) == len(other)
            assert split.labels.dtype == other.labels.dtype
            for what in ("texts", "pairs", "documents"):
                with refused("they are elsewhere"):
                    getattr(split, what)
    with pytest.raises(AttributeError, match="nothing"):
        told.train.nothing  # noqa: B018


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


def test_records_open_without_their_data(capsys):
    """Their tables are written again in test_notebooks.py."""
    study = Study("evidence", results=ROOT / "results")
    units = [unit for notebook in ("01", "02", "03") for unit in study.plan(notebook)]
    assert all(study.store.find(unit) for unit in units)
    where = "are not at hand: records are found by the fingerprint in results/evidence/data.json"
    said = sorted(capsys.readouterr().err.splitlines())
    assert said == [f"fslib: data of {t} {where}" for t in ("qnli", "sst-2", "sst-shift")]
    assert study.chance()["sst-2"] == pytest.approx(0.5, abs=0.1)
    # texts to show a method on: the embedded ones
    assert [t for t in study.example_tasks if not t.startswith("bbc")] == []
    assert capsys.readouterr().err == "", "said once"


def test_nothing_is_computed_without_data(evidence, tmp_path):
    study = Study("evidence", results=evidence)
    gone = ("train-", "has no record and cannot be computed", "data of sst-2 are not at hand")
    for compute in (study.store.get, study.store.renew):
        with refused(*gone, "FSLIB_DATA"):
            compute(study.training(7))
    before = (study.folder / FILE).read_bytes()
    study.store.tell_data(study.profile.tasks)  # nothing to tell of data that are not here
    assert (study.folder / FILE).read_bytes() == before
    fingerprints._consulted.clear()
    cached_task.cache_clear()
    with pytest.raises(NotAtHandError, match=r"task sst-2: no nyu-mll/glue .* from the Hub"):
        Study("evidence", results=tmp_path / "none").plan("02")[0].key  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [
        lambda cards: "",
        lambda cards: "[]",
        lambda cards: '{"tasks": {"sst-2": {}}}',
        lambda cards: cards.replace('"labels": "e', '"labels": "f'),
    ],
)
def test_a_damaged_data_json_is_named(evidence, change):
    path = evidence / "evidence" / FILE
    path.write_text(change(path.read_text()))
    with refused(path, "is damaged"):
        read_cards(path)


def test_the_folder_that_was_named_last_is_asked_first(evidence, tmp_path):
    other = tmp_path / "other"
    cards = json.loads((evidence / "evidence" / FILE).read_text())
    cards["tasks"]["sst-2"]["fingerprint"] = "f" * 16
    other.mkdir()
    (other / FILE).write_text(json.dumps(cards))
    for folder in (other, evidence / "evidence", other):
        fingerprints.consult(folder)
    assert cached_task("sst-2").fingerprint == "f" * 16


def test_data_that_are_others_than_the_records_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FSLIB_DATA", str(write_tasks(tmp_path / "data")))
    store, path = Store(tmp_path / "runs"), tmp_path / "runs" / FILE
    store.tell_data(TASKS)
    before, stamp = read_cards(path), path.stat().st_mtime_ns
    assert set(before) == set(TASKS) and str(tmp_path) not in path.read_text()
    store.tell_data(TASKS[:1])
    assert path.stat().st_mtime_ns == stamp, "nothing new"

    table = tmp_path / "data" / "right" / "dev.tsv"
    table.write_text(table.read_text().replace("dev number 3\t1", "dev number 3\t0"))
    cached_task.cache_clear()
    fingerprints.consult(tmp_path / "runs")
    NumbersUnit(tasks=TASKS, n=0).key  # noqa: B018
    (said,) = capsys.readouterr().err.splitlines()
    for part in ("data of right at hand", "are not those in", "computed anew"):
        assert part in said
    store.tell_data(TASKS[1:])
    after, now = read_cards(path), cached_task("right").fingerprint
    assert after["left"] == before["left"], "what it tells of other tasks stays"
    assert after["right"]["fingerprint"] == now != before["right"]["fingerprint"]
    path.write_text("damaged")
    store.tell_data(TASKS)
    assert read_cards(path) == after
