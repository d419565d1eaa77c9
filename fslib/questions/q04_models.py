"""Notebook 04: does dissociation appear in other encoders, and with heads chosen otherwise?"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib import claims
from fslib.iap import IAP, score_left
from fslib.importance import passes
from fslib.model.encoders import ENCODERS
from fslib.plot import GREY, Look, forest, panels, percent, set_limits, styled, zero
from fslib.questions.q03_pruning import POINT
from fslib.questions.tables import D_ENDS, Rows, agreement, columns, minus, said, table_of
from fslib.study.store import Record
from fslib.study.study import Study
from fslib.study.units import SELECTIONS, UNMATCHED, recorded_iap

FIRST = next(iter(SELECTIONS))  # the way to choose heads that others are compared with
AGREEMENT = ("rank correlation", "overlap of top heads")
PASSES = ("forward passes", "backward passes")
DISSOCIATION = (*D_ENDS, "random heads", "above random", "above low", "above high")


def dissociation_by_encoder(study: Study) -> pd.DataFrame:
    """Return a row per encoder: its size, what it learned, and its dissociation (lesion).

    tasks: how many are learned and enter D, which is NaN where fewer than two do.
    """
    rows = []
    for name in study.profile.encoders:
        chains = study.encoder_units(name)
        trained = study.store.get(chains[0].train).result
        iap = IAP.over_seeds([units.prune.iap(study.store) for units in chains])
        shape, scores, pretrained = trained["shape"], iap.baseline(), ENCODERS.get(name, ({}, True))
        row = {"encoder": name, "layers": shape[0], "heads": int(np.prod(shape))}
        row |= {"pre-trained": pretrained[1], "million parameters": trained["parameters"] / 1e6}
        row |= {"seeds": len(chains), "score": scores.mean()}
        row |= {"above chance by": (scores - iap.chance()).mean()}
        rows.append(row | _dissociation(iap, study.profile.draws))
    return pd.DataFrame(rows)


def _dissociation(iap: IAP, draws: int) -> dict[str, float | int]:
    """Return D of one encoder, beside random heads', as columns; NaN where it is not defined."""
    passed = claims.learned(claims.above_constant(iap))
    each = [f"D, {task}" for task in iap.tasks]
    found = dict.fromkeys([*DISSOCIATION, "p", *each], np.nan)
    if len(passed) > 1:
        result = claims.scored(iap, passed).dissociation(draws=draws)
        found |= {k: getattr(result.mean, POINT[k]) for k in (*DISSOCIATION, "p")}
        found |= {f"D, {task}": result.of(task).value for task in passed}
    return {"tasks": len(passed)} | found


def _unmatched(record: Record) -> dict[str, IAP]:
    """Return what pruning each random draw over all layers did, by name."""
    names = [k.removesuffix("/heads") for k in record.arrays if k.endswith("/heads")]
    return {k: recorded_iap(record, k) for k in names if k.startswith(UNMATCHED)}


def selections(study: Study) -> pd.DataFrame:
    """Return a row per way to choose heads: its ranking, the dissociation it yields, its cost.

    "minus gradient": D minus that of the first; its interval is over evaluation examples, on one
    model. D is over the tasks that are learned, or over all if fewer than two are.
    """
    record = study.store.get(study.selection())
    iaps = {name: recorded_iap(record, name) for name in SELECTIONS} | _unmatched(record)
    values, names = {}, ("selection", "task")
    for name, iap in iaps.items():
        values[name] = {"mean": claims.entering(iap, iaps[FIRST]).dissociation().measure()}
    table = claims.paired_differences(values, FIRST, names, value="D", with_mean=False)
    ranks = [_ranking(study, record, name) for name in iaps]
    table = pd.concat([table, pd.DataFrame(ranks, columns=[*AGREEMENT, *PASSES])], axis=1)
    table["selection"] = table["selection"].str.replace(UNMATCHED, "random, draw")
    return table[["selection", *AGREEMENT, *D_ENDS, *minus(FIRST), *PASSES]]


def _ranking(study: Study, record: Record, name: str) -> tuple[float | int, ...]:
    """Return how a selection's maps agree with the first's, and the passes that they cost."""
    if name not in SELECTIONS:
        return np.nan, np.nan, 0, 0
    fraction, found = max(study.profile.small_fractions), []
    for task in study.profile.tasks:
        usual, other = (record.arrays[f"importance/{n}/{task}"] for n in (FIRST, name))
        found.append(agreement(usual, other, fraction))
    estimator = SELECTIONS[name].get("estimator", "gradient")
    return *np.mean(found, 0), *passes(estimator, *record.result["shape"])


@table_of("random sets", "sets", "score left (%)", "spread")
def random_controls(study: Study) -> Rows:
    """Return what random head sets, matched by layer or not, leave of the score (%)."""
    record = study.store.get(study.selection())
    first = recorded_iap(record, FIRST)
    sets = {  # the last axis is the scored task
        "matched by layer": first.random.scores[0, 0],
        "not matched": np.stack([iap.top.scores[0, 0] for iap in _unmatched(record).values()]),
        "(top heads)": first.top.scores[0, 0],
    }
    for name, scores in sets.items():
        left = score_left(scores, first.baseline()[0]).mean(-1)
        yield name, left.size, left.mean(), left.std(ddof=1)


def sentences(table: pd.DataFrame) -> str:
    """Say what becomes of D without pre-training. Depths of one checkpoint are not pooled."""
    lines = []
    for row in table[~table["pre-trained"]].to_dict("records"):
        d = f"D = {said(row, D_ENDS, '.1f')}" if np.isfinite(row["D"]) else claims.NOT_TESTABLE
        lines.append(
            f"Without pre-training ({row['encoder']}) the tasks end "
            f"{100 * row['above chance by']:.1f} points above chance, {row['tasks']} of them "
            f"learned: {d}."
        )
    return "\n".join(lines)


@styled
def plot_encoders(table: pd.DataFrame) -> Figure:
    """Draw, left: D of each encoder beside random heads'. Right: what it learned."""
    figure, (left, right) = panels(2, 0.9 + 0.27 * len(table), sharey=True, width_ratios=[1.5, 1])
    rows, random = range(len(table)), table["random heads"]
    label = "dissociation D, mean over tasks, 10 and 30 % pruned (points)"
    forest(left, table["encoder"], columns(table, D_ENDS), label)
    set_limits(left, [*table["D"], *random], table["low"], table["high"], "x")
    look: Look = {"color": GREY, "markersize": 11, "mew": 2, "label": "random heads, matched"}
    left.plot(random, rows, "|", **look)
    zero(left)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.barh(rows, table["above chance by"], color="#bbbbbb", height=0.55)
    right.set(xlabel="score above chance (points)")
    percent(right, "x")
    return figure


@styled
def plot_selections(table: pd.DataFrame) -> Figure:
    """Draw, left: D that each way to choose heads yields. Right: agreement with the first."""
    figure, (left, right) = panels(2, 0.9 + 0.24 * len(table), sharey=True, width_ratios=[1.5, 1])
    label = "dissociation D, mean over tasks (points)"
    forest(left, table["selection"], columns(table, D_ENDS), label)
    zero(left)
    r = table["rank correlation"]
    right.barh(range(len(table)), r.fillna(0), color="#bbbbbb", height=0.55)
    right.set(xlabel="rank correlation with the first", xlim=(min(0, r.min()), 1))
    return figure
