"""The units of work: train a model, score its heads, prune them; endings; heads one by one; similarity of tasks."""

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
import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field
from scipy.sparse import hstack

from fslib.claims import gate_half, score_half
from fslib.data.batches import SAMPLINGS
from fslib.data.loading import one_case
from fslib.data.tasks import Split, Task
from fslib.endings import Ending, PCGrad, Stop
from fslib.errors import FslibError, unknown
from fslib.evaluation import check_several, evaluate, predict
from fslib.finetuning import PARTS, transfer
from fslib.heads import checked_fractions
from fslib.iap import IAP, Unlesioned
from fslib.iat import IAT, HeadRows, head_rows
from fslib.importance import (
    Contributions,
    contributions,
    gradients_for,
    head_importance,
    head_products,
)
from fslib.lesions import HeadLesions, lesion_heads
from fslib.model.attention import HOOKED, attention_weights
from fslib.model.devices import best_device, fixed_threads
from fslib.model.encoders import ENCODERS, PRETRAINED
from fslib.model.multitask import MultiTaskModel
from fslib.progress import hidden
from fslib.pruning import prune_important_heads
from fslib.similarity import (
    cosine,
    head_overlap,
    importance_similarity,
    linear_cka,
    representations,
    task_embedding,
    task_similarity,
    text_embedding,
)
from fslib.study.config import Config
from fslib.study.files import writing
from fslib.study.fingerprints import cached_task
from fslib.study.store import Record, Result, Store, Unit
from fslib.training import branch, train


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if os.sep in name:
            raise ValueError(
                f"{name} is a path; point FSLIB_DATA at the folder that holds it, and give its name"
            )
    return tuple(one_case(name) for name in names)


def _one_path(name: str) -> str:
    if name not in (*ENCODERS, *PRETRAINED):
        with suppress(OSError):  # of a name too long for a path
            return str(Path(name).resolve()) if Path(name).is_dir() else name
    return name


# As the tasks call themselves, so that one piece of work has one key wherever the data lie.
TaskNames = Annotated[tuple[str, ...], AfterValidator(_plain_names), Field(min_length=1)]
Steps = Annotated[int, Field(le=10_000_000)]  # the task of every step is drawn before the first
Precision = Literal["float32", "bf16"]
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
    # as lr_floor: a unit in float32 keeps the key that it had before there was a choice
    precision: Precision = Field("float32", exclude_if=lambda value: value == "float32")
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

    def evaluated(self, task: str) -> int:
        """Return how many examples of a task are evaluated."""
        return min(self.eval_examples or sys.maxsize, len(cached_task(task).eval))


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
        return {
            k: getattr(self, k)
            for k in (
                "steps",
                "batch_size",
                "lr",
                "lr_floor",
                "precision",
                "sampling",
                "epochs",
                "seed",
            )
        }

    def new_model(self, tasks: dict[str, Task]) -> MultiTaskModel:
        """Return the model that training begins with."""
        return MultiTaskModel.from_pretrained(
            self.encoder, tasks, max_length=self.max_length, seed=self.seed
        )


