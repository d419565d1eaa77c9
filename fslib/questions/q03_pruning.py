"""Notebook 03: claim C1, do a task's own important heads matter more to it than other heads?"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import LEAST_SEEDS, Evidence, Part, above_constant, learned, p_text
from fslib.iap import IAP, Dissociation, double_dissociations, score_left
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import GREY, looks, panels, percent, set_limits, styled
from fslib.scoring import chance_level
from fslib.study.profiles import shared_by
from fslib.study.study import Study

MOST_ORDERED = 8  # tasks: 40,320 orders
SHOWN_ORDERS = 3
# lesions that are compared on one task: in words, and by what their task shares with it
COMPARED = (
    ("another task with its question", "one that shares nothing", {"question"}, {"neither"}),
    ("another task on its text", "one that shares nothing", {"text"}, {"neither"}),
    ("the task itself", "another with its question", {"itself"}, {"question", "question and text"}),
)


def gate(study: Study) -> pd.DataFrame:
    """Return one row per task: how far its unpruned score lies above the best constant answer, and whether it enters D.

    On the half of the evaluation examples that no score is computed on.
    """
    above = above_constant(study.iap())
    passed = learned(above)
    rows = [
        {
            "task": task,
            "above the best constant answer": i.value,
            "low": i.low,
            "high": i.high,
            "enters": task in passed,
        }
        for task, i in above.items()
    ]
    return pd.DataFrame(rows)


def not_testable(iap: IAP) -> str:
    """Say which gate of C1 these models do not pass, or nothing ("") if they pass them all."""
    passed = learned(above_constant(iap))
    if len(passed) < 2:
        return (
            f"{len(passed)} of {len(iap.tasks)} tasks are learned (above the best constant answer)"
        )
    if len(iap.heads) < LEAST_SEEDS:
        return "one seed says nothing of other trainings"
    return "" if iap.controls else "there are no random heads to compare with"


def decide(result: Dissociation, failed: str) -> Evidence:
    """Return what there is on C1: D specific to the task, and beyond what random heads of the same layers give."""
    specific = Part.of("own lesion against others'", result.measure(), result.mean.p)
    parts = [specific]
    if result.controls is not None:
        parts.append(Part.of("top heads against random ones", result.measure(above_random=True)))
    return Evidence("C1", tuple(parts), failed)


def pruning(study: Study) -> pd.DataFrame:
    """Return scores under every lesion: one row per scored task, fraction, and pruned task or "random".

    low, high: 95 % interval of the score, over seeds and examples; "random" is the mean over the scored task's own
    matched controls. chance: the score of the best constant answer. On all tasks, and all examples that lesions were
    evaluated on.
    """
    iap = study.iap()
    rows = []
    for u, (task, metric) in enumerate(zip(iap.tasks, iap.metrics, strict=True)):
        chance = chance_level(metric, iap.labels[task])
        for f, fraction in enumerate((0.0, *iap.fractions)):
            for t, pruned in enumerate((*iap.tasks, "random")):
                if not f:
                    sets = iap.unpruned[task][:, None]
                elif pruned == "random":
                    sets = iap.random.predictions[task][:, f - 1, u]
                else:
                    sets = iap.top.predictions[task][:, f - 1, t][:, None]
                each = [
                    score_measure(task, metric, sets[:, c], iap.labels[task])
                    for c in range(sets.shape[1])
                ]
                i = mean_of(each).interval()
                rows.append((task, pruned, fraction, i.value, i.low, i.high, chance))
    return pd.DataFrame(
        rows, columns=["scored", "pruned", "fraction", "score", "low", "high", "chance"]
    )


def retained(study: Study) -> dict[float, pd.DataFrame]:
    """Return a table per fraction, tasks by tasks: score with the row's top heads pruned, in % of the unpruned."""
    iap = study.iap()
    share = score_left(iap.top.scores, iap.baseline()[:, None, None]).mean(
        0
    )  # (fractions, pruned, scored)
    index, columns = (
        pd.Index(iap.tasks, name="top heads pruned of"),
        pd.Index(iap.tasks, name="scored"),
    )
    return {f: pd.DataFrame(share[i], index, columns) for i, f in enumerate(iap.fractions)}


