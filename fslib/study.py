"""Profiles, and `Study`: what a notebook asks for results.

A profile fixes everything that a run can vary. A study is a profile, a first seed and a results folder; it
turns them into units (`plan`) and hands out their records in a form that a notebook can use.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field

from fslib.errors import FslibError, unknown
from fslib.experiments import (
    DataConfig,
    ImportanceConfig,
    PruneConfig,
    Store,
    TaskNames,
    TrainConfig,
    TrainingSettings,
    Unit,
    cached_task,
    checked,
    read_contributions,
    read_iap,
)
from fslib.importance import Contributions
from fslib.pruning import IAP
from fslib.results import ROOT, Record, results_root, save_figure, save_table
from fslib.sampling import SAMPLINGS, task_order
from fslib.tasks import Task


class Profile(TrainingSettings):
    """Everything that a run can vary; `fslib run --set key=value` changes a field."""

    tasks: TaskNames = ("bbc", "bbc-pair", "bbc-headline", "bbc-shift")
    seeds: int = Field(2, ge=1)
    importance_examples: int = Field(ge=4)
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    controls: int = Field(ge=1)
    draws: int = Field(2000, ge=50)


PROFILES: dict[str, dict[str, Any]] = {
    # Small enough to run every notebook from scratch inside the tests; its numbers mean nothing.
    "smoke": {
        "encoder": "tiny-random",
        "steps": 40,
        "lr": 1e-3,
        "eval_examples": 48,
        "curve_points": 4,
        "curve_examples": 32,
        "importance_examples": 32,
        "controls": 2,
        "draws": 200,
    },
    # A real pre-trained encoder on real text, in minutes on a laptop's processor. The default.
    "mini": {
        "encoder": "minilm-l6",
        "steps": 600,
        "lr": 1e-4,
        "eval_examples": 200,
        "curve_points": 6,
        "curve_examples": 100,
        "importance_examples": 512,
        "controls": 2,
    },
}


class Study:
    """One profile's results.

    profile: smoke or mini. seed: the first of the profile's seeds. overrides: {field: value} of the profile;
    an overridden profile keeps its results in a folder of its own. results: folder, default `results_root()`.
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
        if profile not in PROFILES:
            raise unknown("profile", profile, PROFILES)
        if seed < 0:
            raise FslibError(f"seed {seed}: give 0 or more")
        changes = dict(overrides or {})
        self.profile: Profile = checked(Profile, PROFILES[profile] | changes, "setting")
        if self.profile.sampling not in SAMPLINGS:
            raise unknown("sampling", self.profile.sampling, SAMPLINGS)
        if len(self.profile.tasks) < 2:
            raise FslibError(f"tasks={list(self.profile.tasks)}: a multi-task study needs at least two tasks")
        if repeated := {t for t in self.profile.tasks if self.profile.tasks.count(t) > 1}:
            raise FslibError(f"two tasks are called {repeated.pop()!r}: rename one")
        for fraction in self.profile.fractions:
            if not 0 < fraction <= 1:
                raise FslibError(f"fraction {fraction} is outside (0, 1]: 0.3 means the top 30 % of all heads")
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

    def training(self, seed: int, task: str | None = None) -> TrainConfig:
        """Multi-task training; with `task`, training on it alone for as many steps as it gets in the multi-task run."""
        p = self.profile
        names, steps = p.tasks, p.steps
        if task is not None:
            sizes = [len(cached_task(t).train) for t in names]
            order = task_order(sizes, steps, p.sampling, p.epochs, seed)
            names, steps = (task,), max(1, order.count(names.index(task)))
        shared = {k: getattr(p, k) for k in TrainingSettings.model_fields}
        return TrainConfig(**shared | {"tasks": names, "steps": steps, "seed": seed})

    def unit(self, kind: str, seed: int, task: str | None = None) -> Unit:
        """The unit of a kind for one seed."""
        if kind == "words":
            return Unit("words", self.data)
        train = self.training(seed, task)
        if kind == "train":
            return Unit("train", train)
        scored = ImportanceConfig(model=train, examples=self.profile.importance_examples)
        if kind == "importance":
            return Unit("importance", scored)
        if kind == "prune":
            return Unit(
                "prune",
                PruneConfig(importance=scored, fractions=self.profile.fractions, controls=self.profile.controls),
            )
        raise unknown("kind of unit", kind, ("words", "train", "importance", "prune"))

    def plan(self, notebook: str) -> list[Unit]:
        """All units behind a notebook (by its number), those they depend on first."""
        seeds = self.seeds
        multi = [self.unit("train", s) for s in seeds]
        if notebook[:2] == "01":
            single = [self.unit("train", s, t) for s in seeds for t in self.profile.tasks]
            return [self.unit("words", seeds[0]), *multi, *single]
        if notebook[:2] == "02":
            return multi + [self.unit("importance", s) for s in seeds]
        if notebook[:2] == "03":
            return self.plan("02") + [self.unit("prune", s) for s in seeds]
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
            save_figure(ROOT / "figures", feature, figure, caption, command)
        display(figure, Markdown(f"*{caption}*"))

    def table(self, name: str, table: pd.DataFrame, digits: int = 3, *, show: pd.Series | None = None) -> None:
        """Save a table as CSV and Markdown under the study's folder, and show it rounded (`show`: only these rows)."""
        from IPython.display import HTML, display

        rounded = save_table(self.folder, name, table, digits)
        with pd.option_context("display.max_colwidth", None):
            display(HTML((rounded if show is None else rounded[show]).to_html(index=False, border=0)))
