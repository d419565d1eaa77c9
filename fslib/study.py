"""`Study`: what a notebook asks for results.

A study is a profile, a first seed and a results folder; it turns them into units (`plan`) and hands out their
records in a form that a notebook can use.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fslib.comparisons import EndingsConfig, SelectionConfig, SimilarityConfig, TransferConfig
from fslib.data.batches import task_order
from fslib.data.tasks import Task
from fslib.dissociation import IAP
from fslib.errors import FslibError, unknown
from fslib.experiments import (
    DataConfig,
    ImportanceConfig,
    PruneConfig,
    Store,
    TrainConfig,
    TrainingSettings,
    Unit,
    cached_task,
    distinct,
    read_contributions,
    read_iap,
)
from fslib.importance import Contributions
from fslib.profiles import make_profile
from fslib.results import ROOT, Record, results_root, save_figure, save_table, write_bytes

# Ways to choose heads: the first is the default. Michel et al. divide by layer norms; the paper's code does not.
SELECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient, layer-normalized": {"normalize": "layer"},
    "gradient, by example": {"reduction": "example"},
    "ablation": {"estimator": "ablation"},
    "integrated": {"estimator": "integrated"},
    "norm": {"estimator": "norm"},
}


def measured(train: TrainConfig, examples: int, fractions: tuple[float, ...], controls: int) -> dict[str, Unit]:
    """A multi-task training and what is measured on its model: {"train", "importance", "prune"}."""
    scored = ImportanceConfig(model=train, examples=examples)
    prune = PruneConfig(importance=scored, fractions=fractions, controls=controls)
    return {"train": Unit("train", train), "importance": Unit("importance", scored), "prune": Unit("prune", prune)}


class Study:
    """One profile's results.

    profile: smoke, mini, glue-mini or paper. seed: the first of the profile's seeds. overrides: {field: value} of the
    profile; an overridden profile keeps its results in a folder of its own. results: default `results_root()`.
    Raises FslibError for an unknown profile, field, task, sampling or a value out of range.
    """

    def __init__(
        self,
        profile: str = "mini",
        *,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        results: str | Path | None = None,
    ) -> None:
        if seed < 0:
            raise FslibError(f"seed {seed}: give 0 or more")
        changes = dict(overrides or {})
        self.profile = make_profile(profile, changes)
        self.name, self.seed, self.overrides = profile, seed, changes
        suffix = "".join(f"+{k}={v}" for k, v in sorted(changes.items())) + (f"+seed={seed}" if seed else "")
        self.folder = Path(results or results_root()) / (profile + re.sub(r"[^\w.+=-]+", "_", suffix))
        self.store = Store(self.folder)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The study's tasks, with as many evaluation examples as the profile takes."""
        return self.data.load()

    @cached_property
    def data(self) -> DataConfig:
        return DataConfig(tasks=self.profile.tasks, eval_examples=self.profile.eval_examples)

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.profile.seeds))

    def training(self, seed: int, task: str | None = None, *, small: bool = False, **changes: Any) -> TrainConfig:
        """Multi-task training; with `task`, training on it alone for as many steps as it gets in the multi-task run.

        small: the encoder, steps, learning rate and evaluation of notebooks 04 to 07, for fewer `tasks` with fewer
            steps in proportion, so that every task gets as many. changes: other fields of the config.
        """
        p = self.profile
        shared = {k: getattr(p, k) for k in TrainingSettings.model_fields} | {"seed": seed}
        if small:
            steps = p.small_steps * len(changes.get("tasks", p.tasks)) // len(p.tasks)
            shared |= {"encoder": p.small_encoder, "steps": steps, "lr": p.small_lr, "curve_points": 1}
            shared |= {"sampling": p.small_sampling}
            shared |= {"eval_examples": p.small_eval_examples}
        shared |= changes
        if task is not None:
            names = shared["tasks"]
            sizes = [len(cached_task(t).train) for t in names]
            order = task_order(sizes, shared["steps"], shared["sampling"], p.epochs, seed)
            shared |= {"tasks": (task,), "steps": max(1, order.count(names.index(task)))}
        return TrainConfig(**shared)

    def unit(self, kind: str, seed: int, task: str | None = None) -> Unit:
        """The unit of a kind for one seed."""
        if kind == "words":
            return Unit("words", self.data)
        train, p = self.training(seed, task), self.profile
        units = measured(train, p.importance_examples, p.fractions, p.controls)
        if kind not in units:
            raise unknown("kind of unit", kind, ("words", *units))
        return units[kind]

    def small(self, encoder: str | None = None, tasks: tuple[str, ...] | None = None) -> dict[str, Unit]:
        """Training, importance and pruning of one encoder on some tasks, at the scale of notebooks 04 to 07."""
        p = self.profile
        train = self.training(self.seed, small=True, encoder=encoder or p.small_encoder, tasks=tasks or p.tasks)
        return measured(train, p.small_examples, p.small_fractions, p.controls)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs of the profile's tasks."""
        return list(combinations(self.profile.tasks, 2))

    def selection_unit(self) -> Unit:
        """One model's heads, chosen in several ways."""
        p = self.profile
        model = self.training(self.seed, small=True)
        shared: dict[str, Any] = {"model": model, "examples": p.selection_examples, "randoms": p.selection_randoms}
        return Unit("selection", SelectionConfig(**shared, selections=SELECTIONS, fraction=max(p.small_fractions)))

    def similarity_unit(self) -> Unit:
        """Similarity of all pairs of tasks, from models trained on one task as long as on it in a pair."""
        p = self.profile
        steps = p.small_steps // len(p.tasks)
        settings = self.training(self.seed, small=True, steps=steps).model_dump()
        return Unit("similarity", SimilarityConfig(**settings, examples=p.small_examples))

    @property
    def ending_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.profile.ending_seeds))

    def endings_unit(self, seed: int) -> Unit:
        """One trunk and all endings."""
        p = self.profile
        iat = {"kind": "IAT", "delta": p.delta, "alpha": p.alpha}
        endings: dict[str, dict[str, Any] | None] = {
            "trunk": {"kind": "Stop", "delta": p.delta},
            "IAT": iat,
            "plain": None,
            "IAT, random heads": iat | {"heads": "random"},
            "IAT, least heads": iat | {"heads": "least"},
            "PCGrad": {"kind": "PCGrad", "delta": p.delta},
            "mixed batches": {"kind": "PCGrad", "delta": p.delta, "project": False},
            "IAT, others frozen": iat | {"others": "freeze"},
            "IAT, leaky": iat | {"strict": False},
            **{f"IAT, alpha {a:g}": iat | {"alpha": a} for a in p.other_alphas},
            **{f"IAT, delta {d:g}": iat | {"delta": d} for d in p.other_deltas},
        }
        settings = self.training(seed, small=True).model_dump() | {"eval_examples": p.ending_examples}
        config = EndingsConfig(
            **settings,
            endings=endings,
            pruned=("trunk", "plain", "IAT", "IAT, random heads"),
            fractions=(p.alpha,),
            examples=p.small_examples,
            prune_examples=p.eval_examples,
        )
        return Unit("endings", config)

    def single_unit(self, seed: int, task: str) -> Unit:
        """A task alone, for as many steps as it gets on the trunk and its plain ending."""
        changes = {"small": True, "eval_examples": self.profile.ending_examples}
        return Unit("train", self.training(seed, task, **changes))  # type: ignore[arg-type]

    @property
    def transfer_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.profile.transfer_seeds))

    def transfer_unit(self, seed: int) -> Unit:
        """Learning curves of the target from all sources, for one seed."""
        p = self.profile
        sources = tuple(t for t in p.tasks if t != p.transfer_target)
        if len(sources) < 2:
            raise FslibError(f"transfer_target {p.transfer_target!r} leaves fewer than two tasks to train a source on")
        options = {k: getattr(p, f"transfer_{k}") for k in ("target", "sizes", "passes", "min_steps", "max_steps")}
        settings = self.training(seed, small=True, tasks=sources).model_dump() | {"eval_examples": p.ending_examples}
        iat = {"delta": p.delta, "alpha": p.alpha}
        return Unit("transfer", TransferConfig(**settings, **options, iat=iat))

    def plan(self, notebook: str) -> list[Unit]:
        """All units behind a notebook (by its number), those they depend on first."""
        seeds, number = self.seeds, notebook[:2]
        if number == "01":
            single = [self.unit("train", s, t) for s in seeds for t in self.profile.tasks]
            return [self.unit("words", seeds[0]), *(self.unit("train", s) for s in seeds), *single]
        if number == "02":
            return [self.unit(kind, s) for kind in ("train", "importance") for s in seeds]
        if number == "03":
            return self.plan("02") + [self.unit("prune", s) for s in seeds]
        if number == "04":
            models = [self.small(encoder) for encoder in (*self.profile.encoders, self.profile.small_encoder)]
            return [*distinct(unit for model in models for unit in model.values()), self.selection_unit()]
        if number == "05":
            return [self.similarity_unit(), *(u for pair in self.pairs for u in self.small(tasks=pair).values())]
        if number == "06":
            single = [self.single_unit(s, t) for s in self.ending_seeds for t in self.profile.tasks]
            return [*(self.endings_unit(s) for s in self.ending_seeds), *single]
        if number == "07":
            return [self.transfer_unit(s) for s in self.transfer_seeds]
        if number == "08":
            return distinct(unit for i in range(1, 8) for unit in self.plan(f"{i:02d}"))
        return []

    def multitask(self) -> list[Record]:
        """Training records of the multi-task models, one per seed."""
        return [self.store.get(self.unit("train", s)) for s in self.seeds]

    def single(self, task: str) -> list[Record]:
        """Training records of a task trained alone, one per seed."""
        return [self.store.get(self.unit("train", s, task)) for s in self.seeds]

    def words(self) -> Record:
        """The bag-of-words baseline."""
        return self.store.get(self.unit("words", self.seeds[0]))

    def contributions(self) -> list[dict[str, Contributions]]:
        """Per-example importance, per seed and task."""
        records = [self.store.get(self.unit("importance", s)) for s in self.seeds]
        return [{t: read_contributions(record, t) for t in self.profile.tasks} for record in records]

    def iap(self) -> IAP:
        """Pruning results over all seeds."""
        return IAP.over_seeds([read_iap(self.store.get(self.unit("prune", s))) for s in self.seeds])

    @property
    def is_plain(self) -> bool:
        """Is this the default profile without other settings, which the committed notebooks show?"""
        return self.name == "mini" and self.seed == 0 and not self.overrides

    def figure(self, name: str, figure: Figure, caption: str, *, feature: str | None = None) -> None:
        """Save a figure as PNG and SVG under the study's folder, and show it with its caption.

        feature: of the reference results, also keep it in the repository's figures/ under this name.
        """
        from IPython.display import Markdown, display  # only notebooks show figures

        command = f"fslib run {name[:2]} --profile {self.name}"
        save_figure(self.folder / "figures", name, figure, caption, command)
        if feature and self.is_plain and self.folder.parent.resolve() == ROOT / "results":
            for kind in ("png", "svg"):  # copied: drawn again, a layout may differ in the last digit
                drawn = (self.folder / "figures" / f"{name}.{kind}").read_bytes()
                write_bytes(ROOT / "figures" / f"{feature}.{kind}", drawn)
        display(figure, Markdown(f"*{caption}*"))

    def table(self, name: str, table: pd.DataFrame, digits: int = 3, *, show: pd.Series | None = None) -> None:
        """Save a table as CSV and Markdown under the study's folder, and show it rounded (`show`: only these rows)."""
        from IPython.display import HTML, display

        rounded = save_table(self.folder, name, table, digits)
        with pd.option_context("display.max_colwidth", None):
            display(HTML((rounded if show is None else rounded[show]).to_html(index=False, border=0)))
