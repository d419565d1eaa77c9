"""Notebook 04: does dissociation appear in other encoders, and does it depend on how heads are chosen?"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import (
    NOT_TESTABLE,
    above_constant,
    entering,
    interval_text,
    learned,
    p_text,
    paired_differences,
    scored,
)
from fslib.heads import overlap, top_heads
from fslib.iap import IAP, score_left
from fslib.importance import passes
from fslib.intervals import Interval, pooled
from fslib.model.encoders import ENCODERS
from fslib.plot import GREY, forest, panels, percent, set_limits, styled
from fslib.scoring import rank_correlation
from fslib.study.store import Record
from fslib.study.study import Study
from fslib.study.units import SELECTIONS, UNMATCHED, recorded_iap


def dissociation_by_encoder(study: Study) -> pd.DataFrame:
    """Return one row per encoder: its size, what it learned, and its dissociation (lesion, mean over all).

    tasks: how many are learned and enter D. D is NaN where fewer than two do.
    """
    rows = []
    for name in study.profile.encoders:
        chains = study.encoder_units(name)
        trained = study.store.get(chains[0].train).result
        iap = IAP.over_seeds([units.prune.iap(study.store) for units in chains])
        row = {
            "encoder": name,
            "layers": trained["shape"][0],
            "heads": int(np.prod(trained["shape"])),
        }
        row |= {
            "pre-trained": ENCODERS.get(name, ({}, True))[1],
            "million parameters": trained["parameters"] / 1e6,
        }
        row |= {"seeds": len(chains), "score": iap.baseline().mean()}
        row["above chance by"] = (iap.baseline() - iap.chance()).mean()
        rows.append(row | _effects(iap, study))
    return pd.DataFrame(rows)


def _effects(iap: IAP, study: Study) -> dict[str, float | int]:
    """Return D of one encoder, beside random heads', as columns; NaN where fewer than two tasks are learned."""
    passed = learned(above_constant(iap))
    names = (
        "D",
        "low",
        "high",
        "random heads",
        "above random",
        "above low",
        "above high",
        "above se",
        "p",
    )
    each: dict[str, float | int] = {f"D, {task}": np.nan for task in iap.tasks}
    if len(passed) < 2:
        return {"tasks": len(passed)} | dict.fromkeys(names, np.nan) | each
    result = scored(iap, passed).dissociation(draws=study.profile.draws)
    d, above = result.mean, result.measure(above_random=True).interval()
    values = (d.value, d.low, d.high, d.random, above.value, above.low, above.high, above.se, d.p)
    each |= {f"D, {task}": float(result.of(task).value) for task in passed}
    return {"tasks": len(passed)} | dict(zip(names, map(float, values), strict=True)) | each


def pooled_effect(table: pd.DataFrame) -> Interval:
    """Return D above random heads, pooled over the pre-trained encoders of the table with a random effect.

    One number for a population of encoders; never a count of those that pass by themselves.
    """
    chosen = table[table["pre-trained"] & table["above se"].notna()]
    pairs = zip(chosen["above random"], chosen["above se"], strict=True)
    return pooled([Interval(float(value), float(se), np.inf) for value, se in pairs])


def selections(study: Study) -> pd.DataFrame:
    """Return one row per way to choose heads: how it ranks them, what dissociation it yields, what it costs.

    "minus gradient": D minus that of the first; its interval is over evaluation examples, on one model. D is over the
    tasks that are learned, or over all if fewer than two are.
    """
    record = study.store.get(study.selection())
    names = [*SELECTIONS, *_unmatched(record)]
    first = recorded_iap(record, names[0])
    values = {
        n: {"mean": entering(recorded_iap(record, n), first).dissociation().measure()}
        for n in names
    }
    table = paired_differences(
        values, names[0], ("selection", "task"), value="D", with_mean=False
    ).drop(columns="task")
    ranks = pd.DataFrame([_ranking(study, record, name) for name in names])
    table = pd.concat([table, ranks], axis=1)
    table["selection"] = [name.replace(UNMATCHED, "random, draw") for name in names]
    agreement = ["rank correlation", "overlap of top heads"]
    difference = [f"minus {names[0]}", "diff low", "diff high"]
    return table[
        [
            "selection",
            *agreement,
            "D",
            "low",
            "high",
            *difference,
            "forward passes",
            "backward passes",
        ]
    ]


