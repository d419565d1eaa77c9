"""IAT, important attention-head training (Li et al., 2023).

In the last part of multi-task training a batch of task t updates, of all query, key and value rows,
only those of t's own heads. `IAT` says which heads those are, `head_rows` finds the rows that
belong to a head, and `IATRule` is what the training loop (`fslib.training`) follows: it hands the
optimizer the gradients of one task's rows and of no others.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fslib.endings import Ending, Rule, Trunk
from fslib.errors import FslibError, check_among, check_count, check_flag, check_number
from fslib.heads import HeadMap, HeadSet, head_count, random_heads, top_heads
from fslib.importance import NORMALIZATIONS, REDUCTIONS, contributions
from fslib.model.attention import control_of
from fslib.model.devices import device_of
from fslib.model.modes import in_mode
from fslib.model.multitask import MultiTaskModel

CHOICES = ("top", "random", "least")
OTHERS = ("train", "freeze")
HeadSets = dict[str, HeadSet]


@dataclass(frozen=True)
class IAT(Ending):
    """Train only a task's own heads on its batches (Li et al., 2023).

    In the last `delta` of the steps a batch of task t updates, of all query, key and value rows,
    only those of t's own heads. No parameter is added.

    Attributes:
        delta: the share of the steps, the last ones, in (0, 1).
        alpha: share of all heads in a task's set, in (0, 1].
        heads: "top" (most important to the task), or a control: "random" (as many in each layer),
            "least" (important).
        others: "train": everything that is not a query, key or value row trains on; "freeze": only
            classifiers do.
        shared: keep heads that are in every task's set; False leaves them out of all.
        strict: a row outside the set stays as it is, bit for bit. False is the released code's: its
            gradient is zero, but Adam's moments and weight decay move it.
        examples: training examples of each task that importance is scored on (None: all). 64 are
            twice what a rank correlation of 0.95 with all examples took in the slowest task.
        reduction, normalize: as in `fslib.head_importance`.
    """

    alpha: float = 0.3
    heads: str = "top"
    others: str = "train"
    shared: bool = True
    strict: bool = True
    examples: int | None = 64
    reduction: str = "token"
    normalize: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "(0, 1]", "there are no more top heads than heads")
        for name, valid in {"heads": CHOICES, "others": OTHERS, "reduction": REDUCTIONS}.items():
            check_among(f"{name} for IAT", getattr(self, name), valid)
        check_among("normalize", self.normalize, NORMALIZATIONS, none=True)
        check_count("examples", self.examples, none=True)
        check_flag("shared", self.shared)
        check_flag("strict", self.strict)
        if self.heads != "top" and self.alpha == 1:
            raise FslibError(f"alpha 1 leaves no choice of {self.heads!r} heads: use less")

    def check(self, trunk: Trunk) -> None:
        """Raise FslibError for one task, no head chosen, and heads without rows to train."""
        self.needs_two_tasks(trunk)
        total = trunk.model.n_layers * trunk.model.n_heads
        if head_count(self.alpha, total) == 0:
            raise FslibError(f"alpha {self.alpha} of {total} heads is none: choose {1 / total:.3f}")
        _rows(trunk)

    def begin(self, trunk: Trunk) -> Rule:
        """Score importance on training data and return the rule that trains the chosen heads."""
        key = ("importance", trunk.step, self.examples)
        if key not in trunk.cache:
            started = time.perf_counter()
            score = partial(contributions, trunk.model, examples=self.examples, seed=trunk.seed)
            parts = {name: score(task) for name, task in trunk.tasks.items()}
            trunk.cache[key] = parts, time.perf_counter() - started
        parts, seconds = trunk.cache[key]
        how = {"reduction": self.reduction, "normalize": self.normalize}
        importance = {name: part.importance(**how) for name, part in parts.items()}
        heads = self.choose(importance, np.random.default_rng((trunk.seed, 5)))
        return IATRule(trunk, self, heads, seconds)

    def choose(self, importance: Mapping[str, HeadMap], rng: np.random.Generator) -> HeadSets:
        """Return each task's head set, True = trained on its batches."""
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
    """Consecutive rows of a query, key or value weight or bias that belong to heads.

    Attributes:
        parameter: the weight or bias.
        dim: 0 for rows, 1 for columns.
        start, stop: the first of them, and the first behind them.
        owners: (layers, heads), True = needs these rows. More than one head with grouped-query
            attention, where query heads share keys and values, and where layers share weights.
    """

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    owners: HeadSet

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of the parameter, or of what else has its shape, as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def belong_to(self, heads: HeadSet) -> bool:
        """Tell whether a head of the set needs these rows."""
        return bool((self.owners & heads).any())


