"""Notebook 03: claim C1, do a task's own important heads matter more to it than other heads?"""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslib import claims as rules
from fslib import plot
from fslib.iap import IAP, Dissociation, double_dissociations, score_left
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import GREY, Look, band, looks, panels, percent, styled, whiskers, zero
from fslib.questions.tables import D_ENDS, SCORE_ENDS, Rows, columns, ends, scope, table_of
from fslib.scoring import chance_level
from fslib.study.profiles import question_of, shared_by
from fslib.study.study import Study

MOST_ORDERED = 8  # tasks: 40,320 orders
SHOWN_ORDERS = 3
# lesions that are compared on one task: in words, and by what their task shares with it
COMPARED = (
    ("another task with its question", "one that shares nothing", {"question"}, {"neither"}),
    ("another task on its text", "one that shares nothing", {"text"}, {"neither"}),
    ("the task itself", "another with its question", {"itself"}, {"question", "question and text"}),
)
# columns of `by_task`: fields of `fslib.iap.Point`
POINT = {"D": "value", "low": "low", "high": "high", "p": "p", "random heads": "random"}
POINT |= {"above random": "above", "above low": "above_low", "above high": "above_high"}


@table_of("task", "above the best constant answer", "low", "high", "enters")
def gate(study: Study) -> Rows:
    """Return a row per task: its unpruned score above the best constant answer, and if it enters D.

    On the half of the evaluation examples that no score is computed on.
    """
    above = rules.above_constant(study.iap())
    for task, interval in above.items():
        yield task, *ends(interval), task in rules.learned(above)


def not_testable(iap: IAP) -> str:
    """Say which gate of C1 these models do not pass, or nothing ("") if they pass them all."""
    count = len(rules.learned(rules.above_constant(iap)))
    if count < 2:
        return f"{count} of {len(iap.tasks)} tasks are learned (above the best constant answer)"
    return "" if iap.controls else "there are no random heads to compare with"


def decide(result: Dissociation, of: str, failed: str) -> rules.Claim:
    """Return what there is on C1: D specific to the task, and beyond that of random heads.

    Args:
        result: D of the tasks that enter.
        of: The scope.
        failed: Of `not_testable`.
    """
    own = result.measure().interval()
    parts = [rules.Part("own lesion against others'", own, result.mean.p_shared)]
    if result.controls is not None:
        above = result.measure(above_random=True).interval()
        parts.append(rules.Part("top heads against random ones", above))
    return rules.Claim("C1", tuple(parts), of, len(result.top.values), failed)


def scope_of(study: Study, tasks: Sequence[str]) -> str:
    """Say what C1 is decided on: the main models, and the tasks that enter."""
    return scope(study.profile.encoder, len(study.seeds), study.profile.steps, tasks)


def _mean_score(iap: IAP, task: str, sets: np.ndarray) -> Measure:
    """Return a task's score, the mean over sets of predictions (seeds, sets, n)."""
    metric, labels = iap.metrics[iap.tasks.index(task)], iap.labels[task]
    each = [score_measure(task, metric, sets[:, i], labels) for i in range(sets.shape[1])]
    return mean_of(each)


@table_of("scored", "pruned", "fraction", *SCORE_ENDS, "chance")
def pruning(study: Study) -> Rows:
    """Return scores under every lesion: a row per scored task, fraction, and pruned task.

    On all tasks, and all examples that lesions were evaluated on. pruned: a task, or "random", the
    mean over the scored task's own matched controls. low, high: 95 % interval of the score, over
    seeds and examples. chance: the score of the best constant answer.
    """
    iap = study.iap()
    for u, (task, metric) in enumerate(zip(iap.tasks, iap.metrics, strict=True)):
        chance = chance_level(metric, iap.labels[task])
        for f, fraction in enumerate((0.0, *iap.fractions)):
            for t, pruned in enumerate((*iap.tasks, "random")):
                if not f:
                    sets = iap.unpruned[task][:, None]
                elif pruned == "random":
                    sets = iap.random.predictions[task][:, f - 1, u]
                else:
                    sets = iap.top.predictions[task][:, f - 1, [t]]
                yield task, pruned, fraction, *ends(_mean_score(iap, task, sets).interval()), chance


