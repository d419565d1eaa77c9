"""What the README says about cost, measured.

    python tests/benchmarks/bench.py                        importance, padding, throughput, memory
    python tests/benchmarks/bench.py iat ranking branching  training's endings (about 20 minutes)
    python tests/benchmarks/bench.py workers                units side by side
    python tests/benchmarks/bench.py smoke reopen mini tests

Speeds are ratios within one run, padding is a count. Each line ends with the target and whether it
was met; the exit code is 1 if one was missed. FSLIB_DATA names a folder with SST-2 and QNLI;
without it, the embedded tasks serve. FSLIB_BENCH_QUICK=1 makes iat, ranking and branching short: to
see that they work, not to measure.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import fslib
from fslib import Study
from fslib.data.batches import Batch
from fslib.evaluation import length_batches, predict
from fslib.importance import contributions, gradients_for, head_products
from fslib.model.attention import tapped
from fslib.progress import hidden
from fslib.training import Settings, Training

ROOT = Path(__file__).resolve().parents[2]
COMMAND = str(Path(sys.executable).with_name("fslib"))
QUICK = bool(os.environ.get("FSLIB_BENCH_QUICK"))


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
    """Compare the importance pass with the same pass done otherwise, by turns.

    The baselines: with gradients of all weights, as `backward` makes them (as the released code
    does), and plain `torch.autograd.grad` in the contexts alone, whose graph begins at the
    embeddings.
    """
    _, model = mini()
    task = fslib.load_tasks(["bbc-headline"])["bbc-headline"].limited(train=256)
    batches = length_batches(model, task.train, 32)

    def contexts(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        kept: list[torch.Tensor] = []
        with tapped(model, lambda layer, ctx: kept.append(ctx) or ctx):
            return model.losses(batch, task.name).sum(), kept

    def weights_too(batch: Batch) -> None:
        loss, kept = contexts(batch)
        for ctx in kept:
            ctx.retain_grad()
        loss.backward()
        torch.stack([(ctx * ctx.grad).sum(-1) for ctx in kept])
        model.zero_grad()

    def contexts_alone(batch: Batch) -> None:
        loss, kept = contexts(batch)
        grads = torch.autograd.grad(loss, kept)
        torch.stack([(ctx * grad).sum(-1) for ctx, grad in zip(kept, grads, strict=True)])

    def ours(batch: Batch) -> None:
        with gradients_for(model):
            head_products(model, batch, task.name)

    model.eval()
    ways = [ours, weights_too, contexts_alone]
    times = [[seconds(lambda way=way: [way(b) for b in batches]) for way in ways] for _ in range(6)]
    ratios = [[b / a, c / a] for a, b, c in times[1:]]  # the first warms up
    whole, alone = np.median(ratios, axis=0)
    what = "importance: speed over"
    met = report(f"{what} weight gradients", f"{whole:.2f} x", ">= 1.4 x", whole >= 1.4)
    what += " autograd.grad in contexts alone"
    return met & report(what, f"{alone:.2f} x", ">= 0.95 x", alone >= 0.95)


def padding() -> bool:
    """Report padding as a share of the tokens computed."""
    _, model = mini()
    names = ["sst-2", "qnli"] if os.environ.get("FSLIB_DATA") else ["bbc", "bbc-headline"]
    first, second = (fslib.load_tasks([name])[name] for name in names)
    met = True
    for what, split in ((f"{names[0]} train", first.train), (f"{names[1]} eval", second.eval)):
        encoded = model.encode(split)
        drawn = islice(encoded.forever(32, np.random.default_rng(0)), len(encoded) // 32)
        orders = ("evaluation", encoded.in_length_order(32), 0.1), ("training", list(drawn), 0.2)
        for when, order, most in orders:
            lengths = [encoded.lengths[indices] for indices in order]
            computed = sum(len(each) * each.max() for each in lengths)
            share = 1 - np.concatenate(lengths).sum() / computed
            line = f"padding, {when}, {what}, batch 32"
            met &= report(line, f"{share:.1%}", f"<= {most:.0%}", share <= most)
    return met


def throughput() -> bool:
    """Report FLOP/s of evaluation of the mini profile's batches, padding counted."""
    study, model = mini()
    rates = []
    for name, task in study.tasks.items():
        batches = length_batches(model, task.eval, 32)
        work = partial(predict, model, task, batches, len(task.eval))
        with FlopCounterMode(display=False) as counter:
            work()
        # of torch's own matrix product, large and square
        a, b = torch.randn(2, 2048, 2048)
        peak = 2 * 2048**3 / min(seconds(partial(torch.matmul, a, b)) for _ in range(8))
        rates.append(counter.get_total_flops() / min(seconds(work) for _ in range(3)) / peak)
        print(f"    {name}: {rates[-1]:.0%} of {peak / 1e9:.0f} GFLOP/s")
    share, what = float(np.mean(rates)), "evaluation: share of torch's matrix-product rate"
    return report(what, f"{share:.0%}", ">= 70 %", share >= 0.7)


