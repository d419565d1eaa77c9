"""Notebook 00: what the models learn from, and which models they are."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.data.batches import Encoded
from fslib.data.bbc import EMBEDDED, articles, raw_articles, split_articles
from fslib.model.encoders import ENCODERS
from fslib.model.multitask import MultiTaskModel
from fslib.plot import COLOURS, looks, panels, percent, styled
from fslib.scoring import chance_level
from fslib.study.fingerprints import cached_task
from fslib.study.study import Study

UNBALANCED = 0.8  # a constant answer that scores more than this


def task_table(study: Study) -> pd.DataFrame:
    """Return one row per task: sizes, labels, metric, chance level, tokens per training example.

    truncated: training examples of which a part is cut off. lost: those of which a text is lost wholly.
    """
    rows = []
    for name, encoded in _encoded(study).items():
        task, tokens = study.every_task[name], encoded.lengths
        rows.append(
            {
                "task": name,
                "question": task.description,
                "texts": 1 if task.train.pairs is None else 2,
                "labels": ", ".join(task.label_names) or "a number",
                "train": len(task.train),
                "eval": len(task.eval),
                "metric": task.metric,
                "chance": chance_level(task.metric, task.eval.labels),
                "tokens": float(tokens.mean()),
                "longest": int(tokens.max()),
                "truncated": int(encoded.truncated.sum()),
                "lost": int(encoded.lost.sum()),
                "in both splits": len(task.shared_texts()),
            }
        )
    return pd.DataFrame(rows)


def lengths(study: Study) -> dict[str, np.ndarray]:
    """Return the tokens of every training example, task by task."""
    return {name: encoded.lengths for name, encoded in _encoded(study).items()}


def _encoded(study: Study) -> dict[str, Encoded]:
    tasks, p = study.every_task, study.profile
    model = MultiTaskModel.from_pretrained(p.encoder, tasks, max_length=p.max_length)
    return {name: model.encode(task.train) for name, task in tasks.items()}


def balance(study: Study) -> dict[str, dict[str, int]]:
    """Count how often each label occurs in training, task by task."""
    return {
        name: {
            label: int((task.train.labels == i).sum()) for i, label in enumerate(task.label_names)
        }
        for name, task in study.every_task.items()
        if not task.is_regression
    }


def examples(study: Study) -> pd.DataFrame:
    """Return the first training example of each task's first two labels, in the order of the labels."""
    rows = []
    for name, task in study.every_task.items():
        for label in np.unique(task.train.labels)[:2]:
            i = int(np.flatnonzero(task.train.labels == label)[0])
            pair = task.train.pairs[i] if task.train.pairs else ""
            said = f"{label:g}" if task.is_regression else task.label_names[int(label)]
            rows.append(
                {"task": name, "text": task.train.texts[i], "second text": pair, "label": said}
            )
    return pd.DataFrame(rows)


def sentences(study: Study) -> str:
    """Say what a reader of scores should know: shared or blank texts, an answer that is nearly always right."""
    lines = []
    for name, task in study.every_task.items():
        if shared := task.shared_texts():
            lines.append(
                f"{name}: {len(shared)} texts are in both splits, so its score may be too high."
            )
        if blank := sum(
            not text.strip() for side in (task.train, task.eval) for text in side.texts
        ):
            lines.append(f"{name}: {blank} texts are blank.")
        if len(np.unique(task.eval.labels)) < 2:
            lines.append(
                f"{name}: all evaluation examples have one label, so its score says nothing."
            )
        elif (share := chance_level(task.metric, task.eval.labels)) > UNBALANCED:
            lines.append(
                f"{name}: always the same answer scores {share:.2f}; compare scores with that."
            )
    return (
        "\n".join(lines)
        or "No text is in both splits or blank, and no answer is nearly always right."
    )


def corpus() -> pd.DataFrame:
    """Count articles, from the raw ones of the embedded corpus to the two sides of the split."""
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


@cache
def embedded_encoders() -> pd.DataFrame:
    """Return one row per encoder that needs no download; it is the same whatever the tasks."""
    rows, task = [], cached_task(next(iter(EMBEDDED)))
    for name, (_, pretrained) in ENCODERS.items():
        model = MultiTaskModel.from_pretrained(name, task)
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


@styled
def plot_lengths_and_labels(
    lengths: Mapping[str, np.ndarray], balance: Mapping[str, Mapping[str, int]]
) -> Figure:
    """Draw, left: tokens per example, task by task. Right: how often each label occurs (shares of the train split)."""
    style = looks(list(lengths))
    figure, (left, right) = panels(2, max(2.6, 0.5 + 0.32 * len(lengths)))
    top = max(int(v.max()) for v in lengths.values())
    for number, (task, values) in enumerate(lengths.items()):
        left.hist(
            values,
            bins=np.arange(0, top + 3, 3).tolist(),
            density=True,
            histtype="step",
            linewidth=1.4,
            color=style[task]["color"],
            linestyle="-" if number < len(COLOURS) else "--",
            label=task,
        )
    left.set(xlabel="tokens per training example", ylabel="density")
    left.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2 if len(lengths) < 5 else 3,
        fontsize=7,
    )
    for row, (task, counts) in enumerate(balance.items()):
        start, total = 0.0, sum(counts.values())
        for i, (label, count) in enumerate(counts.items()):
            share = count / total
            fade = 0.85 - 0.6 * i / max(1, len(counts) - 1)
            right.barh(
                row, share, left=start, color=style[task]["color"], alpha=fade, edgecolor="white"
            )
            text = label if share > 0.025 * len(label) else label[:4] + "."
            dark = style[task]["color"] == "#000000" and fade > 0.5
            right.text(
                start + share / 2,
                row,
                text,
                color="white" if dark else "black",
                ha="center",
                va="center",
                fontsize=7,
                parse_math=False,
            )
            start += share
    right.set_yticks(range(len(balance)), list(balance))
    right.invert_yaxis()
    right.set_xlabel("share of training examples (%)")
    percent(right, "x")
    return figure
