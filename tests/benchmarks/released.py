"""This package beside the paper's released code: one checkpoint, one data set, one run.

    python tests/benchmarks/released.py CODE --data FOLDER [--python PYTHON] [--examples 4000]
    [--eval 800]

CODE: a checkout of the released code (github.com/ZNLP/FunctionalSpecializationInMHA). It runs as it
is, its own script in a process of its own; nothing of it is copied. PYTHON: an interpreter that has
what it needs (transformers 4.21 to 4.30, datasets 2, accelerate, scikit-learn, pandas). FOLDER: has
QNLI and SST-2 in GLUE's layout. examples: training examples of each task for importance. eval: of
each for evaluation.

A MiniLM of six layers is trained on both tasks, saved as the released code saves its models, and
given to both. Compared are the importance of every head, scores before and after pruning 10 and
30 % of heads, and D as the released code computes it; and how long both take, one after the other.
Ends with 1 if tokens, scores or D differ, or importance correlates to less than 0.99.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import fslib
from fslib.data.bbc import package_folder
from fslib.data.loading import glue_task
from fslib.model.encoders import MINILM_PACKAGE
from fslib.scoring import rank_correlation

STATES = {  # what its log says -> what it then does
    "Calculating head": "importance",
    "Evaluating following": "pruning",
    "Head importance scores": "other",
    "***** Prune task": "other",
}
IDS = {"qnli": 12, "sst-2": 10}  # as the released code numbers them
FOLDERS = {"qnli": "QNLI", "sst-2": "SST-2"}
PERCENT = (10, 30)
# of importance maps: the released code takes the mean of a ragged last batch for a whole one's
AGREEMENT = 0.99
MODEL = package_folder(MINILM_PACKAGE) / "model"


def write_data(
    code: Path, data: Path, folder: Path, examples: int, evaluated: int
) -> dict[str, Path]:
    """Put rows of both tasks where the released code reads them; return {task: folder}."""
    found = {}
    for task, name in FOLDERS.items():
        found[task] = place = folder / f"{name}_data"
        place.mkdir()
        for side, count in (("train", examples), ("dev", evaluated)):
            lines = (data / name / f"{side}.tsv").read_text(encoding="utf-8").split("\n")
            text = "\n".join(lines[: count + 1]) + "\n"
            (place / f"{side}.tsv").write_text(text, encoding="utf-8")
        (place / "test.tsv").symlink_to(place / "dev.tsv")
        script = code / "data" / place.name / "dataset_script.py"
        (place / "dataset_script.py").symlink_to(script)
    return found


def write_checkpoint(tasks: dict[str, fslib.Task], path: Path, steps: int) -> None:
    """Train a model on both tasks, and save it with the released code's names of weights."""
    options = {"pooling": "first", "max_length": 128}
    model = fslib.MultiTaskModel.from_pretrained("minilm-l6", tasks, **options)
    shipped = safetensors.torch.load_file(MODEL / "model.safetensors")
    pooler = {k: v for k, v in shipped.items() if k.startswith("pooler.dense.")}
    own = {k.removeprefix("pooler.dense."): v for k, v in pooler.items()}
    model.set_classifiers(model.answers, dense=True)
    for classifier in model.classifiers.values():  # one for both, as BERT's pooler is
        classifier.dense.load_state_dict(own)
        classifier.dense.requires_grad_(False)
    fslib.train(model, tasks, steps=steps, batch_size=32, lr=1e-4, sampling="uniform", seed=0)
    encoder = model.encoder.state_dict() | pooler
    weights = {f"{prefix}.{k}": v for prefix in ("bert", "ptm") for k, v in encoder.items()}
    for task, number in IDS.items():
        for part, value in model.classifiers[task].out.state_dict().items():
            weights[f"classifiers.{number}.{part}"] = value
    torch.save(weights, path)


