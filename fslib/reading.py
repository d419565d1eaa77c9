"""What the numbers say, in sentences: every verdict is computed from its interval, whichever way it falls."""

from typing import Any

import numpy as np
import pandas as pd

from fslib import outcomes
from fslib.dissociation import Dissociation
from fslib.study import Study

SIGNIFICANCE = 0.05
PRIMARY = "importance"  # the similarity that decides on C2, chosen beforehand; the others show how much hangs on it


def verdict(found: Dissociation) -> str:
    """C1 in one sentence, from the mean over tasks and fractions: one test, chosen beforehand."""
    d, low, high, p = (float(a[-1, -1]) for a in (found.value, found.low, found.high, found.p))
    numbers = (
        f"mean D = {d:.1f} points, 95 % interval [{low:.1f}, {high:.1f}], p = {p:.3f} against matched random heads"
    )
    if low > 0 and p < SIGNIFICANCE:
        return f"C1 supported for this model: {numbers}."
    if high < 0 or (p >= SIGNIFICANCE and low <= 0):
        return f"C1 not supported for this model: {numbers}."
    return f"C1 undecided for this model: {numbers}."


def compare(task: str, method: str, row: pd.Series) -> str:
    """One sentence: is multi-task training better or worse than another method, beyond the interval?"""
    low, high = row["diff low"], row["diff high"]
    word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    return (
        f"{task}: multi-task is {word} {method} "
        f"(difference {100 * row['multi-task minus it']:+.1f} points, [{100 * low:+.1f}, {100 * high:+.1f}])"
    )


def importance(correlations: pd.DataFrame, stability: pd.DataFrame) -> str:
    """What the maps say, in numbers: agreement within tasks and between them, and the sample that a ranking needs."""
    values = correlations.to_numpy()
    own = np.eye(len(values), dtype=bool)
    pairs = correlations.where(np.triu(~own)).stack()
    mean = stability.groupby("examples")["mean"].min()
    enough = mean[mean >= 0.95]
    needs = f"from {enough.index[0]} examples on" if len(enough) else f"not within {mean.index.max()} examples"
    return (
        f"Within a task, half samples agree at {values[own].min():.2f} to {values[own].max():.2f}; "
        f"between tasks maps agree at {values[~own].min():.2f} to {values[~own].max():.2f}.\n"
        f"Most alike: {' and '.join(pairs.idxmax())} ({pairs.max():.2f}); "
        f"least alike: {' and '.join(pairs.idxmin())} ({pairs.min():.2f}).\n"
        f"Two disjoint samples rank heads alike (at least 0.95 for every task): {needs}."
    )


def decided(low: float, high: float, p: float = 0.0) -> str:
    """A claim that a number is above 0, by its interval and, where there is one, its p against a null."""
    if low > 0 and p < SIGNIFICANCE:
        return "supported"
    return "not supported" if high < 0 else "undecided at this scale"


def encoders(table: pd.DataFrame) -> str:
    """C1 across encoders, in sentences: for how many, and what pre-training does."""
    holds = (table["low"] > 0) & (table["p"] < SIGNIFICANCE)
    lines = [
        f"D is above 0 and above matched random heads (p < {SIGNIFICANCE}) for {holds.sum()} of {len(table)} encoders"
        + (f": {', '.join(table['encoder'][holds])}." if holds.any() else ".")
    ]
    for _, row in table[~table["pre-trained"]].iterrows():
        lines.append(
            f"Without pre-training ({row['encoder']}) the tasks end {100 * row['above chance by']:.1f} points above "
            f"chance, with D = {row['D']:.1f} [{row['low']:.1f}, {row['high']:.1f}]."
        )
    return "\n".join(lines)


def claims(study: Study) -> pd.DataFrame:
    """One row a claim: what the paper says, what was measured, interval, seeds, verdict, and where it is shown."""
    rows: list[dict[str, Any]] = []

    def add(
        claim: str, says: str, measured: str, value: tuple[float, ...], seeds: int, verdict: str, where: str
    ) -> None:
        numbers = dict(zip(("value", "low", "high", "p"), (*value, np.nan), strict=False))
        row = {"claim": claim, "the paper says": says, "measured here": measured, **numbers, "seeds": seeds}
        rows.append(row | {"verdict": verdict, "notebook": where})

    c1 = study.iap().dissociation(draws=study.profile.draws)
    d, low, high, p = (float(a[-1, -1]) for a in (c1.value, c1.low, c1.high, c1.p))
    table = outcomes.encoders(study)
    holds = int(((table["low"] > 0) & (table["p"] < SIGNIFICANCE)).sum())
    add(
        "C1",
        "heads specialize under multi-task training, on seven pre-trained models",
        f"mean D of {study.profile.encoder}, in points; of notebook 04's {len(table)} encoders it holds for {holds}",
        (d, low, high, p),
        len(study.seeds),
        decided(low, high, p),
        "03, 04",
    )
    row = outcomes.similarity_correlations(study).set_index("similarity").loc[PRIMARY]
    rho, low, high, p = (float(row[k]) for k in ("rank correlation with D", "low", "high", "p"))
    add(
        "C2",
        "the more similar the tasks, the weaker the specialization",
        f"rank correlation of similarity ({PRIMARY}) with D over {row['pairs']:.0f} pairs of tasks",
        (rho, low, high, p),
        1,
        decided(-high, -low, p),
        "05",
    )
    found = outcomes.ending_dissociation(study).set_index(["ending", "task"]).loc[("IAT", "mean")]
    value, low, high = (float(found[k]) for k in ("minus plain", "diff low", "diff high"))
    add(
        "C3",
        "IAT raises specialization",
        "mean D after IAT minus after plain training, in points",
        (value, low, high),
        len(study.ending_seeds),
        decided(low, high),
        "06",
    )
    found = outcomes.endings(study).set_index(["ending", "task"]).loc[("IAT", "mean")]
    value, low, high = (100 * float(found[k]) for k in ("minus plain", "diff low", "diff high"))
    add(
        "C4",
        "IAT beats plain multi-task training",
        "mean score of IAT minus plain training, in points",
        (value, low, high),
        len(study.ending_seeds),
        decided(low, high),
        "06",
    )
    moved = outcomes.transfer(study).set_index(["part", "source", "size"]).loc[("full", "IAT", "mean")]
    value, low, high = (100 * float(moved[k]) for k in ("minus multi-task", "diff low", "diff high"))
    add(
        "C5",
        "IAT transfers better to new tasks",
        f"score on {study.profile.transfer_target}, mean over sizes, from IAT minus from plain training, in points",
        (value, low, high),
        len(study.transfer_seeds),
        decided(low, high),
        "07",
    )
    counts = outcomes.parameters(study)
    added = float(counts["parameters"].max() - counts["parameters"].min())
    add(
        "C6",
        "no parameter is added",
        "parameters after IAT minus after plain training, every ending and seed",
        (added, added, added),
        len(study.ending_seeds),
        "supported" if added == 0 else "not supported",
        "06",
    )
    return pd.DataFrame(rows)


