"""Notebook 02: which attention heads does each task need, and can the ranking be trusted?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.heads import head_name, overlap, top_heads
from fslib.importance import normalized
from fslib.plot import GREY, WIDTH, looks, map_of, panels, styled
from fslib.scoring import rank_correlation
from fslib.study.study import Study

LESIONS = [
    "task", "seed", "rank correlation", "low", "high", "two halves of the examples",
    "largest rise: head", "points lost without it", "lost low", "lost high", "its rank by importance",
    "share of heads with a rise below 0",
]  # fmt: skip


def lesions(study: Study) -> pd.DataFrame:
    """Return how importance predicts what a head's loss costs: one row per task and model.

    The rank correlation, over heads, of importance (training examples) with the rise of the mean loss without the head
    (evaluation examples); its interval over evaluation examples (jackknife, within [-1, 1]); and how two halves of the
    examples agree on the rises (`HeadLesions.reliability`). Then the head without which the loss rises most (L and H
    count from 1), the points of score that are lost without it, and its rank by importance. It is a maximum over heads,
    so its rise is in part luck.
    """
    rows = []
    for seed in study.lesion_seeds:
        found = study.lesion(seed).lesions(study.store)
        parts = study.units(seed).importance.contributions(study.store)
        for task in found.tasks:
            importance, rise = parts[task].importance(), found.rise(task)
            r, halves = found.predicted_by(task, importance).interval(), found.reliability(task)
            layer, head = (int(i) for i in np.unravel_index(rise.argmax(), rise.shape))
            lost = found.measure(task, layer, head).interval()
            rank = int((importance > importance[layer, head]).sum()) + 1
            row = (task, seed, r.value, max(r.low, -1), min(r.high, 1), halves)
            rows.append(
                (
                    *row,
                    head_name(layer, head),
                    *(lost.value, lost.low, lost.high),
                    rank,
                    (rise < 0).mean(),
                )
            )
    return pd.DataFrame(rows, columns=LESIONS)


def importance_maps(
    study: Study, *, reduction: str = "token", normalize: str | None = None
) -> dict[str, np.ndarray]:
    """Return {task: (layers, heads)} importance, the mean over seeds."""
    runs = study.contributions()

    def mean(task: str) -> np.ndarray:
        return np.mean(
            [run[task].importance(reduction=reduction, normalize=normalize) for run in runs], 0
        )

    return {task: mean(task) for task in study.profile.tasks}


def ranking(maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return one row per task and head: importance and rank, layers and heads counted from 1."""
    frames = []
    for task, values in maps.items():
        layer, head = np.indices(values.shape) + 1
        frame = pd.DataFrame(
            {
                "task": task,
                "layer": layer.ravel(),
                "head": head.ravel(),
                "importance": values.ravel(),
            }
        )
        frame["rank"] = frame["importance"].rank(ascending=False, method="first").astype(int)
        frames.append(frame.sort_values("rank"))
    return pd.concat(frames, ignore_index=True)


def task_correlations(study: Study) -> pd.DataFrame:
    """Return the rank correlation of tasks' maps, mean over seeds; diagonal: a task with itself, two half samples."""
    names, runs = study.profile.tasks, study.contributions()
    table = pd.DataFrame(np.zeros((len(names), len(names))), names, names)
    for run in runs:
        halves = {
            t: [run[t].importance(subset=half) for half in _halves(len(run[t].tokens))]
            for t in names
        }
        for a in names:
            for b in names:
                # always one half against another, so that sampling noise weighs the same on and off the diagonal
                r = np.mean(
                    [
                        rank_correlation(halves[a][0], halves[b][1]),
                        rank_correlation(halves[a][1], halves[b][0]),
                    ]
                )
                table.loc[a, b] += r / len(runs)
    return table


