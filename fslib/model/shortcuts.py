"""Work that cannot change what a model says, left out while heads are pruned or scored by gradients.

Two things are left out, of models whose modules allow it (found by looking, and tried before they are relied on):

- What lies before the first layer's attention, its queries, keys and values included, does not depend on which heads
  are off: of passes over one batch, the first alone computes it.
- Where a text is summed up by its first token, no other token's last state is read: the last layer needs keys and
  values of all tokens, and attention, output projection and feed-forward of the first alone. The gradient of the loss
  in the other tokens' outputs of that layer is zero, and so is their part in a head's importance.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fslib.model.attention import control_of, probe_with
from fslib.model.multitask import MultiTaskModel
from fslib.model.spread import main_device, spread_part

TOLERANCE = 1e-5  # of a first token's last hidden state, relative to the largest
SENTENCES = ([5, 6, 7, 8, 9, 10], [11, 9, 5])  # made up, to try the shortcuts on


class LastLayer(NamedTuple):
    """The last layer, and its key and value projections, each a module of its own that acts on whole texts."""

    layer: nn.Module
    key: nn.Module
    value: nn.Module


class Shortcuts(NamedTuple):
    """What can be left out of a model's passes.

    first: modules that run once in a pass, before the first layer's attention. last: None where all tokens of the last
    layer must be computed.
    """

    first: tuple[nn.Module, ...] = ()
    last: LastLayer | None = None


def shortcuts(model: MultiTaskModel) -> Shortcuts:
    """Return what can be left out of the passes of a model in evaluation mode, tried on it; nothing of one with a
    device_map."""
    encoder = model.encoder
    if spread_part(model):
        return Shortcuts()
    ran, attention, makers = _watched(encoder)
    times = Counter(module for module, *_ in ran)
    first = Shortcuts(tuple(module for module, layer, _ in ran if layer == 0 and times[module] == 1))
    one = model.pooling == "first" and _may_be_short(encoder, attention)
    last = Shortcuts(last=_last_layer(encoder, makers, times) if one else None)
    with torch.inference_mode():
        plain = _hidden(encoder)
        kept = first.first if _repeats(encoder, first, plain) else ()
        tried = bool(last.last) and all(_is_the_same(encoder, last, part) for part in (SENTENCES, SENTENCES[:1]))
        return Shortcuts(kept, last.last if tried else None)


@contextmanager
def same_batch(taken: Shortcuts) -> Iterator[None]:
    """Let passes inside the block, all over one batch, compute once what lies before the first attention."""
    with ExitStack() as stack:
        for module in taken.first:
            stack.callback(_restore, module, vars(module).get("forward"))
            module.forward = _once(module.forward)
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    """Undo a change of a module's forward: to one that it had of its own, or to its class's."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that gives again what it gave last, where its input is the same as then."""
    last: list[Any] = []

    def again(*args: Any, **kwargs: Any) -> Any:
        inputs = [*args, *kwargs, *kwargs.values()]
        if not last or not _equal(last[0], inputs):
            last[:] = inputs, forward(*args, **kwargs)
        return last[1]

    return again


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def first_token(encoder: Any, taken: Shortcuts) -> Iterator[None]:
    """Let passes inside the block compute of the last layer what the first token's last hidden state needs."""
    if taken.last is None:
        yield
        return
    layer, key_of, value_of = taken.last
    control = control_of(encoder)
    whole: list[Tensor] = []

    def cut(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give the layer the first token alone, and remember all of them."""
        named = not args
        states = kwargs["hidden_states"] if named else args[0]
        whole[:] = [states]
        if named:
            return args, kwargs | {"hidden_states": states[:, :1]}
        return (states[:, :1], *args[1:]), kwargs

    def all_tokens(_: nn.Module, args: tuple) -> tuple:
        return (whole[0], *args[1:])

    def arranged(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        """Undo what the layer, which thinks that there is one token, has made of the keys and values of all."""
        if control.calls < control.layers - 1:
            return query, key, value, mask
        batch, heads, _, size = query.shape
        key, value = (x.transpose(1, 2).reshape(batch, -1, heads, size).transpose(1, 2) for x in (key, value))
        return query, key, value, mask if mask is None else mask[:, :, :1]

    with ExitStack() as stack:
        for module, hook, named in (
            (layer, cut, True), (key_of, all_tokens, False), (value_of, all_tokens, False),
        ):  # fmt: skip
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=named).remove)
        stack.callback(setattr, control, "arrange", control.arrange)
        control.arrange = arranged
        yield


def _may_be_short(encoder: Any, attention: nn.Module | None) -> bool:
    """Return whether one token of the last layer can be computed alone, and nobody looks at the others.

    A causal layer would take one query for the last; sixteen bits would round otherwise than for all tokens.
    """
    causal = getattr(attention, "is_causal", False) or getattr(encoder.config, "is_decoder", False)
    return not causal and control_of(encoder).tap is None and next(encoder.parameters()).element_size() >= 4


def _watched(encoder: Any) -> tuple[list[tuple[nn.Module, int, Any]], nn.Module | None, list[nn.Module | None]]:
    """Return the modules without parts in the order they run, with the layers whose attention has run before, and what
    each gave; the last layer's attention; and which of the modules gave its query, key and value."""
    control = control_of(encoder)
    ran: list[tuple[nn.Module, int, Any]] = []

    def ran_now(module: nn.Module, _: tuple, output: Any) -> None:
        ran.append((module, control.calls, output))

    handles = [m.register_forward_hook(ran_now) for m in encoder.modules() if not any(m.children())]
    heard: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []
    control.inputs = heard
    try:
        probe_with(encoder, SENTENCES[0])
    finally:
        control.inputs = None
        for handle in handles:
            handle.remove()
    makers = {out.untyped_storage().data_ptr(): m for m, _, out in ran if isinstance(out, Tensor)}
    attention, *states = heard[-1] if heard else (None,)
    return ran, attention, [makers.get(state.untyped_storage().data_ptr()) for state in states]


def _last_layer(encoder: nn.Module, makers: list[nn.Module | None], times: Counter[nn.Module]) -> LastLayer | None:
    """Return the last layer: of a list of as many modules as there are layers, the one that holds the projections.

    None where a query, key or value is not what a module of its own gives, once in a pass.
    """
    if len(set(makers)) != 3 or any(module is None or times[module] != 1 for module in makers):
        return None
    _, key, value = makers
    assert key is not None and value is not None
    lists = (m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == control_of(encoder).layers)
    for layer in (layers[-1] for layers in lists):
        parts = set(layer.modules())
        if key in parts and not any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return LastLayer(layer, key, value)
    return None


def _hidden(encoder: Any, sentences: Sequence[list[int]] = SENTENCES) -> Tensor:
    """Return last hidden states of the made-up sentences, one of them padded."""
    width = max(map(len, sentences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sentences], device=main_device(encoder))
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sentences], device=ids.device)
    return encoder(input_ids=ids % encoder.config.vocab_size, attention_mask=mask).last_hidden_state


def _repeats(encoder: Any, taken: Shortcuts, plain: Tensor) -> bool:
    """Return whether passes that share their beginning give what passes without shortcuts do, bit by bit."""
    with same_batch(taken):
        return all(torch.equal(_hidden(encoder), plain) for _ in range(3))


def _is_the_same(encoder: Any, taken: Shortcuts, sentences: Sequence[list[int]]) -> bool:
    """Return whether the last layer, given one token, says the same of it, up to rounding."""
    plain = _hidden(encoder, sentences)
    try:
        with first_token(encoder, taken):
            found = _hidden(encoder, sentences)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError):  # it cannot be given one token
        return False
    difference = (found[:, 0] - plain[:, 0]).abs().max()
    return found.shape[1] == 1 and bool(difference <= TOLERANCE * plain[:, 0].abs().max())
