"""The units of work: train a model, score its heads, prune them, and all that follows.

In the order of the notebooks: words and training, importance, pruning, heads one by one, ways to
choose heads, similarity of tasks, endings and transfer.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field
from scipy.sparse import hstack

from fslib import importance, similarity
from fslib.claims import gate_half, score_half
from fslib.data.loading import one_case
from fslib.data.tasks import Split, Task
from fslib.endings import Ending, PCGrad, Stop
from fslib.errors import FslibError
from fslib.evaluation import check_several, evaluate, predict
from fslib.finetuning import PARTS, transfer
from fslib.heads import checked_fractions
from fslib.iap import IAP, Unlesioned
from fslib.iat import IAT, HeadRows, head_rows
from fslib.importance import Contributions, head_importance
from fslib.lesions import HeadLesions, lesion_heads
from fslib.model.attention import HOOKED, attention_weights
from fslib.model.devices import best_device, fixed_threads
from fslib.model.encoders import ENCODERS, PRETRAINED
from fslib.model.multitask import MultiTaskModel
from fslib.progress import hidden
from fslib.pruning import prune_important_heads
from fslib.study.config import Config
from fslib.study.files import set_aside, writing
from fslib.study.fingerprints import cached_task
from fslib.study.store import Record, Result, Store, Unit
from fslib.training import branch, train

Arrays = dict[str, np.ndarray]


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if os.sep in name:
            where = "point FSLIB_DATA at the folder that holds it, and give its name"
            raise ValueError(f"{name} is a path; {where}")
    return tuple(one_case(name) for name in names)


def _one_path(name: str) -> str:
    is_folder = name not in (*ENCODERS, *PRETRAINED) and Path(name).is_dir()
    return str(Path(name).resolve()) if is_folder else name


# As the tasks call themselves, so that one piece of work has one key wherever the data lie.
TaskNames = Annotated[tuple[str, ...], AfterValidator(_plain_names), Field(min_length=1)]
Steps = Annotated[int, Field(le=10_000_000)]  # the task of every step is drawn before the first
Precision = Literal["float32", "bf16"]
Sampling = Literal["proportional", "sqrt", "uniform", "annealed"]
LesionedOn = Literal["all", "scored"]  # evaluation examples: all, or the half that scores are from
# A local folder by its whole path: one key, and one folder, wherever a process works.
EncoderName = Annotated[str, Field(min_length=1), AfterValidator(_one_path)]


def optional(default: Any, **limits: Any) -> Any:
    """Return a field that is left out of the key at its default.

    So a unit keeps the key that it had before there was a choice.
    """
    return Field(default, exclude_if=lambda value: value == default, **limits)


class Data(Config):
    """Tasks by name, and how many examples are trained on and evaluated (None: all)."""

    tasks: TaskNames
    eval_examples: int | None = Field(None, ge=2)
    train_examples: int | None = optional(None, ge=2)

    def load(self) -> dict[str, Task]:
        """Return {name: task}, with so many evaluation examples."""
        train, evaluated = self.train_examples, self.eval_examples
        return {n: cached_task(n).limited(train=train, eval=evaluated) for n in self.tasks}

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
    decay: float = optional(1.0, gt=0, le=1)
    lr_floor: float = optional(0.0, ge=0, lt=1)
    weight_decay: float = optional(0.01, ge=0)
    clip: float | None = optional(1.0, gt=0)
    dense: bool = optional(False)  # a dense layer with tanh before each classifier
    precision: Precision = optional("float32")
    sampling: Sampling = "annealed"
    epochs: int = Field(5, ge=1)
    curve_points: int = Field(8, ge=1)
    curve_examples: int = Field(128, ge=2)

    def check(self) -> None:
        """Raise FslibError for an encoder that cannot be loaded."""
        super().check()
        self.shape()

    def shape(self) -> tuple[int, int]:
        """Return (layers, heads per layer) of the encoder."""
        return encoder_shape(self.encoder, self.max_length, self.tasks[0])


@cache
def encoder_shape(encoder: str, max_length: int, task: str) -> tuple[int, int]:
    """Return (layers, heads per layer) of an encoder, loaded once per process."""
    model = MultiTaskModel.from_pretrained(encoder, cached_task(task), max_length=max_length)
    return model.n_layers, model.n_heads


class SeededFineTuning(FineTuning, Unit):
    """A unit of one fine-tuning, with the seed of all that is drawn in it."""

    seed: int = Field(0, ge=0)

    def describe(self) -> str:
        """Say which tasks and seed this is about."""
        return f"{super().describe()}, seed {self.seed}"

    def options(self) -> dict[str, Any]:
        """Return the settings of `fslib.train`, those at their defaults perhaps left out."""
        schedule = {"steps", "batch_size", "lr", "decay", "lr_floor", "weight_decay", "clip"}
        return self.model_dump(include=schedule | {"sampling", "epochs", "precision", "seed"})

    def new_model(self, tasks: dict[str, Task]) -> MultiTaskModel:
        """Return the model that training begins with."""
        options: dict[str, Any] = {"max_length": self.max_length, "seed": self.seed}
        model = MultiTaskModel.from_pretrained(self.encoder, tasks, **options)
        if self.dense:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model.set_classifiers(model.answers, dense=True)
        return model


class WordsUnit(Data, Unit):
    """The baseline that knows words and nothing else: a linear model on TF-IDF, per task."""

    kind: ClassVar[str] = "words"

    def compute(self, store: Store) -> Result:
        """Fit logistic or ridge regression to each task's bag of words, and predict."""
        result = Result({})
        for name, task in self.load().items():
            predictions, features = predict_from_words(task)
            result.arrays[f"predictions/{name}"] = in_bytes(predictions)
            result.values[name] = {"features": features}
        return result


