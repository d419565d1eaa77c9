"""What the README says about cost, measured.

    python tests/benchmarks/bench.py            importance, padding, throughput, memory (about 4 minutes)
    python tests/benchmarks/bench.py iat ranking branching       training's endings, by name (about 20 minutes)
    python tests/benchmarks/bench.py workers                     units side by side (about 5 minutes)
    python tests/benchmarks/bench.py smoke reopen mini tests     the long ones, by name

Speeds are ratios within one run, padding is a count. Each line ends with the target and whether it was met; the exit
code is 1 if one was missed. FSLIB_DATA names a folder with SST-2 and QNLI; without it, the embedded tasks serve.
FSLIB_BENCH_QUICK=1 makes iat, ranking, branching and workers short: to see that they work, not to measure.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import fslib
from fslib import Study
from fslib.data.batches import Batch, padding_share
from fslib.evaluation import length_batches, predict
from fslib.importance import contributions, gradients_for, head_products
from fslib.model.attention import tapped
from fslib.progress import hidden
from fslib.study.parallel import Engine, Here, Workers
from fslib.study.store import Store
from fslib.study.units import TrainUnit
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
        with gradients_for(model):
            for batch in batches:
                head_products(model, batch, task.name)

    def theirs() -> None:
        for batch in batches:
            with_weight_gradients(batch)

    model.eval()
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(5)]
    ratio = statistics.median(b / a for a, b in times)
    return report(
        "importance pass: speed against weight gradients on",
        f"{ratio:.2f} x",
        ">= 1.4 x",
        ratio >= 1.4,
    )


def padding() -> bool:
    """Padding as a share of the tokens computed."""
    _, model = mini()
    names = ["sst-2", "qnli"] if os.environ.get("FSLIB_DATA") else ["bbc", "bbc-headline"]
    first, second = (fslib.load_tasks([name])[name] for name in names)
    met = True
    for what, split in ((f"{names[0]} train", first.train), (f"{names[1]} eval", second.eval)):
        encoded = model.encode(split)
        share = padding_share(encoded.in_length_order(32), encoded.lengths)
        met &= report(
            f"padding, evaluation and importance, {what}, batch 32",
            f"{share:.1%}",
            "<= 10 %",
            share <= 0.1,
        )
        stream = encoded.forever(32, np.random.default_rng(0))
        share = padding_share([next(stream) for _ in range(len(encoded) // 32)], encoded.lengths)
        met &= report(
            f"padding, training, {what}, batch 32", f"{share:.1%}", "<= 20 %", share <= 0.2
        )
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
        width, inner, layers = (
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
        )
        linear = sum(b * s for b, s in shapes) * layers * 2 * (4 * width**2 + 2 * width * inner)
        attention = sum(b * s * s for b, s in shapes) * layers * 4 * width
        predict(model, task, batches, len(task.eval))
        peak = matrix_rate()
        best = min(
            seconds(lambda b=batches, t=task: predict(model, t, b, len(t.eval))) for _ in range(3)
        )
        rates.append((linear + attention) / best / peak)
        print(f"    {name}: {rates[-1]:.0%} of {peak / 1e9:.0f} GFLOP/s")
    share = float(np.mean(rates))
    return report(
        "evaluation: share of torch's matrix-product rate", f"{share:.0%}", ">= 70 %", share >= 0.7
    )


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
        n: int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(n)], check=True, capture_output=True, text=True
            ).stdout
        )
        for n in (1_000, 10_000)
    }
    growth = peak[10_000] / peak[1_000] - 1
    what = f"importance, peak memory: 10,000 examples ({peak[10_000] / 1024:.0f} MiB) over 1,000"
    return report(what, f"{growth:+.1%}", "<= +10 %", growth <= 0.1)


def iat() -> bool:
    """IAT's steps against plain ones, by turns, on the same batches; and importance scoring, against 600 steps."""
    block, blocks = (2, 3) if QUICK else (20, 12)  # the first pair of blocks warms up
    trunk = block
    steps = trunk + block * blocks
    runs = []
    for ending in (None, fslib.IAT()):
        study, model = mini()
        runs.append(run := Training(model, study.tasks, Settings(steps=steps)))
        run.advance(trunk)
        run.begin(ending)
    times: list[list[float]] = [[], []]
    for turn in range(blocks):
        for which in (0, 1) if turn % 2 else (1, 0):
            run = runs[which]
            times[which].append(seconds(lambda run=run: run.advance(run.step + block)))
    plain, ours = (np.array(t[1:]) for t in times)
    scoring = runs[1].history.scoring_seconds / (600 * plain.mean() / block)
    print(
        f"    {1000 * plain.mean() / block:.0f} ms a plain step, {1000 * ours.mean() / block:.0f} ms one of IAT"
    )
    print(
        f"    scoring importance once: {runs[1].history.scoring_seconds:.1f} s, {scoring:.1%} of 600 plain steps"
    )
    ratio = float(np.median(ours / plain))
    what = f"IAT: time of a step over a plain one, {block * len(ours)} steps each"
    return report(what, f"{ratio:.3f} x", "<= 1.03 x", ratio <= 1.03)


