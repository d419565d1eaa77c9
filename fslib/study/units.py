"""The units that several questions share: train a model, score its heads, prune them."""

import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from fslib.data.batches import SAMPLINGS
from fslib.data.loading import one_case
from fslib.data.tasks import Task
from fslib.dissociation import IAP, Unlesioned
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate
from fslib.heads import checked_fractions
from fslib.importance import Contributions, contributions
from fslib.model import footprint
from fslib.model.devices import fixed_threads, from_first, is_first, processes, wait_for_all
from fslib.model.encoders import ENCODERS, PRETRAINED
from fslib.model.multitask import MultiTaskModel
from fslib.pruning import prune_important_heads
from fslib.study.config import Config
from fslib.study.evidence import gate_half, score_half
from fslib.study.files import writing
from fslib.study.fingerprints import cached_task
from fslib.study.records import Record, Result, Store, Unit
from fslib.training import train


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if os.sep in name:
            raise ValueError(f"{name} is a path; point FSLIB_DATA at the folder that holds it, and give its name")
    return tuple(one_case(name) for name in names)


def _one_path(name: str) -> str:
    if name not in (*ENCODERS, *PRETRAINED):
        with suppress(OSError):  # of a name too long for a path
            return str(Path(name).resolve()) if Path(name).is_dir() else name
    return name


# As the tasks call themselves, so that one piece of work has one key wherever the data lie.
TaskNames = Annotated[tuple[str, ...], AfterValidator(_plain_names), Field(min_length=1)]
Steps = Annotated[int, Field(le=10_000_000)]  # the task of every step is drawn before the first
LesionedOn = Literal["all", "scored"]  # evaluation examples: all, or the half that scores are from
# A local folder by its whole path, so that it has one key, and is one folder, wherever a process works.
EncoderName = Annotated[str, Field(min_length=1), AfterValidator(_one_path)]


class Data(Config):
    """Tasks by name, and how many examples are evaluated (None: all)."""

    tasks: TaskNames
    eval_examples: int | None = Field(None, ge=2)

    def load(self) -> dict[str, Task]:
        """Return {name: task}, with so many evaluation examples."""
        return {name: cached_task(name).limited(eval=self.eval_examples) for name in self.tasks}

    def task_names(self) -> list[str]:
        """Name the tasks whose data are used."""
        return list(self.tasks)

    def describe(self) -> str:
        """Say which tasks this is about."""
        return "+".join(self.tasks)


