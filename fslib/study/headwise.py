"""The units that look at heads one by one: what losing each costs, and what each attends to."""

import sys
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field

from fslib.data.tasks import Split, Task
from fslib.errors import FslibError
from fslib.evaluation import check_several, predict
from fslib.importance import gradients_for, head_products
from fslib.lesions import HeadLesions, lesion_heads
from fslib.model import footprint
from fslib.model.attention import HOOKED, attention_weights
from fslib.model.multitask import MultiTaskModel
from fslib.study.evidence import score_half
from fslib.study.records import Record, Result, Store, Unit
from fslib.study.study import Study
from fslib.study.units import LesionedOn, OneModelUnit, in_bytes, with_half

TEXTS = 2  # of every task, to show attention on
LONGEST = 32  # tokens of a text whose attention is shown, special ones included
PARTS = ("labels", "predictions", "losses")


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

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer."""
        layers, heads = footprint.shape(self.model.encoder)
        tokens = sum(size * self.model.tokens(task) for task, size in self._sizes().items())
        return float(layers * (1 + layers * heads) * tokens)

    def tasks(self) -> dict[str, Task]:
        """Return the model's tasks, with the evaluation examples that are used."""
        return {name: scored_on(task, self.on).limited(eval=self.examples) for name, task in self.model.load().items()}

    def compute(self, store: Store) -> Result:
        """Switch off one head after the other, and keep every prediction and loss."""
        found = lesion_heads(self.model.trained(store), self.tasks())
        arrays = {f"{part}/{u}": in_bytes(rows) for part in PARTS for u, rows in getattr(found, part).items()}
        return Result({"tasks": list(found.tasks), "metrics": list(found.metrics), "shape": list(found.shape)}, arrays)

    def lesions(self, store: Store) -> HeadLesions:
        """Return what every head alone is worth, from the record."""
        record = store.get(self)
        tasks = tuple(record.result["tasks"])
        parts = [{u: record.arrays[f"{part}/{u}"] for u in tasks} for part in PARTS]
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

    def token_layers(self) -> float:
        """Return about how often a token goes through a layer."""
        return float(4 * self.model.layers() * self.longest * self.examples * len(self.model.tasks))

    def compute(self, store: Store) -> Result:
        """Look at the texts, and keep weights and importance."""
        model = self.model.trained(store)
        texts: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        is_seen = model.encoder.config.model_type not in HOOKED
        for name, task in self.model.load().items():
            chosen = short_texts(model, task, self.examples, self.longest) if is_seen else []
            found = [pattern(model, task, text) for text in chosen]
            texts[name] = [{k: v for k, v in p._asdict().items() if isinstance(v, str | tuple)} for p in found]
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
    tokens = tuple(str(t) for t in model.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist()))
    answer = predict(model, task, [encoded.batch([0])], 1)[0]
    return Pattern(tokens, named_answer(task, text.labels[0]), named_answer(task, answer), weights, importance)


def named_answer(task: Task, answer: Any) -> str:
    """Return the name of a class, or a value as it is read."""
    return f"{float(answer):.2f}" if task.is_regression else task.label_names[int(answer)]


def lesion_unit(study: Study, seed: int) -> LesionUnit:
    """Return the unit of every head alone of a study's main model."""
    p = study.profile
    return LesionUnit(model=study.units(seed).train, on=p.lesioned_on, examples=p.lesion_examples)


def pattern_unit(study: Study, seed: int) -> PatternUnit:
    """Return the unit of what the heads of a study's main model attend to."""
    return PatternUnit(model=study.units(seed).train, examples=TEXTS, longest=LONGEST)


def head_units(study: Study, seed: int) -> list[Unit]:
    """Return what is looked at head by head of a main model: lesions of the first few, texts of the first."""
    alone = [lesion_unit(study, seed)] if seed in study.seeds[: study.profile.lesion_seeds] else []
    return [*alone, *([pattern_unit(study, seed)] if seed == study.seeds[0] else [])]