class TrainUnit(SeededFineTuning, Unit):
    """One training run, on one or more tasks; the model of several tasks is kept as a checkpoint."""

    kind: ClassVar[str] = "train"

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
        if folder is not None:
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
        arrays |= {
            "losses": np.array(history.losses, np.float32),
            "order": np.array(history.order, np.int8),
        }
        return Result(values, arrays)

    def trained(self, store: Store) -> MultiTaskModel:
        """Return the trained model on this process's device, from its checkpoint or trained now."""
        folder = store.checkpoint(self)
        store.get(self)
        with store.lock(self):  # the lock of whoever else writes, reads or deletes this checkpoint
            if folder.is_dir():
                try:
                    return MultiTaskModel.load(folder).to(best_device())
                except FslibError as error:
                    _set_aside(folder, error)
            with fixed_threads(store.threads):
                self._fit(folder)
            return MultiTaskModel.load(folder).to(best_device())


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

    def compute(self, store: Store) -> Result:
        """Score every head, and keep every example's part."""
        model = self.model.trained(store)
        arrays: dict[str, np.ndarray] = {}
        for name, task in self.model.load().items():
            parts = contributions(model, task, examples=self.examples, seed=self.model.seed)
            arrays |= {
                f"{part}/{name}": getattr(parts, part) for part in ("absolute", "signed", "tokens")
            }
        return Result(
            {"examples": {n: len(arrays[f"tokens/{n}"]) for n in self.model.tasks}}, arrays
        )

    def contributions(self, store: Store) -> dict[str, Contributions]:
        """Return every task's per-example contributions, from the record."""
        arrays = store.get(self).arrays
        parts = ("absolute", "signed", "tokens")
        return {
            t: Contributions(*(arrays[f"{part}/{t}"] for part in parts)) for t in self.model.tasks
        }


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

    def compute(self, store: Store) -> Result:
        """Prune, and keep every prediction."""
        model = self.importance.model
        options: dict[str, Any] = {"reduction": self.reduction, "normalize": self.normalize}
        maps = {
            t: parts.importance(**options)
            for t, parts in self.importance.contributions(store).items()
        }
        options = {
            "ablation": self.ablation,
            "examples": self.importance.examples,
            "seed": model.seed,
        }
        sets = {"fractions": self.fractions, "controls": self.controls, "importance": maps}
        iap = prune_on(model.trained(store), model.load(), self.on, **sets, **options)
        return Result(iap_values(iap), iap_arrays(iap))

    def iap(self, store: Store) -> IAP:
        """Return the pruning results, from the record."""
        return recorded_iap(store.get(self))


def prune_on(model: MultiTaskModel, tasks: dict[str, Task], on: str, **options: Any) -> IAP:
    """Return `prune_important_heads` on all evaluation examples, or, on "scored", on the half that scores are from.

    The other half, which decides on gates, then needs no lesion: it costs one pass of the unpruned model.
    options: of `prune_important_heads`.
    """
    if on == "all":
        return prune_important_heads(model, tasks, **options)
    halves = [
        {name: with_half(task, half) for name, task in tasks.items()}
        for half in (score_half, gate_half)
    ]
    gates = evaluate(model, halves[1])
    apart = {
        name: Unlesioned(score.labels, score.predictions[None]) for name, score in gates.items()
    }
    return replace(prune_important_heads(model, halves[0], **options), apart=apart)


def with_half(task: Task, half: Callable[[int], np.ndarray]) -> Task:
    """Return a task with one half of its evaluation examples; half: `score_half` or `gate_half`."""
    return replace(task, eval=task.eval.take(half(len(task.eval))))


class Chain(NamedTuple):
    """One trained model and what is computed on it, each unit built on the one before."""

    train: TrainUnit
    importance: ImportanceUnit
    prune: PruneUnit


def chain(
    model: TrainUnit, examples: int, fractions: Sequence[float], controls: int, on: LesionedOn
) -> Chain:
    """Return the units of one model: its training, the importance of its heads, their pruning."""
    scored = ImportanceUnit(model=model, examples=examples)
    return Chain(
        model,
        scored,
        PruneUnit(importance=scored, fractions=tuple(fractions), controls=controls, on=on),
    )


def iap_values(iap: IAP) -> dict[str, Any]:
    """Return what a record says of an `IAP` in JSON."""
    return {
        "tasks": list(iap.tasks),
        "metrics": list(iap.metrics),
        "fractions": list(iap.fractions),
    }


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
    return IAP.from_arrays(
        **{k: record.result[k] for k in ("tasks", "metrics", "fractions")}, arrays=arrays
    )


def in_bytes(predictions: np.ndarray) -> np.ndarray:
    """Return class predictions in one byte each (up to 127 classes); values as they are."""
    return (
        predictions.astype(np.int8)
        if predictions.dtype.kind == "i" and predictions.max() < 128
        else predictions
    )


