"""How often the statistics are wrong, on data whose truth is known.

    python tests/benchmarks/calibration.py        one Markdown table (3 to 9 minutes on one core, the same every time)

Everything is computed by the package itself, on the simulators of `tests/simulations.py`, which the tests share. A
row is a share of simulations with its standard error: of 95 % intervals that hold the truth, or of verdicts that are
wrong. "beside it" is the same share for another rule: the Multi-Bootstrap, or the label permutation of all tasks alone,
without the gate and without random heads. FSLIB_BENCH_QUICK=1 simulates a fiftieth: to see that it works.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations import (
    REGIMES,
    WORLDS,
    World,
    covers,
    crossed,
    decide_specialization,
    five_claims,
    mantel_p,
    many,
    one_part,
    pruned_models,
    share,
    two_parts,
)

from fslib.claims import CONTRADICTED, NO_EFFECT, SUPPORTED
from fslib.intervals import multi_bootstrap

QUICK = os.environ.get("FSLIB_BENCH_QUICK") == "1"
Row = tuple[
    str, str, str, list[bool], list[bool]
]  # what, of what data, what it should be, found, beside it


def generators(n: int, *seed: int) -> Iterator[np.random.Generator]:
    """One generator per simulation."""
    return (np.random.default_rng([*seed, i]) for i in range(max(n // 50, 4) if QUICK else n))


def coverage() -> Iterator[Row]:
    """The 95 % interval; beside it the Multi-Bootstrap, from 10 seeds on, of the first 400 simulations."""
    for place, (regime, spread) in enumerate(REGIMES.items()):
        for seeds in (2, 3, 5, 10, 20):
            measures = [crossed(rng, seeds, spread) for rng in generators(4000, 1, place, seeds)]
            found = [covers(m.interval().at(0.95)) for m in measures]
            few = measures[: 400 if seeds >= 10 else 0]
            beside = [
                covers(multi_bootstrap(m, 999, rng))
                for m, rng in zip(few, generators(400, 2, place), strict=False)
            ]
            what = (
                f"{regime} {'dominates' if regime == 'interaction' else 'dominate'}, {seeds} seeds"
            )
            yield "95 % interval holds the truth", what, "0.95", found, beside


def specialization() -> Iterator[Row]:
    """C1, by itself: 4 tasks, 3 models, 200 examples, 2 controls, 10 and 30 % of 72 heads."""
    for place, (name, world) in enumerate(WORLDS.items()):
        found = [
            decide_specialization(pruned_models(rng, world)) for rng in generators(500, 3, place)
        ]
        alone = [x.permutation_alone for x in found]
        yield "C1 supported", f"false: {name}", "<= 0.05", [x.supported for x in found], alone
    found = [
        decide_specialization(pruned_models(rng, World(specific=1.0))) for rng in generators(200, 4)
    ]
    alone = [x.permutation_alone for x in found]
    yield "C1 supported", "true: D of about 8 points", "high", [x.supported for x in found], alone


def correlation() -> Iterator[Row]:
    """C2: two matrices over pairs of tasks that have nothing to do with each other, each with effects of tasks."""
    for tasks in (8, 10):
        found = [mantel_p(rng, tasks) < 0.05 for rng in generators(1000, 5, tasks)]
        yield "Mantel p < 0.05", f"false: {tasks} tasks", "0.05", found, []


def claims() -> Iterator[Row]:
    """C3 to C5, of 5 seeds, and all five claims together."""

    def verdicts(
        decide: Callable[[np.random.Generator], str], verdict: str, seed: int
    ) -> list[bool]:
        return many(lambda rng: decide(rng).startswith(verdict), 40 if QUICK else 2000, seed)

    for name, truths in (("neither part", (0.0, 0.0)), ("one part alone", (0.0, 9.0))):
        found = verdicts(lambda rng, t=truths: two_parts(rng, t).verdict, SUPPORTED, 6)
        yield "two parts supported", f"false: {name} is true", "<= 0.05", found, []
    found = verdicts(lambda rng: two_parts(rng, (0.0, 0.0)).verdict, CONTRADICTED, 7)
    yield "two parts contradicted", "false: both effects are 0", "<= 0.05", found, []
    for side in (1.0, -1.0):
        found = verdicts(lambda rng, s=side: one_part(rng, s).verdict, NO_EFFECT, 8)
        yield (
            "one part: no effect",
            f"false: it is {side:+g}, the smallest of interest",
            "<= 0.05",
            found,
            [],
        )
    found = verdicts(lambda rng: one_part(rng, 0.0).verdict, NO_EFFECT, 9)
    yield "one part: no effect", "true: it is 0", "high", found, []
    found = verdicts(lambda rng: two_parts(rng, (0.5, 0.5)).verdict, NO_EFFECT, 10)
    yield "two parts: no effect", "false: both are the smallest of interest", "<= 0.10", found, []
    found = many(
        lambda rng: any(e.verdict == SUPPORTED for e in five_claims(rng).values()),
        40 if QUICK else 1000,
        11,
    )
    yield "any of five claims supported", "false: none is true", "<= 0.05", found, []


def shown(found: list[bool]) -> str:
    """A share, with its standard error."""
    return "{:.3f} ± {:.3f}".format(*share(found)) if found else ""


def main() -> None:
    """Print the table."""
    print("| what | data | should be | found | beside it | simulations |", flush=True)
    print("|---|---|---|---|---|---|")
    for part in (coverage, specialization, correlation, claims):
        for what, data, expected, found, beside in part():
            count = f"{len(found)}" + (
                f" ({len(beside)} beside)" if beside and len(beside) < len(found) else ""
            )
            print(
                f"| {what} | {data} | {expected} | {shown(found)} | {shown(beside)} | {count} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
