"""All heavy work, as units: kind + config -> record. A unit depends on nothing but its config and the data.

`UNITS` maps each kind to its config and function (`comparisons` adds more). A `Store` finds a unit's record or
computes it: present = reused, missing = computed, one process at a time. Trained models are kept as checkpoints
beside the records; a missing one is trained again.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from fslib.data.loading import load_task
from fslib.data.tasks import Split, Task
from fslib.dissociation import IAP
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate
from fslib.importance import Contributions, contributions
from fslib.model.multitask import MultiTaskModel
from fslib.pruning import prune_important_heads
from fslib.results import Record, Records, git_commit, machine, versions, writing
from fslib.training import train

Outcome = tuple[dict[str, Any], dict[str, np.ndarray]]  # a unit's JSON result and arrays


class Config(BaseModel):
    """A unit's whole input. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if os.sep in name:
            raise ValueError(f"{name} is a path; point FSLIB_DATA at the folder that holds it, and give its name")
    return tuple(name.lower() for name in names)


# As the tasks call themselves, so that one piece of work has one key wherever the data lie.
TaskNames = Annotated[tuple[str, ...], AfterValidator(_plain_names), Field(min_length=1)]


class DataConfig(Config):
    """Tasks by name, and how many examples are evaluated (None: all)."""

    tasks: TaskNames
    eval_examples: int | None = Field(None, ge=2)

    def load(self) -> dict[str, Task]:
        return {name: cached_task(name).limited(eval=self.eval_examples) for name in self.tasks}