class WordsUnit(Data, Unit):
    """The baseline that knows words and nothing else: a linear model on TF-IDF, per task."""

    kind: ClassVar[str] = "words"

    def compute(self, store: Store) -> Result:
        """Fit logistic or ridge regression to each task's bag of words, and predict."""
        values: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        for name, task in self.load().items():
            predictions, features = predict_from_words(task)
            arrays[f"predictions/{name}"], values[name] = (
                in_bytes(predictions),
                {"features": features},
            )
        return Result(values, arrays)


def predict_from_words(task: Task) -> tuple[np.ndarray, int]:
    """Return predictions of the evaluation examples, and from how many features; from none, the constant answer."""
    from sklearn.dummy import DummyClassifier, DummyRegressor  # every kernel would wait for them
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    vectorizer, y = TfidfVectorizer(sublinear_tf=True), task.train.labels
    texts = [*task.train.texts, *(task.train.pairs or ())]
    if not any(map(vectorizer.build_analyzer(), texts)):  # signs and single letters are no words
        constant = (
            DummyRegressor() if task.is_regression else DummyClassifier(strategy="most_frequent")
        )
        return constant.fit(np.zeros((len(y), 1)), y).predict(np.zeros((len(task.eval), 1))), 0
    x = bag_of_words(vectorizer.fit(texts), task.train)
    learner = Ridge() if task.is_regression else LogisticRegression(max_iter=2000)
    return learner.fit(x, y).predict(bag_of_words(vectorizer, task.eval)), int(x.shape[1])


def bag_of_words(vectorizer: Any, split: Split) -> Any:
    """Return sparse features, (n, features): of the text; for pairs of both texts and their elementwise product."""
    first = vectorizer.transform(split.texts)
    if split.pairs is None:
        return first
    second = vectorizer.transform(split.pairs)
    return hstack([first, second, first.multiply(second)]).tocsr()


TEXTS = 2  # of every task, to show attention on
LONGEST = 32  # tokens of a text whose attention is shown, special ones included
LESION_PARTS = ("labels", "predictions", "losses")


