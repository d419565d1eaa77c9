"""Records: whole or not there, whoever is killed and whatever fails; computed once; known by their contents."""

import copy
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import ClassVar

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
from small_units import SMALL, TASKS, NumbersUnit, training, write_tasks
from threadpoolctl import threadpool_info

import fslib
from fslib import Study
from fslib.model.multitask import MultiTaskModel
from fslib.plot import save_figure
from fslib.study import provenance, records
from fslib.study.config import checked
from fslib.study.files import save_table, write_bytes
from fslib.study.runner import tidy
from fslib.study.store import Record, Result, Store, Unit, key_of
from fslib.study.units import ImportanceUnit, PruneUnit, TrainUnit
from fslib.study.verify import record_differences, verify_unit

NUMBERS = small_units.units("numbers")
UNIT = NUMBERS[0]
MODEL = training()


@pytest.fixture(autouse=True)
def small(small_tasks, monkeypatch):
    """Small tasks, on one thread, by code of no known commit."""
    monkeypatch.setattr(records, "git_commit", lambda: "unknown")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        found = {
            p.stem: Store(folder).load(*p.stem.rsplit("-", 1))
            for p in (folder / "runs").glob("*.json")
        }
    assert None not in found.values()
    return found


def leftovers(folder: Path) -> list[Path]:
    """Files that a writer has left unfinished or a reader has set aside."""
    return [p for p in folder.rglob("*") if ".partial-" in p.name or p.name.endswith(".corrupt")]


def same(one: Record, other: Record) -> bool:
    """Whether two records hold the same, down to the last bit, but for where, when and how fast they were made."""
    bits = [
        {k: (v.dtype, v.shape, v.tobytes()) for k, v in record.arrays.items()}
        for record in (one, other)
    ]
    rest = [(r.kind, r.key, r.config, r.data, r.result) for r in (one, other)]
    return bits[0] == bits[1] and rest[0] == rest[1]


KEY = key_of("numbers", {"n": 1}, {"left": "f"})


def record_of(arrays: dict[str, np.ndarray] | None = None, **result) -> Record:
    about = {"versions": {"python": "3"}, "commit": "unknown", "machine": {"threads": 1}}
    return Record("numbers", KEY, {"n": 1}, {"left": "f"}, result, arrays or {}, 0.5, **about)


def weights(model: MultiTaskModel) -> list[torch.Tensor]:
    """Copies, since a loaded model may still read from its file."""
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# There and back


def test_a_record_comes_back_bit_by_bit(tmp_path):
    arrays = {
        "floats": np.array([0.1, -0.0, np.nan, np.inf, 1e-320]),
        "small": np.arange(6, dtype=np.int8).reshape(2, 3),
        "flags": np.array([[True, False]]),
        "empty": np.empty((0, 3), np.float32),
        "predictions/bbc-pair": np.array([1, 2], np.int64),
    }
    record = record_of(arrays, mean=0.1 + 0.2, none=None, list=[1, 2.5, {"é": "…"}], yes=True)
    Store(tmp_path).save(record)
    found = Store(tmp_path).load(record.kind, record.key)
    assert same(found, record)
    assert (found.seconds, found.versions, found.commit) == (0.5, {"python": "3"}, "unknown")
    assert found.machine == {"threads": 1}
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        f"numbers-{record.key}.{s}" for s in ("json", "npz")
    }


def test_a_record_without_arrays_is_one_file(tmp_path):
    Store(tmp_path).save(record_of(mean=1.5))
    assert [p.suffix for p in (tmp_path / "runs").iterdir()] == [".json"]
    assert same(Store(tmp_path).load("numbers", KEY), record_of(mean=1.5))


def test_a_unit_is_computed_once_and_then_read(store):
    assert store.find(UNIT) is None
    first = store.get(UNIT)
    assert store.get(UNIT) is first
    again = Store(store.folder).get(UNIT)
    assert same(again, first)
    assert computed(store.folder) == [0]
    assert first.config == {"tasks": list(TASKS), "eval_examples": None, "n": 0}
    assert set(first.data) == set(TASKS)
    assert set(first.machine) >= {"processor", "capability", "threads"}
    assert {"torch", "numpy", "transformers"} <= set(first.versions)


def test_a_renewed_unit_is_computed_again_and_the_others_stay(store):
    for unit in NUMBERS[:2]:
        store.get(unit)
    store.renew(UNIT)
    store.get(UNIT)
    store.get(NUMBERS[1])
    assert computed(store.folder) == [0, 1, 0]
    store.renew(NUMBERS[2])  # recorded or not
    assert computed(store.folder) == [0, 1, 0, 2]


def test_a_unit_that_fails_leaves_no_record_and_no_lock(store, monkeypatch):
    def broken(unit, store):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(NumbersUnit, "compute", broken)
        with pytest.raises(ZeroDivisionError):
            store.get(UNIT)
    assert whole_records(store.folder) == {}
    assert store.get(UNIT).result["n"] == 0


