"""Records: whole or not there, computed once, known by their contents."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import forkserver
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
from tinymodels import one_thread

from fslib import Study
from fslib.model.multitask import MultiTaskModel
from fslib.study import fingerprints, verify
from fslib.study import store as stores
from fslib.study.config import checked, settings_of
from fslib.study.files import save_figure, save_table, write_bytes
from fslib.study.runner import tidy
from fslib.study.store import Record, Result, Store, key_of
from fslib.study.units import EndingsUnit, TrainUnit

NUMBERS = small_units.units("numbers")
UNIT = NUMBERS[0]
MODEL = training()


@pytest.fixture(autouse=True)
def small(small_tasks, monkeypatch):
    """Small tasks, on one thread, by code of no known commit."""
    monkeypatch.setattr(stores, "git_commit", lambda: "unknown")
    with one_thread():
        yield


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def computed(folder: Path) -> list[int]:
    """Which `numbers` units were computed in a folder, in order, repeats included."""
    log = folder / "computed"
    return [int(line) for line in log.read_text().split()] if log.is_file() else []


def whole_records(folder: Path) -> dict[str, Record]:
    """All sound records of a folder by file name."""
    found = {}
    for path in (folder / "runs").glob("*.json"):
        try:
            found[path.stem] = Store(folder).load(*path.stem.rsplit("-", 1))
        except stores.DamagedRecordError:
            continue
    assert None not in found.values()
    return found


def leftovers(folder: Path) -> list[Path]:
    """Files that a writer has left unfinished or a reader has set aside."""
    return [p for p in folder.rglob("*") if ".partial-" in p.name or p.name.endswith(".corrupt")]


def same(one: Record, other: Record) -> bool:
    """Whether two records hold the same bits, wherever and whenever they were made."""

    def bits(record: Record) -> list:
        arrays = {k: (v.dtype, v.shape, v.tobytes()) for k, v in record.arrays.items()}
        return [arrays, record.kind, record.key, record.config, record.data, repr(record.result)]

    return bits(one) == bits(other)


NAN = float("nan")
KEY = key_of("numbers", {"n": 1}, {"left": "f"})


def record_of(arrays: dict[str, np.ndarray] | None = None, **result) -> Record:
    about = {"versions": {"python": "3"}, "commit": "unknown", "machine": {"threads": 1}}
    return Record("numbers", KEY, {"n": 1}, {"left": "f"}, result, arrays or {}, 0.5, **about)


def weights(model: MultiTaskModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- there and back ---------------------------------------------------------------------------

ARRAYS = {
    "floats": np.array([0.1, -0.0, np.nan, np.inf, 1e-320]),
    "small": np.arange(6, dtype=np.int8).reshape(2, 3),
    "flags": np.array([[True, False]]),
    "empty": np.empty((0, 3), np.float32),
    "predictions/bbc-pair": np.array([1, 2], np.int64),
}


@pytest.mark.parametrize("arrays", [ARRAYS, {}], ids=["arrays", "no arrays"])
def test_a_record_comes_back_bit_by_bit(store, arrays):
    record = record_of(arrays, mean=0.1 + 0.2, none=None, list=[1, NAN, {"é": "…"}], yes=True)
    store.save(record)
    found = Store(store.folder).load("numbers", KEY)
    assert same(found, record) and found.machine == record.machine
    ends = {path.suffix for path in (store.folder / "runs").iterdir()}
    assert ends == ({".json", ".npz"} if arrays else {".json"})


def test_a_unit_is_computed_once_and_then_read_until_it_is_renewed(store):
    assert store.find(UNIT) is None
    first = store.get(UNIT)
    assert store.get(UNIT) is first
    assert same(Store(store.folder).get(UNIT), first)
    assert first.config == {"tasks": list(TASKS), "eval_examples": None, "n": 0}
    assert set(first.data) == set(TASKS)
    assert set(first.machine) >= {"processor", "capability", "threads"}
    assert {"torch", "numpy", "transformers"} <= set(first.versions)
    store.get(NUMBERS[1])
    store.renew(UNIT)
    store.get(UNIT)
    store.get(NUMBERS[1])
    assert computed(store.folder) == [0, 1, 0]
    store.renew(NUMBERS[2])  # recorded or not
    assert computed(store.folder) == [0, 1, 0, 2]


def test_records_can_take_the_place_of_those_on_the_disk(store):
    other = replace(store.get(UNIT), result={"n": 7})
    assert store.with_records([other]).get(UNIT).result == {"n": 7}
    assert store.get(UNIT).result["n"] == 0


def test_a_record_of_another_store_is_written_bit_by_bit_and_takes_the_place_of_what_was_read(
    store, tmp_path
):
    first, other = store.get(UNIT), Store(tmp_path / "other")
    other.save(replace(first, result={"n": 7}))
    assert other.find(UNIT).result == {"n": 7}
    other.save(first)
    for end in (".json", ".npz"):
        one, two = (s.path("numbers", UNIT.key).with_suffix(end) for s in (store, other))
        assert one.read_bytes() == two.read_bytes()
    assert same(other.find(UNIT), first)


# --- what a key depends on --------------------------------------------------------------------


def test_fields_that_are_younger_than_records_are_part_of_the_key_if_they_are_used():
    """All others are part of it: see test_keys.py, where all records are read again."""
    base = training().model_dump()
    younger = {"lr_floor": 0.0, "precision": "float32"}
    assert TrainUnit(**base | younger).key == training().key and not base.keys() & younger
    changes = ({"lr_floor": 0.5}, {"precision": "bf16"}, {"seed": 1}, {})
    assert len({TrainUnit(**base | change).key for change in changes}) == 4
    endings = EndingsUnit(**base, endings={"plain": None}, examples=4)
    assert not endings.model_dump().keys() & {"on", "targets", *younger}
    assert Study("smoke", overrides=younger).overrides == younger, "a profile names them"


def test_the_key_depends_neither_on_spelling_nor_on_where_things_lie(tmp_path, monkeypatch):
    key = UNIT.key
    assert NumbersUnit(n=0, eval_examples=None, tasks=["LEFT", "Right"]).key == key
    monkeypatch.setenv("FSLIB_DATA", str(write_tasks(tmp_path / "data")))
    fingerprints.cached_task.cache_clear()
    assert UNIT.key == key
    (tmp_path / "my" / "encoder").mkdir(parents=True)
    (tmp_path / "minilm-l1").mkdir()
    monkeypatch.chdir(tmp_path)
    base = training().model_dump()
    spellings = ("my/encoder", "./my/../my/encoder", str(tmp_path / "my/encoder"))
    assert len({TrainUnit(**base | {"encoder": spelling}).key for spelling in spellings}) == 1
    named = TrainUnit(**base | {"encoder": "minilm-l1"})
    assert named.encoder == "minilm-l1", "a name comes before a folder"


CIRCLE: list = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({3: 1}, ["setting '3'"]),
        ({"steps": "3"}, ["steps='3'", "integer"]),
        ({"steps": {1, 2}}, ["steps='{1, 2}'", "integer"]),
        ({"steps": CIRCLE}, ["settings", "Circular"]),
        ({"lr": float("nan")}, ["lr=nan", "finite"]),
        ({"precision": "float16"}, ["precision='float16'", "bf16"]),
        ({"tasks": ["some/where"]}, ["some/where", "FSLIB_DATA"]),
        ({"encoder": "\ud800"}, ["setting"]),
    ],
)
def test_a_config_refuses_what_it_does_not_know(change, parts):
    with refused("setting", *parts):
        checked(TrainUnit, training().model_dump() | change, "setting")


def test_settings_of_the_command_line_are_values_in_yaml():
    words = ["lr=1e-4", "doses=[.5, 1.0e-1]", "tasks=[bbc, sst-2]", "eval_examples=null", "a=b=c"]
    wanted = {"lr": 1e-4, "doses": [0.5, 0.1], "tasks": ["bbc", "sst-2"], "eval_examples": None}
    assert settings_of(words) == wanted | {"a": "b=c"}
    for pairs in (["steps"], ["=3"], ["tasks=[bbc"], ["steps=3", "steps=4"], ["a=2020-13-45"]):
        with refused("--set", pairs[-1]):
            settings_of(pairs)


# --- killed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(data):
    """Start a process that computes units, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_units"])
    with pytest.MonkeyPatch.context() as patch:  # or the server does not find what to import
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()

    def start(folder: Path, what: str, **options):
        folder.mkdir(parents=True, exist_ok=True)
        words = {"args": (folder, what, data), "kwargs": options}
        process = context.Process(target=small_units.compute, **words)
        process.start()
        return process

    return start


