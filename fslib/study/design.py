"""Which units each notebook needs, from a profile and a first seed."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

from fslib.data.batches import task_order
from fslib.finetuning import subset_sizes
from fslib.study.fingerprints import cached_task
from fslib.study.profiles import Profile
from fslib.study.store import Unit, distinct
from fslib.study.units import (
    PLAIN,
    RANDOM,
    SELECTIONS,
    TREATED,
    TRUNK,
    Chain,
    Data,
    EndingsUnit,
    FineTuning,
    LesionUnit,
    PatternUnit,
    SelectionUnit,
    SimilarityUnit,
    Targets,
    TrainUnit,
    WordsUnit,
    chain,
)

TEXTS = 2  # of every task, to show attention on
LONGEST = 32  # tokens of a text whose attention is shown, special ones included


class Design:
    """The units of a profile's models, and which of them each notebook needs.

    profile: its settings. seed: added to the profile's seeds.
    """

    def __init__(self, profile: Profile, seed: int = 0) -> None:
        self.profile, self.seed = profile, seed

    @property
    def data(self) -> Data:
        """The tasks by name, and how many examples of them are evaluated."""
        return Data(tasks=self.profile.tasks, eval_examples=self.profile.eval_examples)

    @property
    def pair_tasks(self) -> tuple[str, ...]:
        """The tasks of which notebook 05 makes pairs."""
        return self.profile.pair_tasks or self.profile.tasks

    @property
    def ending_tasks(self) -> tuple[str, ...]:
        """The tasks of the trunks and endings of notebooks 06 and 07."""
        return self.profile.ending_tasks or self.profile.tasks

    @property
    def source_tasks(self) -> tuple[str, ...]:
        """The tasks that the sources of notebook 07 are trained on: none of its targets."""
        return tuple(t for t in self.ending_tasks if t not in self.profile.transfer_targets)

    def seeds_of(self, count: int | None) -> list[int]:
        """Return so many seeds, from the first on."""
        first = self.seed + self.profile.first_seed
        return list(range(first, first + (count or 0)))

    @property
    def seeds(self) -> list[int]:
        """The seeds of the main models."""
        return self.seeds_of(self.profile.seeds)

    @property
    def alone_seeds(self) -> list[int]:
        """The main seeds of which there is a model of every task alone, to compare with."""
        return self.seeds[: self.profile.alone_seeds]

    @property
    def lesion_seeds(self) -> list[int]:
        """The main seeds of whose models every head is switched off alone."""
        return self.seeds[: self.profile.lesion_seeds]

    @property
    def ending_seeds(self) -> list[int]:
        """The seeds of the trunks of notebook 06."""
        return self.seeds_of(self.profile.ending_seeds)

    @property
    def dose_seeds(self) -> list[int]:
        """The seeds of the trunks with every ending, not only those that claims are decided on."""
        return self.ending_seeds[: self.profile.dose_seeds]

    @property
    def transfer_seeds(self) -> list[int]:
        """The seeds of the sources of notebook 07."""
        return self.seeds_of(self.profile.transfer_seeds)

    def training(
        self, seed: int, task: str | None = None, *, small: bool = False, **changes: Any
    ) -> TrainUnit:
        """Return a multi-task training; with `task`, one on it alone, for as many steps as it gets there.

        small: the encoder, steps, learning rate and evaluation of notebooks 04 to 07, for fewer `tasks` with fewer
            steps in proportion, so that every task gets as many. changes: other fields of the unit.
        """
        p = self.profile
        shared = {k: getattr(p, k) for k in FineTuning.model_fields} | {"seed": seed}
        if small:
            steps = p.small_steps * len(changes.get("tasks", p.tasks)) // len(p.tasks)
            encoder = changes.get("encoder", p.small_encoder)
            lr = p.encoder_lrs.get(encoder, p.small_lr)
            shared |= {"encoder": encoder, "steps": steps, "lr": lr, "curve_points": 1}
            shared |= {"sampling": p.small_sampling, "eval_examples": p.small_eval_examples}
        shared |= changes
        if task is not None:
            names = shared["tasks"]
            sizes = tuple(len(cached_task(t).train) for t in names)
            turns = _turns(sizes, shared["steps"], shared["sampling"], p.epochs, seed)
            shared |= {"tasks": (task,), "steps": max(1, turns[names.index(task)])}
        return TrainUnit(**shared)

    def units(self, seed: int) -> Chain:
        """Return the main model of a seed: its training, importance and pruning."""
        p = self.profile
        return chain(
            self.training(seed), p.importance_examples, p.fractions, p.controls, p.lesioned_on
        )

    def small_units(self, seed: int, **changes: Any) -> Chain:
        """Return training, importance and pruning of a model at the scale of notebooks 04 to 07."""
        p = self.profile
        model = self.training(seed, small=True, **changes)
        return chain(model, p.small_examples, p.small_fractions, p.controls, p.lesioned_on)

    def words(self) -> WordsUnit:
        """Return the bag-of-words baseline."""
        return WordsUnit(**self.data.model_dump())

    def lesion(self, seed: int) -> LesionUnit:
        """Return the unit of every head alone of a main model."""
        p = self.profile
        return LesionUnit(model=self.training(seed), on=p.lesioned_on, examples=p.lesion_examples)

    def pattern(self, seed: int) -> PatternUnit:
        """Return the unit of what the heads of a main model attend to."""
        return PatternUnit(model=self.training(seed), examples=TEXTS, longest=LONGEST)

    def head_units(self, seed: int) -> list[Unit]:
        """Return what is looked at head by head of a main model: lesions of the first few, texts of the first."""
        alone = [self.lesion(seed)] if seed in self.lesion_seeds else []
        return [*alone, *([self.pattern(seed)] if seed == self.seeds[0] else [])]

    def encoder_units(self, encoder: str) -> list[Chain]:
        """Return training, importance and pruning of one encoder, per seed.

        The main models of notebook 03 serve here as well where they are trained as the others are.
        """
        p = self.profile
        alike = (p.steps, p.sampling) == (p.small_steps, p.small_sampling)
        if encoder == p.encoder and alike and encoder not in (*p.encoder_lrs, *p.encoder_seeds_of):
            return [self.units(s) for s in self.seeds]
        seeds = self.seeds_of(p.encoder_seeds_of.get(encoder, p.encoder_seeds))
        return [self.small_units(s, encoder=encoder) for s in seeds]

    def selection(self) -> SelectionUnit:
        """Return one small model's heads, chosen in several ways."""
        p = self.profile
        return SelectionUnit(
            model=self.training(self.seeds[0], small=True),
            selections=SELECTIONS,
            examples=p.selection_examples,
            fraction=max(p.small_fractions),
            randoms=p.selection_randoms,
        )

    def similarity(self) -> SimilarityUnit:
        """Return the similarity of all tasks, from models trained on one task as long as on it in a pair."""
        p = self.profile
        steps = p.small_steps // len(p.tasks)
        model = self.training(self.seeds[0], small=True, tasks=self.pair_tasks, steps=steps)
        return SimilarityUnit(**model.model_dump(), examples=p.small_examples)

    def pair_units(self) -> dict[tuple[str, str], list[Chain]]:
        """Return, for every pair of tasks, training, importance and pruning of a model on both, per seed."""
        seeds = self.seeds_of(self.profile.pair_seeds)
        return {
            pair: [self.small_units(s, tasks=pair) for s in seeds]
            for pair in combinations(self.pair_tasks, 2)
        }

    def endings(self, *, whole: bool = True) -> dict[str, dict[str, Any] | None]:
        """Return every ending by name, as a unit describes it; None is plain training.

        whole: with all that the profile names, or those alone that claims are decided on.
        """
        p = self.profile
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
        mixed = not self.left_out()
        chosen = [
            n for n in others if n in p.other_endings and (mixed or others[n]["kind"] != "PCGrad")
        ]
        return {
            **deciding,
            **{name: others[name] for name in chosen},
            **{f"IAT, alpha {a:g}": iat | {"alpha": a} for a in p.other_alphas},
            **{at_dose(TREATED, d): iat | {"delta": d} for d in (*p.other_deltas, *p.doses)},
            **{at_dose(RANDOM, d): iat | {"delta": d, "heads": "random"} for d in p.doses},
        }

    def left_out(self) -> str:
        """Say why there are no endings that mix tasks in a batch, or nothing ("") where there are."""
        tasks, batch = len(self.ending_tasks), self.profile.batch_size
        return (
            f"no PCGrad: a batch of {batch} has no example of some of {tasks} tasks"
            if batch < tasks
            else ""
        )

    def endings_unit(self, seed: int) -> EndingsUnit:
        """Return one trunk and all its endings; for the seeds of notebook 07, with what is learned from them."""
        p = self.profile
        endings = self.endings(whole=seed in self.dose_seeds)
        doses = [
            name
            for d in p.doses
            for name in (at_dose(TREATED, d), at_dose(RANDOM, d))
            if name in endings
        ]
        transferred = seed in self.transfer_seeds and not set(p.transfer_targets) & set(
            self.ending_tasks
        )
        before = (TRUNK,) if seed in self.dose_seeds else ()
        return self._endings(
            seed, self.ending_tasks, endings, (*before, PLAIN, TREATED, RANDOM, *doses), transferred
        )

    def floor_unit(self, seed: int, floor: float) -> EndingsUnit:
        """Return a trunk whose learning rate does not fall below a floor, and its endings of `floor_delta`."""
        iat = {"kind": "IAT", "delta": self.profile.floor_delta, "alpha": self.profile.alpha}
        endings = {PLAIN: None, TREATED: iat, RANDOM: iat | {"heads": "random"}}
        return self._endings(
            seed, self.ending_tasks, endings, tuple(endings), False, lr_floor=floor
        )

    def source_unit(self, seed: int) -> EndingsUnit:
        """Return the unit that transfer begins with: 06's endings, or others if a target is among their tasks."""
        if self.source_tasks == self.ending_tasks:
            return self.endings_unit(seed)
        endings = {name: self.endings()[name] for name in (PLAIN, TREATED, RANDOM)}
        return self._endings(seed, self.source_tasks, endings, (), True)

    def single_unit(self, seed: int, task: str) -> TrainUnit:
        """Return a task of 06 trained alone, for as many steps as it gets on the trunk and its plain ending."""
        examples = self.profile.ending_examples
        return self.training(
            seed, task, small=True, tasks=self.ending_tasks, eval_examples=examples
        )

    def _endings(
        self,
        seed: int,
        tasks: tuple[str, ...],
        endings: dict[str, dict[str, Any] | None],
        pruned: tuple[str, ...],
        transferred: bool,
        **changes: Any,
    ) -> EndingsUnit:
        """Return a trunk on some tasks with some endings."""
        p = self.profile
        settings = self.training(
            seed, small=True, tasks=tasks, eval_examples=p.ending_examples, **changes
        ).model_dump()
        settings |= {
            "pruned": pruned,
            "fractions": p.ending_fractions or (p.alpha,),
            "examples": p.small_examples,
        }
        settings |= {"prune_examples": p.prune_examples or p.eval_examples, "on": p.lesioned_on}
        return EndingsUnit(
            **settings, endings=endings, targets=self.targets() if transferred else None
        )

    def targets(self) -> Targets:
        """Return what is learned from the endings."""
        p = self.profile
        bounds = [subset_sizes(cached_task(name)) for name in p.transfer_targets]
        suiting = (
            n
            for n in p.transfer_sizes
            if n is None or all(least <= n <= most for least, most in bounds)
        )
        return Targets(
            tasks=p.transfer_targets,
            sources=(PLAIN, TREATED, RANDOM),
            sizes=tuple(suiting) or (None,),
            eval_examples=p.ending_examples,
            passes=p.transfer_passes,
            min_steps=p.transfer_min_steps,
            max_steps=p.transfer_max_steps,
        )

    def no_transfer(self) -> str:
        """Say why the tasks leave nothing to transfer from, or nothing ("") if they do."""
        if len(self.source_tasks) >= 2:
            return ""
        without = " and ".join(self.profile.transfer_targets)
        return f"without {without} there are fewer than two tasks to train a source on"

    def plan(self, notebook: str) -> list[Unit]:
        """Return all units behind a notebook (by its number or name), those they depend on first."""
        plan = PLANS.get(str(notebook)[:2])
        return distinct(plan(self)) if plan else []