def predict_from_words(task: Task) -> tuple[np.ndarray, int]:
    """Predict a task's evaluation examples from their words.

    Returns:
        The predictions, and from how many features; from none, they are the best constant.
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor  # every kernel would wait for them
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    vectorizer, y = TfidfVectorizer(sublinear_tf=True), task.train.labels
    texts = [*task.train.texts, *(task.train.pairs or ())]
    if not any(map(vectorizer.build_analyzer(), texts)):  # signs and single letters are no words
        constant = DummyRegressor() if task.is_regression else DummyClassifier()
        nothing, neither = np.zeros((len(y), 1)), np.zeros((len(task.eval), 1))
        return constant.fit(nothing, y).predict(neither), 0
    x = bag_of_words(vectorizer.fit(texts), task.train)
    learner = Ridge() if task.is_regression else LogisticRegression(max_iter=2000)
    return learner.fit(x, y).predict(bag_of_words(vectorizer, task.eval)), int(x.shape[1])


def bag_of_words(vectorizer: Any, split: Split) -> Any:
    """Return sparse features, (n, features).

    Those of the text; for pairs, of both texts, and their elementwise product.
    """
    first = vectorizer.transform(split.texts)
    if split.pairs is None:
        return first
    second = vectorizer.transform(split.pairs)
    return hstack([first, second, first.multiply(second)]).tocsr()


class TrainUnit(SeededFineTuning):
    """One training run; the model of several tasks is kept as a checkpoint."""

    kind: ClassVar[str] = "train"

    def compute(self, store: Store) -> Result:
        """Train and evaluate."""
        # Only multi-task models are used again, by the units that follow.
        return self._fit(store.checkpoint(self) if len(self.tasks) > 1 else None)

    def _fit(self, folder: Path | None) -> Result:
        """Train, evaluate, and save the model in `folder` (None: do not)."""
        tasks = self.load()
        model = self.new_model(tasks)
        curve: dict[str, Any] = {
            "evaluate_every": max(1, self.steps // self.curve_points),
            "evaluate_on": {n: t.limited(eval=self.curve_examples) for n, t in tasks.items()},
        }
        history = train(model, tasks, **self.options(), **curve)
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
        arrays["losses"] = np.array(history.losses, np.float32)
        arrays["order"] = np.array(history.order, np.int8)
        return Result(values, arrays)

    def trained(self, store: Store) -> MultiTaskModel:
        """Return the trained model on this process's device.

        From its checkpoint, or trained now.
        """
        folder = store.checkpoint(self)
        store.get(self)
        with store.lock(self):  # of every process that writes, reads or deletes this checkpoint
            if folder.is_dir():
                try:
                    return MultiTaskModel.load(folder).to(best_device())
                except FslibError as error:
                    set_aside(folder, error)
            with fixed_threads(store.threads):
                self._fit(folder)
            return MultiTaskModel.load(folder).to(best_device())


def in_bytes(predictions: np.ndarray) -> np.ndarray:
    """Return class predictions in one byte each (up to 127 classes); values as they are."""
    is_small = predictions.dtype.kind == "i" and predictions.max() < 128
    return predictions.astype(np.int8) if is_small else predictions


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
        result = Result({"examples": {}})
        for name, task in self.model.load().items():
            parts = importance.contributions(
                model, task, examples=self.examples, seed=self.model.seed
            )
            result.arrays.update({f"{part}/{name}": x for part, x in vars(parts).items()})
            result.values["examples"][name] = len(parts.tokens)
        return result

    def contributions(self, store: Store) -> dict[str, Contributions]:
        """Return every task's per-example contributions, from the record."""
        arrays, parts = store.get(self).arrays, ("absolute", "signed", "tokens")
        return {t: Contributions(*(arrays[f"{p}/{t}"] for p in parts)) for t in self.model.tasks}