class TrainingSettings(DataConfig):
    """How an encoder is fine-tuned; see `fslib.train`."""

    encoder: str
    max_length: int = Field(128, ge=4)
    steps: int = Field(ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(gt=0)
    sampling: str = "annealed"
    epochs: int = Field(5, ge=1)
    curve_points: int = Field(8, ge=1)
    curve_examples: int = Field(128, ge=2)


class TrainConfig(TrainingSettings):
    """One training run, on one or more tasks."""

    seed: int = Field(0, ge=0)


class ImportanceConfig(Config):
    """Gradient importance of every head, for every task, on training examples."""

    model: TrainConfig
    examples: int = Field(ge=1)


class PruneConfig(Config):
    """Pruning of every task's top heads and of matched random heads."""

    importance: ImportanceConfig
    fractions: tuple[float, ...] = Field(min_length=1)
    controls: int = Field(ge=0)
    reduction: str = "token"
    normalize: str | None = None
    ablation: str = "zero"


@cache
def cached_task(name: str) -> Task:
    return load_task(name)


class Unit(NamedTuple):
    """One piece of work: the name of its kind, and its config."""

    kind: str
    config: Config

    def data(self) -> dict[str, str]:
        """Fingerprints of the tasks that the unit uses."""
        config: Any = self.config
        while not isinstance(config, DataConfig):
            config = getattr(config, "importance", None) or config.model
        names = [*config.tasks, *([config.target] if hasattr(config, "target") else [])]
        return {name: cached_task(name).fingerprint for name in names}

    @property
    def key(self) -> str:
        whole = json.dumps([self.kind, self.config.model_dump(mode="json"), self.data()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def distinct(units: Iterable[Unit]) -> list[Unit]:
    """Each unit once, in the order of first mention."""
    return list({unit.key: unit for unit in units}.values())


class Store:
    """Records and checkpoints under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = Records(folder)
        self._open: dict[str, Record] = {}

    def find(self, unit: Unit) -> Record | None:
        """The unit's record if there is one."""
        if unit.key not in self._open and (record := self.records.load(unit.kind, unit.key)):
            self._open[unit.key] = record
        return self._open.get(unit.key)

    def get(self, unit: Unit) -> Record:
        """The unit's record, computed now if it is missing; nothing is written unless it is whole."""
        if record := self.find(unit):
            return record
        with self.records.lock(unit.kind, unit.key):
            if record := self.find(unit):  # another process was first
                return record
            return self._compute(unit)

    def _compute(self, unit: Unit) -> Record:
        if unit.kind not in UNITS:
            raise unknown("kind of unit", unit.kind, UNITS)
        started = time.perf_counter()
        result, arrays = UNITS[unit.kind][1](unit.config, self)
        seconds = round(time.perf_counter() - started, 2)
        config = unit.config.model_dump(mode="json")
        about: dict[str, Any] = {"versions": versions(), "commit": git_commit(), "machine": machine()}
        found = {name: cached_task(name).source for name in unit.data()}
        # not local paths: they say nothing to others, and a fingerprint says which data they hold
        about["sources"] = {name: source for name, source in found.items() if source and not Path(source).exists()}
        record = Record(unit.kind, unit.key, config, unit.data(), result, arrays, seconds, **about)
        self.records.save(record)
        self._open[unit.key] = record
        return record

    def forget(self, unit: Unit) -> None:
        """Delete a unit's record and checkpoint, so that it is computed anew."""
        self._open.pop(unit.key, None)
        path = self.records.path(unit.kind, unit.key)
        with writing(path):
            for old in (path, path.with_suffix(".npz")):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint(unit), ignore_errors=True)

    def checkpoint(self, unit: Unit) -> Path:
        return self.folder / "checkpoints" / f"{unit.kind}-{unit.key}"

    def model(self, config: TrainConfig) -> MultiTaskModel:
        """The trained model of a config, from its checkpoint or trained now."""
        unit = Unit("train", config)
        folder = self.checkpoint(unit)
        if folder.is_dir():
            try:
                return MultiTaskModel.load(folder)
            except FslibError as error:
                aside = folder.with_name(folder.name + ".corrupt")
                shutil.rmtree(aside, ignore_errors=True)
                with writing(aside), suppress(FileNotFoundError):  # another process may have been first
                    folder.rename(aside)
                warnings.warn(f"{error}; set aside as {aside.name}, training again", stacklevel=2)
        if self.find(unit) is None:
            self.get(unit)
            return MultiTaskModel.load(folder) if folder.is_dir() else self.model(config)
        with self.records.lock("train", unit.key):  # the lock of whoever else writes this checkpoint
            if not folder.is_dir():
                fit(config, folder)
            return MultiTaskModel.load(folder)


def training_options(config: TrainConfig) -> dict[str, Any]:
    """A config's settings of `fslib.train`."""
    return {k: getattr(config, k) for k in ("steps", "batch_size", "lr", "sampling", "epochs", "seed")}


def new_model(config: TrainConfig, tasks: dict[str, Task]) -> MultiTaskModel:
    """The model that a config's training begins with."""
    return MultiTaskModel.from_pretrained(config.encoder, tasks, max_length=config.max_length, seed=config.seed)


def fit(config: TrainConfig, folder: Path | None) -> Outcome:
    """Train, evaluate, and save the model in `folder` (None: do not)."""
    tasks = config.load()
    model = new_model(config, tasks)
    history = train(
        model,
        tasks,
        **training_options(config),
        evaluate_every=max(1, config.steps // config.curve_points),
        evaluate_on={n: t.limited(eval=config.curve_examples) for n, t in tasks.items()},
    )
    scores = evaluate(model, tasks)
    if folder is not None:
        for stale in folder.parent.glob(f"{folder.name}.partial-*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with writing(folder):
            model.save(folder)
    result = {
        "scores": {name: score.value for name, score in scores.items()},
        "steps": {name: history.steps_of(name) for name in tasks},
        "curve": history.evaluations,
        "parameters": model.n_parameters(),
        "shape": [model.n_layers, model.n_heads],
    }
    arrays = {f"predictions/{n}": compact(s.predictions) for n, s in scores.items()}
    arrays |= {"losses": np.array(history.losses, np.float32), "order": np.array(history.order, np.int8)}
    return result, arrays


def compact(predictions: np.ndarray) -> np.ndarray:
    """Class predictions in one byte each (up to 127 classes); values as they are."""
    return predictions.astype(np.int8) if predictions.dtype.kind == "i" and predictions.max() < 128 else predictions


def _train(config: TrainConfig, store: Store) -> Outcome:
    # Only multi-task models are used again, by the units that follow.
    return fit(config, store.checkpoint(Unit("train", config)) if len(config.tasks) > 1 else None)


def _importance(config: ImportanceConfig, store: Store) -> Outcome:
    model = store.model(config.model)
    arrays: dict[str, np.ndarray] = {}
    for name, task in config.model.load().items():
        found = contributions(model, task, examples=config.examples, seed=config.model.seed)
        arrays |= {f"{part}/{name}": getattr(found, part) for part in ("absolute", "signed", "tokens")}
    return {"examples": {n: len(arrays[f"tokens/{n}"]) for n in config.model.tasks}}, arrays


def read_contributions(record: Record, task: str) -> Contributions:
    """A task's per-example contributions from an importance record."""
    return Contributions(*(record.arrays[f"{part}/{task}"] for part in ("absolute", "signed", "tokens")))


def _prune(config: PruneConfig, store: Store) -> Outcome:
    scored = store.get(Unit("importance", config.importance))
    tasks = config.importance.model.load()
    options: dict[str, Any] = {"reduction": config.reduction, "normalize": config.normalize}
    iap = prune_important_heads(
        store.model(config.importance.model),
        tasks,
        config.fractions,
        config.controls,
        importance={t: read_contributions(scored, t).importance(**options) for t in tasks},
        ablation=config.ablation,
        examples=config.importance.examples,
        seed=config.importance.model.seed,
    )
    result = {"tasks": list(iap.tasks), "metrics": list(iap.metrics), "fractions": list(iap.fractions)}
    return result, {k: compact(v) if k != "heads" else v for k, v in iap.arrays().items()}


def read_iap(record: Record) -> IAP:
    """The `IAP` of a prune record."""
    return IAP.from_arrays(**record.result, arrays=record.arrays)


def _words(config: DataConfig, store: Store) -> Outcome:
    """Bag of words: TF-IDF of the text (of both texts, and of the words they share), logistic or ridge regression."""
    result: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, task in config.load().items():
        vectorizer = TfidfVectorizer(sublinear_tf=True).fit([*task.train.texts, *(task.train.pairs or ())])
        x, y = bag_of_words(vectorizer, task.train), task.train.labels
        learner = Ridge() if task.is_regression else LogisticRegression(max_iter=2000)
        arrays[f"predictions/{name}"] = compact(learner.fit(x, y).predict(bag_of_words(vectorizer, task.eval)))
        result[name] = {"features": int(x.shape[1])}
    return result, arrays


def bag_of_words(vectorizer: TfidfVectorizer, split: Split) -> Any:
    """Sparse (n, features); for pairs both texts side by side and their elementwise product."""
    from scipy.sparse import hstack

    first = vectorizer.transform(split.texts)
    if split.pairs is None:
        return first
    second = vectorizer.transform(split.pairs)
    return hstack([first, second, first.multiply(second)]).tocsr()


UNITS: dict[str, tuple[type[Config], Callable[[Any, Store], Outcome]]] = {
    "train": (TrainConfig, _train),
    "words": (DataConfig, _words),
    "importance": (ImportanceConfig, _importance),
    "prune": (PruneConfig, _prune),
}


def checked(config: type[Config], values: dict[str, Any], what: str) -> Any:
    """A config from untrusted values; the first thing wrong with it in one line, with the nearest valid name."""
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown(what, name, config.model_fields) from None
        raise FslibError(f"{what} {name}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from None