class LesionUnit(OneModelUnit):
    """Every head switched off alone, on the first of the evaluation examples that the model's pruning is scored on."""

    kind: ClassVar[str] = "lesion"
    on: LesionedOn
    examples: int | None = Field(None, ge=2)

    def check(self) -> None:
        """Raise FslibError for a task of which a single example would be scored."""
        super().check()
        check_several(self._sizes())

    def _sizes(self) -> dict[str, int]:
        """Return how many examples of each task are scored."""
        half = 2 if self.on == "scored" else 1
        most = self.examples or sys.maxsize
        return {task: min(most, self.model.evaluated(task) // half) for task in self.model.tasks}

    def tasks(self) -> dict[str, Task]:
        """Return the model's tasks, with the evaluation examples that are used."""
        return {
            name: scored_on(task, self.on).limited(eval=self.examples)
            for name, task in self.model.load().items()
        }

    def compute(self, store: Store) -> Result:
        """Switch off one head after the other, and keep every prediction and loss."""
        found = lesion_heads(self.model.trained(store), self.tasks())
        arrays = {
            f"{part}/{u}": in_bytes(rows)
            for part in LESION_PARTS
            for u, rows in getattr(found, part).items()
        }
        return Result(
            {
                "tasks": list(found.tasks),
                "metrics": list(found.metrics),
                "shape": list(found.shape),
            },
            arrays,
        )

    def lesions(self, store: Store) -> HeadLesions:
        """Return what every head alone is worth, from the record."""
        record = store.get(self)
        tasks = tuple(record.result["tasks"])
        parts = [{u: record.arrays[f"{part}/{u}"] for u in tasks} for part in LESION_PARTS]
        layers, heads = record.result["shape"]
        return HeadLesions(tasks, tuple(record.result["metrics"]), (layers, heads), *parts)


def scored_on(task: Task, on: str) -> Task:
    """Return a task with all of its evaluation examples, or, on "scored", with the half that scores are from."""
    return task if on == "all" else with_half(task, score_half)


class Pattern(NamedTuple):
    """What a model makes of one text of a task.

    tokens: as the encoder reads them. label, predicted: an answer's name, or a value. weights: (layers, heads, seq,
    seq), how much each token (row) attends to each (column). importance: (layers, heads, seq), |<ctx, grad>| of every
    token: summed over tokens and texts, and divided by their tokens, it is the head's importance.
    """

    tokens: tuple[str, ...]
    label: str
    predicted: str
    weights: Float[np.ndarray, "layers heads seq seq"]
    importance: Float[np.ndarray, "layers heads seq"]


class PatternUnit(OneModelUnit):
    """What heads attend to in the first evaluation texts of every task that are short enough to be shown.

    Of an architecture whose attention weights are not seen (`attention_weights`), no text.
    """

    kind: ClassVar[str] = "pattern"
    examples: int = Field(ge=1)
    longest: int = Field(ge=4)

    def compute(self, store: Store) -> Result:
        """Look at the texts, and keep weights and importance."""
        model = self.model.trained(store)
        texts: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        is_seen = model.encoder.config.model_type not in HOOKED
        for name, task in self.model.load().items():
            chosen = short_texts(model, task, self.examples, self.longest) if is_seen else []
            found = [pattern(model, task, text) for text in chosen]
            texts[name] = [
                {k: v for k, v in p._asdict().items() if isinstance(v, str | tuple)} for p in found
            ]
            for number, p in enumerate(found):
                # sixteen bits: four digits of a weight are more than can be seen
                arrays |= {f"weights/{name}/{number}": p.weights.astype(np.float16)}
                arrays |= {f"importance/{name}/{number}": p.importance}
        return Result({"texts": texts}, arrays)

    def patterns(self, store: Store) -> dict[str, list[Pattern]]:
        """Return every task's texts, from the record."""
        return recorded_patterns(store.get(self))


def recorded_patterns(record: Record) -> dict[str, list[Pattern]]:
    """Return the texts that a record holds, by task."""
    found: dict[str, list[Pattern]] = {}
    for name, texts in record.result["texts"].items():
        found[name] = [
            Pattern(
                tuple(text["tokens"]),
                text["label"],
                text["predicted"],
                record.arrays[f"weights/{name}/{number}"].astype(np.float32),
                record.arrays[f"importance/{name}/{number}"],
            )
            for number, text in enumerate(texts)
        ]
    return found


def short_texts(model: MultiTaskModel, task: Task, examples: int, longest: int) -> list[Split]:
    """Return the first evaluation examples with at most so many tokens, one by one; the shortest where none has."""
    first = task.eval.take(np.arange(min(len(task.eval), 100 * examples)))
    lengths = np.array([len(ids) for ids in model.encode(first).columns["input_ids"]])
    chosen = np.flatnonzero(lengths <= longest)[:examples]
    return [first.take([int(i)]) for i in (chosen if len(chosen) else [int(lengths.argmin())])]


def pattern(model: MultiTaskModel, task: Task, text: Split) -> Pattern:
    """Return what a model makes of one example of a task. Raises FslibError where its weights cannot be seen."""
    if len(text) != 1:
        raise FslibError(f"{len(text)} examples: a pattern is of one")
    encoded = model.encode(text)
    batch = encoded.batch([0]).to(model.device)
    weights = attention_weights(model, batch.inputs)[:, 0].cpu().numpy()
    with gradients_for(model):
        products = head_products(model, batch, task.name)  # (layers, 1, seq, heads)
    importance = products[:, 0].abs().transpose(1, 2).float().cpu().numpy()
    tokens = tuple(
        str(t) for t in model.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist())
    )
    answer = predict(model, task, [encoded.batch([0])], 1)[0]
    return Pattern(
        tokens, named_answer(task, text.labels[0]), named_answer(task, answer), weights, importance
    )


def named_answer(task: Task, answer: Any) -> str:
    """Return the name of a class, or a value as it is read."""
    return f"{float(answer):.2f}" if task.is_regression else task.label_names[int(answer)]


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
                raise FslibError(
                    f"target {name!r} is one of the source's tasks {list(self.tasks)}: leave it out there"
                )

    def made(self) -> dict[str, Ending | None]:
        """Return the endings by name, made of their descriptions."""
        return {name: make_ending(spec) for name, spec in self.endings.items()}

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
            values["branched"][name], values["parameters"][name] = (
                history.branched,
                model.n_parameters(),
            )
            scores = evaluate(model, tasks)
            arrays |= {
                f"predictions/{name}/{t}": in_bytes(s.predictions) for t, s in scores.items()
            }
            arrays |= {f"heads/{name}/{t}": heads for t, heads in history.heads.items()}
            if isinstance(endings[name], Stop):
                movement = Movement(model, history.branched)
            # plain training went on from the same step, however late other endings branch off
            elif movement is not None and (
                history.branched == movement.step or endings[name] is None
            ):
                values["moved"][name] = movement.since(history.heads)
            if name in self.pruned:
                arrays |= iap_arrays(self._prune(model), name)
            if self.targets and name in self.targets.sources:
                arrays |= self._learned(model, name)
        metrics = [task.metric for task in tasks.values()]
        return Result(
            values
            | {"tasks": list(tasks), "metrics": metrics, "fractions": sorted(self.fractions)},
            arrays,
        )

    def _prune(self, model: MultiTaskModel) -> IAP:
        """Score every task's heads as the model is now, and prune them."""
        tasks = self.load()
        maps = {
            t: head_importance(model, task, examples=self.examples, seed=self.seed)
            for t, task in tasks.items()
        }
        limited = {n: t.limited(eval=self.prune_examples) for n, t in tasks.items()}
        options: dict[str, Any] = {"importance": maps, "seed": self.seed}
        return prune_on(model, limited, self.on, fractions=self.fractions, controls=0, **options)

    def _learned(self, source: MultiTaskModel, name: str) -> dict[str, np.ndarray]:
        """Return predictions of every target, learned from a copy of the source at every size and in both ways."""
        plan, found = self.targets, {}
        assert plan is not None
        for target in plan.tasks:
            task = cached_task(target).limited(eval=plan.eval_examples)
            for size in plan.sizes:
                n = len(task.train) if size is None else size
                options: dict[str, Any] = {
                    "size": size,
                    "seed": self.seed,
                    "batch_size": self.batch_size,
                }
                options |= {"steps": plan.steps(n, self.batch_size), "lr": self.lr}
                for part in PARTS:
                    with hidden():
                        learned = transfer(source, task, part=part, **options)
                    found[transfer_name(target, name, part, size)] = in_bytes(
                        learned.score.predictions
                    )
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
        changes = [
            (r.of(r.parameter.detach()) - r.of(self.then[r.parameter])).flatten() for r in rows
        ]
        return float(torch.cat(changes).double().square().mean().sqrt())


# Ways to choose heads: the first is the default. Michel et al. divide by layer norms; the paper's code does not.
SELECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient, layer-normalized": {"normalize": "layer"},
    "gradient, by example": {"reduction": "example"},
    "ablation": {"estimator": "ablation"},
    "integrated": {"estimator": "integrated"},
    "norm": {"estimator": "norm"},
}
UNMATCHED = "unmatched"  # in the names of random draws over all layers