PEAK = """
import resource, sys
import fslib
task = fslib.load_tasks(["bbc-pair"])["bbc-pair"].limited(train=1000)
times = int(sys.argv[1]) // 1000
texts = list(zip(task.train.texts, task.train.pairs)) * times
labels, names = list(task.train.labels) * times, task.label_names
task = fslib.make_task("big", (texts, labels), (texts[:64], labels[:64]), label_names=names)
model = fslib.MultiTaskModel.from_pretrained("minilm-l6", task, max_length=32)
fslib.head_importance(model, task)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory() -> bool:
    """Report peak resident memory of importance over 10,000 examples against 1,000.

    Each in a process of its own. The 10,000 are the 1,000 ten times over, cut at 32 tokens, so that
    only the number of examples differs: a larger sample of texts of unequal length also holds
    longer ones, and a batch of those takes more.
    """

    def peak(examples: int) -> int:
        words = [sys.executable, "-c", PEAK, str(examples)]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    few, many = peak(1_000), peak(10_000)
    what = f"importance, peak memory: 10,000 examples ({many / 1024:.0f} MiB) over 1,000"
    return report(what, f"{many / few - 1:+.1%}", "<= +10 %", many <= 1.1 * few)


def iat() -> bool:
    """Compare IAT's steps with plain ones, by turns, on the same batches; and scoring."""
    block, blocks = (2, 3) if QUICK else (20, 12)  # the first pair of blocks warms up
    runs = []
    for ending in (None, fslib.IAT()):
        study, model = mini()
        settings = Settings(steps=block * (1 + blocks))
        runs.append(run := Training(model, study.tasks, settings))
        run.advance(block)
        run.begin(ending)
    times = np.zeros((2, blocks))
    for turn in range(blocks):
        for which in (0, 1) if turn % 2 else (1, 0):
            run = runs[which]
            times[which, turn] = seconds(partial(run.advance, run.step + block))
    plain, ours = times[:, 1:] / block
    print(f"    {1000 * plain.mean():.0f} ms a plain step, {1000 * ours.mean():.0f} one of IAT")
    took = runs[1].history.scoring_seconds
    share = took / (600 * plain.mean())
    print(f"    scoring importance once: {took:.1f} s, {share:.1%} of 600 plain steps")
    ratio = float(np.median(ours / plain))
    what = f"IAT: time of a step over a plain one, {block * len(ours)} steps each"
    return report(what, f"{ratio:.3f} x", "<= 1.03 x", ratio <= 1.03)


def ranking() -> bool:
    """Find the sample whose ranking of heads correlates to 0.95 with the whole training set's."""
    draws, limit, steps = (2, 64, 4) if QUICK else (20, None, 300)
    study, model = mini()
    fslib.train(model, study.tasks, steps=steps)
    met, rng, default = True, np.random.default_rng(0), fslib.IAT().examples
    for name, task in study.tasks.items():
        every = contributions(model, task, examples=limit)
        whole, n, means = every.importance(), len(every.tokens), {}
        for size in (2**k for k in range(3, 10) if 2**k < n):
            subsets = [rng.choice(n, size, replace=False) for _ in range(draws)]
            maps = [every.importance(subset=subset) for subset in subsets]
            means[size] = float(np.mean([fslib.rank_correlation(m, whole) for m in maps]))
        print(f"    {name}, {n} examples: {means}")
        enough = 2 * max((size for size, mean in means.items() if mean < 0.95), default=4)
        what = f"ranking of heads, {name}: examples for a correlation of 0.95"
        met &= report(what, str(enough), f"<= {default}", enough <= default)
    return met


