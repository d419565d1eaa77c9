"""Notebook 07: claim C5, is an encoder that went through IAT a better start for a new task?"""

from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field

from fslib.data.tasks import Task
from fslib.endings import Ending
from fslib.errors import FslibError
from fslib.evaluation import evaluate
from fslib.heads import checked_fractions
from fslib.iat import IAT
from fslib.intervals import Measure, mean_of, score_measure
from fslib.progress import hidden
from fslib.scoring import chance_level
from fslib.study.evidence import NOT_TESTABLE, Evidence, Part, above_best_constant, differences, halved, score_half
from fslib.study.fingerprints import cached_task
from fslib.study.plots import COLOURS, GREY, MARKERS, panels, percent, styled
from fslib.study.records import Result, Store, Unit
from fslib.study.study import Study, plans
from fslib.study.units import SeededFineTuning, in_bytes
from fslib.training import branch
from fslib.transfer import PARTS, transfer

SOURCES = ("pre-trained", "multi-task", "IAT")
DIFFERENCE = ("minus multi-task", "diff low", "diff high")
COLUMNS = ("source", "size", "seeds", "score", "low", "high", *DIFFERENCE, "part")


class TransferUnit(SeededFineTuning, Unit):
    """From a source trained on `tasks`, plainly and with IAT, and from the encoder as it was, to a `target`."""

    kind: ClassVar[str] = "transfer"
    target: str
    sizes: tuple[int | None, ...] = Field(min_length=1)
    iat: dict[str, Any]
    passes: int = Field(ge=1)
    min_steps: int = Field(ge=1)
    max_steps: int = Field(ge=1)

    def task_names(self) -> list[str]:
        """Name the source's tasks and the target."""
        return [*self.tasks, self.target]

    def target_steps(self, size: int) -> int:
        """Return the steps for a training set of a size: `passes` over it, within the bounds."""
        return min(self.max_steps, max(self.min_steps, self.passes * size // self.batch_size))

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads do not allow."""
        super().check()
        checked_fractions([self.iat["alpha"]], self.shape(), what="alpha")

    def compute(self, store: Store) -> Result:
        """Learn the target at every size, from every source, in both ways."""
        tasks, target = self.load(), cached_task(self.target)
        if self.target in tasks:
            raise FslibError(f"target {self.target!r} is one of the source's tasks {list(tasks)}: leave it out of them")
        target = target.limited(eval=self.eval_examples)
        model = self.new_model(tasks)
        arrays: dict[str, np.ndarray] = {}
        steps: dict[str, int] = {}

        def learn(source: str) -> None:
            for size in self.sizes:
                n = len(target.train) if size is None else size
                steps[str(n)] = self.target_steps(n)
                options: dict[str, Any] = {"size": size, "seed": self.seed, "batch_size": self.batch_size}
                for part in PARTS:
                    with hidden():
                        learned = transfer(model, target, part=part, steps=steps[str(n)], lr=self.lr, **options)
                    arrays[f"predictions/{source}/{part}/{n}"] = in_bytes(learned.score.predictions)

        learn("pre-trained")
        endings: dict[str, Ending | None] = {"IAT": IAT(**self.iat), "multi-task": None}
        for name, _ in branch(model, tasks, endings, **self.options()):
            scores = evaluate(model, tasks)
            arrays |= {f"source/{name}/{t}": in_bytes(s.predictions) for t, s in scores.items()}
            learn(name)
        return Result({"steps": steps, "metric": target.metric, "parts": list(PARTS)}, arrays)


def seeds(study: Study) -> list[int]:
    """Return the seeds of the sources."""
    return study.seeds_of(study.profile.transfer_seeds)


def source_tasks(study: Study) -> tuple[str, ...]:
    """Return the tasks that sources are trained on: all but the target."""
    return tuple(t for t in study.profile.tasks if t != study.profile.transfer_target.lower())


def not_testable(study: Study) -> str:
    """Say why the study's tasks leave nothing to transfer from, or nothing ("") if they do."""
    if len(source_tasks(study)) >= 2:
        return ""
    return f"without {study.profile.transfer_target} there are fewer than two tasks to train a source on"


def sizes(study: Study) -> tuple[int | None, ...]:
    """Return the target's training sizes: those of the profile that it has examples for, at least one per class."""
    labels = target(study).train.labels
    classes = 1 if target(study).is_regression else len(np.unique(labels))
    wanted = study.profile.transfer_sizes
    return tuple(n for n in wanted if n is None or max(2, classes) <= n <= len(labels)) or (None,)


def transfer_unit(study: Study, seed: int) -> TransferUnit:
    """Return the learning curves of the target from all sources, for one seed."""
    p = study.profile
    if reason := not_testable(study):
        raise FslibError(f"transfer_target {p.transfer_target!r}: {reason}")
    options = {k: getattr(p, f"transfer_{k}") for k in ("target", "passes", "min_steps", "max_steps")}
    options["sizes"] = sizes(study)
    settings = study.training(seed, small=True, tasks=source_tasks(study), eval_examples=p.ending_examples).model_dump()
    return TransferUnit(**settings, **options, iat={"delta": p.delta, "alpha": p.alpha})


@plans("07")
def plan(study: Study) -> list[Unit]:
    """Return one unit per seed, or none if there is nothing to transfer from."""
    return [] if not_testable(study) else [transfer_unit(study, s) for s in seeds(study)]


def target(study: Study) -> Task:
    """Return the task that no source has seen."""
    return cached_task(study.profile.transfer_target).limited(eval=study.profile.ending_examples)


def chance(study: Study) -> float:
    """Return the score of the best constant answer on the target, on the half that is scored."""
    return chance_level(target(study).metric, halved(target(study).eval.labels, score_half))


def _predictions(study: Study) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return {part: {source: {size: (seeds, n)}}} of the target's evaluation examples."""
    records = [study.store.get(transfer_unit(study, s)) for s in seeds(study)]
    sizes, parts = records[0].result["steps"], records[0].result["parts"]

    def stacked(part: str, source: str) -> dict[str, np.ndarray]:
        return {n: np.stack([r.arrays[f"predictions/{source}/{part}/{n}"] for r in records]) for n in sizes}

    return {part: {source: stacked(part, source) for source in SOURCES} for part in parts}


def _measures(study: Study) -> dict[str, dict[str, dict[str, Measure]]]:
    """Return {part: {source: {size: score of every seed's model}}} on the half that is scored."""
    task = target(study)
    labels = halved(task.eval.labels, score_half)
    return {
        part: {
            source: {
                n: score_measure(task.name, task.metric, halved(p, score_half), labels) for n, p in by_size.items()
            }
            for source, by_size in by_source.items()
        }
        for part, by_source in _predictions(study).items()
    }


def learning_curves(study: Study) -> pd.DataFrame:
    """Return one row per source, part and target size: score, and its difference from the multi-task source.

    Without a row if there is nothing to transfer from.
    """
    if not_testable(study):
        return pd.DataFrame(columns=COLUMNS)
    frames = [
        differences(measures, "multi-task", ("source", "size")).assign(part=part)
        for part, measures in _measures(study).items()
    ]
    table = pd.concat(frames, ignore_index=True)
    table.insert(2, "seeds", len(seeds(study)))
    return table


def evidence(study: Study) -> Evidence:
    """Return what there is on C5: the full model from IAT minus from plain multi-task training, mean over sizes."""
    if reason := not_testable(study):
        return Evidence("C5", (), reason)
    curves = _measures(study)["full"]
    means = {source: mean_of(list(by_size.values())).scaled(100.0) for source, by_size in curves.items()}
    part = Part.of("IAT minus plain multi-task training", means["IAT"] - means["multi-task"])
    return Evidence("C5", (part,), _floor(study) or "no source with random heads stands beside IAT's")


def _floor(study: Study) -> str:
    """Say at which sizes a source is not above the best constant answer, on the half that no score is computed on."""
    task, low = target(study), []
    for source, by_size in _predictions(study)["full"].items():
        if source != "pre-trained":
            above = {n: above_best_constant(task.name, task.metric, p, task.eval.labels) for n, p in by_size.items()}
            low += [n for n, interval in above.items() if interval.low <= 0]
    sizes = ", ".join(dict.fromkeys(low))
    return f"with {sizes} examples a source is not above the best constant answer" if low else ""


@styled
def plot_learning_curves(table: pd.DataFrame, chance: float) -> Figure:
    """Draw the score on the target against its training examples, one panel per part trained, one line per source."""
    parts = list(dict.fromkeys(table["part"]))
    if not parts:
        figure, (ax,) = panels(1, 1.0)
        ax.set_axis_off()
        ax.text(0.5, 0.5, NOT_TESTABLE, ha="center", va="center")
        return figure
    figure, axes = panels(len(parts), 2.7, sharey=True)
    sources = list(dict.fromkeys(table["source"]))
    for ax, part in zip(axes, parts, strict=True):
        for i, source in enumerate(sources):
            rows = table[(table["part"] == part) & (table["source"] == source) & (table["size"] != "mean")]
            x = np.array([float(s) for s in rows["size"]]) * (1 + 0.05 * (i - 1))  # side by side, not on top
            ax.errorbar(
                x,
                rows["score"],
                yerr=[rows["score"] - rows["low"], rows["high"] - rows["score"]],
                color=GREY if source == "pre-trained" else COLOURS[i - 1],
                marker=MARKERS[i],
                capsize=2,
                label=source,
            )
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set(title=f"trained on the target: {part}" + (" model" if part == "full" else " only"))
        ax.set(xlabel="training examples of the target")
        percent(ax)
    axes[0].set_ylabel("score on the target (%)")
    axes[0].legend()
    return figure