def shared_lesions(iap: IAP) -> pd.DataFrame:
    """Return one row per thing that two tasks may share: how much more a lesion hurts for it, in points of score.

    Compared are, on the same scored task, the mean scores under two kinds of lesions: those of other tasks that share
    the question, or the text, with those of tasks that share neither; and its own with those of tasks that share the
    question. Mean over fractions, and over the scored tasks that have both kinds. Without a row where no task has.
    """
    # each task's score under every lesion, with what the lesion's task shares with it
    under: dict[str, list[tuple[str | None, Measure]]] = {}
    for u, (task, metric) in enumerate(zip(iap.tasks, iap.metrics, strict=True)):
        predictions, labels = (
            iap.top.predictions[task],
            iap.labels[task],
        )  # (seeds, fractions, tasks, n)
        under[task] = []
        for t, name in enumerate(iap.tasks):
            each = [
                score_measure(task, metric, predictions[:, f, t], labels)
                for f in range(len(iap.fractions))
            ]
            under[task].append(("itself" if t == u else shared_by(name, task), mean_of(each)))
    rows = []
    for lesion, than, kind, other in COMPARED:
        by_task = {}
        for task, scores in under.items():
            like, unlike = (
                [score for shares, score in scores if shares in some] for some in (kind, other)
            )
            if like and unlike:
                by_task[task] = (mean_of(unlike) - mean_of(like)).scaled(100.0)
        if by_task:
            i = mean_of(list(by_task.values())).interval()
            row = {
                "lesion of": lesion,
                "hurts more than of": than,
                "by": i.value,
                "low": i.low,
                "high": i.high,
            }
            listed = ", ".join(f"{task} {m.values.mean():+.1f}" for task, m in by_task.items())
            rows.append(row | {"p": i.p, "MDE": i.mde, "by task": listed})
    return pd.DataFrame(
        rows,
        columns=["lesion of", "hurts more than of", "by", "low", "high", "p", "MDE", "by task"],
    )


def by_task(result: Dissociation) -> pd.DataFrame:
    """Return each task's D, its difference from matched random heads, and their means, with intervals."""
    rows = []
    for name in (*result.tasks, "mean"):
        d = result.of(name) if name != "mean" else result.mean
        row = {
            "task": name,
            "D": d.value,
            "low": d.low,
            "high": d.high,
            "p": d.p,
            "random heads": d.random,
        }
        rows.append(
            row | {"above random": d.above, "above low": d.above_low, "above high": d.above_high}
        )
    return pd.DataFrame(rows)


def by_seed(result: Dissociation, seeds: Sequence[int]) -> pd.DataFrame:
    """Return one row per seed: D of each task in that model, and their mean."""
    each = {name: result.of(name).by_seed for name in result.tasks}
    return pd.DataFrame({"seed": seeds, **each, "mean": result.mean.by_seed})


def sentence(result: Dissociation, failed: str) -> str:
    """Say what becomes of C1 for these models by themselves, before p is corrected for the other claims."""
    claim = decide(result, failed)
    carry = [
        task
        for task in result.tasks
        if result.of(task).low > 0 and not result.of(task).above_low <= 0
    ]
    lines = [f"C1 {claim}"]
    lines.append(
        f"Both intervals lie above 0 in {len(carry)} of {len(result.tasks)} tasks: {', '.join(carry) or 'none'}."
    )
    lines.append(
        f"The same relabelling for all models, a stricter test: {p_text(result.mean.p_shared)}."
    )
    return "\n".join(lines)