class SelectionUnit(Unit):
    """One trained model, its heads chosen in several ways: {name: options of `head_importance`}."""

    kind: ClassVar[str] = "selection"
    model: TrainUnit
    selections: dict[str, dict[str, Any]] = Field(min_length=1)
    examples: int = Field(ge=1)
    fraction: float = Field(gt=0, le=1)
    randoms: int = Field(ge=1)

    def task_names(self) -> list[str]:
        """Name the model's tasks."""
        return self.model.task_names()

    def describe(self) -> str:
        """Say which tasks and seed the model is of."""
        return self.model.describe()

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads do not allow."""
        super().check()
        checked_fractions([self.fraction], self.model.shape(), self.randoms)

    def compute(self, store: Store) -> Result:
        """Prune by every selection, and by random sets: `randoms` per task matched by layer, and as many unmatched."""
        model, tasks, seed = self.model.trained(store), self.model.load(), self.model.seed
        arrays: dict[str, np.ndarray] = {}

        def prune(name: str, maps: dict[str, np.ndarray], controls: int = 0) -> IAP:
            iap = prune_important_heads(
                model, tasks, [self.fraction], controls, importance=maps, seed=seed
            )
            arrays.update(iap_arrays(iap, name))
            return iap

        shared: dict[str, Any] = {"examples": self.examples, "seed": seed}
        for number, (name, options) in enumerate(self.selections.items()):
            maps = {
                t: head_importance(model, task, **shared | options) for t, task in tasks.items()
            }
            arrays |= {
                f"importance/{name}/{t}": scores.astype(np.float32) for t, scores in maps.items()
            }
            iap = prune(name, maps, 0 if number else self.randoms)
        for draw in range(self.randoms):
            maps = {
                t: head_importance(model, task, estimator="random", seed=1000 + draw)
                for t, task in tasks.items()
            }
            prune(f"{UNMATCHED} {draw}", maps)
        return Result({"shape": [model.n_layers, model.n_heads], **iap_values(iap)}, arrays)


MEASURES = ("importance", "top heads", "TaskEmb", "TextEmb", "CKA")


class SimilarityUnit(SeededFineTuning, Unit):
    """Similarity of every two of `tasks`, from models trained on one of them each, for `steps` steps."""

    kind: ClassVar[str] = "similarity"
    examples: int = Field(ge=2)
    fraction: float = Field(0.3, gt=0, le=1)

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads do not allow."""
        super().check()
        checked_fractions([self.fraction], self.shape())

    def compute(self, store: Store) -> Result:
        """Measure on models that never saw the pair, so that no measure shares noise with the pair's dissociation."""
        tasks = self.load()
        shared: dict[str, Any] = {"examples": self.examples, "seed": self.seed}
        parts = [task.part("train", self.examples, self.seed) for task in tasks.values()]
        pretrained = MultiTaskModel.from_pretrained(self.encoder, tasks, max_length=self.max_length)
        pretrained.to(best_device())
        evidence: dict[str, list] = {measure: [] for measure in MEASURES}
        for name, task in tasks.items():
            train(model := self.new_model({name: task}), task, **self.options())
            evidence["importance"].append(head_importance(model, task, **shared))
            evidence["TaskEmb"].append(task_embedding(model, task, **shared))
            evidence["TextEmb"].append(text_embedding(pretrained, task, **shared))
            # of one task's pairs and another's single texts alike: all models see the texts of all tasks
            evidence["CKA"].append(np.concatenate([representations(model, part) for part in parts]))
        evidence["top heads"] = evidence["importance"]
        similarity: dict[str, Any] = {
            "importance": importance_similarity,
            "top heads": lambda a, b: head_overlap(a, b, self.fraction),
            "TaskEmb": task_similarity,
            "TextEmb": cosine,
            "CKA": linear_cka,
        }
        matrices = {
            m: [[float(similarity[m](a, b)) for b in evidence[m]] for a in evidence[m]]
            for m in MEASURES
        }
        arrays = {
            f"importance/{t}": m.astype(np.float32)
            for t, m in zip(tasks, evidence["importance"], strict=True)
        }
        return Result({"tasks": list(tasks), "similarity": matrices}, arrays)