class FineTuning(Data):
    """How an encoder is fine-tuned; see `fslib.train`."""

    encoder: EncoderName
    max_length: int = Field(128, ge=4)
    steps: Steps = Field(ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(gt=0, le=1)
    # left out where it is 0: a unit without a floor keeps the key that it had before there was one
    lr_floor: float = Field(0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)
    sampling: str = "annealed"
    epochs: int = Field(5, ge=1)
    curve_points: int = Field(8, ge=1)
    curve_examples: int = Field(128, ge=2)

    def check(self) -> None:
        """Raise FslibError for an unknown sampling and for an encoder that cannot be loaded."""
        super().check()
        if self.sampling not in SAMPLINGS:
            raise unknown("sampling", self.sampling, SAMPLINGS)
        self.shape()

    def shape(self) -> tuple[int, int]:
        """Return how many layers the encoder has, and how many heads a layer."""
        return encoder_shape(self.encoder, self.max_length, self.tasks[0])

    def through(self, examples: int, evaluated: int | float = 0) -> float:
        """Return how often a token goes through a layer: of examples, and of `evaluated` whole evaluation sets."""
        tokens = [self.tokens(task) for task in self.tasks]
        sizes = [self.evaluated(task) for task in self.tasks]
        each = examples * np.mean(tokens) + evaluated * np.dot(tokens, sizes)
        return float(self.layers() * each)

    def layers(self) -> int:
        """Return how many layers the encoder has; its weights are not loaded for that."""
        return footprint.shape(self.encoder)[0]

    def tokens(self, task: str) -> float:
        """Return about how many tokens an example of a task has."""
        return float(min(self.max_length, mean_tokens(task)))

    def evaluated(self, task: str) -> int:
        """Return how many examples of a task are evaluated."""
        return min(self.eval_examples or sys.maxsize, len(cached_task(task).eval))


def mean_tokens(task: str, sample: int = 200) -> float:
    """Return about how many tokens an example of a task has, from the words of the first; infinity if none is at hand.

    For planning alone: a word is taken as 1.3 tokens, and no tokenizer is loaded.
    """
    return _mean_tokens(task, cached_task(task).fingerprint, sample)


@cache
def _mean_tokens(task: str, fingerprint: str, sample: int) -> float:
    split = cached_task(task).train
    try:
        texts, pairs = split.texts[:sample], (split.pairs or ())[:sample]
    except FslibError:  # of data that are not at hand
        return math.inf
    return 1.3 * sum(len(text.split()) for text in (*texts, *pairs)) / len(texts) + 3


@cache
def encoder_shape(encoder: str, max_length: int, task: str) -> tuple[int, int]:
    """Return (layers, heads a layer) of an encoder, loaded once. Raises FslibError for one that cannot be loaded."""
    model = MultiTaskModel.from_pretrained(encoder, cached_task(task), max_length=max_length)
    return model.n_layers, model.n_heads


class SeededFineTuning(FineTuning):
    """One fine-tuning, with the seed of all that is drawn in it."""

    seed: int = Field(0, ge=0)

    def describe(self) -> str:
        """Say which tasks and seed this is about."""
        return f"{super().describe()}, seed {self.seed}"

    def options(self) -> dict[str, Any]:
        """Return the settings of `fslib.train`."""
        return {k: getattr(self, k) for k in ("steps", "batch_size", "lr", "lr_floor", "sampling", "epochs", "seed")}

    def new_model(self, tasks: dict[str, Task]) -> MultiTaskModel:
        """Return the model that training begins with."""
        return MultiTaskModel.from_pretrained(self.encoder, tasks, max_length=self.max_length, seed=self.seed)


class TrainUnit(SeededFineTuning, Unit):
    """One training run, on one or more tasks; the model of several tasks is kept as a checkpoint."""

    kind: ClassVar[str] = "train"

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer."""
        curve = (self.curve_points + 1) * min(self.curve_examples, self.evaluated(self.tasks[0])) * len(self.tasks)
        return self.through(3 * self.steps * self.batch_size + curve, 1)

    def compute(self, store: Store) -> Result:
        """Train and evaluate."""
        # Only multi-task models are used again, by the units that follow.
        return self._fit(store.checkpoint(self) if len(self.tasks) > 1 else None)

    def _fit(self, folder: Path | None) -> Result:
        """Train, evaluate, and save the model in `folder` (None: do not)."""
        tasks = self.load()
        model = self.new_model(tasks)
        history = train(
            model,
            tasks,
            **self.options(),
            evaluate_every=max(1, self.steps // self.curve_points),
            evaluate_on={n: t.limited(eval=self.curve_examples) for n, t in tasks.items()},
        )
        scores = evaluate(model, tasks)
        if folder is not None and is_first():
            with writing(folder):
                model.save(folder)
        values = {
            "scores": {name: score.value for name, score in scores.items()},
            "steps": {name: history.steps_of(name) for name in tasks},
            "curve": history.evaluations,
            "parameters": model.n_parameters(),
            "shape": [model.n_layers, model.n_heads],
        }
        arrays = {f"predictions/{n}": in_bytes(s.predictions) for n, s in scores.items()}
        arrays |= {"losses": np.array(history.losses, np.float32), "order": np.array(history.order, np.int8)}
        return Result(values, arrays)

    def trained(self, store: Store) -> MultiTaskModel:
        """Return the trained model on this process's device, from its checkpoint or trained now."""
        folder = store.checkpoint(self)
        store.get(self)
        with store.lock(self):  # the lock of whoever else writes, reads or deletes this checkpoint
            if from_first(folder.is_dir()):
                found = _loaded(folder)
                if from_first(isinstance(found, MultiTaskModel)):
                    if isinstance(found, FslibError):
                        raise found
                    return found
                if is_first():
                    _set_aside(folder, found)
            with fixed_threads(store.threads):
                self._fit(folder)
            wait_for_all()  # until the first has written
            return MultiTaskModel.load(folder).to(processes().device)


def _loaded(folder: Path) -> MultiTaskModel | FslibError:
    """Return a checkpoint's model on this process's device, or why there is none."""
    try:
        return MultiTaskModel.load(folder).to(processes().device)
    except FslibError as error:
        return error


def _set_aside(folder: Path, error: object) -> None:
    """Rename a checkpoint that cannot be loaded, and warn of it."""
    aside = folder.with_name(folder.name + ".corrupt")
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    warnings.warn(f"{error}; set aside as {aside.name}, training again", stacklevel=3)


class OneModelUnit(Unit):
    """A unit about one trained model."""

    model: TrainUnit

    def task_names(self) -> list[str]:
        """Name the model's tasks."""
        return self.model.task_names()

    def describe(self) -> str:
        """Say which tasks and seed the model is of."""
        return self.model.describe()


class ImportanceUnit(OneModelUnit):
    """Gradient importance of every head, for every task, on training examples."""

    kind: ClassVar[str] = "importance"
    examples: int = Field(ge=1)

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer; no gradient of a weight is computed."""
        return self.model.through(2 * self.examples * len(self.model.tasks))

    def compute(self, store: Store) -> Result:
        """Score every head, and keep every example's part."""
        model = self.model.trained(store)
        arrays: dict[str, np.ndarray] = {}
        for name, task in self.model.load().items():
            parts = contributions(model, task, examples=self.examples, seed=self.model.seed)
            arrays |= {f"{part}/{name}": getattr(parts, part) for part in ("absolute", "signed", "tokens")}
        return Result({"examples": {n: len(arrays[f"tokens/{n}"]) for n in self.model.tasks}}, arrays)

    def contributions(self, store: Store) -> dict[str, Contributions]:
        """Return every task's per-example contributions, from the record."""
        arrays = store.get(self).arrays
        parts = ("absolute", "signed", "tokens")
        return {t: Contributions(*(arrays[f"{part}/{t}"] for part in parts)) for t in self.model.tasks}


class PruneUnit(Unit):
    """Pruning of every task's top heads and of matched random heads."""

    kind: ClassVar[str] = "prune"
    importance: ImportanceUnit
    fractions: tuple[float, ...] = Field(min_length=1)
    controls: int = Field(ge=0)
    reduction: str = "token"
    normalize: str | None = None
    ablation: str = "zero"
    # left out where it is "all": such a unit keeps the key that it had before there was another
    on: LesionedOn = Field("all", exclude_if=lambda value: value == "all")

    def task_names(self) -> list[str]:
        """Name the model's tasks."""
        return self.importance.task_names()

    def describe(self) -> str:
        """Say which tasks and seed the model is of."""
        return self.importance.describe()

    def check(self) -> None:
        """Raise FslibError for fractions and controls that the encoder's heads do not allow."""
        super().check()
        checked_fractions(self.fractions, self.importance.model.shape(), self.controls)

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer."""
        sets = len(self.fractions) * len(self.task_names()) * (1 + self.controls)
        return self.importance.model.through(0, 1 + sets * (0.5 if self.on == "scored" else 1))

    def compute(self, store: Store) -> Result:
        """Prune, and keep every prediction."""
        model = self.importance.model
        options: dict[str, Any] = {"reduction": self.reduction, "normalize": self.normalize}
        maps = {t: parts.importance(**options) for t, parts in self.importance.contributions(store).items()}
        options = {"ablation": self.ablation, "examples": self.importance.examples, "seed": model.seed}
        sets = {"fractions": self.fractions, "controls": self.controls, "importance": maps}
        iap = lesioned(model.trained(store), model.load(), self.on, **sets, **options)
        return Result(iap_values(iap), iap_arrays(iap))

    def iap(self, store: Store) -> IAP:
        """Return the pruning results, from the record."""
        return recorded_iap(store.get(self))


def lesioned(model: MultiTaskModel, tasks: dict[str, Task], on: str, **options: Any) -> IAP:
    """Return `prune_important_heads` on all evaluation examples, or, on "scored", on the half that scores are from.

    The other half, which decides on gates, then needs no lesion: it costs one pass of the unpruned model.
    options: of `prune_important_heads`.
    """
    if on == "all":
        return prune_important_heads(model, tasks, **options)
    halves = [{name: with_half(task, half) for name, task in tasks.items()} for half in (score_half, gate_half)]
    gates = evaluate(model, halves[1])
    apart = {name: Unlesioned(score.labels, score.predictions[None]) for name, score in gates.items()}
    return replace(prune_important_heads(model, halves[0], **options), apart=apart)


def with_half(task: Task, half: Callable[[int], np.ndarray]) -> Task:
    """Return a task with one half of its evaluation examples; half: `score_half` or `gate_half`."""
    return replace(task, eval=task.eval.take(half(len(task.eval))))


class Chain(NamedTuple):
    """One trained model and what is computed on it, each unit built on the one before."""

    train: TrainUnit
    importance: ImportanceUnit
    prune: PruneUnit


def chain(model: TrainUnit, examples: int, fractions: Sequence[float], controls: int, on: LesionedOn) -> Chain:
    """Return the units of one model: its training, the importance of its heads, their pruning."""
    scored = ImportanceUnit(model=model, examples=examples)
    return Chain(model, scored, PruneUnit(importance=scored, fractions=tuple(fractions), controls=controls, on=on))


def iap_values(iap: IAP) -> dict[str, Any]:
    """Return what a record says of an `IAP` in JSON."""
    return {"tasks": list(iap.tasks), "metrics": list(iap.metrics), "fractions": list(iap.fractions)}


def iap_arrays(iap: IAP, name: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of an `IAP` as a record keeps them, under a name where it holds several."""
    prefix = f"{name}/" if name else ""
    return {prefix + k: in_bytes(v) if k != "heads" else v for k, v in iap.arrays().items()}


def recorded_iap(record: Record, name: str = "") -> IAP:
    """Return the `IAP` that a record keeps under a name. Raises FslibError where it keeps none."""
    prefix = f"{name}/" if name else ""
    arrays = {k.removeprefix(prefix): v for k, v in record.arrays.items() if k.startswith(prefix)}
    if "heads" not in arrays:
        raise FslibError(f"record {record.kind}-{record.key} holds no pruning of {name!r}")
    return IAP.from_arrays(**{k: record.result[k] for k in ("tasks", "metrics", "fractions")}, arrays=arrays)


def in_bytes(predictions: np.ndarray) -> np.ndarray:
    """Return class predictions in one byte each (up to 127 classes); values as they are."""
    return predictions.astype(np.int8) if predictions.dtype.kind == "i" and predictions.max() < 128 else predictions
