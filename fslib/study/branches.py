"""One trunk and its endings, which two questions share: what they do to the tasks (06), and to new ones (07)."""

import sys
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from fslib.dissociation import IAP
from fslib.endings import Ending, PCGrad, Stop
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate
from fslib.heads import checked_fractions
from fslib.iat import IAT, HeadRows, head_rows
from fslib.importance import head_importance
from fslib.model.multitask import MultiTaskModel
from fslib.progress import hidden
from fslib.study.config import Config
from fslib.study.fingerprints import cached_task
from fslib.study.records import Result, Store, Unit
from fslib.study.study import Study
from fslib.study.units import (
    LesionedOn,
    SeededFineTuning,
    TaskNames,
    iap_arrays,
    in_bytes,
    lesioned,
)
from fslib.training import branch
from fslib.transfer import PARTS, subset_sizes, transfer

ENDINGS: dict[str, Any] = {"IAT": IAT, "PCGrad": PCGrad, "Stop": Stop}
TRUNK, PLAIN, TREATED, RANDOM = "trunk", "plain", "IAT", "IAT, random heads"
AS_IT_WAS = "pre-trained"  # the encoder as it was, a source of transfer beside the endings


class Targets(Config):
    """New tasks that are learned from some endings' encoders, and from the encoder as it was.

    sources: names of endings. sizes: training examples; None for all. A training set is gone through `passes` times,
    in at least `min_steps` and at most `max_steps` steps.
    """

    tasks: TaskNames
    sources: tuple[str, ...]
    sizes: tuple[int | None, ...] = Field(min_length=1)
    eval_examples: int | None = Field(None, ge=2)
    passes: int = Field(ge=1)
    min_steps: int = Field(ge=1)
    max_steps: int = Field(ge=1)

    def steps(self, size: int, batch_size: int) -> int:
        """Return the steps for a training set of a size."""
        return min(self.max_steps, max(self.min_steps, self.passes * size // batch_size))


class EndingsUnit(SeededFineTuning, Unit):
    """One trunk and its endings: {name: {"kind": IAT, PCGrad or Stop, and its options}, or None for plain training}.

    pruned: the endings whose dissociation is measured, at `fractions`, on the first `prune_examples` of evaluation.
    targets: new tasks to be learned from some of the endings.
    """

    kind: ClassVar[str] = "endings"
    endings: dict[str, dict[str, Any] | None] = Field(min_length=1)
    pruned: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.3,)
    examples: int = Field(ge=1)
    prune_examples: int | None = Field(None, ge=2)
    on: LesionedOn = Field("all", exclude_if=lambda value: value == "all")
    targets: Targets | None = Field(None, exclude_if=lambda value: value is None)

    def task_names(self) -> list[str]:
        """Name the trunk's tasks, and the new ones."""
        return [*self.tasks, *(self.targets.tasks if self.targets else ())]

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads, the number of steps or the tasks do not allow."""
        super().check()
        checked_fractions(self.fractions, self.shape())
        for spec in self.endings.values():
            if ending := make_ending(spec):
                ending.start(self.steps)
            if spec and "alpha" in spec:
                checked_fractions([spec["alpha"]], self.shape(), what="alpha")
        for name in (*self.pruned, *(self.targets.sources if self.targets else ())):
            if name not in self.endings:
                raise unknown("ending", name, self.endings)
        for name in self.targets.tasks if self.targets else ():
            if name in self.tasks:
                raise FslibError(f"target {name!r} is one of the source's tasks {list(self.tasks)}: leave it out there")

    def made(self) -> dict[str, Ending | None]:
        """Return the endings by name, made of their descriptions."""
        return {name: make_ending(spec) for name, spec in self.endings.items()}

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer."""
        endings = list(self.made().values())
        spans = [(e.start(self.steps), e.stop(self.steps)) for e in endings if e]
        last = max((start for start, _ in spans), default=0)
        steps = last + sum(stop - start for start, stop in spans) + (self.steps - last) * endings.count(None)
        sets = len(self.pruned) * len(self.fractions) * len(self.tasks) * (0.5 if self.on == "scored" else 1)
        share = min(1.0, (self.prune_examples or sys.maxsize) / max(map(self.evaluated, self.tasks)))
        scored = 2 * self.examples * len(self.tasks) * len(self.pruned)
        tokens = self.through(3 * steps * self.batch_size + scored, len(endings) + sets * share)
        return tokens + (self._transfer_token_layers(self.targets) if self.targets else 0)

    def _transfer_token_layers(self, plan: Targets) -> float:
        """Return about how often a token goes through a layer while the targets are learned, in both ways."""
        total = 0.0
        for target in plan.tasks:
            n, tested = len(cached_task(target).train), min(plan.eval_examples or sys.maxsize, self.evaluated(target))
            for size in plan.sizes:
                examples = 3 * self.batch_size * plan.steps(size or n, self.batch_size) + (size or n) + 2 * tested
                total += examples * self.tokens(target)
        return total * self.layers() * (1 + len(plan.sources))

    def compute(self, store: Store) -> Result:
        """Train the trunk, then every ending from it; score each, prune and transfer from those that are named."""
        tasks = self.load()
        model = self.new_model(tasks)
        endings = self.made()
        values: dict[str, Any] = {"branched": {}, "parameters": {}, "moved": {}}
        arrays: dict[str, np.ndarray] = {}
        movement: Movement | None = None
        if self.targets:
            arrays |= self._learned(model, AS_IT_WAS)
        for name, history in branch(model, tasks, endings, **self.options()):
            values["branched"][name], values["parameters"][name] = history.branched, model.n_parameters()
            scores = evaluate(model, tasks)
            arrays |= {f"predictions/{name}/{t}": in_bytes(s.predictions) for t, s in scores.items()}
            arrays |= {f"heads/{name}/{t}": heads for t, heads in history.heads.items()}
            if isinstance(endings[name], Stop):
                movement = Movement(model, history.branched)
            # plain training went on from the same step, however late other endings branch off
            elif movement is not None and (history.branched == movement.step or endings[name] is None):
                values["moved"][name] = movement.since(history.heads)
            if name in self.pruned:
                arrays |= iap_arrays(self._prune(model), name)
            if self.targets and name in self.targets.sources:
                arrays |= self._learned(model, name)
        metrics = [task.metric for task in tasks.values()]
        return Result(values | {"tasks": list(tasks), "metrics": metrics, "fractions": sorted(self.fractions)}, arrays)

    def _prune(self, model: MultiTaskModel) -> IAP:
        """Score every task's heads as the model is now, and prune them."""
        tasks = self.load()
        maps = {t: head_importance(model, task, examples=self.examples, seed=self.seed) for t, task in tasks.items()}
        limited = {n: t.limited(eval=self.prune_examples) for n, t in tasks.items()}
        options: dict[str, Any] = {"importance": maps, "seed": self.seed}
        return lesioned(model, limited, self.on, fractions=self.fractions, controls=0, **options)

    def _learned(self, source: MultiTaskModel, name: str) -> dict[str, np.ndarray]:
        """Return predictions of every target, learned from a copy of the source at every size and in both ways."""
        plan, found = self.targets, {}
        assert plan is not None
        for target in plan.tasks:
            task = cached_task(target).limited(eval=plan.eval_examples)
            for size in plan.sizes:
                n = len(task.train) if size is None else size
                options: dict[str, Any] = {"size": size, "seed": self.seed, "batch_size": self.batch_size}
                options |= {"steps": plan.steps(n, self.batch_size), "lr": self.lr}
                for part in PARTS:
                    with hidden():
                        learned = transfer(source, task, part=part, **options)
                    found[transfer_name(target, name, part, size)] = in_bytes(learned.score.predictions)
        return found


def transfer_name(target: str, source: str, part: str, size: int | None) -> str:
    """Return under which name a record keeps the predictions of a target."""
    return f"transfer/{target}/{source}/{part}/{size or 'all'}"


def make_ending(spec: dict[str, Any] | None) -> Ending | None:
    """Return an ending from its description. Raises FslibError for an unknown kind or option."""
    if spec is None:
        return None
    options = dict(spec)
    kind = options.pop("kind", "")
    if kind not in ENDINGS:
        raise unknown("kind of ending", kind, ENDINGS)
    try:
        ending: Ending = ENDINGS[kind](**options)
    except TypeError as error:
        raise FslibError(f"ending {spec}: {error}") from None
    return ending


class Movement:
    """How far rows of heads move between a step and now, as a root mean square over weights."""

    def __init__(self, model: MultiTaskModel, step: int) -> None:
        self.step, self.rows = step, head_rows(model)
        self.then = {row.parameter: row.parameter.detach().clone() for row in self.rows}
        self.inside: np.ndarray | None = None

    def since(self, heads: dict[str, np.ndarray]) -> dict[str, float]:
        """Return how far rows moved of heads in some task's set, and in none; the first sets given say which."""
        if heads and self.inside is None:
            self.inside = np.logical_or.reduce(list(heads.values()))
        if self.inside is None:
            return {}
        parts = {"in no set": [r for r in self.rows if not r.belong_to(self.inside)]}
        parts["in a set"] = [r for r in self.rows if r.belong_to(self.inside)]
        return {what: self._rms(rows) for what, rows in parts.items() if rows}

    def _rms(self, rows: list[HeadRows]) -> float:
        changes = [(r.of(r.parameter.detach()) - r.of(self.then[r.parameter])).flatten() for r in rows]
        return float(torch.cat(changes).double().square().mean().sqrt())


def at_dose(name: str, delta: float) -> str:
    """Return the name of an ending that begins at another delta than the one that decides."""
    return f"{name}, delta {delta:g}"


def dose_seeds(study: Study) -> list[int]:
    """Return the seeds of the trunks with every ending, not only those that claims are decided on."""
    return study.seeds_of(study.profile.ending_seeds)[: study.profile.dose_seeds]


def design(study: Study, *, whole: bool = True) -> dict[str, dict[str, Any] | None]:
    """Return every ending by name, as a unit describes it; None is plain training.

    whole: with all that the profile names, or those alone that claims are decided on.
    """
    p = study.profile
    iat = {"kind": "IAT", "delta": p.delta, "alpha": p.alpha}
    deciding = {
        TRUNK: {"kind": "Stop", "delta": p.delta},
        TREATED: iat,
        PLAIN: None,
        RANDOM: iat | {"heads": "random"},
    }
    if not whole:
        return deciding
    others: dict[str, dict[str, Any]] = {
        "IAT, least heads": iat | {"heads": "least"},
        "PCGrad": {"kind": "PCGrad", "delta": p.delta},
        "mixed batches": {"kind": "PCGrad", "delta": p.delta, "project": False},
        "IAT, others frozen": iat | {"others": "freeze"},
        "IAT, leaky": iat | {"strict": False},
    }
    chosen = [n for n in others if n in p.other_endings and not (others[n]["kind"] == "PCGrad" and left_out(study))]
    return {
        **deciding,
        **{name: others[name] for name in chosen},
        **{f"IAT, alpha {a:g}": iat | {"alpha": a} for a in p.other_alphas},
        **{at_dose(TREATED, d): iat | {"delta": d} for d in (*p.other_deltas, *p.doses)},
        **{at_dose(RANDOM, d): iat | {"delta": d, "heads": "random"} for d in p.doses},
    }


def left_out(study: Study) -> str:
    """Say why there are no endings that mix tasks in a batch, or nothing ("") where there are."""
    tasks, batch = len(study.ending_tasks), study.profile.batch_size
    return f"no PCGrad: a batch of {batch} has no example of some of {tasks} tasks" if batch < tasks else ""


def endings_unit(study: Study, seed: int) -> EndingsUnit:
    """Return one trunk and all its endings; for the seeds of notebook 07, with what is learned from them."""
    p = study.profile
    endings = design(study, whole=seed in dose_seeds(study))
    doses = [name for d in p.doses for name in (at_dose(TREATED, d), at_dose(RANDOM, d)) if name in endings]
    transferred = seed in study.seeds_of(p.transfer_seeds) and not set(p.transfer_targets) & set(study.ending_tasks)
    before = (TRUNK,) if seed in dose_seeds(study) else ()
    return _unit(study, seed, study.ending_tasks, endings, (*before, PLAIN, TREATED, RANDOM, *doses), transferred)


def floor_unit(study: Study, seed: int, floor: float) -> EndingsUnit:
    """Return a trunk whose learning rate does not fall below a floor, and its endings of `floor_delta`."""
    iat = {"kind": "IAT", "delta": study.profile.floor_delta, "alpha": study.profile.alpha}
    endings = {PLAIN: None, TREATED: iat, RANDOM: iat | {"heads": "random"}}
    return _unit(study, seed, study.ending_tasks, endings, tuple(endings), False, lr_floor=floor)


def source_unit(study: Study, seed: int) -> EndingsUnit:
    """Return the unit that transfer begins with: 06's endings, or others if a target is among their tasks."""
    p = study.profile
    tasks = tuple(t for t in study.ending_tasks if t not in p.transfer_targets)
    if tasks == study.ending_tasks:
        return endings_unit(study, seed)
    endings = {name: design(study)[name] for name in (PLAIN, TREATED, RANDOM)}
    return _unit(study, seed, tasks, endings, (), True)


def _unit(
    study: Study,
    seed: int,
    tasks: tuple[str, ...],
    endings: dict[str, dict[str, Any] | None],
    pruned: tuple[str, ...],
    transferred: bool,
    **changes: Any,
) -> EndingsUnit:
    """Return a trunk on some tasks with some endings."""
    p = study.profile
    settings = study.training(seed, small=True, tasks=tasks, eval_examples=p.ending_examples, **changes).model_dump()
    settings |= {"pruned": pruned, "fractions": p.ending_fractions or (p.alpha,), "examples": p.small_examples}
    settings |= {"prune_examples": p.prune_examples or p.eval_examples, "on": p.lesioned_on}
    return EndingsUnit(**settings, endings=endings, targets=targets(study) if transferred else None)


def targets(study: Study) -> Targets:
    """Return what is learned from the endings."""
    p = study.profile
    options = {k: getattr(p, f"transfer_{k}") for k in ("passes", "min_steps", "max_steps")}
    bounds = [subset_sizes(cached_task(name)) for name in p.transfer_targets]
    suiting = (n for n in p.transfer_sizes if n is None or all(least <= n <= most for least, most in bounds))
    sources = (PLAIN, TREATED, RANDOM)
    return Targets(
        tasks=p.transfer_targets,
        sources=sources,
        sizes=tuple(suiting) or (None,),
        eval_examples=p.ending_examples,
        **options,
    )
