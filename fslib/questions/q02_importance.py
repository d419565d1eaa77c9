"""Notebook 02: which attention heads does each task need, and can the ranking be trusted?"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.heads import head_name, top_heads
from fslib.lesions import HeadLesions
from fslib.plot import GREY, WIDTH, looks, map_of, panels, styled
from fslib.questions.tables import Rows, agreement, ends, said, table_of
from fslib.scoring import rank_correlation
from fslib.study.study import Study

ENDS = [(1 - 0.95) / 2, (1 + 0.95) / 2]  # of a 95 % percentile interval
FRACTION = 0.3  # of all heads: the top heads whose overlap is shown
OVERLAP = "overlap of the top 30 % (Jaccard)"
LAST = "share of them in the last layer"
LESIONS = ["task", "seed", "rank correlation", "low", "high", "two halves of the examples"]
LESIONS += ["largest rise: head", "points lost without it", "lost low", "lost high"]
LESIONS += ["its rank by importance", "share of heads with a rise below 0"]
LABELS = ("head", "head", "importance, share of the largest")  # of the maps of lesions


def importance_maps(study: Study) -> dict[str, np.ndarray]:
    """Return {task: (layers, heads)} importance, the mean over seeds."""
    runs = study.contributions()
    return {t: np.mean([run[t].importance() for run in runs], 0) for t in study.profile.tasks}


@table_of("task", "layer", "head", "importance", "rank")
def ranking(maps: Mapping[str, np.ndarray]) -> Rows:
    """Return a row per task and head: importance and rank; layers and heads count from 1."""
    for task, values in maps.items():
        order = np.argsort(-values, axis=None, kind="stable")
        for rank, place in enumerate(order, 1):
            layer, head = divmod(int(place), values.shape[1])
            yield task, layer + 1, head + 1, values.flat[place], rank


def steady_heads(study: Study) -> pd.DataFrame:
    """Return a row per head that is steady: in how many trainings it is in each task's top 10 %.

    Steady: in all trainings for some task, or, in some training, in the top set of every task.
    """
    tops = np.array(
        [[top_heads(run[t].importance(), 0.1) for t in run] for run in study.contributions()]
    )  # (seeds, tasks, layers, heads)
    counts, shared = tops.sum(0), tops.all(1).sum(0)
    chosen = np.argwhere((counts == len(tops)).any(0) | (shared > 0))
    rows = [[head_name(*at), *counts[(..., *at)], shared[tuple(at)]] for at in chosen.tolist()]
    return pd.DataFrame(rows, columns=["head", *study.profile.tasks, "all tasks at once"])


def task_correlations(study: Study) -> pd.DataFrame:
    """Return the rank correlation of tasks' maps, the mean over seeds.

    Always of one half of a task's examples with another half, so that sampling noise weighs the
    same on the diagonal (a task with itself) and off it.
    """
    names, runs = study.profile.tasks, study.contributions()
    table = pd.DataFrame(0.0, names, names)
    for run in runs:
        halves = {}
        for t in names:
            order = np.random.default_rng(0).permutation(len(run[t].tokens))
            parts = order[: len(order) // 2], order[len(order) // 2 :]
            halves[t] = [run[t].importance(subset=part) for part in parts]
        for a, b in product(names, names):
            r = [rank_correlation(halves[a][i], halves[b][1 - i]) for i in (0, 1)]
            table.loc[a, b] += np.mean(r) / len(runs)
    return table


@table_of("task", "seeds", "rank correlation", OVERLAP)
def seed_correlations(study: Study) -> Rows:
    """Return how a task's maps agree between seeds: models of another order and dropout."""
    runs = dict(zip(study.seeds, study.contributions(), strict=True))
    for task in study.profile.tasks:
        maps = {seed: run[task].importance() for seed, run in runs.items()}
        for i, j in sorted(combinations(study.seeds, 2), key=lambda pair: pair[1]):
            yield task, f"{i} and {j}", *agreement(maps[i], maps[j], FRACTION)