def differences(study: Study) -> pd.DataFrame:
    """The paper's released code, seen from outside, against this package: each difference and its measured effect."""
    chosen = outcomes.selections(study).set_index("selection")
    controls = outcomes.random_controls(study).set_index("random sets")["score left (%)"]
    iap = study.iap()
    conventions = {c: iap.dissociation(c, draws=study.profile.draws) for c in ("lesion", "released", "retention")}
    orders = {c: [iap.tasks[i] for i in np.argsort(-f.value[-1, :-1])] for c, f in conventions.items()}
    moved = outcomes.movement(study).set_index("ending")
    scores = outcomes.endings(study, against="IAT").set_index(["ending", "task"]).loc[("IAT, leaky", "mean")]

    def selection(name: str) -> str:
        row = chosen.loc[name]
        return (
            f"rank correlation {row['rank correlation']:.2f}, overlap of top heads {row['overlap of top heads']:.2f}; "
            f"D {row['minus the first']:+.1f} points [{row['diff low']:+.1f}, {row['diff high']:+.1f}]"
        )

    rows = [
        (
            "scale of layers in importance",
            "none in pruning, another for the last layer in training",
            "none, the same everywhere; normalize='layer' on request",
            selection("gradient, layer-normalized"),
        ),
        (
            "absolute value in importance",
            "per token",
            "per token; reduction='example' on request",
            selection("gradient, by example"),
        ),
        (
            "dissociation score",
            "own lesion's effect on different tasks (released)",
            "different lesions on the same task (lesion); both are shown",
            "; ".join(
                f"{c}: mean D {f.value[-1, -1]:.1f} [{f.low[-1, -1]:.1f}, {f.high[-1, -1]:.1f}], "
                f"most specialized {orders[c][0]}, least {orders[c][-1]}"
                for c, f in conventions.items()
            ),
        ),
        (
            "rows outside the set in IAT",
            "zero gradient: Adam's momentum and weight decay still move them (leaky)",
            "no update at all (strict)",
            f"leaky rows move {100 * moved.loc['IAT, leaky', 'rows of heads in no set']:.0f} % as far as in plain "
            f"training, strict ones {100 * moved.loc['IAT', 'rows of heads in no set']:.0f} %; mean score, leaky minus "
            f"strict: {100 * scores['minus IAT']:+.2f} points "
            f"[{100 * scores['diff low']:+.2f}, {100 * scores['diff high']:+.2f}]",
        ),
        (
            "random control heads",
            "drawn over all layers, but one head kept in each; top heads need not keep one",
            "as many in every layer as the top heads",
            f"score left: {controls['matched by layer']:.1f} % matched, {controls['not matched']:.1f} % not matched, "
            f"{controls['(top heads)']:.1f} % top heads",
        ),
        (
            "batches",
            "every step shuffles anew and takes the first batch",
            "every example once per epoch",
            f"an epoch of such steps misses {100 * _missed(study):.0f} % of the examples (simulated)",
        ),
        (
            "gradients of the importance pass",
            "leak into the next update",
            "the model is left as it was",
            "not measured; tested",
        ),
        ("mode after the importance pass", "stays in evaluation mode: no dropout", "restored", "not measured; tested"),
        ("annealed sampling, one epoch", "divides by zero", "proportional sampling", "not measured; tested"),
    ]
    return pd.DataFrame(rows, columns=["what", "released code", "this package", "measured effect"])


def _missed(study: Study) -> float:
    """Share of a task's training examples that are missed if every step takes the first batch of a new shuffle."""
    n, batch, rng = len(study.tasks[study.profile.tasks[0]].train), study.profile.batch_size, np.random.default_rng(0)
    seen = np.concatenate([rng.permutation(n)[:batch] for _ in range(n // batch)])
    return 1 - len(np.unique(seen)) / n