def retained(study: Study) -> dict[float, pd.DataFrame]:
    """Return a table per fraction, tasks by tasks: % of its score that the row's lesion leaves."""
    iap = study.iap()
    left = score_left(iap.top.scores, iap.baseline()[:, None, None]).mean(0)
    index = pd.Index(iap.tasks, name="top heads pruned of")
    columns = pd.Index(iap.tasks, name="scored")
    return {f: pd.DataFrame(left[i], index, columns) for i, f in enumerate(iap.fractions)}


@table_of("lesion of", "hurts more than of", "by", "low", "high", "p", "MDE", "by task")
def shared_lesions(iap: IAP) -> Rows:
    """Return how much more a lesion hurts for what its task shares with the scored one.

    In points of score, on the same scored task: the mean under lesions of other tasks that share
    the question, or the text, against that under lesions of tasks that share neither; and under
    its own lesion against that of tasks that share the question. Mean over fractions, and over the
    scored tasks that have both kinds; no row where no task has.
    """
    # each task's score under every lesion, with what the lesion's task shares with it
    under: dict[str, list[tuple[str | None, Measure]]] = {}
    for u in iap.tasks:
        shares = ["itself" if t == u else shared_by(t, u) for t in iap.tasks]
        sets = np.moveaxis(iap.top.predictions[u], 2, 0)  # (tasks, seeds, fractions, n)
        under[u] = list(zip(shares, (_mean_score(iap, u, s) for s in sets), strict=True))
    for lesion, than, *kinds in COMPARED:
        by_task = {}
        for u, scores in under.items():
            like, unlike = ([m for shares, m in scores if shares in kind] for kind in kinds)
            if like and unlike:
                by_task[u] = (mean_of(unlike) - mean_of(like)).scaled(100.0)
        if by_task:
            i = mean_of(list(by_task.values())).interval()
            listed = ", ".join(f"{u} {m.values.mean():+.1f}" for u, m in by_task.items())
            yield lesion, than, *ends(i), i.p, i.mde, listed


def by_task(result: Dissociation) -> pd.DataFrame:
    """Return each task's D, its difference from matched random heads, and their means."""
    names = (*result.tasks, "mean")
    table = pd.DataFrame([result.of(name)._asdict() for name in names], names)
    table = table.rename_axis("task").reset_index()
    return table[["task", *POINT.values()]].set_axis(["task", *POINT], axis=1)


def by_seed(result: Dissociation, seeds: Sequence[int]) -> pd.DataFrame:
    """Return a row per seed: D of each task in that model, and their mean."""
    each = {name: result.of(name).by_seed for name in (*result.tasks, "mean")}
    return pd.DataFrame({"seed": seeds, **each})


@table_of("without tasks that ask about", "tasks", *D_ENDS, "random heads", "p, shared")
def without_question(iap: IAP, draws: int) -> Rows:
    """Return D of the tasks that are left without those of each question in turn; exploratory."""
    asked = {task: question_of(task) for task in iap.tasks}
    for question in ("", *dict.fromkeys(asked.values())):
        left = [task for task in iap.tasks if not question or asked[task] != question]
        if len(left) > 1:
            d = iap.part(left).dissociation(draws=draws).mean
            name = question or "(none left out)"
            yield name, len(left), d.value, d.low, d.high, d.random, d.p_shared