@pytest.mark.parametrize("unit", [NumbersUnit, TrainUnit, ImportanceUnit, PruneUnit, Unit])
def test_a_unit_that_computes_something_of_its_own_needs_a_kind_of_its_own(unit):
    with pytest.raises(TypeError, match=r"Borrowed computes .*`kind` of its own"):

        class Borrowed(unit):
            def compute(self, store: Store) -> Result:
                return Result({})

    class Owned(unit):
        kind: ClassVar[str] = "owned"

        def compute(self, store: Store) -> Result:
            return Result({})

    assert Owned.kind == "owned"


def test_a_unit_that_computes_what_another_does_has_its_kind(store):
    class Same(NumbersUnit):
        """The same work under another name."""

    unit = Same(tasks=TASKS, n=0)
    assert (unit.kind, unit.key) == (UNIT.kind, UNIT.key)
    assert store.get(unit) is store.get(UNIT)


# What a key depends on


class OtherKind(TrainUnit):
    """A training's config under another kind."""

    kind: ClassVar[str] = "other"


def test_the_key_knows_kind_and_every_part_of_the_config():
    base = training().model_dump()
    changes = [
        {"steps": 3}, {"seed": 1}, {"lr": 2e-3}, {"encoder": "minilm-l1"}, {"sampling": "sqrt"}, {"epochs": 1},
        {"batch_size": 4}, {"max_length": 8}, {"eval_examples": 4}, {"curve_points": 2}, {"curve_examples": 2},
        {"tasks": ["left"]}, {"tasks": ["right", "left"]}, {"lr_floor": 0.5},
    ]  # fmt: skip
    assert {field for change in changes for field in change} == set(TrainUnit.model_fields)
    units = [TrainUnit(**base | change) for change in [{}, *changes]]
    units.append(OtherKind(**base))
    scored = ImportanceUnit(model=training(), examples=4)
    units += [scored, ImportanceUnit(model=training(1), examples=4)]
    for change in (
        {},
        {"controls": 2},
        {"fractions": (0.5,)},
        {"ablation": "mean"},
        {"normalize": "layer"},
    ):
        units.append(
            PruneUnit(**{"importance": scored, "fractions": (0.25,), "controls": 1} | change)
        )
    assert len({unit.key for unit in units}) == len(units)


def test_a_floor_of_nothing_is_no_part_of_the_key():
    plain, same = training(), TrainUnit(**training().model_dump() | {"lr_floor": 0.0})
    assert same.key == plain.key and "lr_floor" not in same.model_dump(mode="json")
    assert (
        same.options()["lr_floor"]
        == 0
        == Study("smoke", overrides={"lr_floor": 0}).overrides["lr_floor"]
    )


def test_the_key_depends_neither_on_spelling_nor_on_where_the_data_lie(tmp_path, monkeypatch):
    key = UNIT.key
    assert NumbersUnit(n=0, eval_examples=None, tasks=["LEFT", "Right"]).key == key
    monkeypatch.setenv("FSLIB_DATA", str(write_tasks(tmp_path)))
    records.cached_task.cache_clear()
    assert UNIT.key == key


def test_the_key_of_a_local_encoder_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = training().model_dump()
    spellings = ("my/encoder", "./my/../my/encoder", str(tmp_path / "my/encoder"))
    assert len({TrainUnit(**base | {"encoder": spelling}).key for spelling in spellings}) == 1
    (tmp_path / "minilm-l1").mkdir()
    assert TrainUnit(**base | {"encoder": "minilm-l1"}).encoder == "minilm-l1", (
        "a name comes before a folder"
    )


def test_the_key_knows_the_data_of_its_own_tasks(tmp_path, monkeypatch):
    units = [NumbersUnit(tasks=tasks, n=0) for tasks in (("left",), TASKS)]
    before = [unit.key for unit in units]
    file = write_tasks(tmp_path) / "right" / "dev.tsv"
    file.write_text(file.read_text().replace("dev number 3\t1", "dev number 3\t0"))
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
    records.cached_task.cache_clear()
    after = [unit.key for unit in units]
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"stepz": 3}, ["'stepz'", "did you mean 'steps'"]),
        ({"learning": 1}, ["'learning'"]),
        ({"steps": 0}, ["steps=0", "greater than or equal to 1"]),
        ({"steps": 2.5}, ["steps=2.5", "integer"]),
        ({"steps": "many"}, ["steps='many'", "integer"]),
        ({"lr": 0}, ["lr=0", "greater than 0"]),
        ({"lr": -1e-3}, ["lr=-0.001"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"eval_examples": 1}, ["eval_examples=1"]),
        ({"tasks": []}, ["tasks"]),
        ({"tasks": "bbc"}, ["tasks='bbc'"]),
        ({"tasks": ["some/where"]}, ["some/where", "FSLIB_DATA"]),
        ({"encoder": None}, ["encoder=None", "string"]),
    ],
)
def test_a_config_refuses_what_it_does_not_know(change, parts):
    with refused("setting", *parts):
        checked(TrainUnit, training().model_dump() | change, "setting")