@table_of("task", "examples", "mean", "low", "high")
def stability(study: Study, repeats: int = 20) -> Rows:
    """Return the rank correlation of maps from two disjoint samples of one size.

    The mean, and the range of 95 % of `repeats` draws of each seed's model.
    """
    runs = study.contributions()
    for task in study.profile.tasks:
        n = len(runs[0][task].tokens)
        for size in [2**k for k in range(2, 20) if 2**k <= n // 2]:
            found = []
            for number, run in enumerate(runs):
                rng = np.random.default_rng([number, size])
                for _ in range(repeats):
                    samples = rng.permutation(n)[: 2 * size].reshape(2, size)
                    maps = [run[task].importance(subset=sample) for sample in samples]
                    found.append(rank_correlation(*maps))
            yield task, size, np.mean(found), *np.quantile(found, ENDS)


@table_of("normalize", "reduction", "task", "rank correlation", OVERLAP, LAST)
def choices(study: Study) -> Rows:
    """Return what layer normalization and the reduction change in maps and top heads.

    Against no normalization with token reduction; means over seeds.
    """
    for reduction, normalize in product(("token", "example"), (None, "layer")):
        for task in study.profile.tasks:
            found = []
            for run in study.contributions():
                usual = run[task].importance()
                other = run[task].importance(reduction=reduction, normalize=normalize)
                top = top_heads(other, FRACTION)
                last = top[-1].sum() / max(1, top.sum())
                found.append((*agreement(usual, other, FRACTION), last))
            yield str(normalize), reduction, task, *np.mean(found, 0)


def _lesioned(study: Study, seed: int) -> tuple[HeadLesions, dict[str, np.ndarray]]:
    """Return what every head alone is worth in a model, and {task: importance of its heads}."""
    parts = study.units(seed).importance.contributions(study.store)
    maps = {task: part.importance() for task, part in parts.items()}
    return study.lesion(seed).lesions(study.store), maps


@table_of(*LESIONS)
def lesions(study: Study) -> Rows:
    """Return how importance predicts what a head's loss costs: a row per task and model.

    The rank correlation, over heads, of importance (training examples) with the rise of the mean
    loss without the head (evaluation examples); its interval over evaluation examples (jackknife,
    within [-1, 1]); and how two halves of the examples agree on the rises
    (`HeadLesions.reliability`). Then the head without which the loss rises most (L and H count
    from 1), the points of score that are lost without it, and its rank by importance. It is a
    maximum over heads, so its rise is in part luck.
    """
    for seed in study.lesion_seeds:
        found, maps = _lesioned(study, seed)
        for task in found.tasks:
            importance, rise = maps[task], found.rise(task)
            r = found.predicted_by(task, importance).interval()
            layer, head = (int(i) for i in np.unravel_index(rise.argmax(), rise.shape))
            lost = found.measure(task, layer, head).interval()
            rank = int((importance > importance[layer, head]).sum()) + 1
            agreement = r.value, max(r.low, -1), min(r.high, 1), found.reliability(task)
            largest = head_name(layer, head), *ends(lost), rank
            yield task, seed, *agreement, *largest, (rise < 0).mean()


def lesion_sentences(table: pd.DataFrame) -> str:
    """Say how well importance predicts what losing a head costs, a line per task and model."""
    if table.empty:
        return "Of no model was every head switched off alone (lesion_seeds=0)."
    return "\n".join(
        f"{row['task']}, seed {row['seed']}: r = {said(row, LESIONS[2:5], '.2f')} (halves of the "
        f"examples agree at {row[LESIONS[5]]:.2f}). The loss rises most without "
        f"{row['largest rise: head']}, number {row['its rank by importance']} by importance; "
        f"the score then loses {row['points lost without it']:.1f} points "
        f"[{row['lost low']:.1f}, {row['lost high']:.1f}]."
        for row in table.to_dict("records")
    )


def sentences(correlations: pd.DataFrame, stability: pd.DataFrame) -> str:
    """Say how maps agree within and between tasks, and which sample a ranking needs."""
    values, own = correlations.to_numpy(), np.eye(len(correlations), dtype=bool)
    pairs = correlations.where(np.triu(~own)).stack()
    least = stability.groupby("examples")["mean"].min()
    enough, needs = least.index[least >= 0.95], f"not within {least.index.max()} examples"
    if len(enough):
        needs = f"from {enough[0]} examples on"
    return (
        f"Within a task, half samples agree at {values[own].min():.2f} to {values[own].max():.2f}; "
        f"between tasks maps agree at {values[~own].min():.2f} to {values[~own].max():.2f}.\n"
        f"Most alike: {' and '.join(pairs.idxmax())} ({pairs.max():.2f}); "
        f"least alike: {' and '.join(pairs.idxmin())} ({pairs.min():.2f}).\n"
        f"Two disjoint samples rank heads alike (at least 0.95 for every task): {needs}."
    )


@styled
def plot_stability(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw the rank correlation of two disjoint samples against their size, of `stability`."""
    style = looks(tasks)
    figure, (ax,) = panels(1, 2.6)
    figure.set_size_inches(WIDTH * 0.6, 2.6)
    for task in tasks:
        part = table[table["task"] == task]
        ax.plot(part["examples"], part["mean"], **style[task], label=task)
        ends = part["low"], part["high"]
        ax.fill_between(part["examples"], *ends, color=style[task]["color"], alpha=0.15, lw=0)
    ax.axhline(0.95, color=GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="examples scored", ylabel="rank correlation with a disjoint sample")
    ax.legend()
    return figure


@styled
def plot_lesions(study: Study) -> Figure:
    """Draw a row per task, of the first model: importance, rise of the loss, and both together."""
    found, maps = _lesioned(study, study.lesion_seeds[0])
    figure, axes = panels(3 * len(found.tasks), 0.75 + 0.16 * found.shape[0], 3)
    rows = [axes[i : i + 3] for i in range(0, len(axes), 3)]
    for (left, middle, right), (task, style) in zip(rows, looks(found.tasks).items(), strict=True):
        importance, rise = maps[task], found.rise(task)
        share, limit = importance / importance.max(), float(np.abs(rise).max())
        map_of(left, share, cmap="viridis", vmin=0, vmax=1)
        image = map_of(middle, rise, cmap="PuOr_r", vmin=-limit, vmax=limit)
        figure.colorbar(image, ax=middle, pad=0.02)
        right.axhline(0, color=GREY, linewidth=0.8)
        right.plot(share.ravel(), rise.ravel(), linestyle="", alpha=0.7, **style)
        left.set_ylabel(f"{task}\nlayer")
        left.tick_params(labelsize=7)
        middle.tick_params(labelsize=7)
        right.set_ylabel("rise", fontsize=7)
        right.set_title(f"r = {float(found.predicted_by(task, importance).values[0]):.2f}")
    rows[0][0].set_title("importance")
    rows[0][1].set_title("rise of the loss without it")
    for ax, label in zip(rows[-1], LABELS, strict=True):
        ax.set_xlabel(label)
    return figure
