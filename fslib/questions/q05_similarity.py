"""Notebook 05: claim C2, the more similar two tasks, the weaker the specialization on both?"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib import claims
from fslib.iap import IAP
from fslib.intervals import Interval
from fslib.plot import COLOURS, MARKERS, Look, panels, set_limits, styled, whiskers, zero
from fslib.questions.tables import D_ENDS, Rows, columns, said, scope, table_of
from fslib.study.profiles import SHARED, question_of, shared_by
from fslib.study.study import Study
from fslib.study.units import MEASURES

UNKNOWN = "(not known)"
BETWEEN = " + "  # the tasks of a pair
NAMED = 15  # pairs: more than that are told apart by what they share, not by name
PRIMARY = (
    "importance"  # the similarity that decides, chosen beforehand; others show what hangs on it
)
D_RANGE = ("D", "lowest D", "highest D")
CORRELATION = "rank correlation with D"
GIVEN = "given whether they ask the same"  # partial correlation
Pruned = Mapping[tuple[str, str], IAP]  # of the models of every pair of tasks, over seeds


def _pruned(study: Study) -> Pruned:
    """Return {pair: what pruning did to the models of both tasks}, over seeds."""
    return {
        pair: IAP.over_seeds([units.prune.iap(study.store) for units in chains])
        for pair, chains in study.pair_units().items()
    }


def _learned(study: Study, pruned: Pruned) -> list[str]:
    """Name the tasks above the best constant answer, over the models of all their pairs.

    On the half of the evaluation examples that no score is computed on.
    """
    above = {}
    for task in study.pair_tasks:
        iaps = [iap for pair, iap in pruned.items() if task in pair]
        metric = iaps[0].metrics[iaps[0].tasks.index(task)]
        examples = [claims.gate_examples(iap, task) for iap in iaps]
        predictions = np.concatenate([part.predictions for part in examples])
        above[task] = claims.above_best_constant(task, metric, predictions, examples[0].labels)
    return claims.learned(above)


def _similarities(study: Study) -> dict[str, pd.DataFrame]:
    """Return {measure: tasks by tasks}, from the record."""
    result = study.store.get(study.similarity()).result
    names, found = result["tasks"], result["similarity"]
    return {measure: pd.DataFrame(found[measure], names, names) for measure in MEASURES}


@table_of("pair", "shared", *MEASURES, "enters", *D_ENDS, "random heads", "p")
def pairs(study: Study) -> Rows:
    """Return a row per pair of tasks: five similarities, and D of the models trained on both.

    shared: question, text, both or neither, where that is known. enters: whether both tasks are
    learned, so that the pair counts. D: mean over seeds, with its interval.
    """
    similarities, pruned = _similarities(study), _pruned(study)
    passed = set(_learned(study, pruned))
    for pair, iap in pruned.items():
        d = claims.scored(iap).dissociation(draws=study.profile.draws).mean
        similar = [frame.loc[pair] for frame in similarities.values()]
        names = BETWEEN.join(pair), shared_by(*pair) or ""
        yield *names, *similar, set(pair) <= passed, d.value, d.low, d.high, d.random, d.p


@table_of("the two tasks share", "pairs", PRIMARY, *D_RANGE, "rank correlation", "low", "high")
def by_shared(table: pd.DataFrame) -> Rows:
    """Return a row per thing that two tasks share: pairs of `pairs`, their D and similarity.

    If some pairs share the text alone and others nothing, a last row has both: does similarity
    count beyond the question? rank correlation: of importance similarity with D among these pairs;
    low, high: its jackknife over tasks, of eight or more. A description, which decides nothing: it
    was not fixed beforehand.
    """
    known = table[table["enters"] & (table["shared"] != "")]
    groups = {what: part for what in SHARED if len(part := known[known["shared"] == what])}
    if {"text", "neither"} <= groups.keys():
        groups["not the question"] = known[known["shared"].isin(["text", "neither"])]
    for what, part in groups.items():
        d = part["D"]
        found = claims.correlation_over_pairs(
            *(_matrix(part, k).to_numpy() for k in (PRIMARY, "D"))
        )
        ends = _ends(found) if found.df + 1 >= claims.LEAST_TASKS else (np.nan, np.nan)
        means = part[PRIMARY].mean(), d.mean()
        yield what, len(part), *means, d.min(), d.max(), found.value, *ends


def _ends(correlation: Interval) -> tuple[float, float]:
    """Return the ends of a correlation's 95 % interval, cut to where a correlation lies."""
    return max(correlation.low, -1.0), min(correlation.high, 1.0)