def released(
    code: Path, python: str, folders: dict[str, Path], checkpoint: Path, out: Path
) -> dict[str, Any]:
    """Run the released code's script, and return what it prints."""
    options = {
        "task_names": ":".join(folders), "data_dirs": ":".join(map(str, folders.values())),
        "prune_tasks": "all", "random_prune_number": 0, "seed": 0, "init_model": checkpoint,
        "model_name_or_path": MODEL, "max_length": 128, "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64, "output_dir": out, "train_data_num": 1_000_000,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--do_eval", "--do_prune", "--eval_pruned", "--same_div", "--do_lower_case"]
    words += ["--prune_percent", *map(str, PERCENT)]
    here = {"PATH": "/usr/bin:/bin", "HOME": str(out)}
    here |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    here |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    here |= {"HF_DATASETS_TRUST_REMOTE_CODE": "1"}
    script = [python, "-u", str(code / "src" / "run_ntasks_classifier.py"), *words]
    done = subprocess.run(script, cwd=code, env=here, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the released code failed:\n{done.stderr[-3000:]}")
    log = done.stdout + done.stderr
    matrices = [
        [[float(x) for x in row.split()] for row in part.strip().splitlines()[: len(folders)]]
        for part in re.findall(r"Prune matrix for [\d.]+\n(.*?)D-score", done.stdout, re.S)
    ]
    evaluated = [(out / f"eval_{task}.txt").read_text() for task in folders]
    return {
        "importance": [importance_in(part) for part in log.split("Head importance scores")[1:]],
        "scores": [float(re.search(r"main = ([\d.]+)", text)[1]) for text in evaluated],
        "matrices": matrices,
        "D": [float(d) for d in re.findall(r"Average D-score: (-?[\d.]+)", done.stdout)],
        "tokens": [float(n) for n in re.findall(r"Total tokens:([\d.]+)", log)],
        "seconds": seconds_of(log),
    }


def importance_in(log: str) -> np.ndarray:
    """Return importance, (layers, heads), from the list that the released code prints."""
    found: dict[tuple[int, int], float] = {}
    for layer, head, score in re.findall(r"Layer-(\d+),Head-(\d+),Score-(\S+)", log):
        found.setdefault((int(layer), int(head)), float(score))
    scores = np.zeros(np.array(list(found)).max(0) + 1)
    for place, score in found.items():
        scores[place] = score
    return scores


def seconds_of(log: str) -> dict[str, float]:
    """Return how long importance and pruning took, from the log's time stamps."""
    stamps = re.findall(r"^(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d) - (.*)$", log, re.M)
    times = [time.mktime(time.strptime(stamp, "%m/%d/%Y %H:%M:%S")) for stamp, _ in stamps]
    states = [next((s for sign, s in STATES.items() if sign in line), "") for _, line in stamps]
    changes = [(at, state) for at, state in zip(times, states, strict=True) if state]
    seconds = dict.fromkeys(STATES.values(), 0.0)
    for (since, state), (until, _) in pairwise([*changes, (times[-1], "")]):
        seconds[state] += until - since
    return {part: seconds[part] for part in ("importance", "pruning")}


def ours(tasks: dict[str, fslib.Task], checkpoint: Path) -> dict[str, Any]:
    """Measure the same checkpoint with this package."""
    in_their_order = dict(sorted(tasks.items(), key=lambda item: IDS[item[0]]))
    model = fslib.load_released(checkpoint, MODEL, in_their_order)
    begun = time.perf_counter()
    importance = {name: fslib.head_importance(model, task) for name, task in tasks.items()}
    scored = time.perf_counter()
    fractions = [p / 100 for p in PERCENT]
    options = {"controls": 0, "importance": importance, "batch_size": 64}
    iap = fslib.prune_important_heads(model, tasks, fractions, **options)
    # holds an evaluation of the whole model, which stands apart in the released script
    pruned = time.perf_counter()
    texts = [model.encode(task.train).columns["input_ids"] for task in tasks.values()]
    return {
        "importance": list(importance.values()),
        "scores": iap.baseline()[0],
        "matrices": iap.scores()[0, :, :, 0],
        "D": iap.dissociation("released").along().value,
        "tokens": [sum(map(len, ids)) for ids in texts],
        "seconds": {"importance": scored - begun, "pruning": pruned - scored},
    }


def main() -> int:
    """Run both, print what they find side by side, and return 1 if scores or D differ."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("code", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable)
    for name, default in (("examples", 4000), ("eval", 800), ("steps", 200), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        root, code = Path(scratch), options.code.resolve()
        folders = write_data(code, options.data.resolve(), root, options.examples, options.eval)
        tasks = {name: glue_task(folder, name=name) for name, folder in folders.items()}
        checkpoint, out = root / "pytorch_model.bin", root / "out"
        write_checkpoint(tasks, checkpoint, options.steps)
        out.mkdir()
        theirs = released(code, options.python, folders, checkpoint, out)
        mine = ours(tasks, checkpoint)
    differ = 0
    for what, tolerance in (("tokens", 0), ("scores", 1e-6), ("matrices", 1e-6), ("D", 0.005)):
        one, other = (np.array(found[what], float) for found in (theirs, mine))
        same = np.allclose(one, other, atol=tolerance)
        differ += not same
        print(f"{what}: {one.round(4).tolist()} {'=' if same else 'DIFFERS FROM'}")
        print(f"    {other.round(4).tolist()}")
    for task, a, b in zip(tasks, theirs["importance"], mine["importance"], strict=True):
        agree = rank_correlation(a, b)
        differ += agree < AGREEMENT
        print(f"importance of {task}: rank correlation {agree:.4f}")
    for part, theirs_took in theirs["seconds"].items():
        took = mine["seconds"][part]
        print(f"{part}: {theirs_took:.0f} s against {took:.0f} s, {theirs_took / took:.2f} x")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