class PruneUnit(Unit):
    """Pruning of every task's top heads and of matched random heads."""

    kind: ClassVar[str] = "prune"
    importance: ImportanceUnit
    fractions: tuple[float, ...] = Field(min_length=1)
    controls: int = Field(ge=0)
    reduction: str = "token"
    normalize: str | None = None
    ablation: str = "zero"
    on: LesionedOn = optional("all")

    def task_names(self) -> list[str]:
        """Name the model's tasks."""
        return self.importance.task_names()

    def describe(self) -> str:
        """Say which tasks and seed the model is of."""
        return self.importance.describe()

    def check(self) -> None:
        """Raise FslibError for fractions and controls that the heads do not allow."""
        super().check()
        checked_fractions(self.fractions, self.importance.model.shape(), self.controls)

    def compute(self, store: Store) -> Result:
        """Prune, and keep every prediction."""
        model, scored = self.importance.model, self.importance.contributions(store)
        how = self.model_dump(include={"reduction", "normalize"})
        options = self.model_dump(include={"fractions", "controls", "ablation"})
        options |= {"examples": self.importance.examples, "seed": model.seed}
        options["importance"] = {t: parts.importance(**how) for t, parts in scored.items()}
        iap = prune_on(model.trained(store), model.load(), self.on, **options)
        return Result(iap_values(iap), iap_arrays(iap))

    def iap(self, store: Store) -> IAP:
        """Return the pruning results, from the record."""
        return recorded_iap(store.get(self))


def prune_on(model: MultiTaskModel, tasks: dict[str, Task], on: str, **options: Any) -> IAP:
    """Prune important heads, on all evaluation examples or on half of them.

    Args:
        model: what is pruned.
        tasks: by name.
        on: "all", or "scored": the half that scores are from. The other half, which decides on
            gates, then needs no lesion: it costs one pass of the unpruned model.
        options: of `prune_important_heads`.
    """
    if on == "all":
        return prune_important_heads(model, tasks, **options)
    scored, gating = (
        {name: _with_half(task, half) for name, task in tasks.items()}
        for half in (score_half, gate_half)
    )
    gates = evaluate(model, gating)
    apart = {u: Unlesioned(score.labels, score.predictions[None]) for u, score in gates.items()}
    return replace(prune_important_heads(model, scored, **options), apart=apart)


def scored_on(task: Task, on: str) -> Task:
    """Return a task with the evaluation examples of `prune_on`."""
    return task if on == "all" else _with_half(task, score_half)


def _with_half(task: Task, half: Callable[[int], np.ndarray]) -> Task:
    return replace(task, eval=task.eval.take(half(len(task.eval))))


def iap_values(iap: IAP) -> dict[str, Any]:
    """Return what a record says of an `IAP` in JSON."""
    return {k: list(getattr(iap, k)) for k in ("tasks", "metrics", "fractions")}


def iap_arrays(iap: IAP, prefix: str = "") -> Arrays:
    """Return the arrays of an `IAP` as a record keeps them, under names with a prefix."""
    return {prefix + k: in_bytes(v) if k != "heads" else v for k, v in iap.arrays().items()}


