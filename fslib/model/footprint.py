"""Count what an encoder takes: the operations of a pass, its weights, the memory of training.

Counted on an encoder of the same shapes that has no weights (torch's device "meta"), by torch itself: nothing is
downloaded but the config of a model that is neither one of fslib's own nor one of the paper's.
"""

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fslib.errors import FslibError, first_line
from fslib.model.encoders import PRETRAINED, load_config, new_encoder, quiet

FLOAT = 4  # bytes of a weight
TRAINED = 4  # floats for each weight in training: itself, its gradient and AdamW's two moments


@cache
def skeleton(encoder: str) -> Any:
    """Return an encoder of a name (of `load_encoder`) without its weights. Raises FslibError where none can be made."""
    try:
        with quiet(), torch.device("meta"):
            made = new_encoder(_config(encoder)).eval()
            made.config.use_cache = False
            return made
    except FslibError:
        raise
    except Exception as error:  # an architecture that asks for a value while it is made
        raise FslibError(f"what {encoder} takes cannot be counted: {first_line(error)}") from error


def _config(encoder: str) -> Any:
    """Return the config of an encoder; one of the paper's is known without its file."""
    if encoder not in PRETRAINED:
        return load_config(encoder)
    kind, (layers, heads, hidden) = PRETRAINED[encoder][1][0], PRETRAINED[encoder][1][1:]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    return transformers.AutoConfig.for_model(kind, **shape, intermediate_size=4 * hidden)


def shape(encoder: str) -> tuple[int, int]:
    """Return how many layers an encoder has, and how many heads a layer."""
    config = skeleton(encoder).config
    return int(config.num_hidden_layers), int(config.num_attention_heads)


@cache
def forward_flops(encoder: str, tokens: int) -> int:
    """Return the floating-point operations of a forward pass over one text of so many tokens."""
    masked = _needs_mask(encoder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _pass(encoder, 1, tokens, masked=masked)
    return int(counter.get_total_flops())


@cache
def weights(encoder: str) -> int:
    """Return how many weights an encoder has."""
    return sum(parameter.numel() for parameter in skeleton(encoder).parameters())


@cache
def training_bytes(encoder: str, texts: int, tokens: int) -> int:
    """Return the bytes that a training step on a batch needs: weights, gradients, AdamW's state, and what is kept of
    the forward pass for the backward one. What the step needs for a moment comes on top."""
    model, kept = skeleton(encoder), dict[int, Tensor]()
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    masked = _needs_mask(encoder)
    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = _pass(encoder, texts, tokens, masked=masked)
    model.eval()
    del output
    saved = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
    return TRAINED * FLOAT * weights(encoder) + saved


def measuring_bytes(encoder: str, texts: int, tokens: int) -> int:
    """Return the bytes that importance and pruning need: the weights, and what is kept of one batch for a gradient."""
    return training_bytes(encoder, texts, tokens) - (TRAINED - 1) * FLOAT * weights(encoder)


def _pass(encoder: str, texts: int, tokens: int, *, masked: bool) -> Any:
    """Run an encoder without weights, with a mask for every text or with none."""
    given = torch.ones(texts, 1, tokens, tokens, dtype=torch.bool, device="meta") if masked else None
    ids = torch.zeros(texts, tokens, dtype=torch.long, device="meta")
    return skeleton(encoder)(input_ids=ids, attention_mask=given)


@cache
def _needs_mask(encoder: str) -> bool:
    """Return whether an encoder without weights must be given a mask, or it makes one of values that are not there.

    Raises FslibError for one that wants to know a value on the way whatever it is given.
    """
    skeleton(encoder)  # says by itself why there is none
    why = ""
    for masked in (False, True):
        try:
            _pass(encoder, 1, 2, masked=masked)
            return masked
        except Exception as error:  # whatever an architecture does with a tensor without values
            why = first_line(error)
    raise FslibError(f"what {encoder} takes cannot be counted: {why}")