def _matrix(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of `pairs` as tasks by tasks; NaN for a pair without a row."""
    pairs = table["pair"].str.split(BETWEEN, regex=False)
    tasks = list(dict.fromkeys(task for pair in pairs for task in pair))
    frame = pd.DataFrame(np.nan, tasks, tasks)
    for (a, b), value in zip(pairs, table[column], strict=True):
        frame.loc[a, b] = frame.loc[b, a] = value
    return frame


@table_of("similarity", "given", CORRELATION, "low", "high", "se", "p", "tasks", "pairs")
def correlations(study: Study, table: pd.DataFrame) -> Rows:
    """Return a row per similarity: its rank correlation with D, which C2 says is negative.

    Over pairs of tasks that are learned. Interval: jackknife over tasks; p: two-sided, by
    exchanging the names of tasks (Mantel's test), since pairs that share a task are not
    independent. NaN for fewer than four tasks, and where a D is not defined.

    Args:
        study: The study.
        table: Of `pairs`.
    """
    d = _matrix(table[table["enters"]], "D")
    tasks, n = list(d.index), len(d)
    for measure, frame in _similarities(study).items():
        similar = frame.loc[tasks, tasks].to_numpy(dtype=float)
        for name, given in {"": None, GIVEN: asks_the_same(tasks)}.items():
            if given is not None or not name:
                found = claims.mantel(similar, d.to_numpy(), np.random.default_rng(0), given)
                i, pairs = found.interval, n * (n - 1) // 2
                yield measure, name, i.value, *_ends(i), i.se, found.p, n, pairs


def asks_the_same(tasks: Sequence[str]) -> np.ndarray | None:
    """Return which tasks ask the same question, 1 or 0; None where some task's is not known."""
    asked = np.array([question_of(task) for task in tasks])
    return (asked[:, None] == asked).astype(float) if all(asked) else None


@table_of("without tasks that ask about", "tasks", CORRELATION, "low", "high", "p")
def without_question(study: Study, table: pd.DataFrame) -> Rows:
    """Return the correlation that decides, without the tasks of each question; exploratory."""
    d, similar = _matrix(table[table["enters"]], "D"), _similarities(study)[PRIMARY]
    asked = {task: question_of(task) for task in d.index}
    for question in dict.fromkeys(asked.values()):
        left = [task for task in d.index if asked[task] != question]
        a, b = (frame.loc[left, left].to_numpy(dtype=float) for frame in (similar, d))
        found = claims.mantel(a, b, np.random.default_rng(0))
        i = found.interval
        yield question or "(not known)", len(left), i.value, *_ends(i), found.p


def decide(table: pd.DataFrame, of: str) -> claims.Claim:
    """Return what there is on C2: that the correlation is below 0, also given the question.

    Args:
        table: Of `correlations`.
        of: The scope.
    """
    rows = table[table["similarity"] == PRIMARY]
    tasks, least = int(rows["tasks"].iloc[0]), claims.LEAST_TASKS
    counted = tasks or "fewer than two"
    few = f"{counted} tasks are learned, and a correlation over pairs needs {least}"
    parts = []
    for row in rows.to_dict("records"):
        interval = Interval(-float(row[CORRELATION]), float(row["se"]), tasks - 1)
        what = ", ".join(filter(None, ["minus the rank correlation", row["given"]]))
        parts.append(claims.Part(what, interval, float(row["p"])))
    return claims.Claim("C2", tuple(parts), of, tasks, few if tasks < least else "")


def scope_of(study: Study) -> str:
    """Say what C2 is decided on."""
    p, pairs = study.profile, study.pair_units()
    steps = next(iter(pairs.values()))[0].train.steps
    more = f"{len(pairs)} pairs of tasks, models of each: {p.pair_seeds}"
    trainings = len(pairs) * p.pair_seeds
    return scope(p.small_encoder, trainings, steps, study.pair_tasks, more)


@styled
def plot_similarity(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """Draw a panel per measure: similarity of a pair against D of a model trained on both."""
    correlations = correlations[correlations["given"] == ""]
    figure, axes = panels(len(correlations) + 1, 2.3, 3, sharey=True)
    for ax, (_, row) in zip(axes, correlations.iterrows(), strict=False):
        for (_, pair), look in zip(table.iterrows(), _pair_looks(table), strict=True):
            face = {"markerfacecolor": look["color"] if pair["enters"] else "white"}
            ends = pair[list(D_ENDS)]
            whiskers(ax, pair[row["similarity"]], ends, elinewidth=0.6, **look, **face)
        zero(ax, "y")
        set_limits(ax, *columns(table, D_ENDS))
        estimate = said(row, (CORRELATION, "low", "high"))
        known = f": {estimate}" if np.isfinite(row[CORRELATION]) else ""
        ax.set(title=f"{row['similarity']}{known}", xlabel="similarity")
    for ax in axes[::3]:
        ax.set_ylabel("dissociation D (points)")
    handles, labels = axes[0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    once = {name: found[name] for name in (*SHARED, *labels) if name in found}
    axes[-1].axis("off")
    title = "model trained on" if len(once) == len(table) else "the two tasks share"
    axes[-1].legend(once.values(), once.keys(), loc="center", title=title)
    return figure


def _pair_looks(table: pd.DataFrame) -> list[Look]:
    """Return how each pair is drawn: by its own look, or, of many, by what its tasks share."""
    if len(table) > NAMED:
        places = [(*SHARED, UNKNOWN).index(what or UNKNOWN) for what in table["shared"]]
        looks = [(i, i, (*SHARED, UNKNOWN)[i]) for i in places]
    else:
        looks = [(i % 7, (i + i // 7) % 7, name) for i, name in enumerate(table["pair"])]
    return [{"color": COLOURS[c], "fmt": MARKERS[m], "label": name} for c, m, name in looks]
