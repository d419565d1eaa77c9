"""Several processes on one thing (gloo): they find what one finds, the first alone writes, no failure is waited for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.launchers import debug_launcher
from small_units import SMALL, training
from tinymodels import toy_task

import fslib
from fslib import IAT, FslibError, MultiTaskModel, PCGrad, evaluate, head_importance, mean_context, train
from fslib.importance import ESTIMATORS
from fslib.model import devices
from fslib.similarity import task_embedding, text_embedding
from fslib.study.records import Store
from fslib.training import Training, branch, make_settings

# Batches of 3 on two processes, and the ragged rest of every epoch: one example, which one of them does not have.
ODD = {"steps": 12, "batch_size": 3, "lr": 1e-3, "sampling": "uniform", "seed": 3}
ENDINGS = {"plain": None, "IAT": IAT(delta=0.5, alpha=0.5, examples=4), "PCGrad": PCGrad(delta=0.5)}
KINDS = ("single", "pair", "regression")


def weights(model):
    """All weights but a key's bias: it moves nothing in a softmax, so its gradient is noise, which Adam blows up."""
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if not n.endswith("key.bias")]).numpy()


def new_model(folder, tasks):
    model = MultiTaskModel.from_pretrained(folder, tasks)
    model.dropout.p = 0.0  # each process draws its own dropout
    return model


def step_by_step(folder):
    """Weights after every step, in double precision: plain training, then each ending."""
    tasks, found = {kind: toy_task(kind, train=7, eval=5) for kind in KINDS}, {}
    for name, ending in ENDINGS.items():
        model = new_model(folder, tasks).double()
        run = Training(model, tasks, make_settings(ODD))
        for step in range(1, ODD["steps"] + 1):
            if step == 7:
                run.begin(ending)
            run.advance(step)
            found[f"steps/{name}/{step:02d}"] = weights(model)
        found[f"losses/{name}"] = np.array(run.history.losses)
        found |= {f"heads/{name}/{task}": heads for task, heads in run.history.heads.items()}
    model = new_model(folder, tasks).double()
    for name, history in branch(model, tasks, ENDINGS, **ODD):
        found[f"branch/{name}"], found[f"branch losses/{name}"] = weights(model), np.array(history.losses)
    return found


def everything(folder):
    """What is measured on three tasks, in many batches and in fewer than there are processes; flat arrays."""
    tasks = {kind: toy_task(kind, train=12, eval=7) for kind in KINDS}
    model = new_model(folder, tasks)
    found = {}
    for size, name in ((5, "many"), (32, "one")):
        options = {"batch_size": size}
        found |= {f"predictions/{name}/{n}": s.predictions for n, s in evaluate(model, tasks, **options).items()}
        for task in tasks.values():
            for estimator in ESTIMATORS:
                key = f"{estimator}/{name}/{task.name}"
                found[key] = head_importance(model, task, estimator=estimator, **options)
    for name, task in tasks.items():
        for examples in (3, 12):
            found[f"mean context/{name}/{examples}"] = mean_context(model, task, examples=examples).numpy()
            embedded = task_embedding(model, task, examples=examples, seed=0)
            found |= {f"embedding/{name}/{examples}/{part}": v for part, v in embedded.items()}
            found[f"text/{name}/{examples}"] = text_embedding(model, task, examples=examples, seed=0)
    iap = fslib.prune_important_heads(model, tasks, [0.25, 0.5], 2, examples=3)
    found |= {f"iap/{part}": np.asarray(array) for part, array in iap.arrays().items()}
    found["order"] = np.array(train(model, tasks, **ODD | {"batch_size": 4}).order)
    found["weights"] = weights(model)
    return found | step_by_step(folder)


def one_of_two(folder, out):
    PartialState(cpu=True)  # the launcher leaves it to its caller to say so
    torch.set_num_threads(1)
    found = everything(folder)
    np.savez(Path(out) / f"{PartialState().process_index}.npz", processes=PartialState().num_processes, **found)


def in_two_processes(folder, out):
    debug_launcher(one_of_two, (folder, out), num_processes=2)


@pytest.fixture(scope="module")
def by_two(zoo, tmp_path_factory):
    """What both processes found, run from a fresh interpreter: forking this one, with its threads, could hang."""
    out = tmp_path_factory.mktemp("two")
    code = f"import test_processes as t; t.in_two_processes({str(zoo.folder('bert'))!r}, {str(out)!r})"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [dict(np.load(out / f"{rank}.npz")) for rank in (0, 1)]
    assert [int(f.pop("processes")) for f in found] == [2, 2]
    return found


@pytest.fixture(scope="module")
def by_one(zoo):
    return everything(zoo.folder("bert"))


# What they find


def test_two_processes_agree_with_each_other_to_the_bit(by_two):
    first, second = by_two
    assert first.keys() == second.keys() and len(first) > 100
    for key in first:
        assert np.array_equal(first[key], second[key]), key