def _halves(n: int) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(n)
    return [order[: n // 2], order[n // 2 :]]


def seed_correlations(study: Study) -> pd.DataFrame:
    """Return how a task's maps agree between seeds: between models trained with another order and dropout."""
    runs = study.contributions()
    rows = []
    for task in study.profile.tasks:
        maps = [run[task].importance() for run in runs]
        pairs = [(i, j) for i in range(len(maps)) for j in range(i)]
        for i, j in pairs:
            sets = [top_heads(maps[k], 0.3) for k in (i, j)]
            rows.append(
                {
                    "task": task,
                    "seeds": f"{study.seeds[j]} and {study.seeds[i]}",
                    "rank correlation": rank_correlation(maps[i], maps[j]),
                    "overlap of the top 30 % (Jaccard)": overlap(*sets),
                }
            )
    return pd.DataFrame(
        rows, columns=["task", "seeds", "rank correlation", "overlap of the top 30 % (Jaccard)"]
    )


def stability(study: Study, repeats: int = 20) -> pd.DataFrame:
    """Return the rank correlation of maps from two disjoint random samples of one size: mean and 95 % range."""
    rows = []
    runs = study.contributions()
    for task in study.profile.tasks:
        n = len(runs[0][task].tokens)
        for size in [2**k for k in range(2, 20) if 2**k <= n // 2]:
            correlations = []
            for number, run in enumerate(runs):
                rng = np.random.default_rng([number, size])
                for _ in range(repeats):
                    order = rng.permutation(n)
                    pair = [
                        run[task].importance(subset=s)
                        for s in (order[:size], order[size : 2 * size])
                    ]
                    correlations.append(rank_correlation(*pair))
            low, high = np.quantile(correlations, [0.025, 0.975])
            rows.append(
                {
                    "task": task,
                    "examples": size,
                    "mean": np.mean(correlations),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows).astype({"low": float, "high": float})


def choices(study: Study, fraction: float = 0.3) -> pd.DataFrame:
    """Return what layer normalization and the reduction change: against no normalization with token reduction."""
    rows = []
    for normalize, reduction in (
        (None, "token"),
        ("layer", "token"),
        (None, "example"),
        ("layer", "example"),
    ):
        for task in study.profile.tasks:
            correlations, overlaps, shares = [], [], []
            for run in study.contributions():
                usual = run[task].importance()
                other = run[task].importance(reduction=reduction, normalize=normalize)
                sets = top_heads(usual, fraction), top_heads(other, fraction)
                correlations.append(rank_correlation(usual, other))
                overlaps.append(overlap(*sets))
                shares.append(sets[1][-1].sum() / max(1, sets[1].sum()))
            rows.append(
                {
                    "normalize": str(normalize),
                    "reduction": reduction,
                    "task": task,
                    "rank correlation": np.mean(correlations),
                    "overlap of the top 30 % (Jaccard)": np.mean(overlaps),
                    "share of them in the last layer": np.mean(shares),
                }
            )
    return pd.DataFrame(rows)


def lesion_sentences(table: pd.DataFrame) -> str:
    """Say how well importance predicts what losing a head costs, a line per task and model."""
    lines = (
        [] if len(table) else ["Of no model was every head switched off alone (lesion_seeds=0)."]
    )
    for row in table.to_dict("records"):
        lines.append(
            f"{row['task']}, seed {row['seed']}: r = {row['rank correlation']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] "
            f"(halves of the examples agree at {row['two halves of the examples']:.2f}). The loss rises most without "
            f"{row['largest rise: head']}, number {row['its rank by importance']} by importance; the score then loses "
            f"{row['points lost without it']:.1f} points [{row['lost low']:.1f}, {row['lost high']:.1f}]."
        )
    return "\n".join(lines)


def layer_normalized(maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the maps with each layer divided by its L2 norm."""
    return {t: normalized(m, "layer") for t, m in maps.items()}


def sentences(correlations: pd.DataFrame, stability: pd.DataFrame) -> str:
    """Say what the maps show: agreement within tasks and between them, and the sample that a ranking needs."""
    values = correlations.to_numpy()
    own = np.eye(len(values), dtype=bool)
    pairs = correlations.where(np.triu(~own)).stack()
    mean = stability.groupby("examples")["mean"].min()
    enough = mean[mean >= 0.95]
    needs = (
        f"from {enough.index[0]} examples on"
        if len(enough)
        else f"not within {mean.index.max()} examples"
    )
    return (
        f"Within a task, half samples agree at {values[own].min():.2f} to {values[own].max():.2f}; "
        f"between tasks maps agree at {values[~own].min():.2f} to {values[~own].max():.2f}.\n"
        f"Most alike: {' and '.join(pairs.idxmax())} ({pairs.max():.2f}); "
        f"least alike: {' and '.join(pairs.idxmin())} ({pairs.min():.2f}).\n"
        f"Two disjoint samples rank heads alike (at least 0.95 for every task): {needs}."
    )


@styled
def plot_stability(table: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw the rank correlation of two disjoint samples against their size. table: task, examples, mean, low, high."""
    style = looks(tasks)
    figure, (ax,) = panels(1, 2.6)
    figure.set_size_inches(WIDTH * 0.6, 2.6)
    for task in tasks:
        part = table[table["task"] == task]
        ax.plot(part["examples"], part["mean"], **style[task], label=task)  # type: ignore[arg-type]
        ax.fill_between(
            part["examples"],
            part["low"],
            part["high"],
            color=style[task]["color"],
            alpha=0.15,
            lw=0,
        )
    ax.axhline(0.95, color=GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="examples scored", ylabel="rank correlation with a disjoint sample")
    ax.legend()
    return figure


@styled
def plot_lesions(study: Study) -> Figure:
    """Draw, one row per task, the map of importance, the map of what losing each head alone adds to the loss, and one
    against the other; of the first model."""
    seed = study.seeds[0]
    found = study.lesion(seed).lesions(study.store)
    parts = study.units(seed).importance.contributions(study.store)
    figure, axes = panels(3 * len(found.tasks), 0.75 + 0.16 * found.shape[0], 3)
    rows = [axes[i : i + 3] for i in range(0, len(axes), 3)]
    for (left, middle, right), (task, style) in zip(rows, looks(found.tasks).items(), strict=True):
        importance, rise = parts[task].importance(), found.rise(task)
        share, limit = importance / importance.max(), float(np.abs(rise).max())
        map_of(left, share, cmap="viridis", vmin=0, vmax=1)
        image = map_of(middle, rise, cmap="PuOr_r", vmin=-limit, vmax=limit)
        figure.colorbar(image, ax=middle, pad=0.02)
        right.axhline(0, color=GREY, linewidth=0.8)
        right.plot(share.ravel(), rise.ravel(), linestyle="", alpha=0.7, **style)  # type: ignore[arg-type]
        left.set_ylabel(f"{task}\nlayer")
        for ax in (left, middle):
            ax.tick_params(labelsize=7)
        right.set_ylabel("rise", fontsize=7)
        right.set_title(f"r = {float(found.predicted_by(task, importance).values[0]):.2f}")
    for ax, title in zip(rows[0], ("importance", "rise of the loss without it", ""), strict=True):
        ax.set_title(title or ax.get_title())
    for ax, label in zip(
        rows[-1], ("head", "head", "importance, share of the largest"), strict=True
    ):
        ax.set_xlabel(label)
    return figure
