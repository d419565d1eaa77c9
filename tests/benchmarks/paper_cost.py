"""What the profile `paper` costs from nothing: operations, and hours on 1, 8 and 64 workers.

    python tests/benchmarks/paper_cost.py [TFLOPS]

TFLOPS: operations per second that a worker reaches, in 10^12 (50). Operations are counted by torch
on encoders without weights, of one text of `TOKENS` tokens, forward; a training step is three of
them, importance two. What is assumed stands in `TOKENS` and `EVALUATED`. Bags of words, attention
patterns, selections, single tasks and transfer are left out, so it is a lower bound.
"""

import heapq
import sys
from itertools import combinations

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from fslib.model.encoders import PRETRAINED, new_encoder
from fslib.study.profiles import make_profile

TOKENS = 64  # of an example: assumed
# evaluation examples by task: those of GLUE, of AG News in pairs; a profile may take fewer
EVALUATED = {"mnli": 9815, "qnli": 5463, "qqp": 40430, "sst-2": 872, "ag-pair": 7600}
HOUR = 3600.0


def forward_flops(encoder: str) -> int:
    """Count the operations of one text's way through an encoder."""
    kind, layers, heads, hidden = PRETRAINED[encoder][1]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    config = transformers.AutoConfig.for_model(kind, **shape, intermediate_size=4 * hidden)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)  # of values, or one is computed
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        new_encoder(config).eval()(input_ids=ids, attention_mask=mask)
    return counter.get_total_flops()


def chains() -> list[tuple[str, str, float]]:
    """Return (what, encoder, texts forward) of all that must run on one worker, in turn."""
    p = make_profile("paper", {})
    n, whole = len(p.tasks), 3.0 * p.steps * p.batch_size
    cap = p.eval_examples or max(EVALUATED.values())
    sizes = [min(cap, EVALUATED[task]) for task in p.tasks]

    def model(texts: float, sizes: list[int], examples: int, fractions: int) -> float:
        """Count training, importance and pruning of a model on tasks of these sizes."""
        sets = fractions * len(sizes) * (1 + p.controls)
        return texts + 2 * examples * len(sizes) + (2 + sets) * sum(sizes)

    small, encoder = (p.small_examples, len(p.small_fractions)), p.encoder
    curve = (p.curve_points + 1) * p.curve_examples * n
    main = model(whole + curve, sizes, p.importance_examples, len(p.fractions))
    endings = 4 + len(p.other_endings) + len(p.other_alphas) + len(p.other_deltas)
    trained = whole * (1 - p.delta + p.delta * endings) + (endings + 3 * n) * sum(sizes)
    each = [("model of all tasks", encoder, main), ("endings of one trunk", encoder, trained)]
    found = p.seeds * (each + n * [("task alone", encoder, whole / n)])
    layers, heads = PRETRAINED[encoder][1][1:3]
    lesions = (1 + layers * heads) * n * min(p.lesion_examples or cap, cap)
    found += [("heads off one by one", encoder, lesions)] * (p.lesion_seeds or p.seeds)
    for other in (name for name in p.encoders if name != encoder):
        texts = model(whole, sizes, *small)
        found += [("model of all tasks", other, texts)] * (p.encoder_seeds or p.seeds)
    found.append(("tasks alone, for similarity", encoder, whole + 2 * n * p.small_examples))
    for pair in combinations(sizes, 2):
        texts = model(2 * whole / n, list(pair), *small)
        found += [("model of two tasks", encoder, texts)] * (p.pair_seeds or p.seeds)
    return found


def longest_first(hours: list[float], workers: int) -> float:
    """Return the hours until the last is done, each worker taking the longest that is left."""
    busy = [0.0] * workers
    for each in sorted(hours, reverse=True):
        heapq.heapreplace(busy, busy[0] + each)
    return max(busy)


if __name__ == "__main__":
    rate = float(sys.argv[1] if sys.argv[1:] else 50) * 1e12
    flops = {encoder: forward_flops(encoder) for encoder in PRETRAINED}
    units = [(what, encoder, texts * flops[encoder]) for what, encoder, texts in chains()]
    print("| what | encoder | how many | PFLOP each | hours each |")
    print("| --- | --- | --- | --- | --- |")
    for what, encoder in dict.fromkeys(unit[:2] for unit in units):
        work = [each for *name, each in units if name == [what, encoder]]
        mean = sum(work) / len(work)
        cells = what, encoder, len(work), f"{mean / 1e15:.0f}", f"{mean / rate / HOUR:.2f}"
        print(f"| {' | '.join(map(str, cells))} |")
    hours = [work / rate / HOUR for *_, work in units]
    for workers in (1, 8, 64):
        print(f"{workers} workers: {longest_first(hours, workers):.1f} hours")
