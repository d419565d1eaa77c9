"""How much does a task need each attention head?

The estimate of Michel et al. (2019), as Li et al. (2023) use it, for task t:

    I_t[l,h] = (1/N) * sum over x, i of | < ctx[l,h,i](x), d loss(x) / d ctx[l,h,i](x) > |

over examples x and tokens i. ctx[l,h,i] is head h's output at token i of layer l, before the output
projection, loss(x) the example's own loss, N the number of non-padding tokens. The inner product is
the first-order change of the loss if that output were scaled away; summed over an example's tokens
it is d loss / d gate.

Why other estimators: the gradient is a guess, made at gate 1, of what happens when a head is gone.
These test it:

    gradient     < ctx, d loss / d ctx > at every token (the paper's)
    ablation     loss with the head zeroed minus loss: exact, but one pass per head
    integrated   the mean of d loss / d gate while all gates go from 0 to 1 together (integrated
                 gradients, Sundararajan et al., 2017): the heads' values sum to the change of the
                 loss
    norm         the length of the head's output, which knows the task's texts but not its labels
    random       measures nothing: what any other must beat

All are measurements: the model leaves them exactly as it came. Heads are read and scaled before the
gates of a surrounding `pruned` apply, so what is off stays as it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fslib.data.batches import Batch
from fslib.data.tasks import Task
from fslib.errors import FslibError, check_among, check_count
from fslib.evaluation import EVAL_BATCH, Most, check_finite, in_mode, length_batches, sample
from fslib.heads import HeadMap
from fslib.model.attention import tapped
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.model.reuse import reused_layers
from fslib.progress import bar

ESTIMATORS = ("gradient", "ablation", "integrated", "norm", "random")
REDUCTIONS = ("token", "example")
NORMALIZATIONS = ("layer",)  # or None
Norm = str | None
STEPS = 8  # of "integrated": in MiniLM the values then sum to the change of the loss within 1 %


@dataclass(frozen=True, eq=False)
class Contributions:
    """Every example's part in the gradient scores: both reductions from one pass.

    Args:
        absolute: (n, layers, heads), sum over an example's tokens of |<ctx, grad>|.
        signed: (n, layers, heads), the same without the bars: d loss / d gate.
        tokens: (n,), non-padding tokens of each example.
    """

    absolute: Float[np.ndarray, "n layers heads"]
    signed: Float[np.ndarray, "n layers heads"]
    tokens: Int[np.ndarray, " n"]

    def importance(
        self, *, reduction: str = "token", normalize: Norm = None, subset: ArrayLike | None = None
    ) -> HeadMap:
        """Return importance, (layers, heads), over all examples or some of them.

        Args:
            reduction: As `head_importance` takes it.
            normalize: As `head_importance` takes it.
            subset: Positions of examples, which may repeat; None for all.
        """
        check_among("reduction", reduction, REDUCTIONS)
        chosen = np.arange(len(self.tokens)) if subset is None else np.asarray(subset)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iub"):
            raise FslibError(f"subset of shape {chosen.shape}: give positions, whole numbers")
        values = (self.absolute if reduction == "token" else self.signed)[chosen]
        return _averaged(np.abs(values), self.tokens[chosen], normalize)


def _averaged(values: np.ndarray, weights: np.ndarray, normalize: Norm) -> HeadMap:
    """Return the sum over examples of their values, (n, layers, heads), per unit of weight."""
    if not len(weights):
        raise FslibError("importance needs at least one example")
    return normalized(values.sum(0, dtype=np.float64) / weights.sum(), normalize)


def normalized(importance: HeadMap, normalize: Norm) -> HeadMap:
    """Return importance as it is, or with each layer divided by its L2 norm ("layer").

    The latter is the advice of Michel et al. (2019).
    """
    check_among("normalize", normalize, NORMALIZATIONS, none=True)
    if normalize is None:
        return importance
    lengths = np.linalg.norm(importance, axis=1, keepdims=True)
    return importance / np.where(lengths > 0, lengths, 1)


def head_importance(
    model: MultiTaskModel,
    task: Task,
    *,
    estimator: str = "gradient",
    reduction: str = "token",
    normalize: Norm = None,
    split: str = "train",
    examples: Most = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
    steps: int = STEPS,
) -> HeadMap:
    """Return the importance of every head for a task, higher = more important.

    What each estimator costs: `passes`. Inside `pruned`, heads that are off score 0 (but by
    "random").

    Args:
        model: The model, with a classifier for the task.
        task: The task.
        estimator: "gradient", the paper's, >= 0, in units of loss per token; "ablation", loss with
            the head zeroed minus loss, mean over examples (< 0: better off without it);
            "integrated", mean over examples of |A|, A the mean of d loss / d gate at `steps` points
            while all gates go from 0 to 1 together, loss per example; "norm", mean over tokens of
            the length of the head's output; "random", uniform by `seed` and the task's name.
        reduction: Of "gradient": "token" takes the absolute value token by token (the released
            code), "example" after summing an example's tokens.
        normalize: None, or "layer" to divide each layer by its L2 norm.
        split: "train" by default, so that evaluation data chooses nothing.
        examples: A random part of the split, None for all of it.
        batch_size: Examples at once.
        seed: For that part, and for "random".
        steps: Of "integrated".

    Returns:
        (layers, heads).
    """
    check_among("normalize", normalize, NORMALIZATIONS, none=True)  # before a pass is spent
    check_among("reduction", reduction, REDUCTIONS)
    check_model(model, task)
    passes(estimator, model.n_layers, model.n_heads, steps)  # refuses an unknown estimator
    if estimator == "gradient":
        sampled: dict[str, Any] = {"split": split, "examples": examples, "seed": seed}
        parts = contributions(model, task, batch_size=batch_size, **sampled)
        return parts.importance(reduction=reduction, normalize=normalize)
    if reduction != "token":
        raise FslibError(f'reduction {reduction!r} is for estimator "gradient", not {estimator!r}')
    part, shape = sample(task, split, examples, seed), (model.n_layers, model.n_heads)
    if estimator == "random":  # by the task's name: two tasks of one seed must not agree by chance
        scores = np.random.default_rng([seed, *task.name.encode()]).random(shape, dtype=np.float32)
        return normalized(scores.astype(np.float64), normalize)
    measures: dict[str, Callable[..., Tensor]] = {"ablation": ablation, "norm": norms}
    measures["integrated"] = partial(integrated, steps=steps)
    values, weights = np.zeros((len(part), *shape), np.float32), np.ones(len(part), np.int64)
    with gradients_for(model):
        work = length_batches(model, part, batch_size)
        for batch in bar(work, f"{estimator} importance", "batches"):
            found = measures[estimator](model, batch.to(model.device), task.name)
            values[batch.indices] = check_finite(found, task.name).cpu().numpy()
            if estimator == "norm":
                weights[batch.indices] = batch.mask.sum(1).numpy()
    return _averaged(np.abs(values) if estimator == "integrated" else values, weights, normalize)


def contributions(
    model: MultiTaskModel, task: Task, *, batch_size: int = EVAL_BATCH, **sampled: Any
) -> Contributions:
    """Return the gradient estimator's parts, example by example.

    One forward and one backward pass; no gradient of a weight is computed.

    Args:
        model: The model.
        task: The task.
        batch_size: Examples at once.
        sampled: split, examples and seed, as `head_importance` takes them.
    """
    check_model(model, task)
    part = sample(task, **sampled)
    # Filled in place: small results kept between large batches would leave holes in memory.
    absolute = np.zeros((len(part), model.n_layers, model.n_heads), dtype=np.float32)
    signed, tokens = np.zeros_like(absolute), np.zeros(len(part), dtype=np.int64)
    with gradients_for(model):
        for batch in length_batches(model, part, batch_size):
            # (layers, batch, seq, heads)
            products = head_products(model, batch.to(model.device), task.name)
            per_token = check_finite(products, task.name)
            absolute[batch.indices] = per_token.abs().sum(2).transpose(0, 1).cpu().numpy()
            signed[batch.indices] = per_token.sum(2).transpose(0, 1).cpu().numpy()
            tokens[batch.indices] = batch.mask.sum(1).numpy()
    return Contributions(absolute, signed, tokens)


def head_products(
    model: MultiTaskModel, batch: Batch, task: str, scale: float = 1.0
) -> Float[Tensor, "layers batch seq heads"]:
    """Return < ctx, d loss / d ctx > of every head at every token; zero at padding.

    Args:
        model: The model.
        batch: On the model's device.
        task: A name.
        scale: What every head's output is multiplied by on its way on; ctx is the output before
            that.
    """
    contexts: list[Tensor] = []

    def listen(layer: int, ctx: Tensor) -> Tensor:
        # The graph starts at the first layer's context: nothing below it is needed.
        ctx = ctx.detach().requires_grad_() if layer == 0 else ctx
        contexts.append(ctx)
        return ctx if scale == 1 else ctx * scale

    with torch.enable_grad(), tapped(model, listen):
        # Examples do not meet inside the model, so the gradient of the sum holds each one's own.
        loss = model.losses(batch, task).sum()
        gradients = torch.autograd.grad(loss, contexts)
    pairs = zip(contexts, gradients, strict=True)
    products = [(wide(ctx.detach()) * wide(grad)).sum(-1) for ctx, grad in pairs]
    return torch.stack(products) * batch.mask[None, :, :, None]


def ablation(model: MultiTaskModel, batch: Batch, task: str) -> Float[Tensor, "batch layers heads"]:
    """Return every example's loss with one head zeroed minus its loss, for each head."""
    with torch.inference_mode(), reused_layers(model) as changed:
        changed(None)
        loss = wide(model.losses(batch, task))
        changes = loss.new_empty(len(loss), model.n_layers, model.n_heads)
        for layer, head in np.ndindex(model.n_layers, model.n_heads):

            def zero(at: int, ctx: Tensor, layer: int = layer, head: int = head) -> Tensor:
                if at == layer:
                    ctx = ctx.clone()
                    ctx[:, :, head] = 0
                return ctx

            changed(layer)
            with tapped(model, zero):
                changes[:, layer, head] = wide(model.losses(batch, task)) - loss
    return changes


