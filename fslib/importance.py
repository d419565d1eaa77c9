"""How much does a task need each attention head?

The estimate of Michel et al. (2019), as Li et al. (2023) use it, for task t:

    I_t[l,h] = (1/N) * sum over examples x, tokens i of | < ctx[l,h,i](x), d loss(x) / d ctx[l,h,i](x) > |

ctx[l,h,i] is head h's output at token i of layer l, before the output projection, loss(x) the example's
own loss, N the number of non-padding tokens. The inner product is the first-order change of the loss if
that output were scaled away; summed over an example's tokens it is d loss / d gate.

It is a measurement: the model leaves it exactly as it came.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor

from fslib.batching import Batch
from fslib.errors import FslibError, unknown
from fslib.evaluation import EVAL_BATCH, gather_rows, in_mode, length_batches, pick_split
from fslib.heads import tapped
from fslib.models import MultiTaskModel
from fslib.tasks import Split, Task

REDUCTIONS = ("token", "example")
NORMALIZATIONS = (None, "layer")


@dataclass(frozen=True, eq=False)
class Contributions:
    """Every example's share in the importance scores, so that subsets and resamples cost nothing.

    absolute: (n, layers, heads), sum over an example's tokens of |<ctx, grad>|.
    signed: (n, layers, heads), the same without the bars: d loss / d gate.
    tokens: (n,), non-padding tokens of each example.
    """

    absolute: Float[np.ndarray, "n layers heads"]
    signed: Float[np.ndarray, "n layers heads"]
    tokens: Int[np.ndarray, " n"]

    def importance(
        self, *, reduction: str = "token", normalize: str | None = None, subset: np.ndarray | None = None
    ) -> Float[np.ndarray, "layers heads"]:
        """(layers, heads) importance over all examples or a subset of them (positions; may repeat)."""
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        subset = np.arange(len(self.tokens)) if subset is None else np.asarray(subset)
        if not len(subset):
            raise FslibError("importance needs at least one example")
        parts = self.absolute[subset] if reduction == "token" else np.abs(self.signed[subset])
        scores = parts.sum(0, dtype=np.float64) / self.tokens[subset].sum()
        return normalized(scores, normalize)


def normalized(
    importance: Float[np.ndarray, "layers heads"], normalize: str | None
) -> Float[np.ndarray, "layers heads"]:
    """Importance as it is (None), or with each layer divided by its L2 norm ("layer", Michel et al.'s advice)."""
    if normalize not in NORMALIZATIONS:
        raise FslibError(f'unknown normalize {normalize!r}: valid: None, "layer"')
    if normalize is None:
        return importance
    norms = np.linalg.norm(importance, axis=1, keepdims=True)
    return importance / np.where(norms > 0, norms, 1)


def head_importance(
    model: MultiTaskModel,
    task: Task,
    *,
    reduction: str = "token",
    normalize: str | None = None,
    split: str = "train",
    examples: int | None = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
) -> Float[np.ndarray, "layers heads"]:
    """Importance of every head for a task, (layers, heads), >= 0, in units of loss per token.

    reduction: "token" takes the absolute value token by token (the released code), "example" after summing an
        example's tokens. normalize: None, or "layer" to divide each layer by its L2 norm.
    split: "train" by default, so that evaluation data chooses nothing. examples: a random part of the split
        (`seed`), None for all.
    """
    found = contributions(model, task, split=split, examples=examples, batch_size=batch_size, seed=seed)
    return found.importance(reduction=reduction, normalize=normalize)


def contributions(
    model: MultiTaskModel,
    task: Task,
    *,
    split: str = "train",
    examples: int | None = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
) -> Contributions:
    """The pass behind `head_importance`, example by example: one forward and one backward, no weight gradients."""
    part = _sample(task, split, examples, seed)
    batches = length_batches(model, part, batch_size)
    if not batches:
        raise FslibError("fewer batches than processes: use a smaller batch_size for importance")
    # Filled in place: small results kept between large batches would leave holes in memory that none can use.
    absolute = np.zeros((len(part), model.n_layers, model.n_heads), dtype=np.float32)
    signed = np.zeros_like(absolute)
    tokens = np.zeros(len(part), dtype=np.int64)
    with _measuring(model):
        for batch in batches:
            per_token = head_products(model, batch.to(model.device), task.name)  # (layers, batch, seq, heads)
            absolute[batch.indices] = per_token.abs().sum(2).transpose(0, 1).cpu().numpy()
            signed[batch.indices] = per_token.sum(2).transpose(0, 1).cpu().numpy()
            tokens[batch.indices] = batch.mask.sum(1).numpy()
    return Contributions(*(gather_rows(rows, batches) for rows in (absolute, signed, tokens)))


def head_products(model: MultiTaskModel, batch: Batch, task: str) -> Float[Tensor, "layers batch seq heads"]:
    """< ctx, d loss / d ctx > for every layer, example, token and head; zero at padding."""
    contexts: list[Tensor] = []

    def listen(layer: int, ctx: Tensor) -> Tensor:
        # The graph starts at the first layer's context: nothing below it is needed.
        ctx = ctx.detach().requires_grad_() if layer == 0 else ctx
        contexts.append(ctx)
        return ctx

    with torch.enable_grad(), tapped(model, listen):
        # Examples do not meet inside the model, so the gradient of the sum holds each example's own.
        loss = model.losses(batch, task).sum()
        gradients = torch.autograd.grad(loss, contexts)
    pairs = zip(contexts, gradients, strict=True)
    products = torch.stack([(ctx.detach() * grad).sum(-1) for ctx, grad in pairs])  # (layers, batch, seq, heads)
    return products * batch.mask[None, :, :, None]


@contextmanager
def _measuring(model: MultiTaskModel) -> Iterator[None]:
    """Dropout off and no weight gradients inside; modes and requires_grad restored, whatever happens."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with in_mode(model, training=False):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _sample(task: Task, split: str, examples: int | None, seed: int) -> Split:
    if examples is None:
        return pick_split(task, split)
    if examples < 1:
        raise FslibError(f"examples {examples}: give at least one, or None for all")
    pick_split(task, split)  # refuses an unknown split by name
    return pick_split(task.limited(**{split: examples}, seed=seed), split)


def mean_context(
    model: MultiTaskModel, task: Task, *, split: str = "train", examples: int | None = None, seed: int = 0
) -> Float[Tensor, "layers heads head_dim"]:
    """Each head's average output over a task's non-padding tokens, for `pruned(..., ablation="mean")`."""
    total = torch.zeros(model.n_layers, *model.control.head_shapes[0], dtype=torch.float64)
    count = 0
    with in_mode(model, training=False), torch.inference_mode():
        for batch in length_batches(model, _sample(task, split, examples, seed), EVAL_BATCH):
            weights = batch.mask[:, :, None, None].to(model.device)

            def listen(layer: int, ctx: Tensor, weights: Tensor = weights) -> Tensor:
                total[layer] += (ctx * weights).sum((0, 1)).cpu()
                return ctx

            with tapped(model, listen):
                model(batch.to(model.device).inputs, task.name)
            count += int(weights.sum())
    parts = gather_object([(total, count)])
    return (sum(t for t, _ in parts) / sum(c for _, c in parts)).float()
