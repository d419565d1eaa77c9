"""IAT, important attention-head training (Li et al., 2023): choose each task's heads, find their rows, train no others.

In the last part of multi-task training a batch of task t updates, of all query, key and value rows, only those of t's
own heads. `IAT` says which heads those are, `head_rows` finds the rows that belong to a head, and `IATRule` is what the
training loop (`fslib.training`) follows: it hands the optimizer the gradients of one task's rows and of no others.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fslib.endings import Ending, Rule, Trunk
from fslib.errors import FslibError, check_count, check_flag, check_number, unknown
from fslib.heads import head_count, random_heads, top_heads
from fslib.importance import REDUCTIONS, Contributions, check_normalize, contributions
from fslib.model.attention import control_of
from fslib.model.devices import device_of
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel

CHOICES = ("top", "random", "least")
OTHERS = ("train", "freeze")
HeadSets = Mapping[str, Bool[np.ndarray, "layers heads"]]


@dataclass(frozen=True)
class IAT(Ending):
    """Important attention-head training (Li et al., 2023): in the last `delta` of the steps a batch of task t updates,
    of all query, key and value rows, only those of t's own heads. No other parameter is touched or added.

    alpha: share of all heads in a task's set, in (0, 1].
    heads: "top" (most important to the task), or a control: "random" (as many in each layer), "least" (important).
    others: "train": everything that is not a query, key or value row trains on; "freeze": only classifiers do.
    shared: keep heads that are in every task's set; False leaves them out of all.
    strict: a row outside the set stays as it is, bit for bit. False is the released code's: its gradient is zero,
        but Adam's moments and weight decay move it.
    examples: training examples of each task that importance is scored on (None: all); `reduction`, `normalize`:
        as in `fslib.head_importance`.
    """

    alpha: float = 0.3
    heads: str = "top"
    others: str = "train"
    shared: bool = True
    strict: bool = True
    examples: int | None = (
        64  # twice what a rank correlation of 0.95 with all examples took in the slowest task
    )
    reduction: str = "token"
    normalize: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "(0, 1]", "there are no more top heads than heads")
        for what, value, valid in (
            ("heads for IAT", self.heads, CHOICES),
            ("others for IAT", self.others, OTHERS),
            ("reduction", self.reduction, REDUCTIONS),
        ):
            if value not in valid:
                raise unknown(what, value, valid)
        check_normalize(self.normalize)
        check_count("examples", self.examples, none=True)
        for name in ("shared", "strict"):
            check_flag(name, getattr(self, name))
        if self.heads != "top" and self.alpha == 1:
            raise FslibError(
                f"alpha 1 takes all heads: heads {self.heads!r} would be the top heads; use a smaller alpha"
            )

    def check(self, trunk: Trunk) -> None:
        """Raise FslibError for one task, an alpha that chooses no head, and heads that own no rows to train."""
        self.needs_two_tasks(trunk)
        flat = np.zeros((trunk.model.n_layers, trunk.model.n_heads))
        self.choose(dict.fromkeys(trunk.tasks, flat), np.random.default_rng(0))
        rows = trunk.once("rows", lambda: head_rows(trunk.model))
        owned = np.logical_or.reduce([flat > 0, *(row.owners for row in rows)])
        if not owned.all():
            layer, head = np.argwhere(~owned)[0]
            raise FslibError(
                f"IAT cannot train head {head} of layer {layer}: its query, key and value are frozen; unfreeze them"
            )

    def begin(self, trunk: Trunk) -> Rule:
        """Score importance on training data, choose each task's heads, and return the rule that trains their rows."""
        scores, seconds = trunk.once(
            ("importance", trunk.step, self.examples), lambda: self._score(trunk)
        )
        maps = {
            t: c.importance(reduction=self.reduction, normalize=self.normalize)
            for t, c in scores.items()
        }
        heads = self.choose(maps, np.random.default_rng((trunk.seed, 5)))
        rows = trunk.once("rows", lambda: head_rows(trunk.model))
        frozen = set(trunk.model.encoder.parameters()) if self.others == "freeze" else set()
        return IATRule(trunk, rows, heads, frozen, self.strict, seconds)

    def _score(self, trunk: Trunk) -> tuple[dict[str, Contributions], float]:
        started = time.perf_counter()
        scores = {
            name: contributions(trunk.model, task, examples=self.examples, seed=trunk.seed)
            for name, task in trunk.tasks.items()
        }
        return scores, time.perf_counter() - started

    def choose(
        self, importance: Mapping[str, Float[np.ndarray, "layers heads"]], rng: np.random.Generator
    ) -> dict[str, Bool[np.ndarray, "layers heads"]]:
        """Return each task's head set, True = trained on its batches. Raises FslibError for one task and empty sets."""
        if len(importance) < 2:
            raise FslibError(
                f"IAT tells the heads of tasks apart: give at least two tasks, not {list(importance)}"
            )
        total = next(iter(importance.values())).size
        if head_count(self.alpha, total) == 0:
            raise FslibError(
                f"alpha {self.alpha} of {total} heads is no head: choose at least {1 / total:.3f}"
            )
        sign = -1 if self.heads == "least" else 1
        sets = {t: top_heads(sign * scores, self.alpha) for t, scores in importance.items()}
        if self.heads == "random":
            sets = {t: random_heads(top, 1, rng)[0] for t, top in sets.items()}
        if not self.shared:
            everywhere = np.logical_and.reduce(list(sets.values()))
            sets = {t: chosen & ~everywhere for t, chosen in sets.items()}
        return sets


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
        """Return these rows of the parameter, of its gradient, or of anything else of its shape, as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def belong_to(self, heads: Bool[np.ndarray, "layers heads"]) -> bool:
        """Tell whether a head of the set needs these rows."""
        return bool((self.owners & heads).any())


class IATRule(Rule):
    """A batch of a task updates the rows of that task's heads, and all that is no query, key or value row.

    Why it is exact: AdamW skips a parameter without a gradient, its moments and its weight decay with it. The optimizer
    sees each head's rows as parameters of their own (`separate_rows`); rows of the task's heads get their part of the
    gradient, other rows none, and stay as they are without any copying. Work per batch grows with the rows of one
    task's heads, not with the number of tasks.

    rows: the model's `head_rows`. heads: each task's head set, True = trained. frozen: parameters that nothing updates.
    strict: False gives other rows a gradient of zero instead of none, and AdamW moves them.
    """

    def __init__(
        self,
        trunk: Trunk,
        rows: Sequence[HeadRows],
        heads: HeadSets,
        frozen: set[nn.Parameter],
        strict: bool = True,
        scoring_seconds: float = 0.0,
    ) -> None:
        super().__init__(trunk)
        self.heads, self.scoring_seconds, self.strict = dict(heads), scoring_seconds, strict
        views = separate_rows(trunk.optimizer, rows)
        in_rows = {row.parameter for row in rows}
        whole = [p for p in trunk.model.parameters() if p not in in_rows]
        self.always = [p for p in whole if p not in frozen]
        self.never = [p for p in whole if p in frozen]
        self.own = {
            t: [(row, views[row]) for row in rows if row.belong_to(mine)]
            for t, mine in heads.items()
        }
        self.others = {
            t: [views[row] for row in rows if not row.belong_to(mine)] for t, mine in heads.items()
        }
        self.updated: list[Tensor] = []

    def collect(self, task: str) -> None:
        """Give the rows of the task's heads, and no others, their part of the gradient."""
        for parameter in self.never:
            parameter.grad = None
        for row, view in self.own[task]:
            view.grad = None if row.parameter.grad is None else row.of(row.parameter.grad)
        for view in () if self.strict else self.others[task]:
            view.grad = torch.zeros_like(view)
        self.updated = [*self.always, *(view for _, view in self.own[task])]

    def gradients(self) -> list[Tensor]:
        """Return what the batch updates: the task's rows, and what always trains."""
        return self.updated


