"""IAP, important attention-head pruning: switch off each task's most important heads and see who suffers.

For every task t and fraction alpha: the top heads of t are pruned, and every task u is evaluated. The same
is done for layer-matched random sets. The `IAP` that comes back (`fslib.iap`) keeps every prediction, so that
scores, dissociation, intervals and nulls are computed afterwards, from arrays, in any convention.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Task, as_tasks
from fslib.errors import FslibError, check_count, check_flag, finite_array, unknown
from fslib.evaluation import EVAL_BATCH, check_finite, length_batches, predict, predicted
from fslib.heads import checked_fractions, random_heads, top_heads
from fslib.iap import IAP
from fslib.importance import head_importance, mean_context
from fslib.model.attention import ABLATIONS, pruned
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.progress import bar

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)


def prune_important_heads(
    model: MultiTaskModel,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    fractions: Sequence[float] = FRACTIONS,
    controls: int = 5,
    *,
    importance: Mapping[str, Float[np.ndarray, "layers heads"]] | None = None,
    reduction: str = "token",
    normalize: str | None = None,
    examples: int | None = None,
    min_per_layer: int = 0,
    iterative: bool = False,
    ablation: str = "zero",
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
) -> IAP:
    """Prune each task's most important heads, and matched random ones, evaluate every task, and return the `IAP`.

    fractions: shares of all heads, each in (0, 1]. controls: random sets per task and fraction, with as many heads
        in each layer as the task's top heads. importance: {task: (layers, heads)}, or None to score it here on
        `examples` training examples (None: all) with `reduction` and `normalize`. min_per_layer: heads that every
        layer keeps. iterative: score again after each fraction, with what is pruned so far switched off.
    ablation: "zero", or "mean": a head's average output over the training data of the task being evaluated.
    Raises FslibError for a fraction outside (0, 1] or of no head, and for more controls than distinct sets; the top
    heads' own set is no control. Source: Li et al. (2023).
    """
    named = as_tasks(tasks)
    check_model(model, *named.values())
    for name, count, least in (
        ("controls", controls, 0),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        check_count(name, count, least)
    check_flag("iterative", iterative)
    fractions = checked_fractions(fractions, (model.n_layers, model.n_heads))
    _check(model, named, importance, ablation)
    scoring: dict[str, Any] = {
        "reduction": reduction,
        "normalize": normalize,
        "examples": examples,
        "seed": seed,
    }
    top = np.zeros((len(named), len(fractions), model.n_layers, model.n_heads), dtype=bool)
    for t, (name, task) in enumerate(named.items()):
        known = (
            importance[name] if importance is not None else head_importance(model, task, **scoring)
        )
        top[t] = _nested_sets(
            model, task, known, fractions, min_per_layer, scoring if iterative else None
        )
        for fraction, chosen in zip(fractions, top[t], strict=True):
            _check_set(name, fraction, chosen, controls)
    rng = np.random.default_rng([seed, 2])
    with_controls = [
        np.concatenate([sets[None], random_heads(sets, controls, rng, others=True)]) for sets in top
    ]
    heads = np.moveaxis(np.stack(with_controls), 2, 0)  # (fractions, tasks, sets, layers, heads)

    batches = {u: length_batches(model, task.eval, batch_size) for u, task in named.items()}
    means = {
        u: mean_context(model, task, examples=examples, seed=seed) if ablation == "mean" else None
        for u, task in named.items()
    }
    unpruned = {
        u: predict(model, task, batches[u], len(task.eval))[None] for u, task in named.items()
    }
    found = {
        u: np.zeros((len(task.eval), *heads.shape[:3]), unpruned[u].dtype)
        for u, task in named.items()
    }
    flat = heads.reshape(-1, *heads.shape[-2:])

    def keep(u: str, batch: Batch, number: int, logits: Tensor) -> None:
        found[u].reshape(-1, len(flat))[batch.indices, number] = predicted(named[u], logits)

    each_pruned(model, batches, flat, keep, ablation=ablation, means=means)
    lesioned = {u: np.moveaxis(rows, 0, -1)[None] for u, rows in found.items()}
    metrics = tuple(task.metric for task in named.values())
    labels = {u: task.eval.labels for u, task in named.items()}
    return IAP(tuple(named), metrics, fractions, heads[None], labels, unpruned, lesioned)


def each_pruned(
    model: MultiTaskModel,
    batches: Mapping[str, Sequence[Batch]],
    sets: Bool[np.ndarray, "sets layers heads"],
    take: Callable[[str, Batch, int, Tensor], None],
    *,
    ablation: str = "zero",
    means: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Call `take` with (task, batch on the model's device, number of a head set, logits while that set is off).

    Every set on every batch, batch by batch.
    """
    with in_mode(model, training=False), torch.inference_mode():
        work = [(name, batch) for name, mine in batches.items() for batch in mine]
        for name, batch in bar(work, "pruning", "batches"):
            there, mean = batch.to(model.device), None if means is None else means[name]
            for number, heads in enumerate(sets):
                with pruned(model, heads, ablation=ablation, mean=mean):
                    logits = check_finite(model(there.inputs, name), name)
                take(name, there, number, logits)


def _check_set(
    task: str, fraction: float, chosen: Bool[np.ndarray, "layers heads"], controls: int
) -> None:
    """Raise FslibError for top heads that are none, or that no other set could be compared with."""
    if not chosen.any():
        raise FslibError(
            f"fraction {fraction} leaves no head of task {task} to prune: use a smaller min_per_layer"
        )
    if controls and all(layer.all() or not layer.any() for layer in chosen):
        raise FslibError(
            f"fraction {fraction} takes whole layers of task {task}: a random set with as many heads in each layer is "
            "the same one; use a smaller fraction, or controls=0"
        )


def _check(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    importance: Mapping[str, np.ndarray] | None,
    ablation: str,
) -> None:
    """Raise FslibError for what cannot be pruned, before the first forward pass."""
    if ablation not in ABLATIONS:
        raise unknown("ablation", ablation, ABLATIONS)
    if not isinstance(importance, Mapping | None):
        raise FslibError(
            f"importance {importance!r:.80}: give {{task: (layers, heads)}}, or None to score it here"
        )
    wanted = (model.n_layers, model.n_heads)
    for name in tasks:
        if importance is None:
            continue
        found = (
            finite_array(f"importance of task {name}", importance[name])
            if name in importance
            else None
        )
        if found is None or found.shape != wanted:
            given = "missing" if found is None else f"of shape {found.shape}"
            raise FslibError(
                f"importance of task {name} is {given}; give one of shape {wanted} (layers, heads)"
            )


def _nested_sets(
    model: MultiTaskModel,
    task: Task,
    importance: np.ndarray,
    fractions: Sequence[float],
    min_per_layer: int,
    rescore: dict[str, Any] | None,
) -> Bool[np.ndarray, "fractions layers heads"]:
    """Return a task's top heads at every fraction; with `rescore`, each step adds the best of the re-scored rest."""
    sets: list[np.ndarray] = []
    for fraction in fractions:
        if sets and rescore is not None:
            with pruned(model, sets[-1]):
                importance = head_importance(model, task, **rescore)
            # what is pruned already scores 0 and must stay in the set
            above_all = importance[~sets[-1]].max(initial=0) + 1
            importance = np.where(sets[-1], above_all, importance)
        sets.append(top_heads(importance, fraction, min_per_layer=min_per_layer))
    return np.array(sets)
