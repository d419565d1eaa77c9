"""How often the statistics are wrong, on data whose truth is known.

    python tests/benchmarks/calibration.py

prints one Markdown table (3 to 9 minutes on one core, the same every time). Everything is computed
by the package itself, on the simulators of `tests/simulations.py`, which the tests share. A row is
a share of simulations with its standard error: of 95 % intervals that hold the truth, or of
verdicts that are wrong. "beside it" is the same share for another rule: the label permutation of
all tasks alone, without the gate and without random heads; Mantel's test that is not given the
question; verdicts without a correction for the number of claims.
FSLIB_BENCH_QUICK=1 simulates a fiftieth: to see that it works.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simulations as sim

from fslib.claims import CONTRADICTED, NO_EFFECT, SESOI, SUPPORTED, Claim
from fslib.questions import q08_claims
from fslib.study.study import Study

QUICK = os.environ.get("FSLIB_BENCH_QUICK") == "1"
# what, of what data, what it should be, found, beside it
Row = tuple[str, str, str, list[bool], list[bool]]


def generators(n: int, *seed: int) -> Iterator[np.random.Generator]:
    """One generator per simulation."""
    return (np.random.default_rng([*seed, i]) for i in range(max(n // 50, 4) if QUICK else n))


def coverage() -> Iterator[Row]:
    """The 95 % interval."""
    for place, (regime, spread) in enumerate(sim.REGIMES.items()):
        for seeds in (2, 3, 5, 10, 20):
            drawn = (sim.crossed(g, seeds, spread) for g in generators(4000, 1, place, seeds))
            found = [sim.covers(measure.interval().at(0.95)) for measure in drawn]
            verb = "dominates" if regime == "interaction" else "dominate"
            what = f"{regime} {verb}, {seeds} seeds"
            yield "95 % interval holds the truth", what, "0.95", found, []


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
    """C2: two unrelated matrices over pairs of tasks, and two that share a question alone."""
    for tasks in (8, 10):
        found = [sim.mantel_p(rng, tasks) < 0.05 for rng in generators(1000, 5, tasks)]
        yield "Mantel p < 0.05", f"false: {tasks} tasks", "0.05", found, []
    for tasks in (8, 10):
        drawn = [sim.mantel_given_p(rng, tasks) for rng in generators(1000, 6, tasks)]
        plain, partial = ([p < 0.05 for p in ps] for ps in zip(*drawn, strict=True))
        what = f"false: the question makes both alike, {tasks} tasks"
        yield "partial Mantel p < 0.05", what, "0.05", partial, plain


def profiles() -> Iterator[Row]:
    """All claims of `evidence` together, with the standard errors that it measured them with."""
    claims = q08_claims.decide(Study("evidence"))
    parts = {name: [part.interval for part in claim.parts] for name, claim in claims.items()}
    errors = {n: [(i.se, i.df) for i in own] for n, own in parts.items() if own}

    def nothing(name: str) -> list[float]:
        return [0.0] * len(errors[name])

    def one_true(name: str) -> list[float]:
        return [0.0, *[9.0] * len(errors[name])][: len(errors[name])]

    def one_at_sesoi(name: str) -> list[float]:
        return [*nothing(name)[1:], SESOI[name][0]]

    rows = [
        (SUPPORTED, "all effects 0", nothing),
        (SUPPORTED, "one part of every claim 0, the other large", one_true),
        (CONTRADICTED, "all effects 0", nothing),
        (NO_EFFECT, "one part of every claim at its SESOI, the other 0", one_at_sesoi),
    ]
    for number, (word, data, truths) in enumerate(rows):
        drawn = [sim.profile_of_claims(g, errors, truths) for g in generators(4000, 7, number)]
        found = [any(c.verdict.startswith(word) for c in each.values()) for each in drawn]
        alone = [any(_alone(c).startswith(word) for c in each.values()) for each in drawn]
        yield f"any of {len(errors)} claims: {word}", f"false: {data}", "<= 0.05", found, alone


def _alone(claim: Claim) -> str:
    """The verdict that would stand without a correction for the number of claims."""
    return replace(claim, corrected=None).verdict


def shown(found: list[bool]) -> str:
    """A sim.share, with its standard error."""
    return "{:.3f} ± {:.3f}".format(*sim.share(found)) if found else ""


def main() -> None:
    """Print the table."""
    print("| what | data | should be | found | beside it | simulations |", flush=True)
    print("|---|---|---|---|---|---|")
    for part in (coverage, specialization, correlation, profiles):
        for what, data, expected, found, beside in part():
            few = f" ({len(beside)} beside)" if 0 < len(beside) < len(found) else ""
            shares = f"{shown(found)} | {shown(beside)}"
            print(f"| {what} | {data} | {expected} | {shares} | {len(found)}{few} |", flush=True)


if __name__ == "__main__":
    main()
