"""Units on a Ray cluster of several nodes, all on this machine: the same records, whatever happens to nodes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster
from refusal import refused
from small_units import (
    SMALL,
    TASKS,
    FailingUnit,
    KilledUnit,
    NumbersUnit,
    PlacedUnit,
    training,
    write_tasks,
)

import fslib
from fslib.questions import main
from fslib.study import cluster as clusters
from fslib.study.fingerprints import cached_task
from fslib.study.schedule import Where, compute
from fslib.study.store import DamagedRecordError, Store
from fslib.study.units import ImportanceUnit, PruneUnit

SCORED = [ImportanceUnit(model=training(seed), examples=4) for seed in (0, 1)]
PRUNED = [PruneUnit(importance=scored, fractions=(0.25,), controls=1) for scored in SCORED]
CHAINS = [[training(seed), SCORED[seed], PRUNED[seed]] for seed in (0, 1)]
COMMAND = [sys.executable, "-c", "import sys, fslib_command; sys.exit(fslib_command.main())"]


@pytest.fixture(scope="module")
def places(data):
    """Three machines: one for the driver alone, and two with a processor and two (pretended) GPUs each."""
    tests = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSLIB_DATA", str(data))
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, str(Path(fslib.__file__).parents[1])]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        cached_task.cache_clear()
        made = RayCluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=2)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()
        cached_task.cache_clear()


@pytest.fixture
def where(places) -> Where:
    return Where(ray=places.address)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.suffix in (".json", ".npz"))


def test_records_are_the_same_bits_from_a_cluster_and_from_here(tmp_path, where):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    units = [unit for chain in CHAINS for unit in chain]
    lines = []
    assert compute(here, units, Where(1), say=[].append) == {}
    assert compute(there, units, where, say=lines.append) == {}
    assert lines[-1].startswith("[6/6] ")
    for unit in units:
        one, two = (
            store.path(unit.kind, unit.key).with_suffix(".npz").read_bytes()
            for store in (here, there)
        )
        assert one == two
        one, two = here.find(unit), there.find(unit)
        assert (one.result, one.machine, one.data, one.config) == (
            two.result,
            two.machine,
            two.data,
            two.config,
        )
    assert not list((tmp_path / "there").rglob("*.safetensors")), "models do not travel"
    assert not list((tmp_path / "there").rglob("*.partial*"))


def test_what_is_recorded_goes_along_and_is_not_computed_again(tmp_path, where):
    store = Store(tmp_path)
    store.get(training(0)), store.get(SCORED[0])
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*.*") if p.is_file()}
    assert compute(store, [PRUNED[0]], where, say=[].append) == {}
    assert store.find(PRUNED[0]) is not None
    for name, when in before.items():
        assert (tmp_path / "runs" / name).stat().st_mtime_ns == when, name


def test_trouble_is_a_line_each_and_stops_nothing_else(tmp_path, where):
    store, n = Store(tmp_path), [NumbersUnit(tasks=TASKS, n=n) for n in range(3)]
    trouble = [KilledUnit(tasks=TASKS, n=0), FailingUnit(tasks=TASKS, n=0)]
    failures = compute(store, [*trouble, *n], where, say=[].append)
    assert failures.keys() == {unit.key for unit in trouble}
    killed, failed = (failures[unit.key].reason for unit in trouble)
    assert killed == "it was lost 3 times, at last by the end of its process"
    assert failed.startswith("RuntimeError: size mismatch")
    assert all(store.find(unit) for unit in n)


def test_a_failure_takes_the_rest_of_its_chain(tmp_path, where):
    failing = FailingUnit(tasks=TASKS, n=1)
    after = PlacedUnit(tasks=TASKS, n=2, log=os.devnull, base=failing)
    failures = compute(Store(tmp_path), [failing, after], where, say=[].append)
    assert failures.keys() == {failing.key, after.key}
    assert failures[after.key].unit == failing


def test_a_machine_that_goes_in_the_middle_of_a_chain_costs_nothing_but_time(
    tmp_path, places, where
):
    doomed = places.add_node(num_cpus=1, num_gpus=2)
    places.wait_for_nodes()
    log = tmp_path / "log"
    first = [PlacedUnit(tasks=TASKS, n=n, log=str(log)) for n in range(3)]
    slow = [
        PlacedUnit(tasks=TASKS, n=10 + n, log=str(log), seconds=6.0, base=unit)
        for n, unit in enumerate(first)
    ]
    found = {}
    store = Store(tmp_path / "store")

    def run() -> None:
        found["failures"] = compute(store, [*first, *slow], where, say=[].append)

    thread = threading.Thread(target=run)
    thread.start()
    end = time.monotonic() + 120
    there = [f"{unit.n} {doomed.node_id}" for unit in slow]
    while not (log.is_file() and any(line in lines_of(log) for line in there)):
        assert time.monotonic() < end and thread.is_alive(), "no slow unit came to the node"
        time.sleep(0.05)
    (number,) = (n for n, line in enumerate(there) if line in lines_of(log))
    while not store.path(
        "placed", first[number].key
    ).is_file():  # the record before it is on its way
        assert time.monotonic() < end
        time.sleep(0.05)
    places.remove_node(doomed)
    thread.join(120)
    assert found["failures"] == {} and all(store.find(unit) for unit in (*first, *slow))
    begun = [int(line.split()[0]) for line in lines_of(log)]
    assert all(begun.count(unit.n) == 1 for unit in first), "their records had arrived"
    assert sorted(begun.count(unit.n) for unit in slow) == [1, 1, 2], "one was begun again"
    assert all(store.find(unit).result["node"] != doomed.node_id for unit in slow)


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().split("\n") if line.count(" ") == 1]


def test_gpus_are_handed_out_one_a_chain_and_none_is_seen_without(tmp_path, places):
    log = str(tmp_path / "log")
    units = [PlacedUnit(tasks=TASKS, n=n, log=log, seconds=1.0) for n in range(4)]
    one, none = Store(tmp_path / "one"), Store(tmp_path / "none")
    assert compute(one, units, Where(ray=places.address, gpus=1), say=[].append) == {}
    assert {one.find(unit).result["gpus"] for unit in units} <= {"0", "1"}
    assert compute(none, units[:1], Where(ray=places.address), say=[].append) == {}
    result = none.find(units[0]).result
    assert result["gpus"] == "" and result["threads"] == 1
    with refused("no machine of the Ray cluster", "3 GPUs"):
        compute(none, units, Where(ray=places.address, gpus=3), say=[].append)
    with refused("no machine of the Ray cluster", "5 processors"):
        compute(Store(tmp_path, 5), units, Where(ray=places.address), say=[].append)


def test_a_worker_with_other_code_is_refused_by_name(tmp_path, where, monkeypatch):
    mine = clusters.versions()
    monkeypatch.setattr(clusters, "versions", lambda: mine | {"torch": "0.1"})
    with refused(
        "the worker on", "was refused", f"torch {mine['torch']} instead of 0.1", "install the same"
    ):
        compute(Store(tmp_path), [NumbersUnit(tasks=TASKS, n=0)], where, say=[].append)
    assert names(tmp_path) == []


def test_a_worker_with_other_data_is_refused_by_name(tmp_path, where, monkeypatch):
    other = write_tasks(tmp_path / "other")
    (other / "left" / "train.tsv").write_text(
        (other / "left" / "train.tsv").read_text().replace("number", "no.")
    )
    monkeypatch.setenv("FSLIB_DATA", str(other))
    cached_task.cache_clear()
    try:
        with refused("was refused", "its data are others", "left, right"):
            compute(
                Store(tmp_path / "store"), [NumbersUnit(tasks=TASKS, n=0)], where, say=[].append
            )
    finally:
        monkeypatch.undo()
        cached_task.cache_clear()


def test_a_record_that_comes_damaged_or_is_another_is_not_written(tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    one, two = (NumbersUnit(tasks=TASKS, n=n) for n in range(2))
    here.get(one)
    content, arrays = here.files(one)
    for files, said in (
        ((content, arrays[:-1]), "came damaged"),
        ((content[:-9], arrays), "came damaged"),
    ):
        with pytest.raises(DamagedRecordError, match=said):
            there.adopt(one, files)
    with pytest.raises(
        DamagedRecordError, match=f"instead of record numbers-{two.key} came numbers-{one.key}"
    ):
        there.adopt(two, (content, arrays))
    assert names(tmp_path / "there") == []
    there.adopt(one, (content, arrays))
    assert there.files(one) == here.files(one)
    with refused("there is no record"):
        there.files(two)


SETTINGS = [
    word
    for key, value in (SMALL | {"seeds": 3}).items()
    for word in ("--set", f"{key}={json.dumps(value)}")
]


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path, places, data):
    words = [
        "run",
        "03",
        "--profile",
        "smoke",
        *SETTINGS,
        "--results",
        str(tmp_path),
        "--ray",
        places.address,
    ]
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 180
    while len(list(tmp_path.rglob("train-*.json"))) < 1:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json") if p.parent.name == "runs"}
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    recorded = sorted(p for p in tmp_path.rglob("*.json") if p.parent.name == "runs")
    assert (
        len(recorded) == 9
        and f"9 units: {len(before)} recorded, {9 - len(before)} to compute" in done.stdout
    )
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray", "local", "--workers", "2"], "--workers are processes of this machine"),
        (["--gpus-per-unit", "1"], "--gpus-per-unit goes with --ray"),
        (["--ray", "local", "--gpus-per-unit", "1.5"], "--gpus-per-unit 1.5"),
        (["--ray", "local", "--gpus-per-unit", "nan"], "--gpus-per-unit nan"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, words, said, small_tasks):
    assert (
        main(["run", "03", "--profile", "smoke", *SETTINGS, "--results", str(tmp_path), *words])
        == 2
    )
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
