"""Notebook 00: what the models learn from, and which models they are."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslib.data.batches import Encoded
from fslib.data.bbc import EMBEDDED, articles, raw_articles, split_articles
from fslib.model.encoders import ENCODERS
from fslib.model.multitask import MultiTaskModel
from fslib.plot import COLOURS, Look, looks, panels, percent, styled
from fslib.questions.tables import Rows, table_of
from fslib.scoring import chance_level
from fslib.study.fingerprints import cached_task
from fslib.study.study import Study

COLUMNS = ["task", "question", "texts", "labels", "train", "eval", "metric", "chance", "tokens"]
COLUMNS += ["longest", "truncated", "lost", "in both splits"]
SIZES = ["layers", "heads a layer", "hidden size", "million parameters"]
UNBALANCED = 0.8  # a constant answer that scores more than this


def _encoded(study: Study) -> dict[str, Encoded]:
    tasks, p = study.every_task, study.profile
    model = MultiTaskModel.from_pretrained(p.encoder, tasks, max_length=p.max_length)
    return {name: model.encode(task.train) for name, task in tasks.items()}


@table_of(*COLUMNS)
def task_table(study: Study) -> Rows:
    """Return a row per task: sizes, labels, metric, chance, tokens per training example.

    truncated: training examples of which a part is cut off. lost: those of which a text is lost
    wholly.
    """
    for name, encoded in _encoded(study).items():
        task, tokens = study.every_task[name], encoded.lengths
        texts, chance = 2 if task.train.pairs else 1, chance_level(task.metric, task.eval.labels)
        yield (
            *(name, task.description, texts, ", ".join(task.label_names) or "a number"),
            *(len(task.train), len(task.eval), task.metric, chance, tokens.mean(), tokens.max()),
            *(encoded.truncated.sum(), encoded.lost.sum(), len(task.shared_texts())),
        )


def lengths(study: Study) -> dict[str, np.ndarray]:
    """Return the tokens of every training example, task by task."""
    return {name: encoded.lengths for name, encoded in _encoded(study).items()}


def balance(study: Study) -> dict[str, dict[str, int]]:
    """Count how often each label occurs in training, task by task."""
    counts = {}
    for name, task in study.every_task.items():
        if not task.is_regression:
            found = np.bincount(task.train.labels, minlength=len(task.label_names))
            counts[name] = dict(zip(task.label_names, found.tolist(), strict=True))
    return counts


@table_of("task", "text", "second text", "label")
def examples(study: Study) -> Rows:
    """Return the first training example of each task's first two labels, in their order."""
    for name, task in study.every_task.items():
        for label in np.unique(task.train.labels)[:2]:
            i = int(np.flatnonzero(task.train.labels == label)[0])
            pair = task.train.pairs[i] if task.train.pairs else ""
            answer = f"{label:g}" if task.is_regression else task.label_names[int(label)]
            yield name, task.train.texts[i], pair, answer


def sentences(study: Study) -> str:
    """Say what a reader of scores should know: shared or blank texts, one answer always right."""
    lines = []
    for name, task in study.every_task.items():
        found = []
        if shared := task.shared_texts():
            found.append(f"{len(shared)} texts are in both splits, so its score may be too high.")
        texts = (*task.train.texts, *task.eval.texts)
        if blank := sum(not text.strip() for text in texts):
            found.append(f"{blank} texts are blank.")
        share = chance_level(task.metric, task.eval.labels)
        if len(np.unique(task.eval.labels)) < 2:
            found.append("all evaluation examples have one label, so its score says nothing.")
        elif share > UNBALANCED:
            found.append(f"always the same answer scores {share:.2f}; compare scores with that.")
        lines += [f"{name}: {line}" for line in found]
    nothing = "No text is in both splits or blank, and no answer is nearly always right."
    return "\n".join(lines) or nothing


def corpus() -> pd.DataFrame:
    """Count articles, from the raw corpus to the two sides of the split."""
    raw, (train, evaluation) = raw_articles(), split_articles()
    counts = {
        "articles in the package": len(raw),
        "distinct texts (title and body)": len({(title, body) for _, _, title, body in raw}),
        "distinct titles": len({title for _, _, title, _ in raw}),
        "kept: no repeat, a sentence of usable length": len(articles()),
        "  for training": len(train),
        "  for evaluation": len(evaluation),
        "  on both sides": len({a.id for a in train} & {a.id for a in evaluation}),
    }
    return pd.DataFrame(counts.items(), columns=["what", "articles"])


@cache
@table_of("encoder", *SIZES, "pre-trained", "pooling")
def embedded_encoders() -> Rows:
    """Return a row per encoder that needs no download; it is the same whatever the tasks."""
    task = cached_task(next(iter(EMBEDDED)))
    for name, (_, pretrained) in ENCODERS.items():
        model = MultiTaskModel.from_pretrained(name, task)
        weights = sum(p.numel() for p in model.encoder.parameters())
        shape = model.n_layers, model.n_heads, model.encoder.config.hidden_size
        yield name, *shape, weights / 1e6, pretrained, model.pooling


@styled
def plot_lengths_and_labels(
    lengths: Mapping[str, np.ndarray], balance: Mapping[str, Mapping[str, int]]
) -> Figure:
    """Draw, left: tokens per example of each task. Right: how often each label occurs."""
    style = looks(list(lengths))
    figure, (left, right) = panels(2, max(2.6, 0.5 + 0.32 * len(lengths)))
    bins = np.arange(0, max(int(v.max()) for v in lengths.values()) + 3, 3)
    look: Look = {"bins": bins, "density": True, "histtype": "step", "linewidth": 1.4}
    for number, (task, values) in enumerate(lengths.items()):
        look |= {"color": style[task]["color"], "linestyle": "-" if number < len(COLOURS) else "--"}
        left.hist(values, **look, label=task)
    left.set(xlabel="tokens per training example", ylabel="density")
    columns = 2 if len(lengths) < 5 else 3
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=7)
    for row, (task, counts) in enumerate(balance.items()):
        _draw_shares(right, row, counts, style[task]["color"])
    right.set_yticks(range(len(balance)), list(balance))
    right.invert_yaxis()
    right.set_xlabel("share of training examples (%)")
    percent(right, "x")
    return figure


def _draw_shares(ax: Axes, row: int, counts: Mapping[str, int], colour: str) -> None:
    """Draw the shares of a task's labels end to end, with the label written on each."""
    start, total = 0.0, sum(counts.values())
    words: Look = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}
    for i, (label, count) in enumerate(counts.items()):
        share = count / total
        fade = 0.85 - 0.6 * i / max(1, len(counts) - 1)
        ax.barh(row, share, left=start, color=colour, alpha=fade, edgecolor="white")
        text = label if share > 0.025 * len(label) else label[:4] + "."
        ink = "white" if colour == "#000000" and fade > 0.5 else "black"
        ax.text(start + share / 2, row, text, color=ink, **words)
        start += share