def test_two_processes_find_what_one_finds(by_one, by_two):
    assert by_one.keys() == by_two[0].keys()
    for key, expected in by_one.items():
        np.testing.assert_allclose(by_two[0][key], expected, rtol=1e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_step_is_that_of_one_process_although_batches_are_odd(by_one, by_two, ending):
    for step in range(1, ODD["steps"] + 1):
        key = f"steps/{ending}/{step:02d}"
        assert by_one[key].dtype == np.float64
        np.testing.assert_allclose(by_two[0][key], by_one[key], rtol=1e-6, atol=1e-6, err_msg=key)
    moved = np.abs(by_one[f"steps/{ending}/12"] - by_one[f"steps/{ending}/11"])
    assert moved.max() > 1e-5  # 1e-6 is less than what a step does
    np.testing.assert_allclose(by_two[0][f"losses/{ending}"], by_one[f"losses/{ending}"], rtol=1e-6)


def test_iat_leaves_the_same_rows_alone(by_one, by_two):
    still = [f["steps/IAT/12"] == f["steps/IAT/11"] for f in (by_one, by_two[0])]
    assert np.array_equal(*still) and 0.05 < still[0].mean() < 0.95
    heads = [key for key in by_one if key.startswith("heads/IAT/")]
    assert len(heads) == 3 and all(np.array_equal(by_one[key], by_two[0][key]) for key in heads)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_of_branch_is_the_training_with_that_ending(by_two, ending):
    np.testing.assert_allclose(by_two[0][f"branch/{ending}"], by_two[0][f"steps/{ending}/12"], rtol=1e-9, atol=1e-12)


# Units


SCRIPT = """
import os, sys
from pathlib import Path
from fslib.study import runner, units
from fslib.study.records import Store
from fslib.model.multitask import MultiTaskModel
from fslib.questions import main

rank = os.environ["RANK"]
if rank == os.environ.get("FAILING"):
    def evaluate(*words, **options):
        raise RuntimeError("out of memory\\nand more")
    units.evaluate = evaluate

def noted(method):
    def note(*words, **options):
        with open(os.environ["WRITERS"], "a") as file:
            file.write(rank + "\\n")
        return method(*words, **options)
    return note

Store.save, MultiTaskModel.save = noted(Store.save), noted(MultiTaskModel.save)
runner.ROOT = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
WORDS = ["--profile", "smoke", *(w for k, v in SMALL.items() for w in ("--set", f"{k}={json.dumps(v)}"))]


def launch(tmp_path, data, *words, timeout=300, **variables):
    """Run fslib in two processes that compute together, on a folder with one notebook; (process, seconds)."""
    from test_cli import READS_RECORD, write_notebook

    (tmp_path / "notebooks").mkdir(exist_ok=True)
    write_notebook(tmp_path / "notebooks" / "02_heads.ipynb", READS_RECORD)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = {**os.environ, "FSLIB_DATA": str(data), "FSLIB_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    here |= {"WRITERS": str(tmp_path / "writers"), **variables}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(script), str(tmp_path), *words]
    begun = time.monotonic()
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=timeout)
    return done, time.monotonic() - begun


def ours(text):
    return [line for line in text.splitlines() if line.startswith("fslib:")]


def test_two_processes_compute_units_together_and_the_first_alone_writes_and_speaks(tmp_path, data):
    done, _ = launch(tmp_path, data, "run", "02", *WORDS)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "results").iterdir()
    records = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    assert [record["kind"] for record in records] == ["importance", "train"]
    assert all(record["machine"]["processes"] == 2 for record in records)
    assert set((tmp_path / "writers").read_text().split()) == {"0"}
    assert done.stdout.count("2 units: 0 recorded, 2 to compute") == 1
    assert done.stdout.count("all done in") == 1 and not ours(done.stderr)
    assert (folder / "notebooks" / "02_heads.ipynb").is_file()
    # one process finds these records, and computes nothing
    again, _ = launch(tmp_path, data, "run", "02", *WORDS)
    assert again.returncode == 0 and "2 units: 2 recorded, 0 to compute" in again.stdout


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_failure_of_one_process_ends_all_with_one_line(tmp_path, data, failing):
    done, seconds = launch(tmp_path, data, "run", "02", *WORDS, FAILING=failing)
    assert done.returncode != 0 and seconds < 120
    (line,) = ours(done.stderr)
    assert f"failed in process {failing}: RuntimeError: out of memory" in line
    assert not list((tmp_path / "results").rglob("runs/*.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "2"), "--workers 2: these 2 processes compute one unit at a time"),
        (("verify",), "verify is for one process"),
    ],
)
def test_what_is_wrong_with_all_processes_is_said_once(tmp_path, data, words, message):
    action = words if words[0] == "verify" else ("run", *words)
    done, _ = launch(tmp_path, data, *action, "02", "--profile", "smoke")
    assert done.returncode != 0
    (line,) = ours(done.stderr)
    assert message in line


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_what_a_scheduler_sets_makes_no_process_wait_for_others(tmp_path, variable):
    command = [sys.executable, "-c", "import fslib_command, sys; sys.exit(fslib_command.main())", "list", "03"]
    here = {**os.environ, variable: "2", "FSLIB_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "0 of 12 units recorded" in done.stdout, done.stderr[-500:]


def test_processes_that_are_not_found_are_a_line(tmp_path):
    command = [sys.executable, "-c", "import fslib_command, sys; sys.exit(fslib_command.main())", "list", "03"]
    here = {**os.environ, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "FSLIB_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("fslib: the processes that this one belongs to are not found: ")


def test_a_trained_model_is_on_the_device_of_its_process(small_tasks, tmp_path, monkeypatch):
    store, unit = Store(tmp_path), training()
    store.get(unit)
    seen = []
    monkeypatch.setattr(MultiTaskModel, "to", lambda model, device: seen.append(device) or model)
    unit.trained(store)
    assert seen == [devices.processes().device]


# What splits weights


@pytest.mark.parametrize(("name", "variable"), devices.SPLITTING.items())
def test_what_splits_weights_among_processes_is_refused_by_name(zoo, monkeypatch, name, variable):
    model, task = zoo.model("bert"), zoo.tasks["single"]
    before = weights(model)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(FslibError, match=f"{name} splits weights among processes, and IAT trains single rows"):
        train(model, task, steps=1)
    assert np.array_equal(weights(model), before)