def recorded_iap(record: Record, name: str = "") -> IAP:
    """Return the `IAP` that a record keeps, under a name where it keeps several.

    Raises:
        FslibError: if it keeps none.
    """
    prefix = f"{name}/" if name else ""
    arrays = {k.removeprefix(prefix): v for k, v in record.arrays.items() if k.startswith(prefix)}
    if "heads" not in arrays:
        raise FslibError(f"record {record.kind}-{record.key} holds no pruning of {name!r}")
    tasks, metrics, fractions = (record.result[k] for k in ("tasks", "metrics", "fractions"))
    return IAP.from_arrays(tasks, metrics, fractions, arrays)


LESION_PARTS = ("labels", "predictions", "losses")  # of `HeadLesions`, a task each


class LesionUnit(OneModelUnit):
    """Every head switched off alone.

    On the first of the evaluation examples that the model's pruning is scored on.
    """

    kind: ClassVar[str] = "lesion"
    on: LesionedOn
    examples: int | None = Field(None, ge=2)

    def check(self) -> None:
        """Raise FslibError for a task of which a single example would be scored."""
        super().check()
        check_several({name: len(task.eval) for name, task in self.scored().items()})

    def scored(self) -> dict[str, Task]:
        """Return {name: task}, with the evaluation examples that every lesion is scored on."""
        tasks = self.model.load().items()
        return {n: scored_on(task, self.on).limited(eval=self.examples) for n, task in tasks}

    def compute(self, store: Store) -> Result:
        """Switch off one head after the other, and keep every prediction and loss."""
        found = lesion_heads(self.model.trained(store), self.scored())
        result = Result({k: list(getattr(found, k)) for k in ("tasks", "metrics", "shape")})
        for part in LESION_PARTS:
            named = getattr(found, part).items()
            result.arrays.update({f"{part}/{u}": in_bytes(rows) for u, rows in named})
        return result

    def lesions(self, store: Store) -> HeadLesions:
        """Return what every head alone is worth, from the record."""
        record = store.get(self)
        tasks, metrics, shape = (tuple(record.result[k]) for k in ("tasks", "metrics", "shape"))
        parts = [{u: record.arrays[f"{part}/{u}"] for u in tasks} for part in LESION_PARTS]
        return HeadLesions(tasks, metrics, shape, *parts)


class Pattern(NamedTuple):
    """What a model makes of one text of a task.

    Args:
        tokens: as the encoder reads them.
        label: the right answer's name, or a value.
        predicted: the model's.
        weights: (layers, heads, seq, seq), how much each token (row) attends to each (column).
        importance: (layers, heads, seq), |<ctx, grad>| of every token; summed over tokens and
            texts, and divided by their tokens, it is the head's importance.
    """

    tokens: tuple[str, ...]
    label: str
    predicted: str
    weights: Float[np.ndarray, "layers heads seq seq"]
    importance: Float[np.ndarray, "layers heads seq"]


class PatternUnit(OneModelUnit):
    """What heads attend to in evaluation texts that are short enough to be shown.

    The first few of every task; none for an architecture whose attention weights are not seen.
    """

    kind: ClassVar[str] = "pattern"
    examples: int = Field(ge=1)
    longest: int = Field(ge=4)

    def compute(self, store: Store) -> Result:
        """Look at the texts, and keep weights and importance."""
        model = self.model.trained(store)
        result = Result({"texts": {name: [] for name in self.model.tasks}})
        if model.encoder.config.model_type in HOOKED:
            return result
        for name, task in self.model.load().items():
            for number, text in enumerate(short_texts(model, task, self.examples, self.longest)):
                found = pattern(model, task, text)
                words = ("tokens", "label", "predicted")
                result.values["texts"][name].append({k: getattr(found, k) for k in words})
                # sixteen bits: four digits of a weight are more than can be seen
                result.arrays[f"weights/{name}/{number}"] = found.weights.astype(np.float16)
                result.arrays[f"importance/{name}/{number}"] = found.importance
        return result

    def patterns(self, store: Store) -> dict[str, list[Pattern]]:
        """Return every task's texts, from the record."""
        record = store.get(self)

        def kept(number: int, name: str, text: dict[str, Any]) -> Pattern:
            weights, scores = (
                record.arrays[f"{part}/{name}/{number}"] for part in ("weights", "importance")
            )
            words = text | {"tokens": tuple(text["tokens"])}
            return Pattern(**words, weights=weights.astype(np.float32), importance=scores)

        told = record.result["texts"].items()
        return {u: [kept(i, u, text) for i, text in enumerate(texts)] for u, texts in told}


