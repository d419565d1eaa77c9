"""Layers that need not run again: those before the first one that is changed.

With a head of layer l switched off, the layers before l give what they gave with all heads on. Of
L layers, every head alone then costs (L + 1) / 2L of the whole passes, with the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fslib.model.attention import control_of


@contextmanager
def reused_layers(model: nn.Module) -> Iterator[Callable[[int | None], None]]:
    """Yield a function that says, before each forward pass of one batch, what changed.

    ``changed(None)``: nothing; all layers run, and what each gives is kept. ``changed(l)``: layer l
    is the first that differs from that pass; layers before it hand back what was kept.

    Where layers are in no list of their own (ALBERT shares one) or give what cannot be handed back,
    every pass is whole. Not for training: nothing is kept of dropout or gradients.

    Args:
        model: A `MultiTaskModel` or its encoder, in evaluation mode.
    """
    control, layers = control_of(model), _layers_of(model)
    kept: dict[int, Any] = {}
    first: int | None = 0

    def changed(layer: int | None) -> None:
        nonlocal first
        first = layer
        if layer is None:
            kept.clear()

    def forward(number: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if first and number < first and len(kept) == len(layers):
            control.calls += 1  # the encoder checks that attention was reached once per layer
            return kept[number]
        before, output = control.calls, run(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,)
        # what can be given again: tensors, or a tuple of them
        is_plain = all(part is None or isinstance(part, Tensor) for part in parts)
        if first is None and (before, control.calls) == (number, number + 1) and is_plain:
            kept[number] = output
        return output

    try:
        for number, layer in enumerate(layers):
            layer.forward = partial(forward, number, layer.forward)
        yield changed
    finally:
        for layer in layers:
            del layer.forward


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the encoder's layers, or none where no list holds each of them once."""
    count = control_of(model).layers
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == len(set(part)) == count:
            return [] if any("forward" in vars(layer) for layer in part) else list(part)
    return []