def test_a_config_cannot_be_changed_after_its_check():
    with pytest.raises(ValueError, match="frozen"):
        training().steps = 5


# Killed


def partials(folder: Path) -> set[Path]:
    return {*folder.glob("runs/.*.partial-*"), *folder.glob("checkpoints/*.partial-*")}


class Workers:
    """Processes that compute units, forked from one that has imported everything."""

    def __init__(self, data: Path) -> None:
        calm = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
        self.process = subprocess.Popen(
            [sys.executable, small_units.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | calm | {"FSLIB_DATA": str(data)},
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, line: str) -> list[int]:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()]

    def start(self, folder: Path, what: str) -> int:
        return self.ask(f"go {folder} {what}")[0]

    def wait(self) -> list[int]:
        return self.ask("wait")

    def run(self, folder: Path, what: str) -> float:
        """Compute without disturbance; returns seconds."""
        begun = time.perf_counter()
        self.start(folder, what)
        assert self.wait() == [0]
        return time.perf_counter() - begun

    def kill_while_writing(self, folder: Path, what: str) -> list[int]:
        """Kill as soon as a file is being written that was not before."""
        known = partials(folder)
        child = self.start(folder, what)
        end = time.perf_counter() + 20
        while not partials(folder) - known:
            assert time.perf_counter() < end, "nothing was written"
        os.kill(child, signal.SIGKILL)
        return self.wait()

    def kill_after(self, seconds: float, folder: Path, what: str) -> list[int]:
        child = self.start(folder, what)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return self.wait()


@pytest.fixture(scope="module")
def workers(data):
    workers = Workers(data)
    yield workers
    workers.process.communicate(timeout=30)


