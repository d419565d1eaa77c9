"""IAP, important attention-head pruning: switch top heads off and see who suffers.

For every task t and fraction alpha: the top heads of t are pruned, and every task u is evaluated.
The same is done for layer-matched random sets. The `IAP` that comes back (`fslib.iap`) keeps every
prediction, so that scores, dissociation, intervals and nulls are computed afterwards, from arrays,
in any convention.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Task, Tasks, as_tasks
from fslib.errors import FslibError, check_among, check_count, check_flag, finite_array
from fslib.evaluation import EVAL_BATCH, blank, check_finite, length_batches, predict, predicted
from fslib.heads import checked_fractions, random_heads, top_heads
from fslib.iap import IAP
from fslib.importance import head_importance, mean_context
from fslib.model.attention import ABLATIONS, pruned
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel, check_model, example_losses
from fslib.model.reuse import reused_layers
from fslib.progress import bar

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)


def prune_important_heads(
    model: MultiTaskModel,
    tasks: Tasks,
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
    """Prune each task's top heads, and random ones like them, and score all tasks.

    Source: Li et al. (2023).

    Args:
        model: The model, with a classifier for every task.
        tasks: Two tasks or more, for a dissociation.
        fractions: Shares of all heads, each in (0, 1].
        controls: Random sets per task and fraction, with as many heads in each layer as the task's
            top heads; the top heads' own set is none of them.
        importance: {task: (layers, heads)}, or None to score it here.
        reduction: Of the importance that is scored here, as are normalize and examples.
        normalize: As `fslib.head_importance` takes it.
        examples: Training examples that importance is scored on; None for all.
        min_per_layer: Heads that every layer keeps.
        iterative: Score again after each fraction, with what is pruned so far switched off.
        ablation: "zero", or "mean": a head's average output over the training data of the task that
            is evaluated.
        batch_size: Examples at once.
        seed: For examples and controls.

    Raises:
        FslibError: For a fraction outside (0, 1] or of no head, and for more controls than there
            are other sets.
    """
    named = as_tasks(tasks)
    check_model(model, *named.values())
    check_count("controls", controls, 0)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0)
    check_flag("iterative", iterative)
    check_among("ablation", ablation, ABLATIONS)
    shape = model.n_layers, model.n_heads
    fractions = checked_fractions(fractions, shape, controls)
    if importance is not None:
        if not isinstance(importance, Mapping):
            raise FslibError(f"importance {type(importance)}: give {{task: (layers, heads)}}")
        for name in named:
            check_among("task of the importance given", name, importance)
            finite_array(f"importance of task {name}", importance[name], shape)
    scoring: dict[str, Any] = {"reduction": reduction, "normalize": normalize}
    scoring |= {"examples": examples, "seed": seed}
    top = []
    for name, task in named.items():
        known = head_importance(model, task, **scoring) if importance is None else importance[name]
        rescored = scoring if iterative else None
        top.append(_nested_sets(model, task, known, fractions, min_per_layer, rescored))
    rng = np.random.default_rng([seed, 2])
    sets = [np.stack([own, *random_heads(own, controls, rng, others=True)]) for own in top]
    heads = np.moveaxis(np.stack(sets), 2, 0)  # (fractions, tasks, sets, layers, heads)

    batches, means, unpruned = {}, {}, {}
    for u, task in named.items():
        batches[u] = length_batches(model, task.eval, batch_size)
        if ablation == "mean":
            means[u] = mean_context(model, task, examples=examples, seed=seed)
        unpruned[u] = predict(model, task, batches[u], len(task.eval))[None]
    found = each_pruned(model, named, batches, heads.reshape(-1, *shape), means=means)
    lesioned = {u: rows.reshape(1, *heads.shape[:3], -1) for u, rows in found.items()}
    metrics = tuple(task.metric for task in named.values())
    labels = {u: task.eval.labels for u, task in named.items()}
    return IAP(tuple(named), metrics, fractions, heads[None], labels, unpruned, lesioned)


def each_pruned(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    batches: Mapping[str, Sequence[Batch]],
    sets: Bool[np.ndarray, "sets layers heads"],
    *,
    means: Mapping[str, Tensor] = MappingProxyType({}),
    losses: Mapping[str, Float[np.ndarray, "sets n"]] | None = None,
) -> dict[str, Num[np.ndarray, "sets n"]]:
    """Return every task's predictions with every head set switched off.

    Where the first set is empty, the others hand back its layers below their own (`reused_layers`).

    Args:
        model: The model.
        tasks: {name: task}.
        batches: {name: batches of its evaluation examples}.
        sets: Head sets, True = switched off.
        means: {name: what a head that is off gives}, zero for a task that is not among them.
        losses: {name: to be filled with every example's loss}.
    """
    found = {name: blank(t, len(sets), len(t.eval)) for name, t in tasks.items()}
    lowest = [int(heads.any(1).argmax()) if heads.any() else None for heads in sets]
    with in_mode(model, training=False), torch.inference_mode(), reused_layers(model) as changed:
        work = [(name, batch) for name, mine in batches.items() for batch in mine]
        for name, batch in bar(work, "pruning", "batches"):
            there, mean = batch.to(model.device), means.get(name)
            ablation = "zero" if mean is None else "mean"
            for number, heads in enumerate(sets):
                changed(lowest[number])
                with pruned(model, heads, ablation=ablation, mean=mean):
                    logits = check_finite(model(there.inputs, name), name)
                found[name][number, batch.indices] = predicted(tasks[name], logits)
                if losses is not None:
                    each = example_losses(logits, there.labels)
                    losses[name][number, batch.indices] = each.float().cpu().numpy()
    return found


def _nested_sets(
    model: MultiTaskModel,
    task: Task,
    importance: np.ndarray,
    fractions: Sequence[float],
    min_per_layer: int,
    rescored: dict[str, Any] | None,
) -> Bool[np.ndarray, "fractions layers heads"]:
    """Return a task's top heads at every fraction.

    With `rescored`, options of `head_importance`, each step adds the best of the re-scored rest.
    """
    sets: list[np.ndarray] = []
    for fraction in fractions:
        if sets and rescored is not None:
            with pruned(model, sets[-1]):
                importance = head_importance(model, task, **rescored)
            # what is pruned already scores 0 and must stay in the set
            above_all = importance[~sets[-1]].max(initial=0) + 1
            importance = np.where(sets[-1], above_all, importance)
        sets.append(top_heads(importance, fraction, min_per_layer=min_per_layer))
        if not sets[-1].any():
            raise FslibError(f"fraction {fraction}, min_per_layer: no head of task {task.name}")
    return np.array(sets)
