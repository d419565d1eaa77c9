"""The one place where a head is switched off or listened to.

Why a registered attention function: transformers 5 has neither `head_mask` nor `prune_heads`, and
patching model classes would tie us to each of them. Every architecture that computes attention
through transformers' attention interface passes here once per layer, with the heads' outputs still
apart: the *context* `ctx`, shape (batch, seq, heads, head_dim), before the output projection. A
*gate* multiplies it, a *tap* reads it. An architecture that does not pass here, and is not among
those that `fslib.model.hooked` reaches, is refused by name: a gate on it would do nothing, in
silence.

A *head set* is a bool array (layers, heads), True = the head is in the set. What being in the set
means is said where the set is used: in `pruned` it means switched off.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fslib.errors import FslibError, check_among
from fslib.model.devices import device_of
from fslib.model.hooked import HOOKED, hook_attention
from fslib.model.modes import in_mode

ATTENTION = "fslib_sdpa"
ABLATIONS = ("zero", "mean")
SUPPORTED = "BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, MPNet, DeBERTa-v2, GPT-2, Llama or T5"

Block = AbstractContextManager[None]
Gate = Float[Tensor, "layers heads"]
Means = Float[Tensor, "layers heads head_dim"]
Tap = Callable[[int, Tensor], Tensor]  # (layer, ctx) -> ctx


class HeadControl:
    """What the attention function of one encoder does to its heads. Normally: nothing.

    Attributes:
        gate: (layers, heads), 1 leaves a head as it is, 0 replaces it by `fill`; differentiable.
        fill: (layers, heads, head_dim) or None for zeros.
        tap: called with each layer's index and context; returns the context to go on with.
        inputs: None, or a list that takes each layer's attention module, query, key and value.
        weights: None, or a list that takes each layer's attention, (batch, heads, seq, seq).
        heard: what hooks have heard of the query, key and value of the layer under way.
        calls: layers seen in this forward (ALBERT shares its layer, DistilBERT has no index).
        layers: how many there are; 0 until `attach` has counted them.
        head_shapes: each layer's (heads, head_dim).
    """

    def __init__(self) -> None:
        self.gate: Tensor | None = None
        self.fill: Tensor | None = None
        self.tap: Tap | None = None
        self.inputs: list[tuple[nn.Module, Tensor, Tensor, Tensor]] | None = None
        self.weights: list[Tensor] | None = None
        self.heard: list[Tensor] = []
        self.calls = 0
        self.layers = 0
        self.head_shapes: list[tuple[int, int]] = []

    def apply(self, ctx: Float[Tensor, "batch seq heads head_dim"]) -> Tensor:
        """Gate and tap one layer's context."""
        layer, self.calls = self.calls, self.calls + 1
        if not self.layers:
            self.head_shapes.append((ctx.shape[2], ctx.shape[3]))
        if self.tap is not None:
            ctx = self.tap(layer, ctx)
        if self.gate is not None:
            gate = self.gate[layer][:, None].to(ctx)  # (heads, 1)
            ctx = ctx * gate
            if self.fill is not None:
                ctx = ctx + (1 - gate) * self.fill[layer].to(ctx)
        return ctx

    @contextmanager
    def having(self, **values: Any) -> Iterator[None]:
        """Hold other values in some attributes inside the block."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


@cache
def attention_function() -> str:
    """Register fslib's attention function with transformers; return its name there.

    When an encoder is made or run, not before: opening transformers takes seconds.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend
    from transformers.masking_utils import sdpa_mask

    def attention(module: nn.Module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        control = getattr(module, "fslib_control", None)
        ctx, weights = attend(module, query, key, value, attention_mask, **kwargs)
        if control is not None and control.inputs is not None:
            control.inputs.append((module, query, key, value))
        if control is not None and control.weights is not None:
            # Attention to unit vectors is the weights, whatever mask, scale or groups of heads.
            unit = torch.eye(key.shape[2]).to(key).expand(*key.shape[:2], -1, -1)
            seen, _ = attend(module, query, key, unit, attention_mask, **kwargs | {"dropout": 0.0})
            control.weights.append(seen.transpose(1, 2))
        return (ctx if control is None else control.apply(ctx)), weights

    AttentionInterface.register(ATTENTION, attention)
    # Without a mask function under the same name, padding would be attended to, in silence.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("head_mask") is not None:
        raise FslibError("head_mask has no effect in transformers 5: use fslib.pruned")
    if module.training and any(getattr(m, "gradient_checkpointing", 0) for m in module.modules()):
        raise FslibError("gradient checkpointing runs attention again, unseen: switch it off")
    attention_function()  # an encoder that was unpickled has been made in another process
    control: HeadControl = module.fslib_control  # type: ignore[assignment]
    control.calls = 0
    control.heard.clear()


def _after_forward(module: nn.Module, args: tuple, output: object) -> None:
    control: HeadControl = module.fslib_control  # type: ignore[assignment]
    if control.layers and control.calls != control.layers:
        ran = f"{type(module).__name__} ran {ATTENTION} {control.calls} times"
        way_out = f"set its layerdrop to 0, its attention implementation to {ATTENTION!r}"
        raise FslibError(f"{ran} for {control.layers} layers: {way_out}")


def attach(encoder: Any) -> HeadControl:
    """Give an encoder its `HeadControl`, after a probe has shown that every layer obeys it.

    An encoder that has one keeps it, so that whatever holds the encoder switches the same heads.

    Raises:
        FslibError: by name, for an architecture whose attention does not arrive once per layer.
    """
    config = encoder.config
    control = getattr(encoder, "fslib_control", None)
    if control is None:
        control = HeadControl()
        encoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
        encoder.register_forward_hook(_after_forward)
        if config.model_type in HOOKED:
            hook_attention(encoder)
    for module in encoder.modules():
        module.fslib_control = control
    control.layers, control.head_shapes = 0, []
    probe_with(encoder, [1, 2, 3])
    layers = int(config.num_hidden_layers)
    if control.calls != layers or len(set(control.head_shapes)) != 1:
        what = f"its attention reached fslib {control.calls} times for {layers} layers"
        raise FslibError(f"{type(encoder).__name__} cannot be used: {what}; use {SUPPORTED}")
    control.layers = layers
    return control


def probe_with(encoder: Any, ids: list[int]) -> Float[Tensor, "seq hidden"]:
    """Return last hidden states of one made-up sentence, in evaluation mode."""
    tokens = torch.tensor([ids], device=device_of(encoder)) % encoder.config.vocab_size
    with in_mode(encoder, training=False), torch.no_grad():
        output = encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if (hidden := getattr(output, "last_hidden_state", None)) is None:
        raise FslibError(f"{type(encoder).__name__} cannot be used: it gives no last hidden states")
    return hidden[0]


def control_of(model: object) -> HeadControl:
    """Return the `HeadControl` of a MultiTaskModel or of an encoder it holds.

    Raises:
        FslibError: if it has none.
    """
    control = getattr(getattr(model, "encoder", model), "fslib_control", None)
    if control is None:
        hint = "load it with MultiTaskModel.from_pretrained (if it is wrapped, give model.module)"
        raise FslibError(f"{type(model).__name__} has no head control: {hint}")
    return control


def as_head_set(heads: object, shape: tuple[int, int]) -> Bool[np.ndarray, "layers heads"]:
    """Return a head set as an array, or raise FslibError if it is none of the model's shape."""
    try:
        array = heads.detach().cpu().numpy() if isinstance(heads, Tensor) else np.asarray(heads)
    except (TypeError, ValueError):  # no numpy type, or rows of different lengths
        array = np.array(None)
    if array.dtype != np.bool_ or array.shape != shape:
        found = f"got {array.dtype} of {array.shape}"
        raise FslibError(f"a head set is a bool array of shape {shape} (layers, heads): {found}")
    return array


def gated(model: nn.Module, gate: Gate | None, fill: Tensor | None = None) -> Block:
    """Multiply every head's context by its gate inside a block; the gate may need a gradient."""
    return control_of(model).having(gate=gate, fill=fill)


def tapped(model: nn.Module, tap: Tap) -> Block:
    """Let `tap(layer, ctx)` see, and replace, every layer's context inside a block."""
    return control_of(model).having(tap=tap)


def attention_weights(
    model: Any, inputs: dict[str, Tensor]
) -> Float[Tensor, "layers batch heads seq seq"]:
    """Return how much each token (last axis but one) attends to each (last axis), by head.

    Rows of real tokens sum to 1. Heads that are switched off around the call are shown as they
    would attend.

    Raises:
        FslibError: for an architecture that computes attention by itself, out of sight.
    """
    control, encoder = control_of(model), getattr(model, "encoder", model)
    if encoder.config.model_type in HOOKED:
        name = type(encoder).__name__
        raise FslibError(f"{name} computes attention by itself: its weights cannot be shown")
    weights: list[Tensor] = []
    with control.having(weights=weights), in_mode(encoder, training=False), torch.inference_mode():
        encoder(**{k: v for k, v in inputs.items() if k in getattr(model, "accepts", inputs)})
        return torch.stack([layer.float() for layer in weights])


@contextmanager
def pruned(
    model: nn.Module, heads: object, *, ablation: str = "zero", mean: Means | None = None
) -> Iterator[None]:
    """Switch the chosen heads off inside the block.

    Blocks nest: what an outer one switched off stays off.

    Args:
        model: a MultiTaskModel, or an encoder of one.
        heads: bool (layers, heads), True = switched off.
        ablation: "zero" replaces a head's context by zero (the paper's), "mean" by `mean`.
        mean: a head's average context over a task's data, from `fslib.mean_context`.

    Raises:
        FslibError: for a head set or a mean of another shape or type, an unknown ablation, "mean"
            without a mean, and a mean that is not finite.
    """
    control = control_of(model)
    shape = (control.layers, *control.head_shapes[0])
    chosen = as_head_set(heads, shape[:2])
    check_among("ablation", ablation, ABLATIONS)
    if (ablation == "mean") != (mean is not None):
        raise FslibError('ablation="mean" goes with mean=fslib.mean_context(...), "zero" with none')
    fits = isinstance(mean, Tensor) and mean.shape == shape and bool(mean.isfinite().all())
    if mean is not None and not fits:
        raise FslibError(f"mean must be a finite tensor of shape {shape} (layers, heads, head_dim)")
    device = device_of(model)
    with torch.inference_mode(False):  # importance inside needs gradients that pass the gate
        gate = torch.from_numpy(~chosen).to(device=device, dtype=torch.float32)
        if control.gate is not None:
            if (control.fill is None) != (mean is None):
                raise FslibError("nested pruned blocks must use the same ablation")
            gate = gate * control.gate
    with gated(model, gate, None if mean is None else mean.to(device)):
        yield