def sentence(result: Dissociation, of: str, failed: str) -> str:
    """Say what becomes of C1 by itself, before p is corrected for the other claims."""
    points = {task: result.of(task) for task in result.tasks}
    single = rules.p_text(result.mean.p)
    carry = [task for task, d in points.items() if d.low > 0 and not d.above_low <= 0]
    return (
        f"C1 {decide(result, of, failed)}\nBoth intervals lie above 0 in {len(carry)} of "
        f"{len(result.tasks)} tasks: {', '.join(carry) or 'none'}.\n"
        f"Each model relabelled by itself, a weaker test: {single}."
    )


def crossings(iap: IAP) -> str:
    """Count the pairs of tasks that cross over: each is hurt more by its own lesion."""
    left = score_left(iap.top.scores, iap.baseline()[:, None, None]).mean((0, 1))
    cross = double_dissociations(left)
    pairs = list(combinations(range(len(iap.tasks)), 2))
    found = [f"{iap.tasks[i]} and {iap.tasks[j]}" for i, j in pairs if cross[i, j]]
    count = f"{len(found)} of {len(pairs)} pairs of tasks cross over (mean over fractions)"
    return f"{count}: {', '.join(found) or 'none'}"


def orders_above(iap: IAP) -> str:
    """Say which exchanges of lesions, alike in all models, give a larger mean D (lesion)."""
    n = len(iap.tasks)
    if n > MOST_ORDERED:
        return f"the orders of {n} tasks are too many to list"
    scores = iap.top.scores[:, iap.headline]
    left = score_left(scores, iap.baseline()[:, None, None]).mean((0, 1))  # (pruned, scored)
    # mean D falls with what is left under own lesions; nothing else changes with an order
    own = {order: float(left[list(order), range(n)].sum()) for order in permutations(range(n))}
    least = own[tuple(range(n))] - 1e-12
    better = sorted((total, order) for order, total in own.items() if total < least)
    named = [", ".join(_cycles(order, iap.tasks)) for _, order in better[:SHOWN_ORDERS]]
    more = ["..."] if len(better) > SHOWN_ORDERS else []
    count = f"{len(better)} of {len(own)} orders of the lesions give a larger mean D"
    return f"{count}: {'; '.join(named + more) or 'none'}"


def _cycles(order: Sequence[int], tasks: Sequence[str]) -> list[str]:
    """Return which tasks an order exchanges with each other, a text per group."""
    found, left = [], set(range(len(order)))
    while left:
        cycle = [min(left)]
        while (after := order[cycle[-1]]) != cycle[0]:
            cycle.append(after)
        left -= set(cycle)
        if len(cycle) > 1:
            found.append(" with ".join(tasks[i] for i in cycle))
    return found


@styled
def plot_by_task(result: Dissociation, tasks: Sequence[str]) -> Figure:
    """Draw, left: D of each task and their mean, beside random heads'. Right: relabelled means.

    Args:
        result: D, of which every seed is drawn as a dot.
        tasks: All of the study, so that each keeps its colour.
    """
    style, points = looks(tasks), {name: result.of(name) for name in (*result.tasks, "mean")}
    figure, (left, right) = panels(2, 0.9 + 0.34 * len(points), width_ratios=[1.7, 1])
    for row, (name, d) in enumerate(points.items()):
        colour = style[name]["color"] if name != "mean" else "black"
        place = np.full(len(d.by_seed), row - 0.22)
        left.scatter(d.by_seed, place, s=9, color=colour, alpha=0.5, lw=0)
        whiskers(left, row - 0.05, (d.value, d.low, d.high), "x", fmt="o", color=colour)
        random = d.random, d.random_low, d.random_high
        whiskers(left, row + 0.2, random, "x", fmt="D", color=GREY, markersize=3.5)
    every = pd.DataFrame([d._asdict() for d in points.values()])
    middle = np.concatenate([every["value"], every["random"], *every["by_seed"]])
    plot.set_limits(left, middle, every[["low", "random_low"]], every[["high", "random_high"]], "x")
    zero(left)
    left.set_yticks(range(len(points)), list(points))
    left.invert_yaxis()
    left.set(xlabel="dissociation D (points); grey: random heads")
    null = result.null[:, -1, -1]
    right.hist(null[np.isfinite(null)], bins=30, color="#bbbbbb")
    right.axvline(result.mean.value, color="black", linewidth=2)
    right.set(xlabel="mean D, tasks relabelled (points)", yticks=[])
    right.set_title(rules.p_text(result.mean.p))
    return figure


