"""The pilots before the profiles `evidence` and `mini`.

On training data held out, so that nothing is chosen by what is evaluated.

    python tests/benchmarks/pilot.py learn minilm-l6 1e-4 3000 sst-2 qnli bbc ...   scores of every
    task along training
    python tests/benchmarks/pilot.py doses minilm-l3 3e-4 1000 sst-2 qnli ...       what IAT
    changes, by delta
    python tests/benchmarks/pilot.py transfer minilm-l3 2e-4 96 sst-2 bbc           new tasks from
    512 examples

Arguments: encoder, learning rate, steps, tasks. Seed 0; those of the profile begin at 100.
FSLIB_DATA names the folder
with SST-2, QNLI and AG-Pair. What they said, on two cores of an AMD EPYC processor:

    learn, minilm-l6, 1e-4, 3000 steps, all ten tasks: every task is above chance after 180 steps
    on it
    learn, minilm-l3, six tasks, 1500 steps: at 2e-4 all are learned, at 3e-4 later
    doses, minilm-l3, 3e-4, 1000 steps, sst-2, qnli, bbc and bbc-headline: IAT changes .1 % of the
    predictions at delta
        0.1, 1.1 % at 0.3, 2.5 % at 0.5, 7.3 % at 0.9; a treatment is one from 3 % on
    transfer, minilm-l3: sst-2 and bbc are learned from 512 examples in 96 steps, bbc-pair is not
    learn, the four embedded tasks, 500 steps, FSLIB_SAMPLING=annealed: minilm-l6 at 1e-4 and
    minilm-l3 at 2e-4 learn
        all four (uniform: minilm-l6 all but bbc-shift); minilm-l3 learns bbc-headline and
        bbc-shift alone in 250
"""

import os
import sys
from dataclasses import replace

import numpy as np

import fslib
from fslib.claims import changed_share
from fslib.data.tasks import Task

HELD_OUT = 300
SAMPLING = os.environ.get("FSLIB_SAMPLING", "uniform")


def held_out(names: list[str]) -> dict[str, Task]:
    """Return the tasks with a part of their training side in the place of the evaluation side."""
    tasks = {}
    for name, task in fslib.load_tasks(names).items():
        order = np.random.default_rng(7).permutation(len(task.train))
        apart, rest = (
            task.train.take(np.sort(part)) for part in (order[:HELD_OUT], order[HELD_OUT:])
        )
        tasks[name] = replace(task, train=rest, eval=apart)
    return tasks


def learn(encoder: str, lr: float, steps: int, tasks: dict[str, Task]) -> None:
    """Print the score of every task, six times along a training."""
    model = fslib.MultiTaskModel.from_pretrained(encoder, tasks, max_length=80)
    options = {"steps": steps, "lr": lr, "sampling": SAMPLING, "evaluate_every": steps // 5}
    for point in fslib.train(model, tasks, **options).evaluations:
        print({name: round(value, 3) for name, value in point.items()})


def doses(encoder: str, lr: float, steps: int, tasks: dict[str, Task]) -> None:
    """Print the share of predictions that IAT changes, by heads and delta, and mean scores."""
    model = fslib.MultiTaskModel.from_pretrained(encoder, tasks, max_length=80)
    endings: dict[str, fslib.IAT | None] = {"plain": None}
    for delta in (0.1, 0.3, 0.5, 0.9):
        endings |= {
            f"{heads}, delta {delta}": fslib.IAT(delta=delta, heads=heads)
            for heads in ("top", "random")
        }
    predictions, scores = {}, {}
    for name, _ in fslib.branch(model, tasks, endings, steps=steps, lr=lr, sampling=SAMPLING):
        found = fslib.evaluate(model, tasks)
        predictions[name] = {task: score.predictions[None] for task, score in found.items()}
        scores[name] = np.mean([score.value for score in found.values()])
    for name in endings:
        changed = changed_share(predictions[name], predictions["plain"])
        print(f"{name:20} changes {100 * changed:4.1f} %   mean score {100 * scores[name]:.1f}")


def transfer(encoder: str, lr: float, steps: int, tasks: dict[str, Task]) -> None:
    """Print the score of every task, learned by the full model from 512 examples."""
    for name, task in tasks.items():
        others = {other: t for other, t in tasks.items() if other != name}
        source = fslib.MultiTaskModel.from_pretrained(encoder, others, max_length=80)
        learned = fslib.transfer(source, task, size=512, steps=steps, lr=lr)
        print(f"{name:20} {100 * learned.score.value:.1f}")


if __name__ == "__main__":
    what, encoder, lr, steps, *names = sys.argv[1:]
    pilots = {"learn": learn, "doses": doses, "transfer": transfer}
    pilots[what](encoder, float(lr), int(steps), held_out(names))