def test_a_kill_at_any_moment_loses_the_unit_under_way_and_nothing_else(workers, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    each = workers.run(calm, "numbers") / len(NUMBERS)
    moments, kept, kills = random.Random(0), {}, 0
    for attempt in range(12):
        if attempt % 2:
            codes = workers.kill_while_writing(rough, "numbers")
        else:
            codes = workers.kill_after(moments.uniform(0, 4 * each), rough, "numbers")
        kills += codes == [-signal.SIGKILL]
        found = whole_records(rough)
        assert all(same(found[name], record) for name, record in kept.items())
        kept = found
    assert kills == 12
    assert 0 < len(kept) < len(NUMBERS)
    before = len(computed(rough))
    assert before - len(kept) <= kills  # each kill cost one unit at most
    workers.run(rough, "numbers")
    assert len(computed(rough)) - before == len(NUMBERS) - len(
        kept
    )  # it went on and did not start over
    ended, undisturbed = whole_records(rough), whole_records(calm)
    # The names hold the keys: processes with another seed of the hash function find the same ones.
    assert ended.keys() == undisturbed.keys() == {f"numbers-{unit.key}" for unit in NUMBERS}
    assert all(same(ended[name], undisturbed[name]) for name in ended)


def test_a_kill_during_training_or_saving_leaves_models_whole(workers, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    seconds = workers.run(calm, "models")
    moments, kept = random.Random(1), {}
    for attempt in range(6):
        if attempt % 3 == 0:
            assert workers.kill_while_writing(rough, "models") == [-signal.SIGKILL]
        else:
            workers.kill_after(moments.uniform(0, seconds / 6), rough, "models")
        found = whole_records(rough)
        assert all(same(found[name], record) for name, record in kept.items())
        kept = found
        for checkpoint in (rough / "checkpoints").iterdir():
            if ".partial-" not in checkpoint.name:
                MultiTaskModel.load(checkpoint)
    workers.run(rough, "models")
    ended, undisturbed = whole_records(rough), whole_records(calm)
    assert len(ended) == 6
    assert ended.keys() == undisturbed.keys()
    assert all(same(ended[name], undisturbed[name]) for name in ended)
    checkpoints = [{p.name for p in (folder / "checkpoints").iterdir()} for folder in (rough, calm)]
    assert checkpoints[0] == checkpoints[1]  # what killed processes left is cleared away


def test_processes_at_once_compute_each_unit_once(workers, tmp_path):
    for _ in range(3):
        workers.start(tmp_path, "numbers")
    assert workers.wait() == [0, 0, 0]
    assert sorted(computed(tmp_path)) == list(range(len(NUMBERS)))
    assert len(whole_records(tmp_path)) == len(NUMBERS)
    assert not leftovers(tmp_path)


def test_processes_at_once_train_whole_models(workers, tmp_path):
    for _ in range(2):
        workers.start(tmp_path, "models")
    assert workers.wait() == [0, 0]
    assert len(whole_records(tmp_path)) == 6
    trained = {f"train-{training(seed).key}" for seed in range(3)}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == trained


# Damaged


def put(path: Path, content: bytes) -> None:
    """A new file in the place of an old one, which a loaded model may still read from."""
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    put(path, path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    put(path, bytes(content))


def edit(**changes):
    """Change fields of a record's JSON."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def arrays_in(path: Path, content: bytes) -> None:
    """Put other arrays in the place of a record's, checksums and all."""
    path.write_bytes(content)
    record = path.with_suffix(".json")
    values = json.loads(record.read_text()) | {"arrays_sha256": hashlib.sha256(content).hexdigest()}
    record.write_text(json.dumps(values | {"content_sha256": records.content_checksum(values)}))


DAMAGES = {
    "cut JSON": (".json", cut),
    "empty JSON": (".json", lambda p: p.write_bytes(b"")),
    "not a record": (".json", lambda p: p.write_text("[]")),
    "a number": (".json", lambda p: p.write_text("3")),
    "not UTF-8": (".json", lambda p: p.write_bytes(b"\xff\xfe")),
    "field too many": (".json", edit(extra=1)),
    "wrong checksum": (".json", edit(arrays_sha256="0" * 64)),
    "another config": (".json", edit(config={"tasks": list(TASKS), "eval_examples": None, "n": 1})),
    "other data": (".json", edit(data={"left": "0", "right": "0"})),
    "another commit": (".json", edit(commit="0" * 40)),
    "another result": (".json", edit(result={"mean": 1.0, "n": 0})),
    "a text for seconds": (".json", edit(seconds="long")),
    "deep JSON": (".json", lambda p: p.write_text("[" * 100_000)),
    "arrays that are no zip": (".npz", lambda p: arrays_in(p, b"PK\x03\x04 and no more")),
    "another key": (".json", edit(key="f" * 16)),
    "another kind": (".json", edit(kind="train")),
    "cut arrays": (".npz", cut),
    "one bit of the arrays": (".npz", flip),
    "no arrays": (".npz", Path.unlink),
    "arrays of another record": (".npz", lambda p: np.savez(p, values=np.zeros(3))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_who_only_reads_renames_nothing(store, damage):
    store.get(UNIT)
    suffix, hurt = DAMAGES[damage]
    path = store.path(UNIT.kind, UNIT.key)
    hurt(path.with_suffix(suffix))
    before = sorted(p.name for p in path.parent.iterdir())
    reader = Store(store.folder)
    with refused(path, "is damaged"):
        reader.load(UNIT.kind, UNIT.key)
    assert reader.find(UNIT) is None
    assert sorted(p.name for p in path.parent.iterdir()) == before


@pytest.mark.parametrize("field", ["config", "data", "kind"])
def test_a_record_without_a_checksum_of_itself_must_still_have_its_key(store, field):
    store.get(UNIT)
    path = store.path(UNIT.kind, UNIT.key)
    content = json.loads(path.read_text())
    del content["content_sha256"]
    path.write_text(json.dumps(content))
    assert Store(store.folder).find(UNIT).result["n"] == 0
    other = {"config": {}, "data": {}, "kind": "others"}[field]
    path.write_text(json.dumps(content | {field: other}))
    with refused(path, "is damaged"):
        store.load(UNIT.kind, UNIT.key)


def test_what_cannot_be_read_is_not_taken_for_damaged(store, monkeypatch):
    store.get(UNIT)

    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    before = sorted(p.name for p in (store.folder / "runs").iterdir())
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (store.load, lambda kind, key: Store(store.folder).get(UNIT)):
        with refused("cannot read", store.path(UNIT.kind, UNIT.key), "Input/output error"):
            read(UNIT.kind, UNIT.key)
    assert sorted(p.name for p in (store.folder / "runs").iterdir()) == before


def test_a_checkpoint_is_not_renewed_while_another_process_has_it(store):
    MODEL.trained(store)
    before = store.path("train", MODEL.key).stat().st_mtime_ns
    with store.lock(MODEL):
        renewing = threading.Thread(target=Store(store.folder).renew, args=[MODEL])
        renewing.start()
        time.sleep(0.3)
        assert (
            store.checkpoint(MODEL).is_dir()
            and store.path("train", MODEL.key).stat().st_mtime_ns == before
        )
    renewing.join(30)
    assert (
        store.checkpoint(MODEL).is_dir()
        and store.path("train", MODEL.key).stat().st_mtime_ns > before
    )


def test_an_undefined_number_is_recorded_and_repeated_by_another(store):
    store.save(record_of({"values": np.array([np.nan, 1.0])}, d=float("nan")))
    found = store.load("numbers", KEY)
    assert np.isnan(found.result["d"])
    assert record_differences(found, found, True) == [] == record_differences(found, found, False)
    defined = record_of({"values": np.array([0.0, 1.0])}, d=0.5)
    assert len(record_differences(found, defined, True)) == len(record_differences(found, defined, False)) == 2


def test_a_clone_that_is_not_installed_keeps_its_first_unit(store, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", missing)
    assert store.get(UNIT).versions | {"python": ""} == {
        "python": "", "fslib": fslib.__version__, "torch": "unknown", "transformers": "unknown", "datasets": "unknown",
        "numpy": "unknown", "scikit-learn": "unknown",
    }  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_said_set_aside_and_computed_again(store, damage):
    good = store.get(UNIT)
    suffix, hurt = DAMAGES[damage]
    path = store.path(UNIT.kind, UNIT.key)
    hurt(path.with_suffix(suffix))
    left = path.read_bytes()
    with pytest.warns(UserWarning, match=f"{path.name}.*damaged.*set aside as {path.name}.corrupt"):
        again = Store(store.folder).get(UNIT)
    assert same(again, good)
    assert computed(store.folder) == [0, 0]
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == left
    assert list(whole_records(store.folder)) == [path.stem]


def test_a_record_that_another_process_removes_counts_as_missing(store, monkeypatch):
    store.get(UNIT)
    path = store.path(UNIT.kind, UNIT.key)
    read = Path.read_bytes

    def remove_after(self):
        content = read(self)
        for old in (path, path.with_suffix(".npz")):
            old.unlink(missing_ok=True)
        return content

    monkeypatch.setattr(Path, "read_bytes", remove_after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(store.folder).load(UNIT.kind, UNIT.key) is None
    assert not leftovers(store.folder)
    assert not path.exists()


# Replaced


def other_numbers(monkeypatch) -> None:
    """From now on the units compute other arrays."""
    compute = NumbersUnit.compute

    def another(unit, store):
        result = compute(unit, store)
        return Result(result.values, {k: v + 1 for k, v in result.arrays.items()})

    monkeypatch.setattr(NumbersUnit, "compute", another)


@pytest.mark.parametrize("moment", ["computing", "writing arrays", "writing JSON"])
def test_what_stops_a_renewal_leaves_the_old_record(store, monkeypatch, moment):
    old = store.get(UNIT)
    with monkeypatch.context() as patch:
        other_numbers(patch)
        write, suffix = records.write_bytes, ".json" if moment == "writing JSON" else ".npz"

        def interrupt(*words):
            if moment == "computing" or words[0].suffix == suffix:
                raise KeyboardInterrupt
            write(*words)

        patch.setattr(
            *((NumbersUnit, "compute") if moment == "computing" else (records, "write_bytes")),
            interrupt,
        )
        with pytest.raises(KeyboardInterrupt):
            store.renew(UNIT)
    for reader in (store, Store(store.folder)):
        assert same(reader.find(UNIT), old)
    Store(store.folder).sweep()
    assert same(Store(store.folder).find(UNIT), old)
    assert {p.name for p in (store.folder / "runs").glob("*.*")} == {
        f"numbers-{UNIT.key}.json", f"numbers-{UNIT.key}.npz", ".locks"
    }  # fmt: skip


def test_a_renewal_that_was_killed_after_its_json_is_finished_by_the_next_run(store, monkeypatch):
    old = store.get(UNIT)
    with monkeypatch.context() as patch:
        other_numbers(patch)
        patch.setattr(records, "_settle", lambda waiting: None)  # killed here
        store.renew(UNIT)
    waiting = store.path(UNIT.kind, UNIT.key).with_suffix(records.NEXT)
    before = waiting.read_bytes()
    new = Store(store.folder).find(UNIT)
    assert not same(new, old) and np.array_equal(new.arrays["values"], old.arrays["values"] + 1)
    assert waiting.is_file()  # who only reads renames nothing
    with store.lock(UNIT):
        Store(store.folder).sweep()
    assert waiting.is_file()  # another process is at it
    Store(store.folder).sweep()
    assert (
        not waiting.is_file()
        and waiting.with_name(f"numbers-{UNIT.key}.npz").read_bytes() == before
    )
    assert same(Store(store.folder).find(UNIT), new)


def test_a_reader_during_renewals_always_finds_a_whole_record(store, monkeypatch):
    store.get(UNIT)
    other_numbers(monkeypatch)
    renewing = threading.Thread(target=lambda: [Store(store.folder).renew(UNIT) for _ in range(10)])
    renewing.start()
    found = 0
    while renewing.is_alive():
        assert Store(store.folder).load(UNIT.kind, UNIT.key) is not None
        found += 1
    assert found > 3


@pytest.mark.parametrize(
    "file",
    ["fslib.json", "classifiers.safetensors", "encoder/model.safetensors", "encoder/config.json"],
)
@pytest.mark.parametrize("hurt", [cut, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_and_trained_again(store, file, hurt):
    good = weights(MODEL.trained(store))
    folder = store.checkpoint(MODEL)
    hurt(folder / file)
    with pytest.warns(UserWarning, match=f"{folder.name}.*set aside as {folder.name}.corrupt"):
        again = weights(MODEL.trained(Store(store.folder)))
    assert equal(good, again)
    assert folder.with_name(f"{folder.name}.corrupt").is_dir()
    assert equal(good, weights(MultiTaskModel.load(folder)))


def test_a_missing_checkpoint_is_trained_again_and_the_record_stays(store):
    good = weights(MODEL.trained(store))
    path = store.path("train", MODEL.key)
    before = path.stat().st_mtime_ns
    shutil.rmtree(store.checkpoint(MODEL))
    assert equal(good, weights(MODEL.trained(store)))
    assert path.stat().st_mtime_ns == before


# No space, no permission


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing can be flushed to the disk for want of space, until `.undo()`."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield patch


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half_written(store, full_disk):
    with refused("cannot write", store.folder, "No space left on device", "free some space"):
        store.get(UNIT)
    assert not leftovers(store.folder)
    assert not list((store.folder / "runs").glob("*-*"))
    full_disk.undo()
    assert store.get(UNIT).result["n"] == 0


def test_a_full_disk_keeps_the_earlier_file(tmp_path, full_disk):
    path = tmp_path / "table.csv"
    path.write_bytes(b"good")
    with refused("cannot write", path, "free some space"):
        write_bytes(path, b"better")
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 100 kB, until called: what a full disk looks like to any library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("unit", [UNIT, MODEL], ids=["record", "checkpoint"])
def test_a_file_that_cannot_grow_is_told_in_one_line_and_nothing_is_half_written(
    store, small_files, unit
):
    with refused("cannot write", store.folder, "free some space"):
        store.get(unit)
    small_files()
    assert not leftovers(store.folder)
    assert whole_records(store.folder) == {}
    assert store.get(unit).kind == unit.kind


@pytest.fixture
def make_read_only(monkeypatch):
    """Call it, and no file can be opened for writing and no folder made: a read-only disk, for root as well."""
    opened, made = Path.open, Path.mkdir

    def refuse(path: Path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_to_read(self, mode="r", *args, **kwargs):
        return refuse(self) if set(mode) & set("wax+") else opened(self, mode, *args, **kwargs)

    def make(self, *args, **kwargs):
        return made(self, *args, **kwargs) if self.is_dir() else refuse(self)

    def start() -> None:
        monkeypatch.setattr(Path, "open", open_to_read)
        monkeypatch.setattr(Path, "mkdir", make)

    return start


def test_records_of_a_read_only_folder_can_be_read(store, make_read_only):
    good = store.get(UNIT)
    make_read_only()
    again = Store(store.folder)
    assert same(again.get(UNIT), good)
    with refused("cannot write", store.folder, "Read-only file system", "--results"):
        again.get(NUMBERS[1])
    with refused("cannot write", store.folder / "tables", "Read-only file system"):
        save_table(store.folder, "some", pd.DataFrame({"a": [1]}))
    assert computed(store.folder) == [0]


def test_a_file_where_the_results_folder_should_be_is_named(tmp_path):
    place = tmp_path / "results"
    place.write_text("I was here first")
    assert Store(place).find(UNIT) is None
    with refused("cannot write", place, "--results"):
        Store(place).get(UNIT)
    assert place.read_text() == "I was here first"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(store):
    store.get(UNIT)
    folder = store.folder / "runs"
    for place in (folder, folder / ".locks"):
        place.chmod(0o555)
    try:
        assert Store(store.folder).get(UNIT).result["n"] == 0
        with refused("cannot write", folder, "Permission denied", "--results"):
            store.get(NUMBERS[1])
    finally:
        for place in (folder, folder / ".locks"):
            place.chmod(0o755)


# Verified


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture
def study(recorded) -> Study:
    """A study of small models with all records of 03, made by the first test and read anew by every test."""
    study = Study("smoke", overrides=SMALL, results=recorded)
    for unit in study.plan("03"):
        study.store.get(unit)
    return Study("smoke", overrides=SMALL, results=recorded)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["train", "importance", "prune"])
def test_an_honest_record_is_repeated_bit_by_bit(study, number):
    verdict = verify_unit(study, study.plan("03")[number])
    assert verdict.exact
    assert verdict.problems == []


def better_score(result: dict, arrays: dict) -> None:
    result["scores"]["left"] = 0.123


def other_loss(result: dict, arrays: dict) -> None:
    arrays["losses"][0] = np.nextafter(arrays["losses"][0], np.float32(9))


def other_prediction(result: dict, arrays: dict) -> None:
    arrays["predictions/right"][0] = 1 - arrays["predictions/right"][0]


def array_lost(result: dict, arrays: dict) -> None:
    del arrays["order"]


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (better_score, "result.scores.left"),
        (other_loss, "losses: 50.0%"),
        (other_prediction, "predictions/right: 10.0%"),
        (array_lost, "order"),
    ],
)
def test_a_tampered_record_is_found_out(study, tmp_path, tamper, named):
    unit = study.plan("03")[0]
    record = copy.deepcopy(study.store.get(unit))
    tamper(record.result, record.arrays)
    other = Study("smoke", overrides=SMALL, results=tmp_path)
    other.store.save(record)
    problems = verify_unit(other, unit).problems
    assert len(problems) == 1
    assert named in problems[0]


def test_what_is_not_recorded_cannot_be_verified(tmp_path):
    study = Study("smoke", overrides=SMALL, results=tmp_path)
    with refused("no record", "train-", "fslib run"):
        verify_unit(study, study.plan("01")[1])


FLOATS = np.random.default_rng(0).random(50)
BITS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("old", "new", "exact", "alike"),
    [
        ({"score": 0.80}, {"score": 0.80}, True, True),
        ({"score": 0.80}, {"score": 0.80 + 1e-12}, True, False),
        ({"score": 0.80}, {"score": 0.87}, False, True),
        ({"score": 0.80}, {"score": 0.89}, False, False),
        ({"score": [0.8, {"x": 0.5}]}, {"score": [0.8, {"x": 0.4}]}, False, False),
        ({"steps": 10}, {"steps": 11}, False, False),
        ({"name": "a"}, {"name": "b"}, False, False),
        ({"a": 1.0}, {"b": 1.0}, False, False),
        ({"list": [1.0]}, {"list": [1.0, 1.0]}, False, False),
        (FLOATS, FLOATS.copy(), True, True),
        (FLOATS, np.nextafter(FLOATS, 2), True, False),
        (FLOATS, FLOATS * 1.01 + 0.02, False, True),
        (FLOATS, FLOATS[::-1].copy(), False, False),
        (FLOATS, np.zeros(50), False, False),
        (FLOATS, FLOATS[:49], False, False),
        (BITS, np.where(np.arange(20) < 3, 1 - BITS, BITS), False, True),
        (BITS, np.where(np.arange(20) < 4, 1 - BITS, BITS), False, False),
        (BITS, np.where(np.arange(20) < 1, 1 - BITS, BITS), True, False),
    ],
)
def test_tolerance_on_this_machine_and_on_another(old, new, exact, alike):
    both = [record_of(**v) if isinstance(v, dict) else record_of({"values": v}) for v in (old, new)]
    problems = record_differences(*both, exact)
    assert len(problems) == (0 if alike else 1)
    assert all(problem.startswith(("result", "values")) for problem in problems)


def test_another_machine_or_version_is_held_to_the_tolerance_only(study, tmp_path):
    unit = study.plan("03")[0]
    honest = study.store.get(unit)
    arrays = honest.arrays | {"losses": honest.arrays["losses"] * np.float32(1.00001)}
    elsewhere = {"machine": honest.machine | {"processor": "other"}}
    for change in (elsewhere, {"versions": honest.versions | {"torch": "0"}}):
        other = Study("smoke", overrides=SMALL, results=tmp_path)
        other.store.save(replace(honest, arrays=arrays, **change))
        verdict = verify_unit(other, unit)
        assert not verdict.exact
        assert verdict.problems == []


# Threads


class ThreadsUnit(NumbersUnit):
    """A unit that says how many threads it has, and fails if it is asked to."""

    kind: ClassVar[str] = "threads"

    def compute(self, store: Store) -> Result:
        """Count the threads of torch and of numpy's linear algebra."""
        if self.n:
            raise ZeroDivisionError
        return Result({"torch": torch.get_num_threads(), "linear algebra": blas_threads()})


def blas_threads() -> list[int]:
    return sorted(
        {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    )


@pytest.mark.parametrize("around", [1, 2, 3])
def test_a_unit_is_computed_with_its_own_threads_however_many_there_are(tmp_path, around):
    torch.set_num_threads(around)
    before = blas_threads()
    unit = ThreadsUnit(tasks=TASKS, n=0)
    for threads in (1, 2):
        record = Store(tmp_path / str(threads), threads).get(unit)
        assert record.machine["threads"] == record.result["torch"] == threads
        assert record.result["linear algebra"] == [threads]
        assert (torch.get_num_threads(), blas_threads()) == (around, before)
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path, 2).get(ThreadsUnit(tasks=TASKS, n=1))
    assert (torch.get_num_threads(), blas_threads()) == (around, before)


def test_a_model_that_is_trained_again_has_the_same_threads(store, monkeypatch):
    store.get(MODEL)
    shutil.rmtree(store.checkpoint(MODEL))
    seen, fit = [], TrainUnit._fit
    monkeypatch.setattr(
        TrainUnit, "_fit", lambda *words: seen.append(torch.get_num_threads()) or fit(*words)
    )
    torch.set_num_threads(2)
    MODEL.trained(store)
    assert seen == [1]


def test_the_profile_says_how_many_threads_and_no_key_knows(tmp_path):
    one, two = (Study("smoke", overrides={"threads": n}, results=tmp_path) for n in (1, 2))
    assert (Study("smoke").store.threads, one.store.threads, two.store.threads) == (1, 1, 2)
    assert [unit.key for unit in one.plan("08")] == [unit.key for unit in two.plan("08")]
    with refused("threads=0"):
        Study("smoke", overrides={"threads": 0})


def test_a_record_of_other_threads_is_verified_within_the_tolerance(study, tmp_path):
    unit = study.plan("03")[0]
    honest = study.store.get(unit)
    other = Study("smoke", overrides=SMALL, results=tmp_path)
    other.store.save(replace(honest, machine=honest.machine | {"threads": 2}))
    assert not verify_unit(other, unit).exact
    other.store.threads = 2
    assert verify_unit(other, unit).exact


# Tables, figures and notebooks


def test_a_table_is_whole_as_csv_and_rounded_as_markdown(tmp_path):
    table = pd.DataFrame({"task": ["bbc", "é"], "D": [1 / 3, -0.0001], "n": [3, 4]})
    shown = save_table(tmp_path, "t", table)
    assert shown["D"].tolist() == [0.333, 0.0]
    assert not np.signbit(shown["D"][1])
    assert (
        tmp_path / "tables" / "t.csv"
    ).read_text() == "task,D,n\nbbc,0.3333333333,3\né,-0.0001,4\n"
    assert "| bbc    | 0.333 |   3 |" in (tmp_path / "tables" / "t.md").read_text()
    assert table["D"][0] == 1 / 3
    assert save_table(tmp_path, "t", table, digits=1)["D"][0] == 0.3


def test_no_p_value_is_shown_as_0(tmp_path):
    table = pd.DataFrame(
        {"D": [1.0, 2.0, 3.0], "p": [0.0001, 0.0449, np.nan], "p, shared": 0.00051, "step": 0.0001}
    )
    shown = save_table(tmp_path, "t", table, digits=1)
    assert (
        shown["p"].tolist() == ["< 0.001", "0.045", ""]
        and shown["p, shared"].tolist() == ["< 0.001"] * 3
    )
    assert shown["step"].tolist() == [0.0] * 3, "no p value"
    rows = (tmp_path / "tables" / "t.md").read_text().splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["< 0.001", "0.045", ""]
    assert pd.read_csv(tmp_path / "tables" / "t.csv")["p"].tolist()[:2] == [0.0001, 0.0449]


def test_a_table_in_markdown_holds_no_html_no_column_and_no_escape_of_its_texts(tmp_path):
    table = pd.DataFrame(
        {"a|b": ["<script>x</script>", "a|b", "c\\d\ne", "p < 0.05"], "n": [1, 2, 3, 4]}
    )
    assert save_table(tmp_path, "t", table)["a|b"][1] == "a|b"
    rows = (tmp_path / "tables" / "t.md").read_text().splitlines()
    cells = [re.split(r"(?<!\\)\|", row)[1].strip() for row in rows]
    assert [cells[0], *cells[2:]] == [
        "a\\|b",
        "&lt;script>x&lt;/script>",
        "a\\|b",
        "c\\\\d e",
        "p < 0.05",
    ]


def test_a_study_shows_a_table_without_html_of_its_texts(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    Study("smoke", results=tmp_path).table("t", pd.DataFrame({"a": ["<script>x</script>"]}))
    assert "<script>" not in shown[0].data and "&lt;script&gt;" in shown[0].data


def test_clip_paths_do_not_depend_on_the_last_digit_of_a_layout(tmp_path):
    for place, shift in (("one", 0), ("two", 1e-13)):
        figure = drawing()
        figure.axes[0].set_position([0.1 + shift, 0.1, 0.8, 0.8])
        save_figure(tmp_path / place, "f", figure, "", "")
    one, two = ((tmp_path / place / "f.svg").read_text() for place in ("one", "two"))
    assert one == two
    assert 'clipPath id="clip0"' in one and "url(#clip0)" in one


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
        one, two = ((tmp_path / place / f"f.{kind}").read_bytes() for place in ("one", "two"))
        assert one == two
    with Image.open(tmp_path / "one" / "f.png") as image:
        assert image.text["Title"] == caption
        assert image.text["Description"] == "made by: fslib run 03"
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    svg = (tmp_path / "one" / "f.svg").read_text()
    assert "Heads of layer 2 → α &lt; 0.3 &amp; more" in svg
    assert "made by: fslib run 03" in svg


def notebook(stamp: str, said: str) -> nbformat.NotebookNode:
    """An executed notebook as papermill leaves it."""
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell["id"] = "random-" + stamp.replace(".", "-")
    cell.outputs = [nbformat.v4.new_output("stream", text=said)]
    cell.metadata = {
        "tags": [],
        "papermill": {"start_time": stamp},
        "execution": {"iopub.execute_input": stamp},
    }
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    made.metadata = {
        "papermill": {"duration": stamp, "input_path": f"/somewhere/{stamp}"},
        "language_info": {"name": "python", "version": stamp},
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    }
    return made


def tidied(tmp_path: Path, stamp: str, said: str) -> bytes:
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook(stamp, said), path)
    return tidy(path)


def test_a_tidied_notebook_forgets_when_and_where_it_ran_but_not_what_it_said(tmp_path):
    one, two = tidied(tmp_path, "3.11", "hello"), tidied(tmp_path, "3.12", "hello")
    assert one == two != tidied(tmp_path, "3.11", "bye")
    read = nbformat.reads(one.decode(), as_version=4)
    nbformat.validate(read)
    assert read.cells[1].outputs[0].text == "hello"
    assert read.cells[1].execution_count == 1
    assert read.metadata.kernelspec.name == "python3"
    assert "3.11" not in one.decode()


def test_tidying_twice_changes_nothing(tmp_path):
    once = tidied(tmp_path, "3.11", "hello")
    path = tmp_path / "once.ipynb"
    path.write_bytes(once)
    assert tidy(path) == once
