"""How much does a task need each attention head?

The estimate of Michel et al. (2019), as Li et al. (2023) use it, for task t:

    I_t[l,h] = (1/N) * sum over examples x, tokens i of | < ctx[l,h,i](x), d loss(x) / d ctx[l,h,i](x) > |

ctx[l,h,i] is head h's output at token i of layer l, before the output projection, loss(x) the example's
own loss, N the number of non-padding tokens. The inner product is the first-order change of the loss if
that output were scaled away; summed over an example's tokens it is d loss / d gate. Other estimators, to test
this one, are in `estimators`.

All are measurements: the model leaves them exactly as it came.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn

from fslib.data.batches import Batch
from fslib.data.tasks import Split, Task
from fslib.errors import FslibError, unknown
from fslib.estimators import STEPS, ablation, head_products, integrated, norms, passes, random_scores
from fslib.evaluation import EVAL_BATCH, gather_rows, in_mode, length_batches, sample
from fslib.model.attention import tapped
from fslib.model.multitask import MultiTaskModel
from fslib.progress import bar

REDUCTIONS = ("token", "example")
NORMALIZATIONS = (None, "layer")


@dataclass(frozen=True, eq=False)
class Estimate:
    """Every example's part in the scores of one estimator, so that subsets and resamples cost nothing.

    values: (n, layers, heads), signed where the estimator is. weights: (n,), what the scores are per: an example's
    tokens, or 1 for the example itself. unsigned: drop the sign example by example, so that no two cancel.
    """

    values: Float[np.ndarray, "n layers heads"]
    weights: Int[np.ndarray, " n"]
    unsigned: bool = False

    def importance(
        self, *, normalize: str | None = None, subset: np.ndarray | None = None
    ) -> Float[np.ndarray, "layers heads"]:
        """(layers, heads) importance over all examples or a subset of them (positions; may repeat)."""
        subset = np.arange(len(self.weights)) if subset is None else np.asarray(subset)
        if not len(subset):
            raise FslibError("importance needs at least one example")
        parts = np.abs(self.values[subset]) if self.unsigned else self.values[subset]
        scores = parts.sum(0, dtype=np.float64) / self.weights[subset].sum()
        return normalized(scores, normalize)


@dataclass(frozen=True, eq=False)
class Contributions:
    """Every example's part in the gradient scores, with and without signs: both reductions from one pass.

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
        return self.estimate(reduction).importance(normalize=normalize, subset=subset)

    def estimate(self, reduction: str = "token") -> Estimate:
        """The same under one reduction."""
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        if reduction == "token":
            return Estimate(self.absolute, self.tokens)
        return Estimate(self.signed, self.tokens, unsigned=True)


def normalized(
    importance: Float[np.ndarray, "layers heads"], normalize: str | None
) -> Float[np.ndarray, "layers heads"]:
    """Importance as it is (None), or with each layer divided by its L2 norm ("layer", Michel et al.'s advice)."""
    check_normalize(normalize)
    if normalize is None:
        return importance
    lengths = np.linalg.norm(importance, axis=1, keepdims=True)
    return importance / np.where(lengths > 0, lengths, 1)


def check_normalize(normalize: str | None) -> None:
    if normalize not in NORMALIZATIONS:
        raise FslibError(f'unknown normalize {normalize!r}: valid: None, "layer"')


def head_importance(
    model: MultiTaskModel,
    task: Task,
    *,
    estimator: str = "gradient",
    reduction: str = "token",
    normalize: str | None = None,
    split: str = "train",
    examples: int | None = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
    steps: int = STEPS,
) -> Float[np.ndarray, "layers heads"]:
    """Importance of every head for a task, (layers, heads), higher = more important.

    estimator: "gradient", the paper's, >= 0, in units of loss per token; "ablation", loss with the head zeroed minus
        loss, mean over examples (< 0: better off without it); "integrated", mean over examples of |A|, A the mean of
        d loss / d gate at `steps` points while all gates go from 0 to 1 together, loss per example; "norm", mean over
        tokens of the length of the head's output; "random", uniform by `seed` and the task's name.
    reduction: of "gradient": "token" takes the absolute value token by token (the released code), "example" after
        summing an example's tokens. normalize: None, or "layer" to divide each layer by its L2 norm.
    split: "train" by default, so that evaluation data chooses nothing. examples: a random part of the split
        (`seed`), None for all.
    Inside `pruned`, heads that are off score 0 (but by "random"). What each costs: `estimators.passes`.
    """
    check_normalize(normalize)  # a misspelt word should not cost a pass
    found = estimate(
        model,
        task,
        estimator=estimator,
        reduction=reduction,
        split=split,
        examples=examples,
        batch_size=batch_size,
        seed=seed,
        steps=steps,
    )
    return found.importance(normalize=normalize)


