"""Small tasks and units for the tests of records, and a script that computes them in processes of their own.

Run as a script it imports fslib once and then obeys lines on standard input: `go FOLDER WHAT` forks a process
that computes the units `WHAT` into FOLDER and prints its id; `wait` waits for all of them and prints their exit
codes (-9: killed).
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

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


class NumbersUnit(Data, Unit):
    """A unit that takes no time to speak of and leaves a few hundred kilobytes."""

    kind: ClassVar[str] = "numbers"
    n: int = Field(ge=0)

    def compute(self, store: Store) -> Result:
        """Draw random numbers, and say in the file `computed` beside the records that it was computed."""
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
    """A unit of a cluster that says where it is computed, in the file `log`, and takes its time."""

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
        seen = {
            "n": self.n,
            "node": node,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": torch.get_num_threads(),
        }
        return Result(seen | {"base": self.base and store.get(self.base).result["n"]})


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
    return TrainUnit(
        tasks=TASKS,
        encoder="tiny-random",
        max_length=16,
        steps=2,
        lr=1e-3,
        seed=seed,
        curve_points=1,
        curve_examples=4,
    )


def units(what: str) -> list[Unit]:
    """`numbers`: 40 quick ones; `models`: three trainings and what is measured on them."""
    if what == "numbers":
        return [NumbersUnit(tasks=TASKS, n=n) for n in range(40)]
    return [ImportanceUnit(model=training(seed), examples=4) for seed in range(3)]


def compute(folder: Path, what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    for unit in units(what):
        store.get(unit)


def main() -> None:
    flush = os.fsync

    def slow_flush(descriptor: int) -> None:
        flush(descriptor)
        time.sleep(
            0.01
        )  # a file is written but has not its name yet: give a killer time to strike here

    os.fsync = slow_flush
    children: list[int] = []
    print("ready", flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "wait":
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            children.clear()
            print(*codes, flush=True)
            continue
        child = os.fork()
        if not child:
            code = 1
            try:
                compute(Path(rest[0]), rest[1])
                code = 0
            finally:
                os._exit(code)
        children.append(child)
        print(child, flush=True)


if __name__ == "__main__":
    main()