def separate_rows(
    optimizer: torch.optim.Optimizer, rows: Sequence[HeadRows]
) -> dict[HeadRows, Tensor]:
    """Make an optimizer see each head's rows as parameters of their own, with their share of its moments.

    Returns the view of the parameter that stands for each of `rows` from here on. The parameters that hold rows leave
    the optimizer's groups; the model does not change.
    """
    views = {row: row.of(row.parameter.data) for row in rows}
    rows_in: dict[nn.Parameter, list[HeadRows]] = {}
    for row in rows:
        rows_in.setdefault(row.parameter, []).append(row)
    for group in optimizer.param_groups:
        own = [row for parameter in group["params"] for row in rows_in.get(parameter, ())]
        for row in own:
            state = optimizer.state.get(row.parameter, {})
            shape = row.parameter.shape
            optimizer.state[views[row]] = {
                k: (row.of(v) if v.shape == shape else v).clone() for k, v in state.items()
            }
        group["params"] = [
            *(p for p in group["params"] if p not in rows_in),
            *(views[row] for row in own),
        ]
        if not all(views[row].is_contiguous() for row in own):
            _leave_fused_kernel(optimizer, group)
    for parameter in rows_in:
        optimizer.state.pop(parameter, None)
    return views


def _leave_fused_kernel(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    # the fused kernel takes consecutive memory only, which columns (GPT-2's) are not; every other one reads
    # the step count on the host, and would wait for the device at each parameter
    group["fused"] = False
    for state in (
        optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})
    ):
        state["step"] = state["step"].cpu()


