"""Can a model be used here? What is checked before training: heads, head sets, rows for IAT."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fslib.errors import FslibError, first_line
from fslib.iat import head_rows
from fslib.model.attention import attach, control_of, pruned, tapped
from fslib.model.devices import device_of
from fslib.model.encoders import load_encoder, natural_pooling
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel

TOLERANCE = 1e-6  # of hidden states, relative to the largest
ALONE = "with all heads off no token learns of another"
MIXES = "with all heads off tokens still learn of each other, which no lesion of heads shows"
HEADS_TRIED = 48  # of a large model, drawn at random, one of every layer at least


@dataclass
class Report:
    """What `check` has found; printed, it is a paragraph.

    Attributes:
        name: of the model.
        architecture: its class, or its name where that could not be loaded.
        layers, heads, head_dim: its shape; heads a layer.
        pooling: how it sums up a text, None where no tokenizer was at hand.
        refused: why no head of it can be switched off, "" if each can.
        rows: why IAT cannot train it, "" if it can.
        passed: the checks of head sets that it passed.
    """

    name: str
    architecture: str
    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    pooling: str | None = None
    refused: str = ""
    rows: str = ""
    passed: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether its importance, pruning and dissociation can be measured."""
        return not self.refused

    def __str__(self) -> str:
        if not self.works:
            return f"{self.name} ({self.architecture}): refused. {self.refused}"
        pooling = f", pooling: {self.pooling}" if self.pooling else ""
        what = f"works, {self.layers} layers of {self.heads} heads{pooling}"
        checked = [f"  checked: {each}" for each in self.passed]
        rows = f"  IAT: {self.rows or 'finds the rows of every head'}"
        return "\n".join([f"{self.name} ({self.architecture}): {what}", *checked, rows])


def check(model: str | Path | MultiTaskModel | nn.Module) -> Report:
    """Report whether a model's heads can be reached, switched off and trained by IAT.

    Nothing is trained. Three checks, each on hidden states of made-up sentences: the empty set
    changes no bit; one head off is the same as zeros in its place where the output projection reads
    it (of `HEADS_TRIED` heads at most); with all heads off no token learns of another, or the
    report says that it does (MobileBERT embeds neighbours together).

    Args:
        model: a name as `MultiTaskModel.from_pretrained` takes it, a model that is loaded, or a
            transformers encoder made with `attn_implementation="fslib_sdpa"`. It is left as it
            was, but for the control that its heads now have.

    Raises:
        FslibError: for a name that is no model and no folder.
    """
    named = isinstance(model, str | Path)
    encoder: Any = model.encoder if isinstance(model, MultiTaskModel) else model
    architecture = str(model) if named else type(encoder).__name__
    report = Report(str(model) if named else getattr(model, "source", architecture), architecture)
    report.pooling = getattr(model, "pooling", None)
    try:
        if named:
            encoder, tokenizer, source = load_encoder(str(model))
            report.pooling = natural_pooling(encoder, tokenizer, source)
        control = attach(encoder)
    except FslibError as error:
        if named and "cannot be used" not in str(error):
            raise
        report.refused = str(error)
        return report
    report.architecture = type(encoder).__name__
    report.layers, (report.heads, report.head_dim) = control.layers, control.head_shapes[0]
    with in_mode(encoder, training=False):
        report.refused = _try_sets(encoder, report.passed)
        try:
            head_rows(encoder)
        except FslibError as error:
            report.rows = str(error)
        except Exception as error:  # whatever an architecture that nobody has tried here does
            report.rows = f"its rows were not found ({first_line(error)})"
    return report


def _try_sets(encoder: Any, passed: list[str]) -> str:
    """Try the empty set, single heads and the full set; tell what passed.

    Returns:
        Why the model is refused, "" if it is not.
    """

    def without(heads: np.ndarray, changed: int | None = None) -> Tensor:
        with pruned(encoder, heads):
            return _hidden(encoder, changed)

    control = control_of(encoder)
    empty = np.zeros((control.layers, control.head_shapes[0][0]), dtype=bool)
    plain = _hidden(encoder)
    if not torch.equal(without(empty), plain):
        return "switching no head off changes what it says"
    passed.append("the empty set changes nothing, bit by bit")
    tried = _drawn(*empty.shape)
    for layer, head in tried:
        one = empty.copy()
        one[layer, head] = True
        off = without(one)
        with _zeroed(encoder, layer, head) as projections:
            expected = _hidden(encoder)
        if not projections:
            return f"layer {layer} does not hand its heads' outputs to a projection as they are"
        if not _close(off, expected):
            return f"switching head {head} of layer {layer} off is not what zeros in its place do"
        if torch.equal(off, plain):
            return f"switching head {head} of layer {layer} off changes nothing"
    passed.append(f"one head off is zeros in its place ({len(tried)} of {empty.size} heads tried)")
    alone, exchanged = without(~empty), without(~empty, changed=2)
    others = np.arange(alone.shape[1]) != 2
    passed.append(ALONE if _close(alone[:, others], exchanged[:, others]) else MIXES)
    return ""


def _drawn(layers: int, heads: int) -> list[tuple[int, int]]:
    """Draw the (layer, head) that are tried: at least one of every layer."""
    rng, every = np.random.default_rng(0), [*np.ndindex(layers, heads)]
    order = [every[i] for i in rng.permutation(len(every))]
    first = list({layer: (layer, head) for layer, head in order}.values())
    rest = [each for each in order if each not in first]
    return sorted([*first, *rest][: max(layers, HEADS_TRIED)])


def _hidden(encoder: Any, changed: int | None = None) -> Tensor:
    """Return last hidden states of two made-up sentences, (2, 6, hidden).

    Args:
        encoder: a transformers model.
        changed: the place of a token that is exchanged for another.
    """
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 9, 5, 7, 6, 8]], device=device_of(encoder))
    if changed is not None:
        ids[:, changed] += 7
    ids = ids % encoder.config.vocab_size
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


@contextmanager
def _zeroed(encoder: Any, layer: int, head: int) -> Iterator[list[nn.Module]]:
    """Put zeros where a layer's projection reads one head, in one forward pass inside.

    The projection is the module that the layer's context enters as it is; it is put into the list
    that the block gets. If the list stays empty, what is done to a head's output is not what
    reaches the next layer.
    """
    contexts: list[Tensor] = []
    found: list[nn.Module] = []

    def listen(_: int, ctx: Tensor) -> Tensor:
        contexts.append(ctx)
        return ctx

    def look(module: nn.Module, args: tuple) -> tuple | None:
        if found or len(contexts) != layer + 1 or not args or not isinstance(args[0], Tensor):
            return None
        states, ctx = args[0], contexts[-1]  # ctx: (batch, seq, heads, head_dim)
        if states.numel() != ctx.numel() or not torch.equal(states.reshape(ctx.shape), ctx):
            return None
        found.append(module)
        ctx = ctx.clone()
        ctx[..., head, :] = 0
        return (ctx.reshape(states.shape), *args[1:])

    leaves = [m for m in encoder.modules() if not list(m.children()) and list(m.parameters())]
    with ExitStack() as hooks, tapped(encoder, listen):
        for module in leaves:
            hooks.enter_context(module.register_forward_pre_hook(look))
        yield found
