"""Which units each notebook needs, from a profile and a first seed."""

import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

from fslib.data.batches import task_order
from fslib.finetuning import subset_sizes
from fslib.study import units as work
from fslib.study.fingerprints import cached_task
from fslib.study.profiles import Profile
from fslib.study.store import Unit, distinct
from fslib.study.units import PLAIN, RANDOM, TREATED, TRUNK, Spec

TEXTS = 2  # of every task, to show attention on
LONGEST = 32  # tokens of a text whose attention is shown, special ones included


class Chain(NamedTuple):
    """One trained model and what is computed on it, each unit built on the one before."""

    train: work.TrainUnit
    importance: work.ImportanceUnit
    prune: work.PruneUnit


class Design:
    """The units of a profile's models, and which of them each notebook needs.

    Args:
        profile: its settings.
        seed: added to the profile's seeds.
    """

    def __init__(self, profile: Profile, seed: int = 0) -> None:
        self.profile, self.seed, p = profile, seed, profile
        # the main models, and of which of them there is every task alone, or every head off alone
        self.seeds = self.seeds_of(p.seeds)
        self.alone_seeds = self.seeds[: p.alone_seeds]
        self.lesion_seeds = self.seeds[: p.lesion_seeds]
        # the trunks of notebook 06, those with every ending, of which there is every task alone,
        # and the sources of notebook 07
        self.ending_seeds = self.seeds_of(p.ending_seeds)
        self.dose_seeds = self.ending_seeds[: p.dose_seeds]
        self.single_seeds = self.ending_seeds[: p.alone_seeds]
        self.transfer_seeds = self.seeds_of(p.transfer_seeds)
        # the tasks of notebook 05's pairs; of 06's trunks; and of 07's, without its targets
        self.pair_tasks = p.pair_tasks or p.tasks
        self.ending_tasks = p.ending_tasks or p.tasks
        targets = p.transfer_targets
        self.source_tasks = tuple(t for t in self.ending_tasks if t not in targets)

    def seeds_of(self, count: int) -> list[int]:
        """Return so many seeds, from the first on."""
        first = self.seed + self.profile.first_seed
        return list(range(first, first + count))

    @property
    def data(self) -> work.Data:
        """The tasks by name, and how many examples of them are evaluated."""
        return work.Data(tasks=self.profile.tasks, eval_examples=self.profile.eval_examples)

    def training(
        self, seed: int, task: str | None = None, *, small: bool = False, **changes: Any
    ) -> work.TrainUnit:
        """Return a multi-task training, or one on a task alone.

        Args:
            seed: of all that is drawn.
            task: on it alone, for as many steps as it gets in the multi-task training.
            small: with the encoder, steps, learning rate and evaluation of notebooks 04 to 07;
                fewer `tasks` get fewer steps in proportion, so that every task gets as many.
            changes: other fields of the unit.
        """
        p = self.profile
        fields = {k: getattr(p, k) for k in work.FineTuning.model_fields} | {"seed": seed}
        if small:
            encoder = changes.get("encoder", p.small_encoder)
            steps = p.small_steps * len(changes.get("tasks", p.tasks)) // len(p.tasks)
            lr = p.encoder_lrs.get(encoder, p.small_lr)
            fields |= {"encoder": encoder, "steps": steps, "lr": lr, "curve_points": 1}
            fields |= {"sampling": p.small_sampling, "eval_examples": p.small_eval_examples}
        fields |= changes
        if task is not None:
            names = list(fields["tasks"])
            most = p.train_examples or sys.maxsize
            sizes = [min(most, len(cached_task(t).train)) for t in names]
            order = list(task_order(sizes, fields["steps"], fields["sampling"], p.epochs, seed))
            fields |= {"tasks": (task,), "steps": max(1, order.count(names.index(task)))}
        return work.TrainUnit(**fields)

    def _chain(self, model: work.TrainUnit, examples: int, fractions: tuple[float, ...]) -> Chain:
        p, importance = self.profile, work.ImportanceUnit(model=model, examples=examples)
        how: dict[str, Any] = {"controls": p.controls, "on": p.lesioned_on}
        prune = work.PruneUnit(importance=importance, fractions=fractions, **how)
        return Chain(model, importance, prune)

    def units(self, seed: int) -> Chain:
        """Return the main model of a seed: its training, importance and pruning."""
        p = self.profile
        return self._chain(self.training(seed), p.importance_examples, p.fractions)

    def small_units(self, seed: int, **changes: Any) -> Chain:
        """Return the same of a model at the scale of notebooks 04 to 07."""
        p = self.profile
        model = self.training(seed, small=True, **changes)
        return self._chain(model, p.small_examples, p.small_fractions)

    def words(self) -> work.WordsUnit:
        """Return the bag-of-words baseline."""
        return work.WordsUnit(**vars(self.data))

    def lesion(self, seed: int) -> work.LesionUnit:
        """Return the unit of every head alone of a main model."""
        p = self.profile
        return work.LesionUnit(
            model=self.training(seed), on=p.lesioned_on, examples=p.lesion_examples
        )

    def pattern(self, seed: int) -> work.PatternUnit:
        """Return the unit of what the heads of a main model attend to."""
        return work.PatternUnit(model=self.training(seed), examples=TEXTS, longest=LONGEST)

    def head_units(self, seed: int) -> list[Unit]:
        """Return what is looked at head by head of a main model.

        Lesions of the first few, texts of the first.
        """
        alone = [self.lesion(seed)] if seed in self.lesion_seeds else []
        return [*alone, *([self.pattern(seed)] if seed == self.seeds[0] else [])]

    def encoder_units(self, encoder: str) -> list[Chain]:
        """Return training, importance and pruning of one encoder, per seed.

        The main models of notebook 03 serve here as well if they are trained as the others are.
        """
        p = self.profile
        alike = (p.steps, p.sampling) == (p.small_steps, p.small_sampling)
        if encoder == p.encoder and alike and encoder not in (*p.encoder_lrs, *p.encoder_seeds_of):
            return [self.units(s) for s in self.seeds]
        seeds = self.seeds_of(p.encoder_seeds_of.get(encoder, p.encoder_seeds))
        return [self.small_units(s, encoder=encoder) for s in seeds]

    def selection(self) -> work.SelectionUnit:
        """Return one small model's heads, chosen in several ways."""
        p = self.profile
        return work.SelectionUnit(
            model=self.training(self.seeds[0], small=True),
            selections=work.SELECTIONS,
            examples=p.selection_examples,
            fraction=max(p.small_fractions),
            randoms=p.selection_randoms,
        )

    def similarity(self) -> work.SimilarityUnit:
        """Return the similarity of all tasks.

        From models trained on one task, for as long as on it in a pair.
        """
        p = self.profile
        steps = p.small_steps // len(p.tasks)
        model = self.training(self.seeds[0], small=True, tasks=self.pair_tasks, steps=steps)
        return work.SimilarityUnit(**vars(model), examples=p.small_examples)

    def pair_units(self) -> dict[tuple[str, str], list[Chain]]:
        """Return the units of a model on every pair of tasks, per seed."""
        seeds = self.seeds_of(self.profile.pair_seeds)
        pairs = combinations(self.pair_tasks, 2)
        return {pair: [self.small_units(s, tasks=pair) for s in seeds] for pair in pairs}

    def endings(self, *, whole: bool = True) -> dict[str, Spec]:
        """Return the endings by name.

        Args:
            whole: all that the profile names, or those alone that claims are decided on.
        """
        p = self.profile
        mixed = {"kind": "PCGrad", "delta": p.delta}
        iat = {"kind": "IAT", "delta": p.delta, "alpha": p.alpha}
        drawn = iat | {"heads": "random"}
        found: dict[str, Spec] = {TRUNK: {"kind": "Stop", "delta": p.delta}}
        found |= {TREATED: iat, PLAIN: None, RANDOM: drawn}
        if not whole:
            return found
        others: dict[str, dict[str, Any]] = {
            "IAT, least heads": iat | {"heads": "least"},
            "PCGrad": mixed,
            "mixed batches": mixed | {"project": False},
            "IAT, others frozen": iat | {"others": "freeze"},
            "IAT, leaky": iat | {"strict": False},
        }
        for name, spec in others.items():
            if name in p.other_endings and not (spec["kind"] == "PCGrad" and self.left_out()):
                found[name] = spec
        found |= {f"IAT, alpha {a:g}": iat | {"alpha": a} for a in p.other_alphas}
        deltas = (*p.other_deltas, *p.doses)
        found |= {at_dose(TREATED, d): iat | {"delta": d} for d in deltas}
        return found | {at_dose(RANDOM, d): drawn | {"delta": d} for d in p.doses}

    def left_out(self) -> str:
        """Say why no endings mix tasks in a batch, or nothing ("") where some do."""
        tasks, batch = len(self.ending_tasks), self.profile.batch_size
        if batch >= tasks:
            return ""
        return f"no PCGrad: a batch of {batch} has no example of some of {tasks} tasks"

    def endings_unit(self, seed: int) -> work.EndingsUnit:
        """Return one trunk and all its endings.

        For the seeds of notebook 07, with what is learned from them.
        """
        p, whole = self.profile, seed in self.dose_seeds
        pruned = [PLAIN, TREATED, RANDOM]
        if whole:
            doses = [at_dose(name, d) for d in p.doses for name in (TREATED, RANDOM)]
            pruned = [TRUNK, *pruned, *doses]
        transferred = seed in self.transfer_seeds and self.source_tasks == self.ending_tasks
        return self._endings(
            seed, self.endings(whole=whole), tuple(pruned), transferred=transferred
        )

    def floor_unit(self, seed: int, floor: float) -> work.EndingsUnit:
        """Return a trunk with a floor to its learning rate, and endings of `floor_delta`."""
        iat = {"kind": "IAT", "delta": self.profile.floor_delta, "alpha": self.profile.alpha}
        endings: dict[str, Spec] = {PLAIN: None, TREATED: iat, RANDOM: iat | {"heads": "random"}}
        return self._endings(seed, endings, tuple(endings), lr_floor=floor)

    def source_unit(self, seed: int) -> work.EndingsUnit:
        """Return the unit that transfer begins with.

        06's endings, or others if a target is among their tasks.
        """
        if self.source_tasks == self.ending_tasks:
            return self.endings_unit(seed)
        every = self.endings(whole=False)
        endings = {name: every[name] for name in (PLAIN, TREATED, RANDOM)}
        return self._endings(seed, endings, (), transferred=True, tasks=self.source_tasks)

    def single_unit(self, seed: int, task: str) -> work.TrainUnit:
        """Return a task of 06 trained alone.

        For as many steps as it gets on the trunk and its plain ending.
        """
        fields = {"tasks": self.ending_tasks, "eval_examples": self.profile.ending_examples}
        return self.training(seed, task, small=True, **fields)

    def _endings(
        self,
        seed: int,
        endings: dict[str, Spec],
        pruned: tuple[str, ...],
        *,
        transferred: bool = False,
        **changes: Any,
    ) -> work.EndingsUnit:
        p = self.profile
        fields = {"tasks": self.ending_tasks, "eval_examples": p.ending_examples} | changes
        return work.EndingsUnit(
            **vars(self.training(seed, small=True, **fields)),
            endings=endings,
            pruned=pruned,
            fractions=p.ending_fractions or (p.alpha,),
            examples=p.small_examples,
            prune_examples=p.prune_examples or p.eval_examples,
            on=p.lesioned_on,
            targets=self.targets() if transferred else None,
        )

    def targets(self) -> work.Targets:
        """Return what is learned from the endings, at sizes that suit all targets."""
        p = self.profile
        bounds = [subset_sizes(cached_task(name)) for name in p.transfer_targets]
        least, most = max(low for low, _ in bounds), min(high for _, high in bounds)
        sizes = [size for size in p.transfer_sizes if size is None or least <= size <= most]
        return work.Targets(
            tasks=p.transfer_targets,
            sources=(PLAIN, TREATED, RANDOM),
            sizes=tuple(sizes) or (None,),
            eval_examples=p.ending_examples,
            passes=p.transfer_passes,
            min_steps=p.transfer_min_steps,
            max_steps=p.transfer_max_steps,
        )

    def no_transfer(self) -> str:
        """Say why there is nothing to transfer from, or nothing ("") if there is."""
        if len(self.source_tasks) >= 2:
            return ""
        without = " and ".join(self.profile.transfer_targets)
        return f"without {without} there are fewer than two tasks to train a source on"

    def plan(self, *notebooks: str) -> list[Unit]:
        """Return all units behind notebooks, each once, those they depend on first.

        Args:
            notebooks: their numbers or names.
        """
        plans = [PLANS[name[:2]] for name in notebooks if name[:2] in PLANS]
        return distinct(unit for plan in plans for unit in plan(self))


