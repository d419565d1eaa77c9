"""The tables behind the notebooks: from a study's records to tidy data frames, one row a thing.

Scores are fractions, dissociation is in points. Intervals are 95 % percentile bootstrap over evaluation
examples of the mean over seeds; the same resample is used for everything scored on a task (paired).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fslib.data.bbc import articles, raw_articles, split_articles
from fslib.dissociation import Dissociation
from fslib.heads import overlap, top_heads
from fslib.importance import normalized
from fslib.model.encoders import ENCODERS
from fslib.model.multitask import MultiTaskModel
from fslib.results import Record
from fslib.scoring import bootstrap_counts, chance_level, interval, metric_score, rank_correlation
from fslib.study import Study


def tasks(study: Study) -> pd.DataFrame:
    """What each task is: sizes, labels, metric, chance level, tokens per training example."""
    rows = []
    for name, tokens in lengths(study).items():
        task = study.tasks[name]
        rows.append(
            {
                "task": name,
                "question": task.description,
                "texts": 1 if task.train.pairs is None else 2,
                "labels": ", ".join(task.label_names) or "a number",
                "train": len(task.train),
                "eval": len(task.eval),
                "metric": task.metric,
                "chance": chance(study)[name],
                "tokens": float(tokens.mean()),
                "longest": int(tokens.max()),
                "in both splits": len(task.shared_texts()),
            }
        )
    return pd.DataFrame(rows)


def chance(study: Study) -> dict[str, float]:
    """Score of the best constant answer on the evaluation examples, task by task."""
    return {name: chance_level(task.metric, task.eval.labels) for name, task in study.tasks.items()}


def lengths(study: Study) -> dict[str, np.ndarray]:
    """Tokens of every training example, task by task."""
    model = MultiTaskModel.from_pretrained(study.profile.encoder, study.tasks, max_length=study.profile.max_length)
    return {name: model.encode(task.train).lengths for name, task in study.tasks.items()}


def balance(study: Study) -> dict[str, dict[str, int]]:
    """How often each label occurs in training, task by task."""
    return {
        name: {label: int((task.train.labels == i).sum()) for i, label in enumerate(task.label_names)}
        for name, task in study.tasks.items()
        if not task.is_regression
    }


def examples(study: Study) -> pd.DataFrame:
    """The first training example of each of the first two labels of every task."""
    rows = []
    for name, task in study.tasks.items():
        for label in range(min(2, task.n_outputs)):
            i = int(np.flatnonzero(task.train.labels == label)[0])
            pair = task.train.pairs[i] if task.train.pairs else ""
            rows.append(
                {"task": name, "text": task.train.texts[i], "second text": pair, "label": task.label_names[label]}
            )
    return pd.DataFrame(rows)


def corpus() -> pd.DataFrame:
    """From the raw articles of the embedded corpus to the two sides of the split, counted."""
    raw = raw_articles()
    sides = split_articles()
    counts = {
        "articles in the package": len(raw),
        "distinct texts (title and body)": len({(title, body) for _, _, title, body in raw}),
        "distinct titles": len({title for _, _, title, _ in raw}),
        "kept: no repeat, a sentence of usable length": len(articles()),
        "  for training": len(sides[0]),
        "  for evaluation": len(sides[1]),
        "  on both sides": len({a.id for a in sides[0]} & {a.id for a in sides[1]}),
    }
    return pd.DataFrame([{"what": what, "articles": count} for what, count in counts.items()])


def encoders(study: Study) -> pd.DataFrame:
    """The encoders that need no download."""
    rows = []
    for name, (_, pretrained) in ENCODERS.items():
        model = MultiTaskModel.from_pretrained(name, study.tasks)
        rows.append(
            {
                "encoder": name,
                "layers": model.n_layers,
                "heads a layer": model.n_heads,
                "hidden size": model.encoder.config.hidden_size,
                "million parameters": sum(p.numel() for p in model.encoder.parameters()) / 1e6,
                "pre-trained": pretrained,
                "pooling": model.pooling,
            }
        )
    return pd.DataFrame(rows)


def losses(study: Study, window: int = 15) -> dict[str, pd.DataFrame]:
    """Training loss per task, a running mean over `window` of its steps, averaged over seeds on a common grid."""
    grid = np.linspace(0, study.profile.steps, 41)[1:]
    found = {}
    for i, name in enumerate(study.profile.tasks):
        curves = []
        for record in study.multitask():
            steps = np.flatnonzero(record.arrays["order"] == i)
            if len(steps):
                smooth = pd.Series(record.arrays["losses"][steps]).rolling(window, min_periods=1).mean()
                curves.append(np.interp(grid, steps + 1, smooth))
        found[name] = pd.DataFrame({"step": grid, "loss": np.mean(curves, 0) if curves else np.nan})
    return found


def curves(study: Study) -> pd.DataFrame:
    """Evaluation scores along training: seed, step, and one column per task."""
    rows = [
        {"seed": seed, **point}
        for seed, record in zip(study.seeds, study.multitask(), strict=True)
        for point in record.result["curve"]
    ]
    return pd.DataFrame(rows).astype({"step": int})


def scores(study: Study) -> pd.DataFrame:
    """Every method on every task: score, interval, and its paired difference from multi-task training."""
    rows = []
    for name, task in study.tasks.items():
        labels = task.eval.labels
        majority = np.full(len(labels), np.bincount(task.train.labels).argmax() if not task.is_regression else 0)
        multi = _predictions(study.multitask(), name)
        methods = {
            "multi-task": multi,
            "single-task": _predictions(study.single(name), name),
            "bag of words": _predictions([study.words()], name),
            "majority class": majority[None],
        }
        counts = bootstrap_counts(len(labels), study.profile.draws, np.random.default_rng(0))
        base = metric_score(task.metric, multi, labels, counts).mean(0)
        for method, predictions in methods.items():
            per_seed = metric_score(task.metric, predictions, labels)
            draws = metric_score(task.metric, predictions, labels, counts).mean(0)
            low, high = interval(draws)
            diff_low, diff_high = interval(base - draws)
            rows.append(
                {
                    "task": name,
                    "method": method,
                    "seeds": len(per_seed),
                    "score": per_seed.mean(),
                    "low": float(low),
                    "high": float(high),
                    "seed min": per_seed.min(),
                    "seed max": per_seed.max(),
                    "multi-task minus it": metric_score(task.metric, multi, labels).mean() - per_seed.mean(),
                    "diff low": float(diff_low),
                    "diff high": float(diff_high),
                }
            )
    return pd.DataFrame(rows)


def _predictions(records: Sequence[Record], task: str) -> np.ndarray:
    return np.stack([r.arrays[f"predictions/{task}"] for r in records])


def importance(study: Study, *, reduction: str = "token", normalize: str | None = None) -> dict[str, np.ndarray]:
    """Importance maps, the mean over seeds, (layers, heads) per task."""
    found = study.contributions()

    def mean(task: str) -> np.ndarray:
        return np.mean([run[task].importance(reduction=reduction, normalize=normalize) for run in found], 0)

    return {task: mean(task) for task in study.profile.tasks}


def ranking(maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Every head of every task with its importance and rank, layers and heads counted from 1."""
    frames = []
    for task, values in maps.items():
        layer, head = np.indices(values.shape) + 1
        frame = pd.DataFrame({"task": task, "layer": layer.ravel(), "head": head.ravel(), "importance": values.ravel()})
        frame["rank"] = frame["importance"].rank(ascending=False, method="first").astype(int)
        frames.append(frame.sort_values("rank"))
    return pd.concat(frames, ignore_index=True)