@styled
def plot_pruning(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw a panel per scored task, of `pruning`: own lesion, other tasks', and random heads'."""
    style = looks(tasks)
    figure, axes = panels(len(tasks), 2.6, min(2, len(tasks)), sharex=True)
    for ax, scored in zip(axes, tasks, strict=True):
        part = table[table["scored"] == scored]
        _draw_lesions(ax, part, scored, style)
        low, high = part["score"].min(), part["score"].max()
        margin = 0.3 * (high - low) + 0.02  # intervals may reach far
        ax.set(ylabel="score (%)", ylim=(low - margin, high + margin))
        ax.set_title(f"scored: {scored}", color=style[scored]["color"], fontweight="bold")
        percent(ax)
        percent(ax, "x")
    for ax in axes[-min(2, len(tasks)) :]:
        ax.set_xlabel("heads pruned (%)")
        ax.tick_params(labelbottom=True)  # also where the panel below stays empty
    for line in plot.legend_below(figure, axes[0], 3).get_lines():
        line.set_linewidth(1)  # thick is a panel's own task, another in each
    return figure


def _draw_lesions(ax: Axes, part: pd.DataFrame, scored: str, style: dict[str, Look]) -> None:
    """Draw one task's scores against the fraction pruned, a line per lesion."""
    random = part[part["pruned"] == "random"]
    band(ax, random["fraction"], columns(random, SCORE_ENDS), "their mean", "random heads")
    for pruned in style:
        line = part[part["pruned"] == pruned]
        own = pruned == scored
        thick: Look = {"linewidth": 2.2, "zorder": 3} if own else {"linewidth": 1, "alpha": 0.75}
        look = style[pruned] | thick | {"label": f"top heads of {pruned}"}
        ax.plot(line["fraction"], line["score"], **look)
        if own:
            look = {"fmt": "none", "color": style[pruned]["color"]}
            whiskers(ax, line["fraction"], columns(line, SCORE_ENDS), **look)
    look = {"color": "black", "linestyle": ":", "linewidth": 0.8, "label": "best constant answer"}
    ax.axhline(part["chance"].iloc[0], **look)


@styled
def plot_dissociation(results: Sequence[Dissociation], tasks: Sequence[str]) -> Figure:
    """Draw a panel per convention: mean D (black), each task's, and random heads' (band).

    Args:
        results: D in each convention.
        tasks: All of the study, so that each keeps its colour.
    """
    figure, axes = panels(len(results), 3.0)
    for ax, result in zip(axes, results, strict=True):
        x, style, mean = np.array(result.fractions), looks(tasks), result.along()
        band(ax, x, (mean.random, mean.random_low, mean.random_high), "mean, random heads")
        each = {task: result.along(task).value for task in result.tasks}
        for task, d in each.items():
            ax.plot(x, d, **style[task], linewidth=1, alpha=0.8, label=task)
        look: Look = {"color": "black", "marker": "o", "linewidth": 2.2, "capsize": 3}
        whiskers(ax, x, (mean.value, mean.low, mean.high), **look, label="mean, top heads")
        zero(ax, "y")
        by_task = np.concatenate(list(each.values()))
        low, high = (mean.low, mean.random_low), (mean.high, mean.random_high)
        plot.set_limits(ax, by_task, np.concatenate(low), np.concatenate(high))
        ax.set(title=f"convention: {result.convention}", ylabel="dissociation D (points)")
        ax.set(xlabel="heads pruned (%)", xticks=x)
        percent(ax, "x")
    plot.legend_below(figure, axes[0], 4)
    return figure
