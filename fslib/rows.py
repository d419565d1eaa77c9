"""The query, key and value rows of every head: where they are, and how to update some of them and no others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fslib.errors import FslibError
from fslib.evaluation import in_mode
from fslib.model.attention import control_of


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Consecutive rows (dim 0) or columns (dim 1) of a query, key or value weight or bias that belong to heads.

    owners: (layers, heads), True = needs these rows. More than one head with grouped-query attention, where query
        heads share keys and values, and where layers share their weights.
    """

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    owners: Bool[np.ndarray, "layers heads"]

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of the parameter, of its gradient, or of anything else of its shape, as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


def head_rows(model: nn.Module) -> list[HeadRows]:
    """All query, key and value rows of a model, by head; found by looking, not by names, so for any architecture.

    What depends on a row of a projection shows in a gradient: for each head, the rows of its layer's parameters
    that its query, key or value has a gradient for. Parameters that act on all heads alike are not among them.
    Raises FslibError for a model that mixes heads there, as a norm over all of a layer's queries does (OLMo2).
    """
    control = control_of(model)
    shape = (control.layers, control.head_shapes[0][0])
    found: dict[tuple[int, int, int, int], HeadRows] = {}
    with in_mode(model, training=False), torch.enable_grad():
        for layer, (module, *states) in enumerate(_attention_inputs(model)):
            parameters = [p for p in module.parameters() if p.requires_grad]
            for state in states:  # (batch, heads, seq, head_dim); keys and values may have fewer heads
                each = shape[1] // state.shape[1]
                for head in range(state.shape[1]) if state.requires_grad else ():
                    own = state[:, head]
                    uneven = torch.arange(own.numel(), device=own.device).cos().view_as(own)  # finds zero rows, too
                    grads = torch.autograd.grad((own * uneven).sum(), parameters, retain_graph=True, allow_unused=True)
                    runs = [_runs(grad, alone=state.shape[1] == 1) for grad in grads]
                    matrices = [r for r, g in zip(runs, grads, strict=True) if g is not None and g.ndim > 1]
                    if matrices and not any(matrices):
                        raise FslibError(
                            f"{type(module).__name__} mixes its heads' queries, keys or values: they have no rows of "
                            "their own that IAT could train; use an architecture that keeps its heads apart"
                        )
                    for parameter, places in zip(parameters, runs, strict=True):
                        for dim, start, stop in places:
                            place = (id(parameter), dim, start, stop)
                            rows = HeadRows(parameter, dim, start, stop, np.zeros(shape, dtype=bool))
                            owners = found.setdefault(place, rows).owners
                            owners[layer, head * each : (head + 1) * each] = True
    return list(found.values())


def _attention_inputs(model: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Every layer's attention module with the query, key and value it computes, each from detached hidden states."""
    control = control_of(model)
    encoder: Any = getattr(model, "encoder", model)
    device = next(encoder.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % encoder.config.vocab_size

    @contextmanager
    def listening() -> Iterator[list]:
        heard: list = []
        control.inputs = heard
        try:
            yield heard
        finally:
            control.inputs = None

    with torch.no_grad(), listening() as heard:
        encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    # detached: where layers share their weights, a head's own rows would otherwise be lost among those before it
    hooks = [m.register_forward_pre_hook(_detached, with_kwargs=True) for m in {id(h[0]): h[0] for h in heard}.values()]
    try:
        with listening() as heard:
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return heard


def _detached(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def cut(value: object) -> object:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(a) for a in args), {k: cut(v) for k, v in kwargs.items()}


def _runs(grad: Tensor | None, alone: bool) -> list[tuple[int, int, int]]:
    """(dim, start, stop) of the consecutive rows with a gradient; none if all have one, unless a head is `alone`."""
    if grad is None or not grad.ndim or not grad.any():
        return []
    for dim in range(min(2, grad.ndim)):
        used = (grad != 0).movedim(dim, 0).flatten(1).any(1) if grad.ndim > 1 else grad != 0
        if alone or not used.all():
            edges = torch.diff(used.int(), prepend=used.new_zeros(1).int(), append=used.new_zeros(1).int())
            starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
            return [(dim, a, b) for a, b in zip(starts, stops, strict=True)]
    return []


class RowOptimizer:
    """Makes an optimizer see each head's rows as parameters of their own.

    AdamW skips a parameter without a gradient, its moments and its weight decay with it. So a head's rows get their
    gradient in a batch of a task whose set the head is in, and none otherwise, and stay as they are without any
    copying. Work per batch grows with the rows of one task's heads, not with the number of tasks.

    rows: the model's `head_rows`. sets: each task's heads, bool (layers, heads), True = trained.
    frozen: parameters that nothing updates.
    strict: False gives other rows a gradient of zero instead of none, and AdamW moves them.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[HeadRows],
        optimizer: torch.optim.Optimizer,
        sets: Mapping[str, Bool[np.ndarray, "layers heads"]],
        frozen: set[nn.Parameter],
        strict: bool = True,
    ) -> None:
        views = {row: row.of(row.parameter.data) for row in rows}
        owned: dict[nn.Parameter, list[HeadRows]] = {}
        for row in rows:
            owned.setdefault(row.parameter, []).append(row)
        for group in optimizer.param_groups:
            own = [row for p in group["params"] for row in owned.get(p, ())]
            for row in own:
                state = optimizer.state.get(row.parameter, {})
                optimizer.state[views[row]] = {
                    k: (row.of(v) if v.shape == row.parameter.shape else v).clone() for k, v in state.items()
                }
            group["params"] = [*(p for p in group["params"] if p not in owned), *(views[row] for row in own)]
            # the fused kernel takes consecutive memory only, which columns (GPT-2's) are not; every other one reads
            # the step count on the host, and would wait for the device at each parameter
            if not all(views[row].is_contiguous() for row in own):
                group["fused"] = False
                for state in (optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})):
                    state["step"] = state["step"].cpu()
        for parameter in owned:
            optimizer.state.pop(parameter, None)
        whole = [p for p in model.parameters() if p not in owned]
        self.always = [p for p in whole if p not in frozen]
        self.never = [p for p in whole if p in frozen]
        mine = {t: [bool((row.owners & heads).any()) for row in rows] for t, heads in sets.items()}
        placed = [(row, views[row]) for row in rows]
        self.trained = {t: [place for place, is_mine in zip(placed, mine[t], strict=True) if is_mine] for t in sets}
        self.others = {t: [] if strict else [p for p, m in zip(placed, mine[t], strict=True) if not m] for t in sets}

    def hand_out(self, task: str) -> list[Tensor]:
        """Give each view its part of the gradient of a batch of `task`; returns all that the batch updates."""
        for parameter in self.never:
            parameter.grad = None
        for row, view in self.trained[task]:
            view.grad = None if row.parameter.grad is None else row.of(row.parameter.grad)
        for _, view in self.others[task]:
            view.grad = torch.zeros_like(view)
        return [*self.always, *(view for _, view in self.trained[task])]