def short_texts(model: MultiTaskModel, task: Task, examples: int, longest: int) -> list[Split]:
    """Return the first evaluation examples with at most `longest` tokens, one by one.

    Where there is none, the shortest.
    """
    first = task.eval.take(np.arange(min(len(task.eval), 100 * examples)))
    lengths = np.array([len(ids) for ids in model.encode(first).columns["input_ids"]])
    chosen = np.flatnonzero(lengths <= longest)[:examples]
    return [first.take([int(i)]) for i in (chosen if len(chosen) else [lengths.argmin()])]


def pattern(model: MultiTaskModel, task: Task, text: Split) -> Pattern:
    """Return what a model makes of one example of a task.

    Raises:
        FslibError: if its attention weights cannot be seen.
    """
    encoded = model.encode(text)
    batch = encoded.batch([0]).to(model.device)
    weights = attention_weights(model, batch.inputs)[:, 0].cpu().numpy()
    with importance.gradients_for(model):
        products = importance.head_products(model, batch, task.name)  # (layers, 1, seq, heads)
    per_token = products[:, 0].abs().transpose(1, 2).float().cpu().numpy()
    ids = batch.inputs["input_ids"][0].tolist()
    tokens = tuple(str(token) for token in model.tokenizer.convert_ids_to_tokens(ids))
    answers = text.labels[0], predict(model, task, [encoded.batch([0])], 1)[0]
    label, predicted = (named_answer(task, answer) for answer in answers)
    return Pattern(tokens, label, predicted, weights, per_token)


def named_answer(task: Task, answer: Any) -> str:
    """Return the name of a class, or a value as it is read."""
    return f"{float(answer):.2f}" if task.is_regression else task.label_names[int(answer)]


# Ways to choose heads: the first is the default.
# Michel et al. divide by layer norms; the paper's code does not.
SELECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient, layer-normalized": {"normalize": "layer"},
    "gradient, by example": {"reduction": "example"},
    "ablation": {"estimator": "ablation"},
    "integrated": {"estimator": "integrated"},
    "norm": {"estimator": "norm"},
}
UNMATCHED = "unmatched"  # in the names of random draws over all layers