def integrated(
    model: MultiTaskModel, batch: Batch, task: str, *, steps: int
) -> Float[Tensor, "batch layers heads"]:
    """Return the mean of d loss / d gate on the way of all gates from 0 to 1.

    At the midpoints of `steps` equal parts. Summed over heads it tends to loss(all gates 1) -
    loss(all gates 0) as `steps` grows.
    """
    gates = ((k + 0.5) / steps for k in range(steps))
    # d loss / d ctx = gate * d loss / d (gate * ctx), and d loss / d gate wants the latter
    slopes = (head_products(model, batch, task, scale=gate).sum(2) / gate for gate in gates)
    return sum(slopes, torch.zeros((), device=model.device)).transpose(0, 1) / steps


def norms(model: MultiTaskModel, batch: Batch, task: str) -> Float[Tensor, "batch layers heads"]:
    """Return the L2 norm of each head's output, summed over an example's tokens.

    0 for a head that is switched off.
    """
    lengths: list[Tensor] = []

    def listen(layer: int, ctx: Tensor) -> Tensor:
        lengths.append(wide(ctx).norm(dim=-1))
        return ctx

    with torch.inference_mode(), tapped(model, listen):
        model(batch.inputs, task)
        # (layers, batch, heads)
        sums = (torch.stack(lengths) * batch.mask[None, :, :, None]).sum(2)
        gate = model.control.gate
        # The tap comes before the gate, and what does not pass the gate is not the head's output.
        return (sums if gate is None else sums * gate.abs()[:, None]).transpose(0, 1)