def task_correlations(study: Study) -> pd.DataFrame:
    """Rank correlation of tasks' maps, averaged over seeds; diagonal: a task's own two half samples (the ceiling)."""
    names, found = study.profile.tasks, study.contributions()
    table = pd.DataFrame(np.zeros((len(names), len(names))), names, names)
    for run in found:
        halves = {t: [run[t].importance(subset=half) for half in _halves(len(run[t].tokens))] for t in names}
        for a in names:
            for b in names:
                # always one half against another, so that sampling noise weighs the same on and off the diagonal
                r = np.mean(
                    [rank_correlation(halves[a][0], halves[b][1]), rank_correlation(halves[a][1], halves[b][0])]
                )
                table.loc[a, b] += r / len(found)
    return table


def _halves(n: int) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(n)
    return [order[: n // 2], order[n // 2 :]]


def seed_correlations(study: Study) -> pd.DataFrame:
    """Rank correlation of a task's map between seeds: between models trained with another order and dropout."""
    found = study.contributions()
    rows = []
    for task in study.profile.tasks:
        maps = [run[task].importance() for run in found]
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
    return pd.DataFrame(rows, columns=["task", "seeds", "rank correlation", "overlap of the top 30 % (Jaccard)"])


def stability(study: Study, repeats: int = 20) -> pd.DataFrame:
    """Rank correlation of maps from two disjoint random samples of equal size: mean and 95 % range over repeats."""
    rows = []
    runs = study.contributions()
    for task in study.profile.tasks:
        n = len(runs[0][task].tokens)
        for size in [2**k for k in range(2, 20) if 2**k <= n // 2]:
            found = []
            for number, run in enumerate(runs):
                rng = np.random.default_rng([number, size])
                for _ in range(repeats):
                    order = rng.permutation(n)
                    pair = [run[task].importance(subset=s) for s in (order[:size], order[size : 2 * size])]
                    found.append(rank_correlation(*pair))
            low, high = interval(np.array(found))
            rows.append({"task": task, "examples": size, "mean": np.mean(found), "low": low, "high": high})
    return pd.DataFrame(rows).astype({"low": float, "high": float})


def choices(study: Study, fraction: float = 0.3) -> pd.DataFrame:
    """What layer normalization and the reduction change: against no normalization with token reduction."""
    rows = []
    for normalize, reduction in ((None, "token"), ("layer", "token"), (None, "example"), ("layer", "example")):
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


def layer_normalized(maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The maps with each layer divided by its L2 norm."""
    return {t: normalized(m, "layer") for t, m in maps.items()}


def pruning(study: Study) -> pd.DataFrame:
    """Scores under every lesion: scored task, pruned task (or "random": its own matched controls), fraction, interval.

    For "random" low and high are the least and the greatest score over controls and seeds, not an interval.
    """
    iap = study.iap()
    mean, low, high = iap.score_intervals(draws=study.profile.draws)
    every, base = iap.scores(), iap.baseline()
    rows = []
    for u, scored in enumerate(iap.tasks):
        for f, fraction in enumerate((0.0, *iap.fractions)):
            for t, pruned in enumerate(iap.tasks):
                values = {"score": mean[f, t, u], "low": low[f, t, u], "high": high[f, t, u]}
                rows.append({"scored": scored, "pruned": pruned, "fraction": fraction, **values})
            control = every[:, f - 1, u, 1:, u] if f else base[:, u]
            values = {"score": control.mean(), "low": control.min(), "high": control.max()}
            rows.append({"scored": scored, "pruned": "random", "fraction": fraction, **values})
    return pd.DataFrame(rows)


def retained(study: Study) -> dict[float, pd.DataFrame]:
    """At each fraction, tasks by tasks: score with the row's top heads pruned, in % of the unpruned score."""
    iap = study.iap()
    share = 100 * (iap.scores()[:, :, :, 0] / iap.baseline()[:, None, None]).mean(0)  # (fractions, pruned, scored)
    index, columns = pd.Index(iap.tasks, name="top heads pruned of"), pd.Index(iap.tasks, name="scored")
    return {f: pd.DataFrame(share[i], index, columns) for i, f in enumerate(iap.fractions)}


def by_task(found: Dissociation, seeds: Sequence[int]) -> pd.DataFrame:
    """Each task's own D over all fractions beside that of its matched controls.

    No p per task: with few controls a single task's is coarse (at best about 1 / (controls + 1) ** seeds).
    """
    columns = {"D": found.value, "low": found.low, "high": found.high, "random heads": found.null_mean}
    table = pd.DataFrame({"task": [*found.tasks, "mean"], **{k: v[-1] for k, v in columns.items()}})
    table["above random by"] = table["D"] - table["random heads"]
    for seed, values in zip(seeds, found.by_seed, strict=True):
        table[f"D, seed {seed}"] = values[-1]
    return table
