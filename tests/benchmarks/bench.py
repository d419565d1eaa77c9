"""What the README says about cost, measured.

    python tests/benchmarks/bench.py            importance, padding, throughput, memory (about 4 minutes)
    python tests/benchmarks/bench.py smoke reopen mini tests     the long ones, by name

Speeds are ratios within one run, padding is a count. Each line ends with the target and whether it was met; the exit
code is 1 if one was missed. FSLIB_DATA names a folder with SST-2 and QNLI; without it, the embedded tasks serve.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

import fslib
from fslib.batching import Batch, padding_share
from fslib.evaluation import length_batches, predict
from fslib.heads import tapped
from fslib.importance import _measuring, head_products
from fslib.study import Study

ROOT = Path(__file__).resolve().parents[2]


def report(what: str, measured: str, target: str, met: bool) -> bool:
    print(f"{what:66} {measured:>8}   target {target:16} {'met' if met else 'MISSED'}", flush=True)
    return met


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def mini() -> tuple[Study, fslib.MultiTaskModel]:
    study = Study("mini")
    return study, fslib.MultiTaskModel.from_pretrained(study.profile.encoder, study.tasks)


def importance() -> bool:
    """The importance pass against the same pass with weight gradients on, by turns."""
    _, model = mini()
    task = fslib.load_tasks(["bbc-headline"])["bbc-headline"].limited(train=256)
    batches = length_batches(model, task.train, 32)

    def with_weight_gradients(batch: Batch) -> None:
        kept: list[torch.Tensor] = []

        def keep(layer: int, ctx: torch.Tensor) -> torch.Tensor:
            ctx.retain_grad()
            kept.append(ctx)
            return ctx

        with tapped(model, keep):
            model.losses(batch, task.name).sum().backward()
        torch.stack([(ctx * ctx.grad).sum(-1) for ctx in kept])
        model.zero_grad()

    def ours() -> None:
        with _measuring(model):
            for batch in batches:
                head_products(model, batch, task.name)

    def theirs() -> None:
        for batch in batches:
            with_weight_gradients(batch)

    model.eval()
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(5)]
    ratio = statistics.median(b / a for a, b in times)
    return report("importance pass: speed against weight gradients on", f"{ratio:.2f} x", ">= 1.4 x", ratio >= 1.4)


def padding() -> bool:
    """Padding as a share of the tokens computed."""
    _, model = mini()
    names = ["sst-2", "qnli"] if os.environ.get("FSLIB_DATA") else ["bbc", "bbc-headline"]
    first, second = (fslib.load_tasks([name])[name] for name in names)
    met = True
    for what, split in ((f"{names[0]} train", first.train), (f"{names[1]} eval", second.eval)):
        encoded = model.encode(split)
        share = padding_share(encoded.in_length_order(32), encoded.lengths)
        met &= report(f"padding, evaluation and importance, {what}, batch 32", f"{share:.1%}", "<= 10 %", share <= 0.1)
        stream = encoded.forever(32, np.random.default_rng(0))
        share = padding_share([next(stream) for _ in range(len(encoded) // 32)], encoded.lengths)
        met &= report(f"padding, training, {what}, batch 32", f"{share:.1%}", "<= 20 %", share <= 0.2)
    return met


def matrix_rate() -> float:
    """FLOP/s of torch's own matrix product, large and square."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(8))


def throughput() -> bool:
    """Evaluation of the mini profile's batches, in FLOP/s of its matrix products (padding counted: it is computed)."""
    study, model = mini()
    config = model.encoder.config
    rates = []
    for name, task in study.tasks.items():
        batches = length_batches(model, task.eval, 32)
        shapes = [batch.mask.shape for batch in batches]
        width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        linear = sum(b * s for b, s in shapes) * layers * 2 * (4 * width**2 + 2 * width * inner)
        attention = sum(b * s * s for b, s in shapes) * layers * 4 * width
        predict(model, task, batches, len(task.eval))
        peak = matrix_rate()
        best = min(seconds(lambda b=batches, t=task: predict(model, t, b, len(t.eval))) for _ in range(3))
        rates.append((linear + attention) / best / peak)
        print(f"    {name}: {rates[-1]:.0%} of {peak / 1e9:.0f} GFLOP/s")
    share = float(np.mean(rates))
    return report("evaluation: share of torch's matrix-product rate", f"{share:.0%}", ">= 70 %", share >= 0.7)


PEAK = """
import resource, sys
import fslib
task = fslib.load_tasks(["bbc-pair"])["bbc-pair"]
times = int(sys.argv[1]) // 1000
texts = list(zip(task.train.texts[:1000], task.train.pairs[:1000])) * times
labels = list(task.train.labels[:1000]) * times
task = fslib.make_task("big", (texts, labels), (texts[:64], labels[:64]), label_names=task.label_names)
model = fslib.MultiTaskModel.from_pretrained("minilm-l6", task, max_length=32)
fslib.head_importance(model, task)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory() -> bool:
    """Peak resident memory of importance over 10,000 examples against 1,000, each in a process of its own.

    The 10,000 are the 1,000 ten times over, cut at 32 tokens, so that only the number of examples differs: a larger
    sample of texts of unequal length also holds longer ones, and a batch of those takes more.
    """
    peak = {
        n: int(subprocess.run([sys.executable, "-c", PEAK, str(n)], check=True, capture_output=True, text=True).stdout)
        for n in (1_000, 10_000)
    }
    growth = peak[10_000] / peak[1_000] - 1
    what = f"importance, peak memory: 10,000 examples ({peak[10_000] / 1024:.0f} MiB) over 1,000"
    return report(what, f"{growth:+.1%}", "<= +10 %", growth <= 0.1)


def timed(what: str, words: list[str], limit: float) -> bool:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    return report(what, f"{took:.0f} s", f"< {limit:.0f} s", took < limit and not done.returncode)


def smoke() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        words = ["fslib.cli", "run", "--fresh", "--profile", "smoke", "--results", folder]
        return timed("smoke, all notebooks from scratch", words, 180)


def mini_run() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        words = ["fslib.cli", "run", "--fresh", "--results", folder]
        return timed("mini, all notebooks from scratch", words, 25 * 60)


def reopen() -> bool:
    return timed("mini, all notebooks from records", ["fslib.cli", "run"], 90)


def tests() -> bool:
    return timed("pytest, all of it", ["pytest", "-q"], 600)


BENCHMARKS: dict[str, Callable[[], bool]] = {
    "importance": importance,
    "padding": padding,
    "throughput": throughput,
    "memory": memory,
    "smoke": smoke,
    "reopen": reopen,
    "mini": mini_run,
    "tests": tests,
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or ["importance", "padding", "throughput", "memory"]
    if wrong := [name for name in wanted if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {wrong[0]!r}: valid: {', '.join(BENCHMARKS)}")
    met = [BENCHMARKS[name]() for name in wanted]
    sys.exit(0 if all(met) else 1)