def ranking() -> bool:
    """Examples from which on a sample's ranking of heads correlates to 0.95 with that of the whole training set."""
    draws, limit, steps = (2, 64, 4) if QUICK else (20, None, 300)
    study, model = mini()
    trained = study.store.checkpoint(study.units(0).train)
    if trained.is_dir() and not QUICK:
        model = fslib.MultiTaskModel.load(trained)
    else:
        fslib.train(model, study.tasks, steps=steps)
    met, rng = True, np.random.default_rng(0)
    for name, task in study.tasks.items():
        every = contributions(model, task, examples=limit)
        whole, n = every.importance(), len(every.tokens)
        means = {}
        for size in (2**k for k in range(3, 10) if 2**k < n):
            maps = [
                every.importance(subset=rng.choice(n, size, replace=False)) for _ in range(draws)
            ]
            means[size] = float(np.mean([fslib.rank_correlation(m, whole) for m in maps]))
        print(
            f"    {name}, {n} examples: "
            + ", ".join(f"{size}: {mean:.3f}" for size, mean in means.items())
        )
        unstable = [size for size, mean in means.items() if mean < 0.95]
        enough = 2 * max(unstable, default=4)
        default = fslib.IAT().examples
        what = f"ranking of heads, {name}: examples for a correlation of 0.95"
        met &= report(what, str(enough), f"<= {default}", enough <= default)
    return met


def branching() -> bool:
    """Six endings from one trunk against six whole trainings: updates of the optimizer, and seconds."""
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
    updates = 0

    def count(*_: object) -> None:
        nonlocal updates
        updates += 1

    def fresh() -> fslib.MultiTaskModel:
        return fslib.MultiTaskModel.from_pretrained("minilm-l3", study.tasks)

    def whole() -> None:
        for ending in endings.values():
            kind = "pcgrad" if isinstance(ending, fslib.PCGrad) else "iat"
            fslib.train(fresh(), study.tasks, steps=steps, **{kind: ending})

    handle = register_optimizer_step_post_hook(count)
    branched = seconds(lambda: list(fslib.branch(fresh(), study.tasks, endings, steps=steps)))
    made = updates
    alone = seconds(whole)
    handle.remove()
    share = made / (updates - made)
    met = report(
        f"branching, six endings: updates ({made}) of all", f"{share:.1%}", "<= 25 %", share <= 0.25
    )
    print(f"    {branched:.0f} s against {alone:.0f} s")
    return met & report(
        "branching, six endings: time",
        f"{branched / alone:.1%}",
        "<= 35 %",
        branched <= 0.35 * alone,
    )


def workers() -> bool:
    """Short trainings by two workers of one thread each against one after another on two threads: steps a second."""
    steps, count = (2, 2) if QUICK else (60, 6)
    units = [Study("mini").training(seed, small=True, steps=steps) for seed in range(2 + count)]

    def through(engine: Engine, some: list[TrainUnit]) -> None:
        left, running = list(some), 0
        while left or running:
            while left and engine.has_room():
                engine.begin([left.pop()])
                running += 1
            for done in engine.ended(60.0):
                assert not done.failure, done.failure
                running -= 1

    def rate(number: int, threads: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder), threads)
            with closing(Here(store) if number == 1 else Workers(store, number)) as engine:
                return speed(engine)

    def speed(engine: Engine) -> float:
        through(engine, units[:2])  # workers start, and everybody loads the data
        return count * steps / seconds(lambda: through(engine, units[2:]))

    side_by_side, one_by_one = rate(2, 1), rate(1, 2)
    print(f"    {side_by_side:.2f} steps/s by 2 workers x 1 thread, {one_by_one:.2f} by 1 x 2")
    ratio = side_by_side / one_by_one
    return report(
        "units by 2 workers x 1 thread: speed over 1 x 2 threads",
        f"{ratio:.2f} x",
        ">= 1.2 x",
        ratio >= 1.2,
    )


def timed(what: str, words: list[str], limit: float) -> bool:
    started = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    return report(what, f"{took:.0f} s", f"< {limit:.0f} s", took < limit and not done.returncode)


def smoke() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        words = [COMMAND, "run", "--fresh", "--profile", "smoke", "--results", folder]
        return timed("smoke, all notebooks from scratch", words, 120)


def mini_run() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        words = [COMMAND, "run", "--fresh", "--results", folder]
        return timed("mini, all notebooks from scratch", words, 45 * 60)


def reopen() -> bool:
    return timed("mini, all notebooks from records", [COMMAND, "run"], 180)


def tests() -> bool:
    return timed("pytest, all of it", [sys.executable, "-m", "pytest", "-q"], 900)


BENCHMARKS: dict[str, Callable[[], bool]] = {
    "importance": importance,
    "padding": padding,
    "throughput": throughput,
    "memory": memory,
    "iat": iat,
    "ranking": ranking,
    "branching": branching,
    "workers": workers,
    "smoke": smoke,
    "reopen": reopen,
    "mini": mini_run,
    "tests": tests,
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or ["importance", "padding", "throughput", "memory"]
    if wrong := [name for name in wanted if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {wrong[0]!r}: valid: {', '.join(BENCHMARKS)}")
    with hidden():
        met = [BENCHMARKS[name]() for name in wanted]
    sys.exit(0 if all(met) else 1)
