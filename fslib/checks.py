"""Can a model be used here? What is checked before anyone trains it: heads, pooling, head sets, rows for IAT."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fslib.errors import FslibError, first_line
from fslib.evaluation import in_mode
from fslib.iat import head_rows
from fslib.model.attention import attach, control_of, pruned, tapped
from fslib.model.devices import device_of
from fslib.model.encoders import load_encoder, natural_pooling
from fslib.model.multitask import MultiTaskModel

TOLERANCE = 1e-6  # of hidden states, relative to the largest
MIXES = "with all heads off tokens still learn of each other: not by heads, so no lesion shows what that does"
HEADS_TRIED = 48  # of a large model, drawn at random


@dataclass(frozen=True)
class Report:
    """What `check` has found; printed, it is a paragraph.

    refused: why no head of it can be switched off, "" if each can. pooling: how it sums up a text, None where no
    tokenizer was at hand. rows: why IAT cannot train it, "" if it can. passed: the checks of head sets that it passed.
    """

    name: str
    architecture: str
    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    pooling: str | None = None
    refused: str = ""
    rows: str = ""
    passed: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Whether importance, pruning and dissociation can be had of it."""
        return not self.refused

    def __str__(self) -> str:
        if not self.works:
            return f"{self.name} ({self.architecture}): refused. {self.refused}"
        pooling = f", pooling: {self.pooling}" if self.pooling else ""
        lines = [
            f"{self.name} ({self.architecture}): works, {self.layers} layers of {self.heads} heads{pooling}",
            *(f"  checked: {what}" for what in self.passed),
            f"  IAT: {self.rows or 'finds the rows of every head'}",
        ]
        return "\n".join(lines)


def check(model: str | Path | MultiTaskModel | nn.Module) -> Report:
    """Report whether a model's heads can be reached, switched off one by one, and trained by IAT; nothing is trained.

    model: a name as `MultiTaskModel.from_pretrained` takes it, a model that is loaded, or a transformers encoder made
        with `attn_implementation="fslib_sdpa"`. It is left as it was, but for the control that its heads now have.
    Three checks, each on hidden states of made-up sentences: the empty set changes no bit; one head off is the same as
    zeros in its place where the output projection reads it (of `HEADS_TRIED` heads at most); with all heads off no
    token learns of another, or it is said that it does (MobileBERT embeds neighbours together).
    Raises FslibError for a name that is no model and no folder.
    """
    pooling = None
    if isinstance(model, str | Path):
        name = str(model)
        try:
            encoder, tokenizer, source = load_encoder(name)
            attach(encoder)
            pooling = natural_pooling(encoder, tokenizer, source)
        except FslibError as error:
            if "cannot be used" not in str(error):
                raise
            return Report(name, name, refused=str(error))
    else:
        encoder = model.encoder if isinstance(model, MultiTaskModel) else model
        name = getattr(model, "source", None) or type(encoder).__name__
        pooling = getattr(model, "pooling", None)
        try:
            attach(encoder)
        except FslibError as error:
            return Report(name, type(encoder).__name__, refused=str(error))
    control = control_of(encoder)
    shape = {
        "layers": control.layers,
        "heads": control.head_shapes[0][0],
        "head_dim": control.head_shapes[0][1],
    }
    with in_mode(encoder, training=False):
        passed, refused = _sets(encoder)
        rows = _rows(encoder) if not refused else ""
    return Report(
        name,
        type(encoder).__name__,
        **shape,
        pooling=pooling,
        refused=refused,
        rows=rows,
        passed=passed,
    )