def branching() -> bool:
    """Compare six endings from one trunk with six whole trainings: updates and seconds."""
    study = Study("mini")
    steps = 20 if QUICK else 200
    endings = {
        "plain": None,
        "IAT": fslib.IAT(),
        "random heads": fslib.IAT(heads="random"),
        "least heads": fslib.IAT(heads="least"),
        "others frozen": fslib.IAT(others="freeze"),
        "PCGrad": fslib.PCGrad(),
    }
    updates: list[int] = []

    def branched(*names: str) -> None:
        model = fslib.MultiTaskModel.from_pretrained("minilm-l3", study.tasks)
        list(fslib.branch(model, study.tasks, {k: endings[k] for k in names}, steps=steps))

    handle = register_optimizer_step_post_hook(lambda *_: updates.append(1))
    together = seconds(lambda: branched(*endings))
    made = len(updates)
    alone = seconds(lambda: [branched(name) for name in endings])
    handle.remove()
    share, took = made / (len(updates) - made), together / alone
    what = f"branching, six endings: updates ({made}) of all"
    met = report(what, f"{share:.1%}", "<= 25 %", share <= 0.25)
    print(f"    {together:.0f} s against {alone:.0f} s")
    return met & report("branching, six endings: time", f"{took:.1%}", "<= 35 %", took <= 0.35)


def workers() -> bool:
    """Compare notebook 01 by two workers of one thread with one of two threads, from nothing."""

    def took(workers: int, threads: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [COMMAND, "run", "01", "--fresh", "--results", folder]
            words += ["--workers", str(workers), "--set", f"threads={threads}"]
            return seconds(lambda: subprocess.run(words, check=True, capture_output=True))

    side_by_side, one_by_one = took(2, 1), took(1, 2)
    print(f"    {side_by_side:.0f} s by 2 workers x 1 thread, {one_by_one:.0f} by 1 x 2")
    ratio = one_by_one / side_by_side
    what = "units by 2 workers x 1 thread: speed over 1 x 2 threads"
    return report(what, f"{ratio:.2f} x", ">= 1.2 x", ratio >= 1.2)


def timed(what: str, words: list[str], limit: float) -> bool:
    """Time a command, which must succeed."""
    done: list[subprocess.CompletedProcess] = []
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    took = seconds(lambda: done.append(subprocess.run(words, **options)))
    if done[0].returncode:
        print(done[0].stdout[-2000:], done[0].stderr[-2000:])
    fine = took < limit and not done[0].returncode
    return report(what, f"{took:.0f} s", f"< {limit:.0f} s", fine)


def run(what: str, limit: float, *options: str) -> bool:
    """Time all notebooks from scratch, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return timed(what, [COMMAND, "run", "--fresh", "--results", folder, *options], limit)


PYTEST = [sys.executable, "-m", "pytest", "-q"]
BENCHMARKS: dict[str, Callable[[], bool]] = {
    "importance": importance,
    "padding": padding,
    "throughput": throughput,
    "memory": memory,
    "iat": iat,
    "ranking": ranking,
    "branching": branching,
    "workers": workers,
    "smoke": lambda: run("smoke, all notebooks from scratch", 120, "--profile", "smoke"),
    "reopen": lambda: timed("mini, all notebooks from records", [COMMAND, "run"], 180),
    "mini": lambda: run("mini, all notebooks from scratch", 45 * 60),
    "tests": lambda: timed("pytest, all of it", PYTEST, 600),
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or ["importance", "padding", "throughput", "memory"]
    if wrong := [name for name in wanted if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {wrong[0]!r}: valid: {', '.join(BENCHMARKS)}")
    with hidden():
        met = [BENCHMARKS[name]() for name in wanted]
    sys.exit(0 if all(met) else 1)
