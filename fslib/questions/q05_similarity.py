"""Notebook 05: claim C2, the more similar two tasks, the weaker the specialization of a model trained on both?"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import (
    LEAST_TASKS,
    Evidence,
    Part,
    above_best_constant,
    correlation_over_pairs,
    gate_examples,
    learned,
    mantel,
    scored,
)
from fslib.iap import IAP
from fslib.intervals import Interval
from fslib.plot import COLOURS, MARKERS, panels, set_limits, styled
from fslib.study.profiles import SHARED, shared_by
from fslib.study.study import Study
from fslib.study.units import MEASURES

UNKNOWN = "(not known)"
BETWEEN = " + "  # the tasks of a pair
NAMED = 15  # pairs: more than that are told apart by what they share, not by name
PRIMARY = "importance"  # the similarity that decides on C2, chosen beforehand; the others show how much hangs on it


def _iaps(study: Study) -> dict[tuple[str, str], IAP]:
    """Return {pair: what pruning did to the models of both tasks}, over seeds."""
    return {
        pair: IAP.over_seeds([units.prune.iap(study.store) for units in chains])
        for pair, chains in study.pair_units().items()
    }


def gate(study: Study) -> dict[str, Interval]:
    """Return, per task, how far its score lies above the best constant answer, over the models of all its pairs.

    On the half of the evaluation examples that no score is computed on.
    """
    above, recorded = {}, _iaps(study)
    for task in study.pair_tasks:
        iaps = [iap for pair, iap in recorded.items() if task in pair]
        metric = iaps[0].metrics[iaps[0].tasks.index(task)]
        examples = [gate_examples(iap, task) for iap in iaps]
        predictions = np.concatenate([part.predictions for part in examples])
        above[task] = above_best_constant(task, metric, predictions, examples[0].labels)
    return above


def pairs(study: Study) -> pd.DataFrame:
    """Return one row per pair of tasks: five similarities, and the dissociation of models trained on that pair.

    shared: question, text, both or neither, where that is known. enters: whether both tasks are learned, so that the
    pair counts. D: mean over seeds, with its interval.
    """
    matrices, passed = _matrices(study), learned(gate(study))
    rows = []
    for pair, iap in _iaps(study).items():
        d = scored(iap).dissociation(draws=study.profile.draws).mean
        row: dict[str, object] = {"pair": BETWEEN.join(pair), "shared": shared_by(*pair) or ""}
        row |= {m: matrices[m].loc[pair] for m in MEASURES}
        row |= {"enters": set(pair) <= set(passed), "D": d.value, "low": d.low, "high": d.high}
        rows.append(row | {"random heads": d.random, "p": d.p})
    return pd.DataFrame(rows)


def by_shared(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per thing that two tasks share: how many pairs of `pairs` do, their D and importance similarity.

    If some pairs share the text alone and others nothing, a last row has both: does similarity count beyond the
    question? rank correlation: of importance similarity with D among these pairs; low, high: its jackknife
    over tasks, of eight or more. A description, which decides nothing: it was not fixed beforehand.
    """
    known = table[table["enters"] & (table["shared"] != "")]
    groups = {what: part for what in SHARED if len(part := known[known["shared"] == what])}
    if {"text", "neither"} <= groups.keys():
        groups["not the question"] = known[known["shared"].isin(["text", "neither"])]
    rows = []
    for shared, part in groups.items():
        row = {
            "the two tasks share": shared,
            "pairs": len(part),
            PRIMARY: part[PRIMARY].mean(),
            "D": part["D"].mean(),
        }
        row |= {"lowest D": part["D"].min(), "highest D": part["D"].max()}
        found = correlation_over_pairs(
            *(_matrix(part, column).to_numpy() for column in (PRIMARY, "D"))
        )
        row["rank correlation"] = found.value
        enough = found.df + 1 >= LEAST_TASKS
        rows.append(row | (_ends(found) if enough else {"low": np.nan, "high": np.nan}))
    columns = [
        "the two tasks share",
        "pairs",
        PRIMARY,
        "D",
        "lowest D",
        "highest D",
        "rank correlation",
        "low",
        "high",
    ]
    return pd.DataFrame(rows, columns=columns)


def _ends(correlation: Interval) -> dict[str, float]:
    """Return both ends of a correlation's 95 % interval, cut to [-1, 1], where a correlation lies."""
    return {"low": max(correlation.low, -1.0), "high": min(correlation.high, 1.0)}


