"""Small tasks and units for the tests of records, engines and the command."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

import fslib
from fslib.study.store import Result, Store, Unit
from fslib.study.units import Data, ImportanceUnit, TrainUnit

TASKS = ("left", "right")
# Fields of a profile that make its studies small.
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
    "lesion_seeds": 0,
}
COMMAND = [sys.executable, "-c", "import sys; from fslib.cli import main; sys.exit(main())"]


def small(**changes: object) -> list[str]:
    """The settings of small studies, some changed, as words of the command line."""
    pairs = (SMALL | changes).items()
    settings = [word for key, value in pairs for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["--profile", "smoke", *settings]


def hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(words: list[str], **options) -> subprocess.Popen:
    """Start the command in a process of its own; the code under test is found first."""
    here = str(Path(fslib.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": here} | options.pop("env", {})
    # what a shell starts in the background ignores Ctrl-C, and so would what it starts
    shared = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_interrupts}
    return subprocess.Popen([*COMMAND, *words], env=environment, text=True, **shared | options)


def wait_for(found: Callable, seconds: float = 200):
    """Return what a call gives once it gives something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return value


class NumbersUnit(Data, Unit):
    """A unit that takes little time and leaves a few hundred kilobytes."""

    kind: ClassVar[str] = "numbers"
    n: int = Field(ge=0)

    def compute(self, store: Store) -> Result:
        """Draw random numbers, and note in the file `computed` that it was computed."""
        with (store.folder / "computed").open("a") as file:
            file.write(f"{self.n}\n")
        values = np.random.default_rng(self.n).random(20_000)
        time.sleep(0.005)
        return Result(
            {"mean": float(values.mean()), "n": self.n},
            {"values": values, "order": np.argsort(values)},
        )


class FailingUnit(NumbersUnit):
    """A unit with a mistake in it."""

    kind: ClassVar[str] = "failing"

    def compute(self, store: Store) -> Result:
        raise RuntimeError("size mismatch\nand more")


class KilledUnit(NumbersUnit):
    """A unit that takes more memory than there is."""

    kind: ClassVar[str] = "killed"

    def compute(self, store: Store) -> Result:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class PlacedUnit(NumbersUnit):
    """A slow unit of a cluster that notes in the file `log` where it is computed."""

    kind: ClassVar[str] = "placed"
    log: str
    seconds: float = 0.0
    base: NumbersUnit | None = None

    def compute(self, store: Store) -> Result:
        """Return the machine, its GPUs and threads."""
        import ray
        import torch

        node = ray.get_runtime_context().get_node_id()
        with Path(self.log).open("a") as file:
            file.write(f"{self.n} {node}\n")
        time.sleep(self.seconds)
        gpus, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()
        if self.base is not None:
            store.get(self.base)
        return Result({"n": self.n, "node": node, "gpus": gpus, "threads": threads})


def write_tasks(place: Path) -> Path:
    """Two tasks of ten examples a side in GLUE's layout, `left` of pairs."""
    for task in TASKS:
        (place / task).mkdir(parents=True)
        for side in ("train", "dev"):
            other = "\tother" if task == "left" else ""
            rows = [f"text{other}\tlabel"]
            second = "\tpair" if task == "left" else ""
            rows += [f"{side} number {i}{second}\t{i % 2}" for i in range(10)]
            (place / task / f"{side}.tsv").write_text("\n".join(rows) + "\n")
    return place


def training(seed: int = 0) -> TrainUnit:
    """A training that takes a moment."""
    sizes = {"max_length": 16, "steps": 2, "curve_points": 1, "curve_examples": 4}
    return TrainUnit(tasks=TASKS, encoder="tiny-random", lr=1e-3, seed=seed, **sizes)


def compute(folder: Path, what: str, data: Path, die_at: int = 0) -> None:
    """Compute units in a process of their own, which may kill itself while it writes.

    Args:
        folder: of the store.
        what: `numbers`, 40 quick ones, or `models`, three trainings and their importance.
        data: of the tasks.
        die_at: which flush or renaming of a file it does not live to see; 0: it sees all.
    """
    os.environ["FSLIB_DATA"] = str(data)
    calls = itertools.count(1)

    def deadly(call: Callable) -> Callable:
        def counted(*words: object) -> object:
            if next(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words)

        return counted

    for place, name in ((os, "fsync"), (Path, "replace"), (Path, "rename")):
        setattr(place, name, deadly(getattr(place, name)))
    store = Store(folder)
    for unit in units(what):
        store.get(unit)


def units(what: str) -> list[Unit]:
    """The units that `compute` computes."""
    if what == "numbers":
        return [NumbersUnit(tasks=TASKS, n=n) for n in range(40)]
    return [ImportanceUnit(model=training(seed), examples=4) for seed in range(3)]