def at_dose(name: str, delta: float) -> str:
    """Return the name of an ending that begins at another delta than the one that decides."""
    return f"{name}, delta {delta:g}"


@cache
def _turns(
    sizes: tuple[int, ...], steps: int, sampling: str, epochs: int, seed: int
) -> Counter[int]:
    """Return how many of a training's steps each task has, by its index."""
    return Counter(task_order(list(sizes), steps, sampling, epochs, seed))


def _multitask(d: Design) -> list[Unit]:
    single = [d.training(s, task) for s in d.alone_seeds for task in d.profile.tasks]
    return [d.words(), *(d.training(s) for s in d.seeds), *single]


def _importance(d: Design) -> list[Unit]:
    units = [d.units(s) for s in d.seeds]
    return [
        *(u.train for u in units),
        *(u.importance for u in units),
        *map(d.lesion, d.lesion_seeds),
    ]


def _pruning(d: Design) -> list[Unit]:
    # seed by seed: a run that is cut short has whole seeds, and no model must be trained again for what is missing
    return [unit for s in d.seeds for unit in d.units(s)]


def _models(d: Design) -> list[Unit]:
    chains = [units for encoder in d.profile.encoders for units in d.encoder_units(encoder)]
    return [*(unit for units in chains for unit in units), d.selection().model, d.selection()]


def _similarity(d: Design) -> list[Unit]:
    chains = [units for pair in d.pair_units().values() for units in pair]
    return [d.similarity(), *(unit for units in chains for unit in units)]


def _iat(d: Design) -> list[Unit]:
    floors = [d.floor_unit(s, floor) for s in d.dose_seeds for floor in d.profile.dose_floors]
    single = [
        d.single_unit(s, t) for s in d.ending_seeds[: d.profile.alone_seeds] for t in d.ending_tasks
    ]
    return [*map(d.endings_unit, d.ending_seeds), *floors, *single]


def _transfer(d: Design) -> list[Unit]:
    return [] if d.no_transfer() else [d.source_unit(s) for s in d.transfer_seeds]


def _claims(d: Design) -> list[Unit]:
    return [unit for number in range(1, 8) for unit in d.plan(f"{number:02d}")]


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