def finish(start, folder: Path, what: str, *, count: int = 1, code: int = 0, **options) -> None:
    processes = [start(folder, what, **options) for _ in range(count)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [code] * count


# a record is two files, each of which is flushed and renamed; a checkpoint is renamed before
@pytest.mark.parametrize(
    ("what", "kills", "records"), [("numbers", (7, 3, 4), 40), ("models", (8, 2), 6)]
)
def test_a_kill_at_any_moment_loses_one_unit_at_most(start, tmp_path, what, kills, records):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    finish(start, calm, what)
    kept: dict[str, Record] = {}
    for kill in kills:
        finish(start, rough, what, code=-signal.SIGKILL, die_at=kill)
        found = whole_records(rough)
        assert all(same(found[name], record) for name, record in kept.items())
        kept = found
        for checkpoint in (rough / "checkpoints").glob("train-*"):
            if ".partial-" not in checkpoint.name:
                MultiTaskModel.load(checkpoint)
    before = len(computed(rough))
    assert 0 < len(kept) < records and before <= len(kept) + len(kills)
    finish(start, rough, what)
    if what == "numbers":
        assert len(computed(rough)) - before == records - len(kept), "it did not start over"
    ended, undisturbed = whole_records(rough), whole_records(calm)
    # the names hold the keys: they are the same in every process
    assert ended.keys() == undisturbed.keys() and len(ended) == records
    assert all(same(ended[name], undisturbed[name]) for name in ended)
    for folder in ("runs", "checkpoints"):
        left, right = ({p.name for p in (f / folder).glob("*")} for f in (rough, calm))
        assert left == right, "what killed processes left is swept"


def test_processes_at_once_compute_each_unit_once(start, tmp_path):
    finish(start, tmp_path / "numbers", "numbers", count=2)
    assert sorted(computed(tmp_path / "numbers")) == list(range(40))
    finish(start, tmp_path / "models", "models", count=2)
    assert len(whole_records(tmp_path / "models")) == 6 and not leftovers(tmp_path)
    trained = {f"train-{training(seed).key}" for seed in range(3)}
    assert {p.name for p in (tmp_path / "models" / "checkpoints").iterdir()} == trained


# --- damaged ----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Put half of a file in its place: a loaded model may still read from the old one."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(*, honest: bool = False, **changes):
    """Change fields of a record's JSON; `honest`: and its checksum."""

    def change(path: Path) -> None:
        values = json.loads(path.read_text()) | changes
        if honest:
            values["content_sha256"] = stores.content_checksum(values)
        path.write_text(json.dumps(values))

    return change


def arrays_in(path: Path, content: bytes) -> None:
    """Put other arrays in the place of a record's, checksums and all."""
    path.write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    edit(honest=True, arrays_sha256=checksum)(path.with_suffix(".json"))


OTHER = {"tasks": list(TASKS), "eval_examples": None, "n": 1}


def of_another_unit(path: Path) -> None:
    data = json.loads(path.read_text())["data"]
    edit(honest=True, config=OTHER, key=key_of("numbers", OTHER, data))(path)


DAMAGES = {
    "cut JSON": (".json", cut),
    "not a record": (".json", lambda p: p.write_text("[]")),
    "not UTF-8": (".json", lambda p: p.write_bytes(b"\xff\xfe")),
    "deep JSON": (".json", lambda p: p.write_text("[" * 100_000)),
    "field too many": (".json", edit(honest=True, extra=1)),
    "another config": (".json", edit(honest=True, config=OTHER)),
    "another unit's": (".json", of_another_unit),
    "another result": (".json", edit(result={"mean": 1.0, "n": 0})),
    "a text for seconds": (".json", edit(seconds="long")),
    "arrays that are no zip": (".npz", lambda p: arrays_in(p, b"PK\x03\x04 and no more")),
    "one bit of the arrays": (".npz", flip),
    "no arrays": (".npz", Path.unlink),
    "arrays of another record": (".npz", lambda p: np.savez(p, values=np.zeros(3))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_never_used_and_set_aside_only_to_be_computed_again(store, damage):
    good = store.get(UNIT)
    suffix, hurt = DAMAGES[damage]
    path = store.path(UNIT.kind, UNIT.key)
    hurt(path.with_suffix(suffix))
    left, names = path.read_bytes(), sorted(p.name for p in path.parent.iterdir())
    with refused(path, "is damaged"):
        Store(store.folder).load(UNIT.kind, UNIT.key)
    assert Store(store.folder).find(UNIT) is None
    assert sorted(p.name for p in path.parent.iterdir()) == names, "a reader renames nothing"
    with pytest.warns(UserWarning, match=f"{path.name}.*damaged.*set aside as {path.name}.corrupt"):
        again = Store(store.folder).get(UNIT)
    assert same(again, good) and computed(store.folder) == [0, 0]
    assert store.set_aside() == [path.with_name(f"{path.name}.corrupt")]
    assert store.set_aside()[0].read_bytes() == left
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
    assert Store(store.folder).find(UNIT) is None
    assert not leftovers(store.folder) and not path.exists()


# --- replaced ---------------------------------------------------------------------------------


def other_numbers(monkeypatch) -> None:
    """Let the units compute other arrays from now on."""
    compute = NumbersUnit.compute

    def another(unit, store):
        result = compute(unit, store)
        return Result(result.values, {k: v + 1 for k, v in result.arrays.items()})

    monkeypatch.setattr(NumbersUnit, "compute", another)


@pytest.mark.parametrize("moment", [".npz", ".json"])
def test_a_renewal_that_is_stopped_costs_one_recomputed_unit_at_most(store, monkeypatch, moment):
    old = store.get(UNIT)

    def interrupt(path, content):
        if path.suffix == moment:
            raise KeyboardInterrupt
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        other_numbers(patch)
        patch.setattr(stores, "write_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.renew(UNIT)
    again = Store(store.folder)
    if moment == ".json":  # the new arrays do not fit the old JSON
        assert again.find(UNIT) is None
        with pytest.warns(UserWarning, match="arrays are lost, or do not match"):
            again.get(UNIT)
    assert same(again.find(UNIT), old)


def test_a_reader_during_renewals_never_gets_wrong_numbers(store, monkeypatch):
    values = store.get(UNIT).arrays["values"]
    other_numbers(monkeypatch)
    renewing = threading.Thread(target=lambda: [Store(store.folder).renew(UNIT) for _ in range(10)])
    renewing.start()
    found = 0
    while renewing.is_alive():
        record = Store(store.folder).find(UNIT)
        if record is not None:
            assert any(np.array_equal(record.arrays["values"], values + k) for k in (0, 1))
        found += record is not None
    assert found > 3 and not leftovers(store.folder)


def test_a_checkpoint_is_not_renewed_while_another_process_has_it(store):
    MODEL.trained(store)
    path = store.path("train", MODEL.key)
    before = path.stat().st_mtime_ns
    with store.lock(MODEL):
        renewing = threading.Thread(target=Store(store.folder).renew, args=[MODEL])
        renewing.start()
        time.sleep(0.3)
        assert store.checkpoint(MODEL).is_dir() and path.stat().st_mtime_ns == before
    renewing.join(30)
    assert store.checkpoint(MODEL).is_dir() and path.stat().st_mtime_ns > before


@pytest.mark.parametrize("file", ["fslib.json", "encoder/model.safetensors"])
def test_a_damaged_checkpoint_is_set_aside_and_trained_again(store, file):
    good = weights(MODEL.trained(store))
    folder = store.checkpoint(MODEL)
    cut(folder / file)
    with pytest.warns(UserWarning, match=f"{folder.name}.*set aside as {folder.name}.corrupt"):
        again = weights(MODEL.trained(Store(store.folder)))
    assert torch.equal(good, again)
    assert store.set_aside() == [folder.with_name(f"{folder.name}.corrupt")]
    assert torch.equal(good, weights(MultiTaskModel.load(folder)))


def test_a_missing_checkpoint_is_trained_again_on_as_many_threads(store, monkeypatch):
    good = weights(MODEL.trained(store))
    path = store.path("train", MODEL.key)
    before = path.stat().st_mtime_ns
    shutil.rmtree(store.checkpoint(MODEL))
    seen, fit = [], TrainUnit._fit

    def spied(*words):
        seen.append(torch.get_num_threads())
        return fit(*words)

    monkeypatch.setattr(TrainUnit, "_fit", spied)
    torch.set_num_threads(2)
    assert torch.equal(good, weights(MODEL.trained(store))) and seen == [1]
    assert path.stat().st_mtime_ns == before, "the record stays"


# --- no space, no permission ------------------------------------------------------------------


@pytest.mark.parametrize("unit", [UNIT, MODEL], ids=["record", "checkpoint"])
def test_a_file_that_cannot_grow_is_told_in_one_line_and_none_is_half_written(store, unit):
    """What a full disk looks like to any library: no file may grow beyond 100 kB."""
    path = store.folder / "table.csv"
    path.write_bytes(b"good")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with refused("cannot write", store.folder, "free some space"):
            store.get(unit)
        with refused("cannot write", path, "free some space"):
            write_bytes(path, b"better" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"good"
    assert not leftovers(store.folder) and whole_records(store.folder) == {}
    assert store.get(unit).kind == unit.kind


def test_records_of_a_read_only_folder_can_be_read(store, monkeypatch):
    good = store.get(UNIT)

    def refuse(path: Path, *words, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # for root as well
    monkeypatch.setattr(Path, "replace", refuse)
    again = Store(store.folder)
    assert same(again.get(UNIT), good)
    with refused("cannot write", store.folder, "Read-only file system", "--results"):
        again.get(NUMBERS[1])
    assert computed(store.folder) == [0]


# --- verified ---------------------------------------------------------------------------------


def test_a_tampered_record_is_found_out(tmp_path):
    study = Study("smoke", overrides=SMALL, results=tmp_path)
    unit = study.plan("03")[0]
    honest = study.store.get(unit)
    losses = honest.arrays["losses"].copy()
    losses[0] = np.nextafter(losses[0], np.float32(9))
    changes = [{"machine": honest.machine | {"threads": 2}}]
    changes += [{"versions": honest.versions | {"torch": "0"}}, {}]
    for change in changes:
        study.store.save(replace(honest, arrays=honest.arrays | {"losses": losses}, **change))
        verdict = verify.verify_unit(study, unit)
        assert verdict.exact == (not change)
        assert verdict.exact or verdict.problems == [], "held to the tolerance only"
    (problem,) = verdict.problems
    assert "losses: 50.0%" in problem


FLOATS = np.random.default_rng(0).random(50)
GONE = np.where(np.arange(50) < 3, NAN, FLOATS)
BITS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("old", "new", "exact", "alike"),
    [
        ({"score": 0.80}, {"score": 0.80}, True, True),
        ({"score": 0.80}, {"score": 0.80 + 1e-12}, True, False),
        ({"score": 0.80}, {"score": 0.87}, False, True),
        ({"score": 0.80}, {"score": 0.89}, False, False),
        ({"score": NAN}, {"score": float("nan")}, True, True),
        ({"score": NAN}, {"score": 0.5}, False, False),
        (GONE, GONE.copy(), True, True),
        (GONE, FLOATS, False, False),
        ({"steps": 10}, {"steps": 11}, False, False),
        ({"a": 1.0}, {"b": 1.0}, False, False),
        ({"list": [1.0]}, {"list": [1.0, 1.0]}, False, False),
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
    problems = verify.record_differences(*both, exact)
    assert len(problems) == (0 if alike else 1)
    assert all(problem.startswith(("result", "values")) for problem in problems)


# --- threads ----------------------------------------------------------------------------------


class ThreadsUnit(NumbersUnit):
    """A unit that says how many threads it has, and fails if it is asked to."""

    kind: ClassVar[str] = "threads"

    def compute(self, store: Store) -> Result:
        """Count the threads of torch and of numpy's linear algebra."""
        if self.n:
            raise ZeroDivisionError
        return Result({"threads": threads()})


def threads() -> list[int]:
    """Those of torch, and of every library of linear algebra."""
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return [torch.get_num_threads(), *{library["num_threads"] for library in blas}]


def test_a_unit_is_computed_with_its_own_threads_however_many_there_are(tmp_path):
    torch.set_num_threads(3)
    before = threads()
    unit = ThreadsUnit(tasks=TASKS, n=0)
    for number in (1, 2):
        record = Store(tmp_path / str(number), number).get(unit)
        assert record.machine["threads"] == number
        assert record.result["threads"] == [number, number] and threads() == before
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path, 2).get(ThreadsUnit(tasks=TASKS, n=1))
    assert threads() == before


def test_the_profile_says_how_many_threads_and_no_key_knows(tmp_path):
    one, two = (Study("smoke", overrides={"threads": n}, results=tmp_path) for n in (1, 2))
    assert (Study("smoke").store.threads, one.store.threads, two.store.threads) == (1, 1, 2)
    assert [unit.key for unit in one.plan("08")] == [unit.key for unit in two.plan("08")]


# --- tables, figures and notebooks ------------------------------------------------------------


def test_a_table_is_whole_as_csv_and_rounded_as_markdown(tmp_path, monkeypatch):
    texts = ["<script>x</script>", "a|b", "c\\d\ne"]
    table = pd.DataFrame({"a|b": texts, "D": [1 / 3, -0.0001, 2.0], "n": [3, 4, 5]})
    table = table.assign(**{"p, shared": [0.0001, 0.0449, np.nan], "step": 0.0001})
    rounded = save_table(tmp_path, "t", table)
    assert rounded["D"].tolist() == [0.333, 0.0, 2.0] and not np.signbit(rounded["D"][1])
    assert rounded["p, shared"].tolist() == ["< 0.001", "0.045", ""], "no p value is shown as 0"
    assert rounded["step"].tolist() == [0.0] * 3, "no p value"
    whole = pd.read_csv(tmp_path / "tables" / "t.csv")
    assert whole["a|b"].tolist() == texts and whole["D"][0] == 0.3333333333
    head, _, *rows = (tmp_path / "tables" / "t.md").read_text().splitlines()
    first = [row.split(" | ")[0].strip("| ") for row in (head, *rows)]
    assert first == ["a\\|b", "&lt;script>x&lt;/script>", "a\\|b", "c\\\\d e"]
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    Study("smoke", results=tmp_path).table("t", table, show=table["n"] == 3)
    assert "&lt;script&gt;" in shown[0].data and "0.045" not in shown[0].data


def drawing(shift: float = 0) -> Figure:
    figure = Figure(figsize=(2, 1.5))
    axes = figure.add_axes((0.1 + shift, 0.1, 0.8, 0.8))
    axes.plot([0, 1], [1, 0], label="line")
    axes.fill_between([0, 1], [0, 0], [1, 1], hatch="/")
    axes.legend()
    return figure


def test_a_figure_has_the_same_bytes_twice_and_its_caption_inside(tmp_path):
    caption = "Heads of layer 2 → α < 0.3 & more"
    # a layout that is computed again may differ in its last digit
    for place, shift in (("one", 0), ("two", 1e-13)):
        with matplotlib.rc_context({"svg.hashsalt": place}):
            save_figure(tmp_path / place, "f", drawing(shift), caption, "fslib run 03")
    for kind in ("png", "svg"):
        one, two = ((tmp_path / place / f"f.{kind}").read_bytes() for place in ("one", "two"))
        assert one == two
    with Image.open(tmp_path / "one" / "f.png") as image:
        assert image.text == {"Title": caption, "Description": "made by: fslib run 03"}
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    svg = (tmp_path / "one" / "f.svg").read_text()
    for part in ("α &lt; 0.3 &amp; more", "made by: fslib run 03", "url(#clip0)", 'id="clip0"'):
        assert part in svg


def tidied(folder: Path, stamp: str, said: str) -> bytes:
    """An executed notebook, as papermill leaves it, made tidy."""
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell["id"] = "random-" + stamp.replace(".", "-")
    cell.outputs = [nbformat.v4.new_output("stream", text=said)]
    cell.metadata = {"tags": [], "papermill": {"start_time": stamp}, "execution": {"at": stamp}}
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    language = {"name": "python", "version": stamp}
    made.metadata = {"papermill": {"at": stamp}, "language_info": language, "kernelspec": kernel}
    nbformat.write(made, folder / "notebook.ipynb")
    return tidy(folder / "notebook.ipynb")


def test_a_tidied_notebook_forgets_when_and_where_it_ran_but_not_what_it_said(tmp_path):
    one, two = tidied(tmp_path, "3.11", "hello"), tidied(tmp_path, "3.12", "hello")
    assert one == two != tidied(tmp_path, "3.11", "bye") and b"3.11" not in one
    read = nbformat.reads(one.decode(), as_version=4)
    nbformat.validate(read)
    assert read.cells[1].outputs[0].text == "hello" and read.cells[1].execution_count == 1
    assert read.metadata.kernelspec.name == "python3"
    (tmp_path / "once.ipynb").write_bytes(one)
    assert tidy(tmp_path / "once.ipynb") == one