def passes(estimator: str, layers: int, heads: int, steps: int = STEPS) -> tuple[int, int]:
    """Count the (forward, backward) passes over the sample that an estimator takes."""
    check_among("estimator", estimator, ESTIMATORS)
    check_count("steps", steps)
    forward_alone = {"ablation": layers * heads + 1, "norm": 1, "random": 0}
    if estimator in forward_alone:
        return forward_alone[estimator], 0
    return (steps, steps) if estimator == "integrated" else (1, 1)


def mean_context(
    model: MultiTaskModel, task: Task, *, split: str = "train", examples: Most = None, seed: int = 0
) -> Float[Tensor, "layers heads head_dim"]:
    """Return each head's average output, for `pruned(..., ablation="mean")`.

    Over a task's non-padding tokens. The options are those of `head_importance`.
    """
    check_model(model, task)
    total = torch.zeros(model.n_layers, *model.control.head_shapes[0], dtype=torch.float64)
    count = 0
    with in_mode(model, training=False), torch.inference_mode():
        for batch in length_batches(model, sample(task, split, examples, seed), EVAL_BATCH):
            weights = batch.mask[:, :, None, None].to(model.device)

            def listen(layer: int, ctx: Tensor, weights: Tensor = weights) -> Tensor:
                total[layer] += (wide(ctx) * weights.to(ctx.device)).sum((0, 1)).cpu()
                return ctx

            with tapped(model, listen):
                model(batch.to(model.device).inputs, task.name)
            count += int(weights.sum())
    return check_finite((total / count).float(), task.name)


@contextmanager
def gradients_for(model: nn.Module, weights: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Switch dropout off and let these weights alone have gradients.

    Modes and requires_grad are restored. Gradients are possible inside, even where the caller has
    entered `torch.inference_mode`.
    """
    before, chosen = [(p, p.requires_grad) for p in model.parameters()], set(weights)
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter in chosen)
        with torch.inference_mode(False), in_mode(model, training=False):
            yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def wide(values: Tensor) -> Tensor:
    """Return numbers of 16 bits in 32, others as they are.

    In 32, sums over tokens lose nothing and numpy can hold them.
    """
    return values.float() if values.element_size() < 4 else values
