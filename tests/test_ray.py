"""Units on a Ray cluster of several nodes, all on this machine."""

import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import ray
import small_units
from ray.cluster_utils import Cluster as RayCluster
from refusal import refused
from small_units import TASKS, FailingUnit, KilledUnit, NumbersUnit, PlacedUnit, training

import fslib
from fslib.cli import main
from fslib.study import ray as clusters
from fslib.study.fingerprints import cached_task
from fslib.study.parallel import Done, Engine, compute
from fslib.study.ray import Cluster
from fslib.study.store import Store, Unit
from fslib.study.units import ImportanceUnit, PruneUnit

SCORED = [ImportanceUnit(model=training(seed), examples=4) for seed in (0, 1)]
PRUNED = [PruneUnit(importance=scored, fractions=(0.25,), controls=1) for scored in SCORED]
CHAINS = [[training(seed), SCORED[seed], PRUNED[seed]] for seed in (0, 1)]


@pytest.fixture(scope="module")
def places(data):
    """Three machines: the driver's, and two with a processor and two pretended GPUs each."""
    tests = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSLIB_DATA", str(data))
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, str(Path(fslib.__file__).parents[1])]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        cached_task.cache_clear()
        head = {"num_cpus": 0, "include_dashboard": False}
        made = RayCluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=2)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()
        cached_task.cache_clear()


@pytest.fixture
def there(places):
    """Compute units on that cluster, and return what failed."""

    def compute_there(store: Store, units: list[Unit], say=[].append, **options) -> dict[str, Done]:
        return compute(store, units, Cluster(store, places.address, **options), say)

    return compute_there


def numbers(count: int) -> list[Unit]:
    return [NumbersUnit(tasks=TASKS, n=n) for n in range(count)]


def test_records_are_the_same_bits_from_a_cluster_and_from_here(tmp_path, there):
    """One chain is computed whole there; of the other, what is recorded here goes along."""
    here, other, lines = Store(tmp_path / "here"), Store(tmp_path / "there"), []
    units = [unit for chain in CHAINS for unit in chain]
    assert compute(here, units, Engine(here), [].append) == {}
    for unit in CHAINS[0][:2]:
        other.save(here.find(unit))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*.npz")}
    assert there(other, units[2:], lines.append) == {}
    assert lines[-1].startswith("[4/4] ") and len(before) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    for unit in units:
        one, two = here.find(unit), other.find(unit)
        path = other.path(unit.kind, unit.key).with_suffix(".npz")
        assert path.read_bytes() == (here.folder / "runs" / path.name).read_bytes()
        for part in ("result", "machine", "data", "config"):
            assert getattr(one, part) == getattr(two, part)
    assert not list((tmp_path / "there").rglob("*.safetensors")), "models do not travel"
    assert not list((tmp_path / "there").rglob("*.partial*"))


def test_trouble_is_a_line_each_and_stops_nothing_else(tmp_path, there):
    store, sound, lines = Store(tmp_path), numbers(3), []
    killed, failing = KilledUnit(tasks=TASKS, n=0), FailingUnit(tasks=TASKS, n=0)
    after = PlacedUnit(tasks=TASKS, n=2, log=os.devnull, base=failing)  # the rest of its chain
    failures = there(store, [killed, failing, after, *sound], lines.append)
    assert failures.keys() == {killed.key, failing.key, after.key}
    assert failures[killed.key].failure.startswith("it was lost 3 times, at last by WorkerCrashed")
    assert sum("was lost by WorkerCrashedError: " in x for x in lines) == 2
    assert failures[after.key].unit == failing
    assert failures[after.key].failure.startswith("RuntimeError: size mismatch")
    assert all(store.find(unit) for unit in sound)


