"""Architectures that compute attention by themselves, reached by hooks where their heads' outputs enter a projection.

What comes there is what transformers' attention interface would have handed over: the context of every head, still
apart. So heads are listened to and switched off as in any other architecture; `fslib.check` shows that it is the same.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """Where a layer of an architecture computes attention: names of modules inside the encoder's layers.

    attention: has the heads' number as `num_attention_heads`. inputs: its query, key and value projections. projection:
    what reads the heads' outputs.
    """

    attention: str
    inputs: tuple[str, str, str]
    projection: str


# model type -> place
HOOKED = {
    "mpnet": Place("attention.attn", ("q", "k", "v"), "attention.attn.o"),
    "deberta-v2": Place(
        "attention.self", ("query_proj", "key_proj", "value_proj"), "attention.output.dense"
    ),
}


def hook_attention(encoder: Any) -> None:
    """Let every layer of one of the architectures above pass its context to the control that its modules hold.

    Query, key and value are heard where a projection gives them first: DeBERTa sends positions through the same ones.
    """
    place = HOOKED[encoder.config.model_type]
    for attention, projection in _layers(encoder, place):
        # in tuples, or a module would become a part of what it is a part of
        projection.fslib_attention = (attention,)
        projection.register_forward_pre_hook(_before_projection)
        for name in place.inputs:
            part = getattr(attention, name)
            part.fslib_attention = (attention,)
            part.register_forward_hook(_after_input)


def _layers(encoder: nn.Module, place: Place) -> Iterator[tuple[Any, Any]]:
    modules = dict(encoder.named_modules())
    for name, module in modules.items():
        if name.endswith(f".{place.attention}"):
            yield module, modules[name.removesuffix(place.attention) + place.projection]


def _after_input(part: Any, args: tuple, states: Tensor) -> None:
    """Keep what a query, key or value projection gives, if someone listens."""
    if part.fslib_control.inputs is not None:
        (attention,) = part.fslib_attention
        part.fslib_control.heard.append(
            states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        )


def _before_projection(projection: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (attention,), control = projection.fslib_attention, projection.fslib_control
    if control.inputs is not None:
        query, key, value = control.heard[:3]
        control.heard.clear()
        control.inputs.append((attention, query, key, value))
    ctx = args[0].unflatten(-1, (attention.num_attention_heads, -1))
    return (control.apply(ctx).flatten(-2), *args[1:])
