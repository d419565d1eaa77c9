"""The tables behind notebooks 04 to 08: from a study's records to tidy data frames, one row a thing.

Scores are fractions, dissociation is in points. Where several seeds were trained, intervals (95 %, percentile
bootstrap) are over seeds and evaluation examples together; differences are paired: the same seeds, hence the same
trunk, and the same examples on both sides.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from fslib.comparisons import MEASURES, read_named_iap
from fslib.dissociation import IAP, Dissociation
from fslib.experiments import cached_task, read_iap
from fslib.heads import overlap, top_heads
from fslib.importance import passes
from fslib.model.encoders import ENCODERS
from fslib.results import Record
from fslib.scoring import (
    bootstrap_counts,
    chance_level,
    exchanged_correlations,
    interval,
    metric_score,
    p_value,
    rank_correlation,
)
from fslib.study import SELECTIONS, Study
from fslib.tables import importance

Scored = tuple[float, np.ndarray]  # a value, and the same in every resample (draws,)

# --- 04: encoders, and ways to choose heads


def encoder_iaps(study: Study) -> dict[str, IAP]:
    """Pruning results of every encoder of the profile."""
    return {name: read_iap(study.store.get(study.small(name)["prune"])) for name in study.profile.encoders}


def encoders(study: Study) -> pd.DataFrame:
    """One row an encoder: its size, what it learned, and its mean dissociation (lesion, over fractions and tasks)."""
    rows = []
    for name, iap in encoder_iaps(study).items():
        trained = study.store.get(study.small(name)["train"])
        found = iap.dissociation(draws=study.profile.draws)
        learned = iap.baseline()[0] - iap.chance()
        row = {"encoder": name, "layers": trained.result["shape"][0], "heads": int(np.prod(trained.result["shape"]))}
        row |= {
            "pre-trained": ENCODERS.get(name, ({}, True))[1],
            "million parameters": trained.result["parameters"] / 1e6,
        }
        row |= {"score": iap.baseline().mean(), "above chance by": learned.mean()}
        row |= {"D": found.value[-1, -1], "low": found.low[-1, -1], "high": found.high[-1, -1]}
        row |= {"random heads": found.null_mean[-1, -1], "p": found.p[-1, -1]}
        rows.append(row | {f"D, {t}": found.value[-1, i] for i, t in enumerate(found.tasks)})
    return pd.DataFrame(rows)


def selections(study: Study) -> pd.DataFrame:
    """One row a way to choose heads: how it ranks them, what dissociation it yields, what it costs.

    D minus the gradient's: its interval is over evaluation examples, on one model.
    """
    record, fraction = study.store.get(study.selection_unit()), max(study.profile.small_fractions)
    names = [*SELECTIONS, *(n for n in _names(record) if n.startswith("unmatched"))]
    found: dict[str, Scored] = {}
    for name in names:
        iap = read_named_iap(record, name)
        found[name] = iap.bootstrap(draws=study.profile.draws)["mean"]
    base, base_draws = found[names[0]]
    rows = []
    for name, (value, draws) in found.items():
        (low, high), (diff_low, diff_high) = interval(draws), interval(draws - base_draws)
        row: dict[str, object] = {"selection": name.replace("unmatched", "random, draw")}
        if name in SELECTIONS:
            maps = [[record.arrays[f"importance/{n}/{t}"] for n in (names[0], name)] for t in study.profile.tasks]
            sets = [[top_heads(m, fraction) for m in pair] for pair in maps]
            row |= {"rank correlation": np.mean([rank_correlation(*pair) for pair in maps])}
            row |= {"overlap of top heads": np.mean([overlap(*pair) for pair in sets])}
            forward, backward = passes(SELECTIONS[name].get("estimator", "gradient"), *record.result["shape"])
        else:
            row |= {"rank correlation": np.nan, "overlap of top heads": np.nan}
            forward = backward = 0
        row |= {"D": value, "low": float(low), "high": float(high), "minus the first": value - base}
        row |= {"diff low": float(diff_low), "diff high": float(diff_high)}
        rows.append(row | {"forward passes": forward, "backward passes": backward})
    return pd.DataFrame(rows)


def _names(record: Record) -> list[str]:
    return list(dict.fromkeys(k.split("/")[0] for k in record.arrays if k.endswith("/heads")))


def random_controls(study: Study) -> pd.DataFrame:
    """What random head sets cost, matched by layer with the top heads or not: score left, in % of the unpruned."""
    record = study.store.get(study.selection_unit())
    names = _names(record)
    first = read_named_iap(record, names[0])
    base = first.baseline()[0]
    matched = first.scores()[0, 0, :, 1:]  # (pruned, controls, scored)
    unmatched = np.stack(
        [read_named_iap(record, n).scores()[0, 0, :, 0] for n in names if n.startswith("unmatched")], 1
    )
    rows = []
    for what, found in (("matched by layer", matched), ("not matched", unmatched)):
        share = 100 * (found / base).mean(-1)
        rows.append(
            {"random sets": what, "sets": share.size, "score left (%)": share.mean(), "spread": share.std(ddof=1)}
        )
    top = 100 * (first.scores()[0, 0, :, 0] / base).mean(-1)
    rows.append(
        {"random sets": "(top heads)", "sets": top.size, "score left (%)": top.mean(), "spread": top.std(ddof=1)}
    )
    return pd.DataFrame(rows)


# --- 05: similarity


def similarity(study: Study) -> pd.DataFrame:
    """One row a pair of tasks: five similarities, and the dissociation of a model trained on that pair."""
    record = study.store.get(study.similarity_unit())
    place = {t: i for i, t in enumerate(record.result["tasks"])}
    rows = []
    for pair in study.pairs:
        i, j = (place[t] for t in pair)
        row: dict[str, object] = {"pair": " + ".join(pair)}
        row |= {m: record.result["similarity"][m][i][j] for m in MEASURES}
        found = pair_iap(study, pair).dissociation(draws=study.profile.draws)
        row |= {"D": found.value[-1, -1], "low": found.low[-1, -1], "high": found.high[-1, -1]}
        rows.append(row | {"random heads": found.null_mean[-1, -1], "p": found.p[-1, -1]})
    return pd.DataFrame(rows)


def pair_iap(study: Study, pair: tuple[str, str]) -> IAP:
    return read_iap(study.store.get(study.small(tasks=pair)["prune"]))


def similarity_correlations(study: Study) -> pd.DataFrame:
    """Rank correlation of each similarity with D over pairs: C2 says negative.

    Interval: bootstrap over pairs and, within D, over evaluation examples. p: one-sided, exact, by exchanging the
    names of the tasks in the similarities (Mantel's test), since pairs that share a task are not independent.
    """
    record, d = study.store.get(study.similarity_unit()), similarity(study)["D"].to_numpy()
    draws, place = study.profile.draws, {t: i for i, t in enumerate(record.result["tasks"])}
    pairs = [(place[a], place[b]) for a, b in study.pairs]
    resampled = np.stack([pair_iap(study, p).bootstrap(draws=draws)["mean"].draws for p in study.pairs], -1)
    chosen = np.random.default_rng(0).integers(len(pairs), size=(draws, len(pairs)))
    rows = []
    for measure in MEASURES:
        matrix = np.array(record.result["similarity"][measure])
        similar = np.array([matrix[pair] for pair in pairs])
        boot = [rank_correlation(similar[c], r[c]) for c, r in zip(chosen, resampled, strict=True) if len(set(c)) > 2]
        low, high = interval(np.array(boot))
        null, exact = exchanged_correlations(matrix, pairs, d, np.random.default_rng(0))
        row: dict[str, object] = {"similarity": measure, "rank correlation with D": null[0]}
        row |= {"low": float(low), "high": float(high), "p": float(p_value(-null, np.asarray(-null[0]), exact))}
        rows.append(row | {"pairs": len(pairs)})
    return pd.DataFrame(rows)


# --- 06: endings


class Resampled:
    """Scores of many methods on the same tasks, in the same bootstrap samples of seeds and evaluation examples."""

    def __init__(self, labels: Mapping[str, np.ndarray], seeds: int, draws: int) -> None:
        self.labels = labels
        self.seed_weights = bootstrap_counts(seeds, draws, np.random.default_rng([0, 1000])) / seeds
        self.counts = {
            t: bootstrap_counts(len(y), draws, np.random.default_rng([0, i])) for i, (t, y) in enumerate(labels.items())
        }

    def score(self, task: str, metric: str, predictions: np.ndarray) -> tuple[float, Float[np.ndarray, " draws"]]:
        """(mean over seeds, the same in every resample) of predictions (seeds, n)."""
        value = metric_score(metric, predictions, self.labels[task]).mean()
        resampled = metric_score(metric, predictions, self.labels[task], self.counts[task])  # (seeds, draws)
        return float(value), (resampled * self.seed_weights.T).sum(0)


def _ending_records(study: Study) -> list[Record]:
    return [study.store.get(study.endings_unit(s)) for s in study.ending_seeds]


def endings(study: Study, against: str = "plain") -> pd.DataFrame:
    """Every ending, and single-task training, on every task and their mean: score, difference from plain training."""
    records = _ending_records(study)
    tasks = {t: cached_task(t).limited(eval=study.profile.ending_examples) for t in study.profile.tasks}
    resampled = Resampled({t: task.eval.labels for t, task in tasks.items()}, len(records), study.profile.draws)
    predictions: dict[str, dict[str, np.ndarray]] = {
        "single-task": {
            t: np.stack(
                [study.store.get(study.single_unit(s, t)).arrays[f"predictions/{t}"] for s in study.ending_seeds]
            )
            for t in tasks
        }
    }
    for name in records[0].config["endings"]:
        predictions[name] = {t: np.stack([r.arrays[f"predictions/{name}/{t}"] for r in records]) for t in tasks}
    scores = {
        name: {t: resampled.score(t, tasks[t].metric, found[t]) for t in tasks} for name, found in predictions.items()
    }
    return compared(scores, "ending", "task", against, len(records))


def compared(
    found: Mapping[str, Mapping[str, Scored]], method: str, column: str, against: str, seeds: int
) -> pd.DataFrame:
    """One row a method and column, and their mean: value, interval, and the paired difference from one method."""
    rows = []
    with_mean = {}
    for name, values in found.items():
        mean = float(np.mean([v for v, _ in values.values()])), np.mean([d for _, d in values.values()], axis=0)
        with_mean[name] = {**values, "mean": mean}
    for name, values in with_mean.items():
        for what, (value, draws) in values.items():
            low, high = interval(draws)
            base, base_draws = with_mean[against][what]
            diff_low, diff_high = interval(draws - base_draws)
            row: dict[str, object] = {method: name, column: what, "seeds": seeds, "score": value}
            row |= {"low": float(low), "high": float(high), f"minus {against}": value - base}
            rows.append(row | {"diff low": float(diff_low), "diff high": float(diff_high)})
    return pd.DataFrame(rows)


def ending_dissociation(study: Study, against: str = "plain") -> pd.DataFrame:
    """Dissociation (lesion, at IAT's alpha) before and after each ending, and its difference from plain training."""
    records = _ending_records(study)
    names = study.endings_unit(study.seed).config.pruned  # type: ignore[attr-defined]
    found: dict[str, dict[str, Scored]] = {}
    for name in names:
        iap = IAP.over_seeds([read_named_iap(r, name) for r in records])
        drawn = iap.bootstrap(draws=study.profile.draws, over_seeds=True)
        found[name] = {t: drawn[t] for t in study.profile.tasks}
    return compared(found, "ending", "task", against, len(records)).rename(columns={"score": "D"})


def movement(study: Study) -> pd.DataFrame:
    """How far head rows moved in each ending (root mean square), in units of plain training's, mean over seeds."""
    records = _ending_records(study)
    rows = []
    for name in (n for n in records[0].config["endings"] if n in records[0].result["moved"]):
        found = [r.result["moved"] for r in records]
        if all(name in f and f[name] for f in found):
            shares = {k: np.mean([f[name][k] / f["plain"][k] for f in found if k in f[name]]) for k in found[0][name]}
            rows.append({"ending": name, **{f"rows of heads {k}": v for k, v in shares.items()}})
    return pd.DataFrame(rows)


def parameters(study: Study) -> pd.DataFrame:
    """Parameters of the model after every ending of every seed."""
    records = _ending_records(study)
    rows = [
        {"seed": s, "ending": name, "parameters": n}
        for s, record in zip(study.ending_seeds, records, strict=True)
        for name, n in record.result["parameters"].items()
    ]
    return pd.DataFrame(rows)


def counted_steps(study: Study) -> pd.DataFrame:
    """Steps that the endings took by branching, and would have taken one by one."""
    record = study.store.get(study.endings_unit(study.seed))
    steps, full = record.result["steps"], record.config["steps"]
    named = {"one trunk, all endings": steps["branching"], "every ending from the first step": steps["unbroken"]}
    return pd.DataFrame([{"how": how, "steps": n, "trainings": n / full} for how, n in named.items()])


# --- 07: transfer

SOURCES = ("pre-trained", "multi-task", "IAT")


def transfer(study: Study) -> pd.DataFrame:
    """One row a source, part and target size: score, and its difference from the multi-task source."""
    records = [study.store.get(study.transfer_unit(s)) for s in study.transfer_seeds]
    target = cached_task(study.profile.transfer_target).limited(eval=study.profile.ending_examples)
    resampled = Resampled({target.name: target.eval.labels}, len(records), study.profile.draws)
    frames = []
    for part in records[0].result["parts"]:
        found = {
            source: {
                size: resampled.score(
                    target.name,
                    target.metric,
                    np.stack([r.arrays[f"predictions/{source}/{part}/{size}"] for r in records]),
                )
                for size in records[0].result["steps"]
            }
            for source in SOURCES
        }
        frames.append(compared(found, "source", "size", "multi-task", len(records)).assign(part=part))
    return pd.concat(frames, ignore_index=True)


def transfer_chance(study: Study) -> float:
    """Score of the best constant answer on the target."""
    target = cached_task(study.profile.transfer_target).limited(eval=study.profile.ending_examples)
    return chance_level(target.metric, target.eval.labels)


# --- 08: the story


def story(study: Study, found: Dissociation, fraction: float = 0.3) -> tuple:
    """What `charts.teaser` draws: the two tasks whose maps differ most, and the main result."""
    maps, iap = importance(study), study.iap()
    names = study.profile.tasks
    pair = min(combinations(names, 2), key=lambda p: rank_correlation(maps[p[0]], maps[p[1]]))
    place = [names.index(t) for t in pair]
    nearest = int(np.argmin(np.abs(np.array(iap.fractions) - fraction)))
    left = 100 * (iap.scores()[:, nearest] / iap.baseline()[:, None, None]).mean(0)  # (pruned, sets, scored)
    retained = pd.DataFrame(left[:, 0][np.ix_(place, place)], index=pair, columns=pair)
    random_left = {t: float(left[i, 1:, i].mean()) for t, i in zip(pair, place, strict=True)}
    chosen = {t: iap.heads[0, nearest, i, 0] for t, i in zip(pair, place, strict=True)}
    return {t: maps[t] for t in pair}, chosen, retained, random_left, found