def test_a_machine_that_goes_in_the_middle_of_a_chain_costs_nothing_but_time(
    tmp_path, places, there
):
    doomed = places.add_node(num_cpus=1, num_gpus=2)
    places.wait_for_nodes()
    log, store, found = tmp_path / "log", Store(tmp_path / "store"), {}
    shared = {"tasks": TASKS, "log": str(log)}
    first = [PlacedUnit(n=n, **shared) for n in range(3)]
    slow = [PlacedUnit(n=10 + n, seconds=6.0, base=unit, **shared) for n, unit in enumerate(first)]
    run = lambda: found.update(failures=there(store, [*first, *slow]))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    begun = lambda: log.read_text().splitlines() if log.is_file() else []  # noqa: E731
    there_now = lambda: [n for n in range(3) if f"{10 + n} {doomed.node_id}" in begun()]  # noqa: E731
    (number,) = small_units.wait_for(there_now)
    small_units.wait_for(store.path("placed", first[number].key).is_file)  # it is on its way
    places.remove_node(doomed)
    thread.join(120)
    assert found["failures"] == {} and all(store.find(unit) for unit in (*first, *slow))
    numbers = [int(line.split()[0]) for line in begun()]
    assert all(numbers.count(unit.n) == 1 for unit in first), "their records had arrived"
    assert sorted(numbers.count(unit.n) for unit in slow) == [1, 1, 2], "one was begun again"
    assert all(store.find(unit).result["node"] != doomed.node_id for unit in slow)


def test_gpus_are_handed_out_one_a_chain_and_none_is_seen_without(tmp_path, there):
    units = [PlacedUnit(tasks=TASKS, n=n, log=str(tmp_path / "log"), seconds=1.0) for n in range(4)]
    one, none = Store(tmp_path / "one"), Store(tmp_path / "none")
    assert there(one, units, gpus=1) == {}
    assert {one.find(unit).result["gpus"] for unit in units} <= {"0", "1"}
    assert there(none, units[:1]) == {}
    result = none.find(units[0]).result
    assert result["gpus"] == "" and result["threads"] == 1
    with refused("no machine of the Ray cluster", "3 GPUs"):
        there(none, units, gpus=3)
    with refused("no machine of the Ray cluster", "5 processors"):
        there(Store(tmp_path, 5), units)


def test_a_worker_with_other_code_or_data_is_refused_by_name(tmp_path, there, data, monkeypatch):
    mine, store = clusters.versions(), Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "versions", lambda: mine | {"torch": "0.1"})
        other = f"torch {mine['torch']} instead of 0.1"
        with refused("the worker on", "was refused", other, "install the same"):
            there(store, numbers(1))
    changed = shutil.copytree(data, tmp_path / "other") / "left" / "train.tsv"
    changed.write_text(changed.read_text().replace("number", "no."))
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path / "other"))
    cached_task.cache_clear()
    with refused("was refused", "its data are others", "left, right"):
        there(store, numbers(1))
    cached_task.cache_clear()
    assert not list(tmp_path.rglob("*.json"))


def test_a_worker_without_the_data_is_refused_and_names_them(monkeypatch):
    def missing(unit):
        raise fslib.FslibError("no left")

    wanted, pickled = clusters.code(), pickle.dumps({"0": numbers(1)[0]})
    monkeypatch.setattr(NumbersUnit, "data", missing)
    with refused("it cannot load the data: no left"):
        next(clusters.obey(wanted, pickled, pickle.dumps([]), 1))


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path, places):
    words = ["run", "03", *small_units.small(seeds=3), "--results", str(tmp_path)]
    words += ["--ray", places.address]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = small_units.start(words, **quiet, env={"PYTHONPATH": os.environ["PYTHONPATH"]})
    small_units.wait_for(lambda: process.poll() is not None or list(tmp_path.rglob("train-*.json")))
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("runs/*.json")}
    assert 1 <= len(before) < 9
    process = small_units.start(words, env={"PYTHONPATH": os.environ["PYTHONPATH"]})
    said, errors = process.communicate(timeout=300)
    assert f"9 units: {len(before)} recorded, {9 - len(before)} to compute" in said, errors
    assert len(list(tmp_path.rglob("runs/*.json"))) == 9
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path, places, capsys):
    words = ["run", "03", "--profile", "smoke", "--results", str(tmp_path)]
    assert main([*words, "--ray", "127.0.0.1:1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fslib: no Ray cluster at '127.0.0.1:1': ") and shown.count("\n") == 1