def _sets(encoder: Any) -> tuple[tuple[str, ...], str]:
    """Try the empty set, single heads and the full set; return what passed, and why the model is refused, if it is."""
    control = control_of(encoder)
    layers, heads = control.layers, control.head_shapes[0][0]
    empty, full = np.zeros((layers, heads), dtype=bool), np.ones((layers, heads), dtype=bool)
    plain, passed = _hidden(encoder), []
    with pruned(encoder, empty):
        if not torch.equal(_hidden(encoder), plain):
            return (), "switching no head off changes what it says"
    passed.append("the empty set changes nothing, bit by bit")
    try:
        projections = _projections(encoder)
    except FslibError as error:
        return tuple(passed), str(error)
    every = list(np.ndindex(layers, heads))
    order = np.random.default_rng(0).permutation(len(every))[:HEADS_TRIED]
    for layer, head in (every[i] for i in sorted(order)):
        one = empty.copy()
        one[layer, head] = True
        with pruned(encoder, one):
            off = _hidden(encoder)
        with _zeros_at(projections, layer, head, control.head_shapes[0]):
            expected = _hidden(encoder)
        if not _close(off, expected):
            return tuple(
                passed
            ), f"switching head {head} of layer {layer} off is not what zeros in its place do"
        if torch.equal(off, plain):
            return tuple(passed), f"switching head {head} of layer {layer} off changes nothing"
    passed.append(f"one head off is zeros in its place ({len(order)} of {len(every)} heads tried)")
    with pruned(encoder, full):
        alone, exchanged = _hidden(encoder), _hidden(encoder, changed=2)
    others = [i for i in range(alone.shape[1]) if i != 2]
    alike = _close(alone[:, others], exchanged[:, others])
    passed.append("with all heads off no token learns of another" if alike else MIXES)
    return tuple(passed), ""


def _hidden(encoder: Any, changed: int | None = None) -> Tensor:
    """Return last hidden states of two made-up sentences, (2, 6, hidden), with one token exchanged for another."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 9, 5, 7, 6, 8]], device=device_of(encoder))
    if changed is not None:
        ids[:, changed] += 7
    ids = ids % encoder.config.vocab_size
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def _projections(encoder: Any) -> list[nn.Module]:
    """Return the module of each layer that reads the heads' outputs, found by what enters it.

    Raises FslibError where none does: what is done to a head's output then is not what reaches the next layer.
    """
    contexts: list[Tensor] = []
    found: dict[int, nn.Module] = {}

    def listen(layer: int, ctx: Tensor) -> Tensor:
        contexts.append(ctx.detach().flatten(-2))
        return ctx

    def look(module: nn.Module, args: tuple) -> None:
        if contexts and args and isinstance(args[0], Tensor):
            mine = contexts[-1]
            if args[0].numel() == mine.numel() and torch.equal(args[0].reshape(mine.shape), mine):
                found.setdefault(len(contexts) - 1, module)

    leaves = [
        m for m in encoder.modules() if not any(m.children()) and any(True for _ in m.parameters())
    ]
    hooks = [module.register_forward_pre_hook(look) for module in leaves]
    try:
        with tapped(encoder, listen):
            _hidden(encoder)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [layer for layer in range(control_of(encoder).layers) if layer not in found]:
        raise FslibError(
            f"layer {missing[0]} does not hand its heads' outputs to a projection as they are: they cannot be checked"
        )
    return [found[layer] for layer in range(control_of(encoder).layers)]


@contextmanager
def _zeros_at(
    projections: list[nn.Module], layer: int, head: int, shape: tuple[int, int]
) -> Iterator[None]:
    """Put zeros where a layer's projection reads one head; layers that share their weights are told by the call."""
    module, calls = projections[layer], 0
    turn = sum(other is module for other in projections[:layer])

    def hook(_: nn.Module, args: tuple) -> tuple:
        nonlocal calls
        calls += 1
        if calls - 1 != turn:
            return args
        heads = args[0].clone().unflatten(-1, shape)
        heads[..., head, :] = 0
        return (heads.flatten(-2), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _rows(encoder: Any) -> str:
    """Say why IAT cannot train a model's heads one by one, "" if it can."""
    try:
        rows = head_rows(encoder)
    except FslibError as error:
        return str(error)
    except Exception as error:  # whatever an architecture that nobody has tried here does
        return f"its rows were not found ({first_line(error)})"
    owned = np.logical_or.reduce([row.owners for row in rows]) if rows else np.zeros(1, dtype=bool)
    if not owned.all():
        layer, head = np.argwhere(~np.atleast_2d(owned))[0]
        return f"head {head} of layer {layer} has no rows of its own"
    return ""
