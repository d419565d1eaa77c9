"""What one batch says about every head: the importance estimators, and what each costs.

Why several: the gradient is a first-order guess, at gate 1, of what happens when a head is gone. The others test it:

    gradient     < ctx, d loss / d ctx > at every token
    ablation     loss with the head zeroed minus loss: exact, but a pass for each head
    integrated   the mean of d loss / d gate while all gates go from 0 to 1 together (integrated gradients,
                 Sundararajan et al., 2017): the heads' values sum to the change of the loss
    norm         the length of the head's output, which knows the task's texts but not its labels
    random       measures nothing: what any other must beat

Heads are read and scaled before the gates of a surrounding `pruned` apply, so what is off stays as it is.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fslib.data.batches import Batch
from fslib.errors import FslibError, unknown
from fslib.model.attention import tapped
from fslib.model.multitask import MultiTaskModel

ESTIMATORS = ("gradient", "ablation", "integrated", "norm", "random")
STEPS = 8  # of "integrated": in MiniLM the values then sum to the loss they change within 1 %, and rank as with 64


def passes(estimator: str, layers: int, heads: int, steps: int = STEPS) -> tuple[int, int]:
    """(forward, backward) passes over the sample that an estimator takes on a model of `layers` x `heads`."""
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if steps < 1:
        raise FslibError(f"steps {steps}: give at least one point between gate 0 and gate 1")
    return {
        "gradient": (1, 1),
        "ablation": (layers * heads + 1, 0),
        "integrated": (steps, steps),
        "norm": (1, 0),
        "random": (0, 0),
    }[estimator]


def head_products(
    model: MultiTaskModel, batch: Batch, task: str, scale: float = 1.0
) -> Float[Tensor, "layers batch seq heads"]:
    """< ctx, d loss / d ctx > for every layer, example, token and head; zero at padding.

    scale: what every head's output is multiplied by on its way on; ctx is the output before that.
    """
    contexts: list[Tensor] = []

    def listen(layer: int, ctx: Tensor) -> Tensor:
        # The graph starts at the first layer's context: nothing below it is needed.
        ctx = ctx.detach().requires_grad_() if layer == 0 else ctx
        contexts.append(ctx)
        return ctx if scale == 1 else ctx * scale

    with torch.enable_grad(), tapped(model, listen):
        # Examples do not meet inside the model, so the gradient of the sum holds each example's own.
        loss = model.losses(batch, task).sum()
        gradients = torch.autograd.grad(loss, contexts)
    pairs = zip(contexts, gradients, strict=True)
    products = torch.stack([(ctx.detach() * grad).sum(-1) for ctx, grad in pairs])  # (layers, batch, seq, heads)
    return products * batch.mask[None, :, :, None]


def integrated(model: MultiTaskModel, batch: Batch, task: str, *, steps: int) -> Float[Tensor, "batch layers heads"]:
    """Mean of d loss / d gate at the midpoints of `steps` equal parts of [0, 1], all gates moving together.

    Summed over heads it tends to loss(all gates 1) - loss(all gates 0) as `steps` grows.
    """
    total = torch.zeros((), device=model.device)
    for k in range(steps):
        gate = (k + 0.5) / steps
        # d loss / d ctx = gate * d loss / d (gate * ctx), and d loss / d gate wants the latter
        total = total + head_products(model, batch, task, scale=gate).sum(2) / gate  # (layers, batch, heads)
    return total.transpose(0, 1) / steps


def ablation(model: MultiTaskModel, batch: Batch, task: str) -> Float[Tensor, "batch layers heads"]:
    """Every example's loss with one head zeroed minus its loss, for each head; < 0: better off without the head."""
    with torch.inference_mode():
        loss = model.losses(batch, task)
        changes = loss.new_empty(len(loss), model.n_layers, model.n_heads)
        for layer, head in np.ndindex(model.n_layers, model.n_heads):

            def zero(at: int, ctx: Tensor, layer: int = layer, head: int = head) -> Tensor:
                if at != layer:
                    return ctx
                ctx = ctx.clone()
                ctx[:, :, head] = 0
                return ctx

            with tapped(model, zero):
                changes[:, layer, head] = model.losses(batch, task) - loss
    return changes


def norms(model: MultiTaskModel, batch: Batch, task: str) -> Float[Tensor, "batch layers heads"]:
    """L2 norm of each head's output, summed over an example's tokens; 0 for a head that is switched off."""
    lengths: list[Tensor] = []

    def listen(layer: int, ctx: Tensor) -> Tensor:
        lengths.append(ctx.norm(dim=-1))
        return ctx

    with torch.inference_mode(), tapped(model, listen):
        model(batch.inputs, task)
        sums = (torch.stack(lengths) * batch.mask[None, :, :, None]).sum(2)  # (layers, batch, heads)
        gate = model.control.gate
        # The tap comes before the gate, and what does not pass the gate is not the head's output.
        return (sums if gate is None else sums * gate.abs()[:, None]).transpose(0, 1)


def random_scores(layers: int, heads: int, task: str, seed: int) -> Float[np.ndarray, "layers heads"]:
    """Uniform in [0, 1), by seed and task name: two tasks of one seed must not agree on their heads by chance."""
    if seed < 0:
        raise FslibError(f"seed {seed}: give 0 or more")
    return np.random.default_rng([seed, *task.encode()]).random((layers, heads), dtype=np.float32)
