"""Notebook 03: claim C1, do a task's own important heads matter more to it than other heads?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.dissociation import Dissociation, score_left
from fslib.study.evidence import verdict
from fslib.study.plots import GREY, looks, panels, percent, styled
from fslib.study.records import Unit
from fslib.study.study import Study, plans


@plans("03")
def plan(study: Study) -> list[Unit]:
    """Return the main models, the importance of their heads, and their pruning."""
    units = [study.units(s) for s in study.seeds]
    return [*(u.train for u in units), *(u.importance for u in units), *(u.prune for u in units)]


def pruning(study: Study) -> pd.DataFrame:
    """Return scores under every lesion: one row per scored task, fraction, and pruned task or "random".

    low, high: 95 % interval of the score under a task's top heads. least, greatest: range over controls and seeds of
    the score under the scored task's own matched controls ("random"); a range is no interval.
    """
    iap = study.iap()
    mean, low, high = iap.score_intervals(draws=study.profile.draws)
    rows = []
    for u, scored in enumerate(iap.tasks):
        for f, fraction in enumerate((0.0, *iap.fractions)):
            shared = {"scored": scored, "fraction": fraction}
            for t, pruned in enumerate(iap.tasks):
                rows.append(
                    shared | {"pruned": pruned, "score": mean[f, t, u], "low": low[f, t, u], "high": high[f, t, u]}
                )
            control = iap.random.scores[:, f - 1, u, :, u] if f else iap.baseline()[:, u]
            span = {"least": control.min(), "greatest": control.max()}
            rows.append(shared | {"pruned": "random", "score": control.mean()} | span)
    return pd.DataFrame(rows, columns=["scored", "pruned", "fraction", "score", "low", "high", "least", "greatest"])


def retained(study: Study) -> dict[float, pd.DataFrame]:
    """Return a table per fraction, tasks by tasks: score with the row's top heads pruned, in % of the unpruned."""
    iap = study.iap()
    share = score_left(iap.top.scores, iap.baseline()[:, None, None]).mean(0)  # (fractions, pruned, scored)
    index, columns = pd.Index(iap.tasks, name="top heads pruned of"), pd.Index(iap.tasks, name="scored")
    return {f: pd.DataFrame(share[i], index, columns) for i, f in enumerate(iap.fractions)}


def by_task(result: Dissociation, seeds: Sequence[int]) -> pd.DataFrame:
    """Return each task's own D over all fractions beside that of its matched controls, and their mean.

    No p per task: with few controls a single task's is coarse (at best about 1 / (controls + 1) ** seeds).
    """
    rows = []
    for name in (*result.tasks, "mean"):
        d = result.of(name) if name != "mean" else result.mean
        row = {"task": name, "D": d.value, "low": d.low, "high": d.high, "random heads": d.null_mean}
        row["above random by"] = d.value - d.null_mean
        rows.append(row | {f"D, seed {seed}": value for seed, value in zip(seeds, d.by_seed, strict=True)})
    return pd.DataFrame(rows)


def sentence(result: Dissociation) -> str:
    """Say what becomes of C1 for this model: one test, chosen beforehand, of the mean over tasks and fractions."""
    d = result.mean
    return (
        f"C1 {verdict(d.low, d.high, d.p)} for this model: mean D = {d.value:.1f} points, "
        f"95 % interval [{d.low:.1f}, {d.high:.1f}], p = {d.p:.3f} against matched random heads."
    )


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
            band["fraction"], band["least"], band["greatest"], color=GREY, alpha=0.25, lw=0, label="random heads"
        )
        ax.plot(band["fraction"], band["score"], color=GREY, linestyle="--", linewidth=1)
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
        ax.set_title(f"scored: {scored}", color=style[scored]["color"], fontweight="bold")
        ax.set_ylabel("score (%)")
        percent(ax)
        percent(ax, "x")
    for ax in axes[-min(2, len(tasks)) :]:
        ax.set_xlabel("heads pruned (%)")
        ax.tick_params(labelbottom=True)  # also where the panel below stays empty
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def plot_dissociation(results: Sequence[Dissociation]) -> Figure:
    """Draw one panel per convention: mean dissociation (black, interval), each task's, and the matched random band."""
    figure, axes = panels(len(results), 3.0)
    for ax, result in zip(axes, results, strict=True):
        x, style, mean = np.array(result.fractions), looks(result.tasks), result.along()
        ax.fill_between(x, mean.null_low, mean.null_high, color=GREY, alpha=0.25, lw=0)
        ax.plot(x, mean.null_mean, color=GREY, linestyle="--", linewidth=1, label="mean, random heads")
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
        ax.set(title=f"convention: {result.convention}", xlabel="heads pruned (%)", ylabel="dissociation D (points)")
        ax.set_xticks(x)
        percent(ax, "x")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure
