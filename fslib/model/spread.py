"""Encoders that are spread over devices: loaded with a device_map, their weights wait on other devices or on disk.

accelerate brings each module's weights to where it runs, for as long as it runs. What such a model can be asked is said
here: all that needs no gradient of a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from fslib.errors import FslibError


def main_device(model: nn.Module) -> torch.device:
    """Return the device that a model takes its input on and gives its output on."""
    for part in (model, getattr(model, "encoder", None)):  # a MultiTaskModel's encoder is what is spread
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return next(model.parameters()).device


def spread_part(model: nn.Module) -> nn.Module | None:
    """Return what has a device_map, the model or the encoder that it holds; None where all is in one place."""
    parts = (model, getattr(model, "encoder", None))
    return next((part for part in parts if getattr(part, "hf_device_map", None) is not None), None)


def check_in_one_place(model: nn.Module) -> None:
    """Raise FslibError for a model with a device_map: while it runs, its weights are others than those it names."""
    if part := spread_part(model):
        raise FslibError(
            f"this {type(part).__name__} was loaded with device_map: its heads can be scored and pruned, but its "
            "weights cannot be trained or have gradients; load it without device_map on a device that holds it"
        )


@contextmanager
def weights_left(model: nn.Module) -> Iterator[None]:
    """Keep, of a forward pass inside the block, no weight for the backward one that waits elsewhere.

    It is read again where a gradient passes: otherwise all weights would be in one place after all.
    """
    running: list[tuple[nn.Module, Any]] = []  # modules whose weights are here, with what has brought them
    handles: list[RemovableHandle] = []
    for module in model.modules():
        for hook in (each for each in _hooks(module) if each.offload):
            handles.append(module.register_forward_pre_hook(lambda m, _, hook=hook: running.append((m, hook))))
            handles.append(module.register_forward_hook(lambda *_: _forget(running)))

    def leave(tensor: Tensor) -> Tensor | _Left:
        for module, hook in reversed(running):
            for name, weight in module.named_parameters(recurse=hook.place_submodules):
                if not weight.is_meta and weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    shape = (tensor.size(), tensor.stride(), tensor.storage_offset())
                    return _Left(hook.weights_map, name, tensor.device, tensor.dtype, shape)
        return tensor

    try:
        if handles:
            with saved_tensors_hooks(leave, _read_again):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Left(NamedTuple):
    """A weight, or a view of one, that was left where it waits."""

    waiting: Any  # {name: weight}
    name: str
    device: torch.device
    dtype: torch.dtype
    shape: tuple[Any, Any, Any]  # size, stride, offset


def _read_again(saved: Tensor | _Left) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.waiting[saved.name].to(saved.device, saved.dtype).as_strided(*saved.shape)


def _forget(running: list) -> None:
    running.pop()


def _hooks(module: object) -> list[Any]:
    """Return accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", [hook]) if isinstance(each, AlignDevicesHook)]
