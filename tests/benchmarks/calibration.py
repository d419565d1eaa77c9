"""How often the statistics are wrong, on data whose truth is known.

    python tests/benchmarks/calibration.py

prints one Markdown table (3 to 9 minutes on one core, the same every time). Everything is computed
by the package itself, on the simulators of `tests/simulations.py`, which the tests share. A row is
a share of simulations with its standard error: of 95 % intervals that hold the truth, or of
verdicts that are wrong. "beside it" is the same share for another rule: the Multi-Bootstrap, or the
label permutation of all tasks alone, without the gate and without random heads.
FSLIB_BENCH_QUICK=1 simulates a fiftieth: to see that it works.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simulations as sim

from fslib.claims import CONTRADICTED, NO_EFFECT, SUPPORTED
from fslib.intervals import multi_bootstrap

QUICK = os.environ.get("FSLIB_BENCH_QUICK") == "1"
BOTH, ANY = "two parts: no effect", "any of five claims supported"
Verdict = Callable[[np.random.Generator], str]
# what, of what data, what it should be, found, beside it
Row = tuple[str, str, str, list[bool], list[bool]]


def generators(n: int, *seed: int) -> Iterator[np.random.Generator]:
    """One generator per simulation."""
    return (np.random.default_rng([*seed, i]) for i in range(max(n // 50, 4) if QUICK else n))


def coverage() -> Iterator[Row]:
    """The 95 % interval; beside it the Multi-Bootstrap, of ten seeds or more, 400 times."""
    for place, (regime, spread) in enumerate(sim.REGIMES.items()):
        for seeds in (2, 3, 5, 10, 20):
            rngs = generators(4000, 1, place, seeds)
            measures = [sim.crossed(rng, seeds, spread) for rng in rngs]
            found = [sim.covers(m.interval().at(0.95)) for m in measures]
            few = measures[: 400 if seeds >= 10 else 0]
            both = zip(few, generators(400, 2, place), strict=False)
            beside = [sim.covers(multi_bootstrap(m, 999, rng)) for m, rng in both]
            verb = "dominates" if regime == "interaction" else "dominate"
            what = f"{regime} {verb}, {seeds} seeds"
            yield "95 % interval holds the truth", what, "0.95", found, beside


def specialization() -> Iterator[Row]:
    """C1, by itself: 4 tasks, 3 models, 200 examples, 2 controls, 10 and 30 % of 72 heads."""
    rows = [(f"false: {name}", "<= 0.05", 500, 3, world) for name, world in sim.WORLDS.items()]
    rows.append(("true: D of about 8 points", "high", 200, 4, sim.World(specific=1.0)))
    for place, (what, expected, n, seed, world) in enumerate(rows):
        seeds = (seed, place) if seed == 3 else (seed,)
        drawn = (sim.pruned_models(rng, world) for rng in generators(n, *seeds))
        found = [sim.decide_specialization(iap) for iap in drawn]
        alone = [x.permutation_alone for x in found]
        yield "C1 supported", what, expected, [x.supported for x in found], alone


def correlation() -> Iterator[Row]:
    """C2: two unrelated matrices over pairs of tasks, each with effects of tasks."""
    for tasks in (8, 10):
        found = [sim.mantel_p(rng, tasks) < 0.05 for rng in generators(1000, 5, tasks)]
        yield "Mantel p < 0.05", f"false: {tasks} tasks", "0.05", found, []


def claims() -> Iterator[Row]:
    """C3 to C5, of 5 seeds, and all five claims together."""

    def two(truth: float, other: float) -> Verdict:
        return lambda rng: sim.two_parts(rng, (truth, other)).verdict

    def one(truth: float) -> Verdict:
        return lambda rng: sim.one_part(rng, truth).verdict

    def any_supported(rng: np.random.Generator) -> str:
        verdicts = [evidence.verdict for evidence in sim.five_claims(rng).values()]
        return SUPPORTED if SUPPORTED in verdicts else ""

    supported, none = "two parts supported", "one part: no effect"
    rows = [
        (supported, "false: neither part is true", "<= 0.05", two(0, 0), SUPPORTED, 6),
        (supported, "false: one part alone is true", "<= 0.05", two(0, 9), SUPPORTED, 6),
        ("two parts contradicted", "false: both are 0", "<= 0.05", two(0, 0), CONTRADICTED, 7),
        (none, "false: it is +1, the smallest of interest", "<= 0.05", one(1), NO_EFFECT, 8),
        (none, "false: it is -1, the smallest of interest", "<= 0.05", one(-1), NO_EFFECT, 8),
        (none, "true: it is 0", "high", one(0), NO_EFFECT, 9),
        (BOTH, "false: both the smallest of interest", "<= 0.10", two(0.5, 0.5), NO_EFFECT, 10),
        (ANY, "false: none is true", "<= 0.05", any_supported, SUPPORTED, 11),
    ]
    for what, data, expected, decide, verdict, seed in rows:
        n = 40 if QUICK else 1000 if what == ANY else 2000
        found = sim.many(lambda rng, d=decide, v=verdict: d(rng).startswith(v), n, seed)
        yield what, data, expected, found, []


def shown(found: list[bool]) -> str:
    """A sim.share, with its standard error."""
    return "{:.3f} ± {:.3f}".format(*sim.share(found)) if found else ""


def main() -> None:
    """Print the table."""
    print("| what | data | should be | found | beside it | simulations |", flush=True)
    print("|---|---|---|---|---|---|")
    for part in (coverage, specialization, correlation, claims):
        for what, data, expected, found, beside in part():
            few = f" ({len(beside)} beside)" if 0 < len(beside) < len(found) else ""
            shares = f"{shown(found)} | {shown(beside)}"
            print(f"| {what} | {data} | {expected} | {shares} | {len(found)}{few} |", flush=True)


if __name__ == "__main__":
    main()