def head_rows(model: nn.Module) -> list[HeadRows]:
    """Return all query, key and value rows of a model, by head; found by looking, so for any architecture.

    What depends on a row of a projection shows in a gradient: for each head, the rows of its layer's parameters
    that its query, key or value has a gradient for. Parameters that act on all heads alike are not among them.
    Raises FslibError for a model that mixes heads there, as a norm over all of a layer's queries does (OLMo2).
    """
    control = control_of(model)
    shape = (control.layers, control.head_shapes[0][0])
    rows: dict[tuple[int, int, int, int], HeadRows] = {}
    with in_mode(model, training=False), torch.inference_mode(False), torch.enable_grad():
        for layer, (module, *states) in enumerate(_attention_inputs(model)):
            for state in states:  # query, key, value
                for parameter, (dim, start, stop), heads in _rows_behind(state, module, shape[1]):
                    new = HeadRows(parameter, dim, start, stop, np.zeros(shape, dtype=bool))
                    rows.setdefault((id(parameter), dim, start, stop), new).owners[layer, heads] = (
                        True
                    )
    return list(rows.values())


def _rows_behind(
    state: Tensor, module: nn.Module, n_heads: int
) -> Iterator[tuple[nn.Parameter, tuple[int, int, int], slice]]:
    """Yield (parameter, (dim, start, stop), heads): the rows of an attention module that each head's state comes from.

    state: a layer's query, key or value, (batch, heads, seq, head_dim); keys and values may have fewer heads.
    """
    if not state.requires_grad:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = state.shape[1]
    each = n_heads // groups  # query heads that share one key or value
    for head in range(groups):
        own = state[:, head]
        uneven = (
            torch.arange(own.numel(), device=own.device).cos().view_as(own)
        )  # finds zero rows, too
        grads = torch.autograd.grad(
            (own * uneven).sum(), parameters, retain_graph=True, allow_unused=True
        )
        runs = [_runs(grad, alone=groups == 1) for grad in grads]
        matrices = [r for r, g in zip(runs, grads, strict=True) if g is not None and g.ndim > 1]
        if matrices and not any(matrices):
            raise FslibError(
                f"{type(module).__name__} mixes its heads' queries, keys or values: they have no rows of "
                "their own that IAT could train; use an architecture that keeps its heads apart"
            )
        for parameter, own_runs in zip(parameters, runs, strict=True):
            for run in own_runs:
                yield parameter, run, slice(head * each, (head + 1) * each)


def _attention_inputs(model: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Return every layer's attention module with its query, key and value, each from detached hidden states."""
    control = control_of(model)
    encoder: Any = model.encoder if isinstance(model, MultiTaskModel) else model
    ids = torch.arange(1, 9, device=device_of(encoder))[None] % encoder.config.vocab_size

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
    hooks = [
        m.register_forward_pre_hook(_detached, with_kwargs=True)
        for m in {id(h[0]): h[0] for h in heard}.values()
    ]
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
    """Return (dim, start, stop) of consecutive rows with a gradient; none if all have one, unless a head is `alone`."""
    if grad is None or not grad.ndim or not grad.any():
        return []
    for dim in range(min(2, grad.ndim)):
        used = (grad != 0).movedim(dim, 0).flatten(1).any(1) if grad.ndim > 1 else grad != 0
        if alone or not used.all():
            edges = torch.diff(
                used.int(), prepend=used.new_zeros(1).int(), append=used.new_zeros(1).int()
            )
            starts, stops = (
                (edges == 1).nonzero()[:, 0].tolist(),
                (edges == -1).nonzero()[:, 0].tolist(),
            )
            return [(dim, a, b) for a, b in zip(starts, stops, strict=True)]
    return []