def crossings(iap: IAP) -> str:
    """Count the pairs of tasks that cross over, each hurt more by its own lesion than by the other's."""
    base = iap.baseline()[:, None, None]
    left = score_left(iap.top.scores, base).mean((0, 1))  # (pruned, scored)
    cross = double_dissociations(left)
    pairs = [
        f"{a} and {b}"
        for i, a in enumerate(iap.tasks)
        for j, b in enumerate(iap.tasks)
        if i < j and cross[i, j]
    ]
    count = len(iap.tasks) * (len(iap.tasks) - 1) // 2
    return f"{len(pairs)} of {count} pairs of tasks cross over (mean over fractions): {', '.join(pairs) or 'none'}"


def orders_above(iap: IAP) -> str:
    """Say which exchanges of lesions, alike in all models, give a larger mean D (lesion) than the true order."""
    n, chosen = len(iap.tasks), iap.headline
    if n > MOST_ORDERED:
        return f"the orders of {n} tasks are too many to list"
    left = score_left(iap.top.scores[:, chosen], iap.baseline()[:, None, None]).mean(
        (0, 1)
    )  # (pruned, scored)
    # D's mean falls with what is left under own lesions, and with nothing else that an order changes
    own = {order: float(left[list(order), range(n)].sum()) for order in permutations(range(n))}
    least = own[tuple(range(n))] - 1e-12
    better = sorted((total, order) for order, total in own.items() if total < least)
    named = [", ".join(_cycles(order, iap.tasks)) for _, order in better[:SHOWN_ORDERS]]
    more = ["..."] if len(better) > SHOWN_ORDERS else []
    return f"{len(better)} of {len(own)} orders of the lesions give a larger mean D: {'; '.join(named + more) or 'none'}"


def _cycles(order: Sequence[int], tasks: Sequence[str]) -> list[str]:
    """Return what an order exchanges: names of the tasks that change their places with each other, per group."""
    found, seen = [], set()
    for first in range(len(order)):
        cycle, at = [], first
        while at not in seen:
            seen.add(at)
            cycle.append(tasks[at])
            at = order[at]
        if len(cycle) > 1:
            found.append(" with ".join(cycle))
    return found


@styled
def plot_by_task(result: Dissociation, tasks: Sequence[str]) -> Figure:
    """Draw, left: D of each task and their mean, every seed a dot, beside random heads'. Right: the mean relabelled.

    tasks: all of the study, so that each keeps its colour.
    """
    style, names = looks(tasks), [*result.tasks, "mean"]
    figure, (left, right) = panels(2, 0.9 + 0.34 * len(names), width_ratios=[1.7, 1])
    points = [result.of(name) for name in names]
    for row, (name, d) in enumerate(zip(names, points, strict=True)):
        colour = style[name]["color"] if name != "mean" else "black"
        left.scatter(
            d.by_seed, np.full(len(d.by_seed), row - 0.22), s=9, color=colour, alpha=0.5, lw=0
        )
        for y, value, low, high, look in (
            (row - 0.05, d.value, d.low, d.high, {"fmt": "o", "color": colour}),
            (
                row + 0.2,
                d.random,
                d.random_low,
                d.random_high,
                {"fmt": "D", "color": GREY, "markersize": 3.5},
            ),
        ):
            left.errorbar(value, y, xerr=[[value - low], [high - value]], capsize=2, **look)
    ends = ("value", "low", "high"), ("random", "random_low", "random_high")
    middle, least, most = (
        [getattr(d, names[k]) for names in ends for d in points] for k in range(3)
    )
    set_limits(left, np.concatenate([middle, *(d.by_seed for d in points)]), least, most, "x")
    left.axvline(0, color="black", linewidth=0.6)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="dissociation D (points); grey: random heads")
    null = result.null[:, -1, -1]
    right.hist(null[np.isfinite(null)], bins=30, color="#bbbbbb")
    right.axvline(result.mean.value, color="black", linewidth=2)
    right.set(xlabel="mean D, tasks relabelled (points)", yticks=[], title=p_text(result.mean.p))
    return figure