class IATRule(Rule):
    """A batch updates the rows of its task's heads, and all that is no query, key or value row.

    Why it is exact: AdamW skips a parameter without a gradient, its moments and its weight decay
    with it. The optimizer sees each head's rows as parameters of their own (`separate_rows`); rows
    of the task's heads get their part of the gradient, other rows none, and stay as they are
    without any copying. Work per batch grows with the rows of one task's heads, not with the number
    of tasks.

    Args:
        trunk: the training.
        iat: what to train. `strict`: without it other rows get a gradient of zero instead of none,
            and AdamW moves them.
        heads: each task's head set, True = trained.
        scoring_seconds: time that choosing the heads took.
    """

    def __init__(self, trunk: Trunk, iat: IAT, heads: HeadSets, scoring_seconds: float) -> None:
        super().__init__(trunk)
        self.heads, self.scoring_seconds, self.strict = heads, scoring_seconds, iat.strict
        rows = _rows(trunk)
        views = separate_rows(trunk.optimizer, rows).items()
        whole = set(self.parameters) - {row.parameter for row in rows}
        frozen = set(trunk.model.encoder.parameters()) if iat.others == "freeze" else set()
        self.never = whole & frozen
        self.always = [p for p in self.parameters if p in whole and p not in frozen]
        self.own = {t: [v for v in views if v[0].belong_to(mine)] for t, mine in heads.items()}
        self.others = {t: [v for r, v in views if not r.belong_to(heads[t])] for t in heads}
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
    """Make an optimizer see each head's rows as parameters of their own.

    They take their share of its moments along. The parameters that hold rows leave the optimizer's
    groups; the model does not change.

    Returns:
        The view of the parameter that stands for each of `rows` from here on.
    """
    views = {row: row.of(row.parameter.data) for row in rows}
    split = {row.parameter for row in rows}
    for group in optimizer.param_groups:
        own = [row for p in group["params"] if p in split for row in rows if row.parameter is p]
        for row in own:
            state, shape = optimizer.state.get(row.parameter, {}), row.parameter.shape
            parts = {k: row.of(v) if v.shape == shape else v for k, v in state.items()}
            optimizer.state[views[row]] = {k: part.clone() for k, part in parts.items()}
        whole = [p for p in group["params"] if p not in split]
        group["params"] = [*whole, *(views[row] for row in own)]
        if all(views[row].is_contiguous() for row in own):
            continue
        # the fused kernel takes consecutive memory only, which columns (GPT-2's) are not; every
        # other kernel reads the step count on the host, and would wait for the device at each
        group["fused"] = False
        for state in (optimizer.state.get(p, {}) for p in group["params"]):
            if "step" in state:
                state["step"] = state["step"].cpu()
    for parameter in split:
        optimizer.state.pop(parameter, None)
    return views