def _ranking(study: Study, record: Record, name: str) -> dict[str, float]:
    """Return how one selection's maps agree with the first's, and the passes over the sample that they cost."""
    if name not in SELECTIONS:
        agreement = {"rank correlation": np.nan, "overlap of top heads": np.nan}
        return agreement | {"forward passes": 0, "backward passes": 0}
    first, fraction = next(iter(SELECTIONS)), max(study.profile.small_fractions)
    maps = [
        [record.arrays[f"importance/{n}/{t}"] for n in (first, name)] for t in study.profile.tasks
    ]
    sets = [[top_heads(m, fraction) for m in pair] for pair in maps]
    forward, backward = passes(
        SELECTIONS[name].get("estimator", "gradient"), *record.result["shape"]
    )
    return {
        "rank correlation": float(np.mean([rank_correlation(*pair) for pair in maps])),
        "overlap of top heads": float(np.mean([overlap(*pair) for pair in sets])),
        "forward passes": forward,
        "backward passes": backward,
    }


def _unmatched(record: Record) -> list[str]:
    return [
        k.removesuffix("/heads")
        for k in record.arrays
        if k.startswith(UNMATCHED) and k.endswith("/heads")
    ]


def random_controls(study: Study) -> pd.DataFrame:
    """Return what random head sets, matched by layer with top heads or not, leave of the score in % of the unpruned."""
    record = study.store.get(study.selection())
    first = recorded_iap(record, next(iter(SELECTIONS)))
    unmatched = [
        recorded_iap(record, name).top.scores[0, 0] for name in _unmatched(record)
    ]  # each (pruned, scored)
    sets = {
        "matched by layer": first.random.scores[0, 0],  # (pruned, controls, scored)
        "not matched": np.stack(unmatched, 1),
        "(top heads)": first.top.scores[0, 0],
    }
    rows = []
    for name, scores in sets.items():
        left = score_left(scores, first.baseline()[0]).mean(-1)
        rows.append(
            {
                "random sets": name,
                "sets": left.size,
                "score left (%)": left.mean(),
                "spread": left.std(ddof=1),
            }
        )
    return pd.DataFrame(rows)


def sentences(table: pd.DataFrame) -> str:
    """Say what the encoders show together, and what becomes of D without pre-training."""
    effect, lines = pooled_effect(table), []
    count = int((table["pre-trained"] & table["above se"].notna()).sum())
    if np.isfinite(effect.se):
        lines.append(
            f"Pooled over {count} pre-trained encoders (random effect): D above random heads {interval_text(effect, 1)} "
            f"points, {p_text(effect.p)}, minimum detectable effect {effect.mde:.1f}."
        )
    else:
        lines.append(
            f"Nothing to pool: {count} pre-trained encoders have learned two tasks or more."
        )
    for _, row in table[~table["pre-trained"]].iterrows():
        said = (
            f"D = {row['D']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
            if np.isfinite(row["D"])
            else NOT_TESTABLE
        )
        lines.append(
            f"Without pre-training ({row['encoder']}) the tasks end {100 * row['above chance by']:.1f} points above "
            f"chance, {row['tasks']} of them learned: {said}."
        )
    return "\n".join(lines)


@styled
def plot_encoders(table: pd.DataFrame) -> Figure:
    """Draw, left: each encoder's mean dissociation (interval) beside random heads'. Right: what it learned."""
    figure, (left, right) = panels(2, 0.9 + 0.27 * len(table), sharey=True, width_ratios=[1.5, 1])
    names = table["encoder"]
    forest(left, names, table["D"], table["low"], table["high"])
    set_limits(left, np.append(table["D"], table["random heads"]), table["low"], table["high"], "x")
    left.plot(
        table["random heads"],
        range(len(table)),
        "|",
        color=GREY,
        markersize=11,
        mew=2,
        label="random heads, matched",
    )
    left.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D, mean over tasks, 10 and 30 % pruned (points)")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.barh(range(len(table)), table["above chance by"], color="#bbbbbb", height=0.55)
    right.set(xlabel="score above chance (points)")
    percent(right, "x")
    return figure


@styled
def plot_selections(table: pd.DataFrame) -> Figure:
    """Draw, left: dissociation that each way to choose heads yields. Right: its rank correlation with the default."""
    figure, (left, right) = panels(2, 0.9 + 0.24 * len(table), sharey=True, width_ratios=[1.5, 1])
    forest(left, table["selection"], table["D"], table["low"], table["high"])
    left.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D, mean over tasks (points)")
    right.barh(range(len(table)), table["rank correlation"].fillna(0), color="#bbbbbb", height=0.55)
    right.set(
        xlabel="rank correlation with the first", xlim=(min(0, table["rank correlation"].min()), 1)
    )
    return figure