def at_dose(name: str, delta: float) -> str:
    """Return the name of an ending that begins at another delta than the deciding one."""
    return f"{name}, delta {delta:g}"


def _multitask(d: Design) -> list[Unit]:
    single = [d.training(s, task) for s in d.alone_seeds for task in d.profile.tasks]
    return [d.words(), *(d.training(s) for s in d.seeds), *single]


def _importance(d: Design) -> list[Unit]:
    units = [d.units(s) for s in d.seeds]
    scored = [*(u.train for u in units), *(u.importance for u in units)]
    return [*scored, *map(d.lesion, d.lesion_seeds)]


def _pruning(d: Design) -> list[Unit]:
    # seed by seed: a run that is cut short has whole seeds, and no model is trained again
    return [unit for s in d.seeds for unit in d.units(s)]


def _models(d: Design) -> list[Unit]:
    chains = [units for encoder in d.profile.encoders for units in d.encoder_units(encoder)]
    return [*(unit for units in chains for unit in units), d.selection().model, d.selection()]


def _similarity(d: Design) -> list[Unit]:
    chains = [units for pair in d.pair_units().values() for units in pair]
    return [d.similarity(), *(unit for units in chains for unit in units)]


def _iat(d: Design) -> list[Unit]:
    floors = [d.floor_unit(s, floor) for s in d.dose_seeds for floor in d.profile.dose_floors]
    single = [d.single_unit(s, t) for s in d.single_seeds for t in d.ending_tasks]
    return [*map(d.endings_unit, d.ending_seeds), *floors, *single]


def _transfer(d: Design) -> list[Unit]:
    return [] if d.no_transfer() else [d.source_unit(s) for s in d.transfer_seeds]


def _claims(d: Design) -> list[Unit]:
    return d.plan(*(f"{number:02d}" for number in range(1, 8)))


def _explore(d: Design) -> list[Unit]:
    return [*d.units(d.seeds[0]), *d.head_units(d.seeds[0])]


# notebook -> the units it needs, those they depend on first
PLANS: dict[str, Callable[[Design], list[Unit]]] = {
    "01": _multitask,
    "02": _importance,
    "03": _pruning,
    "04": _models,
    "05": _similarity,
    "06": _iat,
    "07": _transfer,
    "08": _claims,
    "09": _explore,
}