@styled
def plot_pruning(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw one panel per evaluated task: its own lesion, the other tasks' lesions, and the matched random band.

    table: of `pruning`; fraction 0 is the unpruned model.
    """
    style = looks(tasks)
    figure, axes = panels(len(tasks), 2.6, min(2, len(tasks)), sharex=True)
    for ax, scored in zip(axes, tasks, strict=True):
        part = table[table["scored"] == scored]
        band = part[part["pruned"] == "random"]
        ax.fill_between(
            band["fraction"],
            band["low"],
            band["high"],
            color=GREY,
            alpha=0.25,
            lw=0,
            label="random heads",
        )
        ax.plot(
            band["fraction"],
            band["score"],
            color=GREY,
            linestyle="--",
            linewidth=1,
            label="their mean",
        )
        for pruned in tasks:
            line = part[part["pruned"] == pruned]
            own = pruned == scored
            ax.plot(
                line["fraction"],
                line["score"],
                **style[pruned],  # type: ignore[arg-type]
                linewidth=2.2 if own else 1,
                alpha=1 if own else 0.75,
                label=f"top heads of {pruned}",
                zorder=3 if own else 2,
            )
            if own:
                low, high = line["score"] - line["low"], line["high"] - line["score"]
                ax.errorbar(
                    line["fraction"],
                    line["score"],
                    yerr=[low, high],
                    fmt="none",
                    color=style[pruned]["color"],
                    capsize=2,
                )
        least, most = part["score"].min(), part["score"].max()
        ax.axhline(
            part["chance"].iloc[0],
            color="black",
            linestyle=":",
            linewidth=0.8,
            label="best constant answer",
        )
        ax.set_ylim(
            least - 0.3 * (most - least) - 0.02, most + 0.3 * (most - least) + 0.02
        )  # intervals may reach far
        ax.set_title(f"scored: {scored}", color=style[scored]["color"], fontweight="bold")
        ax.set_ylabel("score (%)")
        percent(ax)
        percent(ax, "x")
    for ax in axes[-min(2, len(tasks)) :]:
        ax.set_xlabel("heads pruned (%)")
        ax.tick_params(labelbottom=True)  # also where the panel below stays empty
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3)
    for line in legend.get_lines():
        line.set_linewidth(1)  # thick is a panel's own task, another in each
    return figure


@styled
def plot_dissociation(results: Sequence[Dissociation], tasks: Sequence[str]) -> Figure:
    """Draw one panel per convention: mean dissociation (black, interval), each task's, and random heads' (band).

    tasks: all of the study, so that each keeps its colour.
    """
    figure, axes = panels(len(results), 3.0)
    for ax, result in zip(axes, results, strict=True):
        x, style, mean = np.array(result.fractions), looks(tasks), result.along()
        ax.fill_between(x, mean.random_low, mean.random_high, color=GREY, alpha=0.25, lw=0)
        ax.plot(x, mean.random, color=GREY, linestyle="--", linewidth=1, label="mean, random heads")
        for task in result.tasks:
            ax.plot(x, result.along(task).value, **style[task], linewidth=1, alpha=0.8, label=task)  # type: ignore[arg-type]
        ax.errorbar(
            x,
            mean.value,
            yerr=[mean.value - mean.low, mean.high - mean.value],
            color="black",
            marker="o",
            linewidth=2.2,
            capsize=3,
            label="mean, top heads",
        )
        ax.axhline(0, color="black", linewidth=0.6)
        by_task = np.concatenate([result.along(task).value for task in result.tasks])
        low, high = (mean.low, mean.random_low, by_task), (mean.high, mean.random_high, by_task)
        set_limits(ax, by_task, np.concatenate(low), np.concatenate(high))
        ax.set(
            title=f"convention: {result.convention}",
            xlabel="heads pruned (%)",
            ylabel="dissociation D (points)",
        )
        ax.set_xticks(x)
        percent(ax, "x")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure
