"""Architectures that compute attention by themselves, reached by hooks.

The hooks are where the heads' outputs enter a projection. What comes there is what transformers'
attention interface would have handed over: the context of every head, still apart. So heads are
listened to and switched off as in any other architecture; `fslib.check` shows that it is the same.
"""

from typing import Any

from torch import Tensor

_DEBERTA = ("query_proj", "key_proj", "value_proj")
# Model type -> names of the modules of a layer: what has the heads' number as
# `num_attention_heads`, in it the query, key and value projections, and what reads the heads'
# outputs.
HOOKED = {
    "mpnet": ("attention.attn", ("q", "k", "v"), "attention.attn.o"),
    "deberta-v2": ("attention.self", _DEBERTA, "attention.output.dense"),
}


def hook_attention(encoder: Any) -> None:
    """Let every layer of an architecture in `HOOKED` pass its context to the head control.

    Query, key and value are heard where a projection first gives them: DeBERTa sends positions
    through the same projections afterwards.
    """
    place, inputs, reader = HOOKED[encoder.config.model_type]
    modules = dict(encoder.named_modules())
    for name in [name for name in modules if name.endswith(f".{place}")]:
        attention, projection = modules[name], modules[name.removesuffix(place) + reader]
        # in tuples, or a module would become a part of what it is a part of
        projection.fslib_attention = (attention,)
        projection.register_forward_pre_hook(_before_projection)
        for part in map(attention.get_submodule, inputs):
            part.fslib_attention = (attention,)
            part.register_forward_hook(_after_input)


def _by_head(states: Tensor, attention: Any) -> Tensor:
    return states.unflatten(-1, (attention.num_attention_heads, -1))


def _after_input(part: Any, args: tuple, states: Tensor) -> None:
    """Keep what a query, key or value projection gives while something listens."""
    if part.fslib_control.inputs is not None:
        part.fslib_control.heard.append(_by_head(states, *part.fslib_attention).transpose(1, 2))


def _before_projection(projection: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (attention,), control = projection.fslib_attention, projection.fslib_control
    if control.inputs is not None:
        control.inputs.append((attention, *control.heard[:3]))
        control.heard.clear()
    return (control.apply(_by_head(args[0], attention)).flatten(-2), *args[1:])