def head_rows(model: nn.Module) -> list[HeadRows]:
    """Return all query, key and value rows of a model, by head.

    They are found by looking, so for any architecture: what depends on a row of a projection shows
    in a gradient. They are, for each head, the rows of its layer's parameters that its query, key
    or value has a gradient for. Parameters that act on all heads alike are not among them.

    Raises:
        FslibError: for a model that mixes heads there, as a norm over all of a layer's queries
            does (OLMo2), and for a head without rows that can be trained.
    """
    control = control_of(model)
    shape = (control.layers, control.head_shapes[0][0])
    rows: dict[tuple[int, int, int, int], HeadRows] = {}
    with in_mode(model, training=False), torch.inference_mode(False), torch.enable_grad():
        for layer, (module, *states) in enumerate(_attention_inputs(model)):
            for state in states:  # query, key, value
                for parameter, run, heads in _rows_behind(state, module, shape[1]):
                    new = HeadRows(parameter, *run, np.zeros(shape, dtype=bool))
                    found = rows.setdefault((id(parameter), *run), new)
                    found.owners[layer, heads] = True
    owned = np.logical_or.reduce([row.owners for row in rows.values()] or [np.zeros(shape, bool)])
    for layer, head in np.argwhere(~owned):
        why = "it has no query, key or value rows of its own, or they are frozen"
        raise FslibError(f"IAT cannot train head {head} of layer {layer}: {why}")
    return list(rows.values())


def _rows_behind(
    state: Tensor, module: nn.Module, n_heads: int
) -> Iterator[tuple[nn.Parameter, tuple[int, int, int], slice]]:
    """Yield (parameter, (dim, start, stop), heads): the rows that each head's state comes from.

    Args:
        state: a layer's query, key or value, (batch, heads, seq, head_dim); keys and values may
            have fewer heads.
        module: the layer's attention.
        n_heads: of its queries.
    """
    if not state.requires_grad:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = state.shape[1]
    each = n_heads // groups  # query heads that share one key or value
    for head in range(groups):
        own = state[:, head]
        # an uneven sum finds rows of zeros, too
        total = (own * torch.arange(own.numel(), device=own.device).cos().view_as(own)).sum()
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        runs = [_runs(grad, alone=groups == 1) for grad in grads]
        matrices = [r for r, g in zip(runs, grads, strict=True) if g is not None and g.ndim > 1]
        if matrices and not any(matrices):
            mixed = f"{type(module).__name__} mixes its heads' queries, keys or values"
            raise FslibError(f"{mixed}: IAT finds no rows of their own; use another architecture")
        for parameter, own_runs in zip(parameters, runs, strict=True):
            for run in own_runs:
                yield parameter, run, slice(head * each, (head + 1) * each)


def _attention_inputs(model: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Return every layer's attention module, query, key and value, from detached states."""
    control = control_of(model)
    encoder: Any = model.encoder if isinstance(model, MultiTaskModel) else model
    ids = torch.arange(1, 9, device=device_of(encoder))[None] % encoder.config.vocab_size

    def listen() -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
        heard: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []
        with control.having(inputs=heard):
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
        return heard

    with torch.no_grad():
        modules = dict.fromkeys(module for module, *_ in listen())
    with ExitStack() as hooks:
        # detached: where layers share weights, a head's own rows would be lost among those before
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(_detached, with_kwargs=True))
        return listen()


def _detached(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def cut(value: object) -> object:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(a) for a in args), {k: cut(v) for k, v in kwargs.items()}


def _runs(grad: Tensor | None, alone: bool) -> list[tuple[int, int, int]]:
    """Return (dim, start, stop) of consecutive rows with a gradient.

    None if all rows have one, unless a head is `alone`.
    """
    if grad is None or not grad.ndim or not grad.any():
        return []
    for dim in range(min(2, grad.ndim)):
        used = (grad != 0).movedim(dim, 0)
        used = used.reshape(len(used), -1).any(1)
        if alone or not used.all():
            edges = nn.functional.pad(used.int(), (1, 1)).diff()  # 1 where a run starts, -1 behind
            starts, stops = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
            return [(dim, a, b) for a, b in zip(starts, stops, strict=True)]
    return []


def _rows(trunk: Trunk) -> list[HeadRows]:
    """Return the model's rows, found once for all endings of a training."""
    if "rows" not in trunk.cache:
        trunk.cache["rows"] = head_rows(trunk.model)
    return trunk.cache["rows"]