class SelectionUnit(OneModelUnit):
    """One trained model, its heads chosen in several ways.

    selections: {name: options of `head_importance`}.
    """

    kind: ClassVar[str] = "selection"
    selections: dict[str, dict[str, Any]] = Field(min_length=1)
    examples: int = Field(ge=1)
    fraction: float = Field(gt=0, le=1)
    randoms: int = Field(ge=1)

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads do not allow."""
        super().check()
        checked_fractions([self.fraction], self.model.shape(), self.randoms)

    def compute(self, store: Store) -> Result:
        """Prune by every selection, and by random sets.

        `randoms` sets per task are matched by layer, and as many are not.
        """
        model, tasks, seed = self.model.trained(store), self.model.load(), self.model.seed
        shared: dict[str, Any] = {"examples": self.examples, "seed": seed}
        ways = {name: shared | options for name, options in self.selections.items()}
        for draw in range(self.randoms):
            ways[f"{UNMATCHED} {draw}"] = {"estimator": "random", "seed": 1000 + draw}
        arrays: Arrays = {}
        for number, (name, options) in enumerate(ways.items()):
            maps = {t: head_importance(model, task, **options) for t, task in tasks.items()}
            if name in self.selections:
                arrays |= {f"importance/{name}/{t}": x.astype(np.float32) for t, x in maps.items()}
            controls = 0 if number else self.randoms
            sets: dict[str, Any] = {"importance": maps, "seed": seed}
            iap = prune_important_heads(model, tasks, [self.fraction], controls, **sets)
            arrays |= iap_arrays(iap, f"{name}/")
        return Result({"shape": [model.n_layers, model.n_heads], **iap_values(iap)}, arrays)


MEASURES = ("importance", "top heads", "TaskEmb", "TextEmb", "CKA")


class SimilarityUnit(SeededFineTuning):
    """Similarity of every two tasks, from models trained on one task each."""

    kind: ClassVar[str] = "similarity"
    examples: int = Field(ge=2)
    fraction: float = Field(0.3, gt=0, le=1)

    def compute(self, store: Store) -> Result:
        """Measure on models that never saw a pair of tasks.

        So no measure shares noise with the pair's dissociation.
        """
        tasks = self.load()
        shared: dict[str, Any] = {"examples": self.examples, "seed": self.seed}
        parts = [task.part("train", self.examples, self.seed) for task in tasks.values()]
        pretrained = MultiTaskModel.from_pretrained(self.encoder, tasks, max_length=self.max_length)
        pretrained.to(best_device())
        seen: dict[str, list] = {measure: [] for measure in MEASURES}
        for name, task in tasks.items():
            train(model := self.new_model({name: task}), task, **self.options())
            seen["importance"].append(head_importance(model, task, **shared))
            seen["TaskEmb"].append(similarity.task_embedding(model, task, **shared))
            seen["TextEmb"].append(similarity.text_embedding(pretrained, task, **shared))
            # of pairs and single texts alike: all models see the texts of all tasks
            read = [similarity.representations(model, part) for part in parts]
            seen["CKA"].append(np.concatenate(read))
        seen["top heads"] = seen["importance"]
        measures: dict[str, Any] = {
            "importance": similarity.importance_similarity,
            "top heads": partial(similarity.head_overlap, fraction=self.fraction),
            "TaskEmb": similarity.task_similarity,
            "TextEmb": similarity.cosine,
            "CKA": similarity.linear_cka,
        }
        matrices = {
            m: [[float(alike(a, b)) for b in seen[m]] for a in seen[m]]
            for m, alike in measures.items()
        }
        maps = zip(tasks, seen["importance"], strict=True)
        arrays = {f"importance/{t}": scores.astype(np.float32) for t, scores in maps}
        return Result({"tasks": list(tasks), "similarity": matrices}, arrays)


Spec = dict[str, Any] | None  # of an ending: its kind and options; None is plain training
ENDINGS: dict[str, Any] = {"IAT": IAT, "PCGrad": PCGrad, "Stop": Stop, "plain": Ending}
TRUNK, PLAIN, TREATED, RANDOM = "trunk", "plain", "IAT", "IAT, random heads"
AS_IT_WAS = "pre-trained"  # the encoder as it was, a source of transfer beside the endings


def make_ending(spec: Spec) -> Ending | None:
    """Return an ending from its description."""
    if spec is None:
        return None
    options = dict(spec)
    return ENDINGS[options.pop("kind")](**options)


class Targets(Config):
    """New tasks that are learned from some endings' encoders, and from the encoder as it was.

    sources: names of endings. sizes: training examples; None for all. A training set is gone
    through `passes` times, in at least `min_steps` and at most `max_steps` steps.
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