def estimate(
    model: MultiTaskModel,
    task: Task,
    *,
    estimator: str = "gradient",
    reduction: str = "token",
    split: str = "train",
    examples: int | None = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
    steps: int = STEPS,
) -> Estimate:
    """The passes behind `head_importance`, example by example; the same options."""
    passes(estimator, model.n_layers, model.n_heads, steps)  # refuses an unknown estimator and no steps
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if estimator == "gradient":
        found = contributions(model, task, split=split, examples=examples, batch_size=batch_size, seed=seed)
        return found.estimate(reduction)
    if reduction != "token":
        raise FslibError(f'reduction {reduction!r} is for estimator "gradient" alone: leave it out with {estimator!r}')
    part = sample(task, split, examples, seed)
    values = np.zeros((len(part), model.n_layers, model.n_heads), dtype=np.float32)
    weights = np.ones(len(part), dtype=np.int64)
    if estimator == "random":
        values[:] = random_scores(model.n_layers, model.n_heads, task.name, seed)
        return Estimate(values, weights)
    measures: dict[str, Callable[[MultiTaskModel, Batch, str], Tensor]] = {
        "ablation": ablation,
        "integrated": partial(integrated, steps=steps),
        "norm": norms,
    }
    batches = _batches(model, part, batch_size)
    with measuring(model):
        for batch in bar(batches, f"{estimator} importance", "batches"):
            values[batch.indices] = measures[estimator](model, batch.to(model.device), task.name).cpu().numpy()
            if estimator == "norm":
                weights[batch.indices] = batch.mask.sum(1).numpy()
    values, weights = gather_rows(values, batches), gather_rows(weights, batches)
    return Estimate(values, weights, unsigned=estimator == "integrated")


def contributions(
    model: MultiTaskModel,
    task: Task,
    *,
    split: str = "train",
    examples: int | None = None,
    batch_size: int = EVAL_BATCH,
    seed: int = 0,
) -> Contributions:
    """The gradient estimator, example by example: one forward and one backward pass, no weight gradients."""
    part = sample(task, split, examples, seed)
    batches = _batches(model, part, batch_size)
    # Filled in place: small results kept between large batches would leave holes in memory that none can use.
    absolute = np.zeros((len(part), model.n_layers, model.n_heads), dtype=np.float32)
    signed = np.zeros_like(absolute)
    tokens = np.zeros(len(part), dtype=np.int64)
    with measuring(model):
        for batch in batches:
            per_token = head_products(model, batch.to(model.device), task.name)  # (layers, batch, seq, heads)
            absolute[batch.indices] = per_token.abs().sum(2).transpose(0, 1).cpu().numpy()
            signed[batch.indices] = per_token.sum(2).transpose(0, 1).cpu().numpy()
            tokens[batch.indices] = batch.mask.sum(1).numpy()
    return Contributions(*(gather_rows(rows, batches) for rows in (absolute, signed, tokens)))


@contextmanager
def measuring(model: nn.Module, weights: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Dropout off and gradients for these weights alone; modes and requires_grad restored, whatever happens."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with in_mode(model, training=False):
            yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _batches(model: MultiTaskModel, part: Split, batch_size: int) -> list[Batch]:
    batches = length_batches(model, part, batch_size)
    if not batches:
        raise FslibError("fewer batches than processes: use a smaller batch_size for importance")
    return batches


def mean_context(
    model: MultiTaskModel, task: Task, *, split: str = "train", examples: int | None = None, seed: int = 0
) -> Float[Tensor, "layers heads head_dim"]:
    """Each head's average output over a task's non-padding tokens, for `pruned(..., ablation="mean")`."""
    total = torch.zeros(model.n_layers, *model.control.head_shapes[0], dtype=torch.float64)
    count = 0
    with in_mode(model, training=False), torch.inference_mode():
        for batch in length_batches(model, sample(task, split, examples, seed), EVAL_BATCH):
            weights = batch.mask[:, :, None, None].to(model.device)

            def listen(layer: int, ctx: Tensor, weights: Tensor = weights) -> Tensor:
                total[layer] += (ctx * weights).sum((0, 1)).cpu()
                return ctx

            with tapped(model, listen):
                model(batch.to(model.device).inputs, task.name)
            count += int(weights.sum())
    parts = gather_object([(total, count)])
    return (sum(t for t, _ in parts) / sum(c for _, c in parts)).float()