def _matrix(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of `pairs` as tasks by tasks; NaN for a pair without a row."""
    pairs = table["pair"].str.split(BETWEEN, regex=False)
    tasks = list(dict.fromkeys(task for pair in pairs for task in pair))
    frame = pd.DataFrame(np.nan, tasks, tasks)
    for (a, b), value in zip(pairs, table[column], strict=True):
        frame.loc[a, b] = frame.loc[b, a] = value
    return frame


def _matrices(study: Study) -> dict[str, pd.DataFrame]:
    """Return {measure: tasks by tasks}, from the record."""
    result = study.store.get(study.similarity()).result
    return {
        m: pd.DataFrame(result["similarity"][m], result["tasks"], result["tasks"]) for m in MEASURES
    }


def correlations(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per similarity: its rank correlation with D over pairs, which C2 says is negative.

    table: of `pairs`. Over the tasks that are learned. Interval: jackknife over tasks; p: one-sided, by exchanging the
    names of tasks (Mantel's test), since pairs that share a task are not independent. NaN for fewer than four tasks,
    and where a D is not defined.
    """
    tasks = learned(gate(study))
    d = _matrix(table, "D").reindex(index=tasks, columns=tasks).to_numpy()
    rows = []
    for measure, frame in _matrices(study).items():
        found = mantel(frame.loc[tasks, tasks].to_numpy(dtype=float), d, np.random.default_rng(0))
        row: dict[str, object] = {
            "similarity": measure,
            "rank correlation with D": found.interval.value,
        }
        row |= {**_ends(found.interval), "se": found.interval.se, "p": found.p}
        rows.append(row | {"tasks": len(tasks), "pairs": len(tasks) * (len(tasks) - 1) // 2})
    return pd.DataFrame(rows)


def primary(table: pd.DataFrame) -> pd.Series:
    """Return the row of `correlations` that decides on C2."""
    return table.set_index("similarity").loc[PRIMARY]


def decide(table: pd.DataFrame) -> Evidence:
    """Return what there is on C2, from `correlations`: the claim is that the correlation is below 0."""
    row = primary(table)
    tasks = int(row["tasks"])
    interval = Interval(float(row["rank correlation with D"]), float(row["se"]), tasks - 1).scaled(
        -1.0
    )
    failed = (
        f"{tasks} tasks are learned, and a correlation over pairs needs {LEAST_TASKS}"
        if tasks < LEAST_TASKS
        else ""
    )
    return Evidence("C2", (Part("minus the rank correlation", interval, float(row["p"])),), failed)


@styled
def plot_similarity(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """Draw one panel per measure: similarity of the pair against the dissociation of a model trained on it."""
    measures = list(correlations["similarity"])
    figure, axes = panels(len(measures) + 1, 2.3, 3, sharey=True)
    for ax, (_, row) in zip(axes, correlations.iterrows(), strict=False):
        for (_, pair), (colour, marker, name) in zip(
            table.iterrows(), _pair_looks(table), strict=True
        ):
            ax.errorbar(
                pair[row["similarity"]],
                pair["D"],
                yerr=[[pair["D"] - pair["low"]], [pair["high"] - pair["D"]]],
                fmt=marker,
                color=colour,
                markerfacecolor=colour if pair["enters"] else "white",
                elinewidth=0.6,
                capsize=2,
                label=name,
            )
        ax.axhline(0, color="black", linewidth=0.6)
        set_limits(ax, table["D"], table["low"], table["high"])
        rho = row["rank correlation with D"]
        known = f": {rho:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if np.isfinite(rho) else ""
        ax.set_title(f"{row['similarity']}{known}")
        ax.set_xlabel("similarity")
    for ax in axes[::3]:
        ax.set_ylabel("dissociation D (points)")
    handles, labels = axes[0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    once = {name: found[name] for name in (*SHARED, *labels) if name in found}
    axes[-1].axis("off")
    title = "model trained on" if len(once) == len(table) else "the two tasks share"
    axes[-1].legend(once.values(), once.keys(), loc="center", title=title)
    return figure


def _pair_looks(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return colour, marker and name of every pair: its own, or, of many pairs, by what its tasks share."""
    if len(table) > NAMED:
        order = {what: i for i, what in enumerate((*SHARED, UNKNOWN))}
        return [
            (COLOURS[order[w]], MARKERS[order[w]], w) for w in table["shared"].replace("", UNKNOWN)
        ]
    return [
        (COLOURS[i % 7], MARKERS[(i + i // 7) % 7], name) for i, name in enumerate(table["pair"])
    ]