class EndingsUnit(SeededFineTuning):
    """One trunk and its endings, each pruned, or taken as a source of transfer, or both.

    endings: {name: {"kind": IAT, PCGrad or Stop, and its options}, or None for plain training}.
    pruned: the endings whose dissociation is measured, at `fractions`, on the first
    `prune_examples` of evaluation. targets: new tasks to be learned from some of the endings.
    """

    kind: ClassVar[str] = "endings"
    endings: dict[str, Spec] = Field(min_length=1)
    pruned: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.3,)
    examples: int = Field(ge=1)
    prune_examples: int | None = Field(None, ge=2)
    on: LesionedOn = optional("all")
    targets: Targets | None = optional(None)

    def task_names(self) -> list[str]:
        """Name the trunk's tasks, and the new ones."""
        return [*self.tasks, *(self.targets.tasks if self.targets else ())]

    def check(self) -> None:
        """Raise FslibError for what the heads, the steps or the tasks do not allow."""
        super().check()
        checked_fractions(self.fractions, self.shape())
        for ending in filter(None, self.made().values()):
            ending.start(self.steps)
        for spec in self.endings.values():
            if spec and "alpha" in spec:
                checked_fractions([spec["alpha"]], self.shape(), what="alpha")

    def made(self) -> dict[str, Ending | None]:
        """Return the endings by name, made of their descriptions."""
        return {name: make_ending(spec) for name, spec in self.endings.items()}

    def compute(self, store: Store) -> Result:
        """Train the trunk, then every ending from it; score each, and do what is asked."""
        tasks, endings = self.load(), self.made()
        model = self.new_model(tasks)
        branched: dict[str, int] = {}
        moved: dict[str, dict[str, float]] = {}
        parameters: dict[str, int] = {}
        movement: Movement | None = None
        arrays = self._learned(model, AS_IT_WAS)
        for name, history in branch(model, tasks, endings, **self.options()):
            branched[name], parameters[name] = history.branched, model.n_parameters()
            for t, score in evaluate(model, tasks).items():
                arrays[f"predictions/{name}/{t}"] = in_bytes(score.predictions)
            arrays |= {f"heads/{name}/{t}": heads for t, heads in history.heads.items()}
            if isinstance(endings[name], Stop):
                movement = Movement(model, history.branched)
            # plain training went on from the same step, however late other endings branch off
            elif movement and (history.branched == movement.step or endings[name] is None):
                moved[name] = movement.since(history.heads)
            if name in self.pruned:
                arrays |= iap_arrays(self._prune(model), f"{name}/")
            if self.targets and name in self.targets.sources:
                arrays |= self._learned(model, name)
        values: dict[str, Any] = {"branched": branched, "parameters": parameters, "moved": moved}
        metrics = [task.metric for task in tasks.values()]
        values |= {"tasks": list(tasks), "metrics": metrics, "fractions": sorted(self.fractions)}
        return Result(values, arrays)

    def _prune(self, model: MultiTaskModel) -> IAP:
        """Score every task's heads as the model is now, and prune them."""
        tasks, seed = self.load(), self.seed
        scoring: dict[str, Any] = {"examples": self.examples, "seed": seed}
        maps = {t: head_importance(model, task, **scoring) for t, task in tasks.items()}
        limited = {n: t.limited(eval=self.prune_examples) for n, t in tasks.items()}
        sets: dict[str, Any] = {"fractions": self.fractions, "controls": 0, "importance": maps}
        return prune_on(model, limited, self.on, seed=seed, **sets)

    def _learned(self, source: MultiTaskModel, name: str) -> Arrays:
        """Return predictions of every target, at every size and in both ways.

        Each is learned from a copy of the source.
        """
        plan, found = self.targets, {}
        if plan is None:
            return {}
        for target in plan.tasks:
            task = cached_task(target).limited(eval=plan.eval_examples)
            for size in plan.sizes:
                steps = plan.steps(size or len(task.train), self.batch_size)
                shared = self.model_dump(include={"batch_size", "lr", "seed"}) | {"steps": steps}
                for part in PARTS:
                    with hidden():
                        learned = transfer(source, task, part=part, size=size, **shared)
                    where = transfer_name(target, name, part, size)
                    found[where] = in_bytes(learned.score.predictions)
        return found


def transfer_name(target: str, source: str, part: str, size: int | None) -> str:
    """Return under which name a record keeps the predictions of a target."""
    return f"transfer/{target}/{source}/{part}/{size or 'all'}"


class Movement:
    """How far rows of heads move between a step and now: a root mean square over weights."""

    def __init__(self, model: MultiTaskModel, step: int) -> None:
        self.step, self.rows = step, head_rows(model)
        self.then = {row.parameter: row.parameter.detach().clone() for row in self.rows}
        self.inside: np.ndarray | None = None

    def since(self, heads: Arrays) -> dict[str, float]:
        """Return how far rows moved, of heads in some task's set, and of those in none.

        The first sets that are given say which.
        """
        if heads and self.inside is None:
            self.inside = np.logical_or.reduce(list(heads.values()))
        if self.inside is None:
            return {}
        parts: dict[str, list[HeadRows]] = {"in no set": [], "in a set": []}
        for row in self.rows:
            parts["in a set" if row.belong_to(self.inside) else "in no set"].append(row)
        return {what: self._rms(rows) for what, rows in parts.items() if rows}

    def _rms(self, rows: list[HeadRows]) -> float:
        changes = [r.of(r.parameter.detach()) - r.of(self.then[r.parameter]) for r in rows]
        whole = torch.cat([change.flatten() for change in changes])
        return float(whole.double().square().mean().sqrt())
