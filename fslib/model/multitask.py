"""`MultiTaskModel`: one encoder shared by all tasks, one linear classifier per task."""

import inspect
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fslib.data.batches import Batch, Encoded
from fslib.data.tasks import Split, Task, as_tasks
from fslib.errors import FslibError, check_count, checked_path, first_line, unknown
from fslib.model.attention import HeadControl, attach, control_of
from fslib.model.devices import device_of, partial_mark
from fslib.model.encoders import (
    ENCODERS,
    PRETRAINED,
    check_shape,
    load_encoder,
    natural_pooling,
    quiet,
    shape_of,
)

POOLINGS = ("first", "mean", "last")
CARD = "fslib.json"


@dataclass(frozen=True)
class Answer:
    """What a classifier's outputs mean: `outputs` of them, one per label name, or one number; scored by `metric`.

    label_names, metric: None where a checkpoint of an older version does not say.
    """

    outputs: int
    label_names: tuple[str, ...] | None
    metric: str | None

    def __post_init__(self) -> None:
        check_count("outputs", self.outputs)

    @classmethod
    def to(cls, task: Task) -> "Answer":
        """Return what a classifier for this task answers."""
        return cls(task.n_outputs, task.label_names, task.metric)

    def agrees(self, other: "Answer") -> bool:
        """Tell whether nothing that both know differs."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return all(own == theirs for own, theirs in pairs if own is not None and theirs is not None)

    def __str__(self) -> str:
        names = "a number" if self.outputs == 1 else f"{self.outputs} classes"
        return f"{', '.join(self.label_names) if self.label_names else names} ({self.metric or 'metric not known'})"


class Classifiers(nn.ModuleDict):
    """A classifier per task, {name: classifier}, where a name may be anything: `train`, `type` and `keys`, too.

    Why not a plain ModuleDict: it refuses names that are attributes of modules. Here names are keys and nothing else.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Keep a classifier under its name."""
        self._modules[name] = module  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        # as in a module without such a key: a task may be called `training`, which is also every module's mode
        if name in self.__dict__.get("_modules", ()):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class DenseClassifier(nn.Module):
    """A classifier behind a dense layer and a tanh, as checkpoints of the paper's released code have them."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.out_features = outputs
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, pooled: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch outputs"]:
        """Return logits, or the one regression value."""
        return self.out(torch.tanh(self.dense(pooled)))


class MultiTaskModel(nn.Module):
    """One shared encoder and one linear classifier per task (Li et al., 2023).

    Attributes: encoder, tokenizer, classifiers, answers (what is known of each task: label names and metric),
    pooling, max_length, n_layers, n_heads, source (the name it was loaded by).
    """

    encoder: Any
    classifiers: Any

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        answers: Mapping[str, Answer],
        pooling: str,
        max_length: int,
        source: str,
    ) -> None:
        super().__init__()
        control = attach(encoder)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.source = source
        self.n_layers, self.n_heads = control.layers, control.head_shapes[0][0]
        config = encoder.config
        # RoBERTa's position table is 2 longer than the longest text
        limits = [
            max_length,
            tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", 1 << 30) - 2,
        ]
        self.max_length = min(int(limit) for limit in limits if limit and limit > 0)
        self.accepts = set(inspect.signature(encoder.forward).parameters)
        self.dropout = nn.Dropout(0.1)
        self.set_classifiers(answers)

    def set_classifiers(self, answers: Mapping[str, Answer], *, dense: bool = False) -> None:
        """Give the model new classifiers, with random weights, in the place of those it has: linear, or dense ones."""
        width, kind = self.encoder.config.hidden_size, DenseClassifier if dense else nn.Linear
        self.answers = dict(answers)
        self.classifiers = Classifiers(
            {task: kind(width, a.outputs) for task, a in answers.items()}
        )
        for name, parameter in self.classifiers.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(
                parameter, std=0.02
            )
        self.classifiers.to(self.device, next(self.encoder.parameters()).dtype)

    @property
    def control(self) -> HeadControl:
        """What is done to the encoder's heads; one for all models that hold this encoder."""
        return control_of(self)

    def check_tasks(self, tasks: Iterable[Task]) -> None:
        """Raise FslibError for a task that the model has no classifier for, or one that answers something else.

        A name is not enough: on labels in another order, a classifier's answers would be scored as their opposites.
        """
        for task in tasks:
            as_tasks(task)  # refuses what is no task
            if task.name not in self.answers:
                raise unknown("task of this model", task.name, self.answers)
            own, asked = self.answers[task.name], Answer.to(task)
            if not own.agrees(asked):
                raise FslibError(
                    f"task {task.name} is not the one this model was made for: that has {own}, this one {asked}; give "
                    "it another name, or the same labels in the same order"
                )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        tasks: Task | Iterable[Task] | Mapping[str, Task],
        *,
        pooling: str | None = None,
        max_length: int = 128,
        seed: int = 0,
    ) -> "MultiTaskModel":
        """Load an encoder by fslib's name, local folder or Hub id, with new classifiers for `tasks`.

        pooling: first, mean or last; None takes what the model is: a sentence-transformers folder says so
            itself, a decoder has only its last token, an encoder with a start token uses that, else the mean.
        max_length: tokens of an example, the special ones among them; what is longer is cut off (`Encoded.truncated`).
        seed: for the classifiers, and for the encoder where it is not pre-trained.
        Raises FslibError for an unknown name or pooling, an unreachable Hub, weights that are not
        safetensors, and an architecture whose heads cannot be reached (by name).
        """
        if pooling not in (None, *POOLINGS):
            raise unknown("pooling", pooling, POOLINGS)
        check_count("max_length", max_length)
        check_count("seed", seed, 0)
        named = as_tasks(tasks)
        if Path(str(name)).is_dir() and str(name) not in (*ENCODERS, *PRETRAINED):
            name = Path(
                name
            ).absolute()  # a relative path is another folder from another working folder
        # weights made in inference mode could never have a gradient
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, tokenizer, folder = load_encoder(str(name))
            how = pooling or natural_pooling(encoder, tokenizer, folder)
            answers = {task: Answer.to(t) for task, t in named.items()}
            model = cls(encoder, tokenizer, answers, how, max_length, str(name)).eval()
        for task in named.values():
            model.check_room(task.train)
        return model

    @property
    def device(self) -> torch.device:
        return device_of(self.encoder)

    def check_room(self, split: Split) -> None:
        """Raise FslibError where `max_length` has no room for a token of each of an example's texts."""
        texts = 1 if split.pairs is None else 2
        check_count(
            "max_length",
            self.max_length,
            self.tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts,
        )

    def encode(self, split: Split) -> Encoded:
        """Return the token ids of a split, truncated to `max_length` tokens.

        Raises FslibError where that leaves nothing of a text, and for ids that the encoder has no embedding for: then
        the tokenizer is another model's.
        """
        self.check_room(split)
        encoded = Encoded(split, self.tokenizer, self.max_length)
        known = self.encoder.get_input_embeddings().num_embeddings
        if (largest := encoded.largest_id) >= known:
            raise FslibError(
                f"the tokenizer of {self.source} gives token id {largest}, but its encoder has embeddings for {known} "
                "tokens: they do not belong together"
            )
        return encoded

    def forward(self, inputs: dict[str, Tensor], task: str) -> Float[Tensor, "batch outputs"]:
        """Return logits (or the one regression value) of one task for a batch of token ids and their mask."""
        if task not in self.classifiers:
            raise unknown("task of this model", task, self.classifiers)
        taken = {k: v for k, v in inputs.items() if k in self.accepts}
        hidden = self.encoder(**taken).last_hidden_state  # (batch, seq, hidden)
        return self.classifiers[task](
            self.dropout(pool(hidden, inputs["attention_mask"], self.pooling))
        )

    def losses(self, batch: Batch, task: str) -> Float[Tensor, "batch"]:
        """Return every example's own loss: cross-entropy, or squared error for regression."""
        return example_losses(self(batch.inputs, task), batch.labels)

    def n_parameters(self) -> int:
        """Count the parameters of encoder and classifiers."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write encoder, tokenizer and classifiers as safetensors and JSON; the folder appears whole or not at all."""
        folder = checked_path("folder of a model", folder)
        partial = folder.with_name(folder.name + partial_mark())
        shutil.rmtree(partial, ignore_errors=True)
        card = {
            "source": self.source,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "outputs": {t: c.out_features for t, c in self.classifiers.items()},
            "answers": {t: asdict(a) for t, a in self.answers.items()},
            "shape": shape_of(self.encoder.config),
        }
        try:
            partial.mkdir(parents=True)
            with quiet():
                self.encoder.save_pretrained(partial / "encoder")
                self.tokenizer.save_pretrained(partial / "encoder")
            safetensors.torch.save_file(
                self.classifiers.state_dict(), partial / "classifiers.safetensors"
            )
            (partial / CARD).write_text(json.dumps(card, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> "MultiTaskModel":
        """Read what `save` wrote. Raises FslibError if the folder is missing, incomplete or damaged."""
        if not isinstance(folder, str | Path):
            raise FslibError(
                f"{folder!r} is no path of a folder that MultiTaskModel.save has written"
            )
        folder = Path(folder)
        if not (folder / CARD).is_file():
            raise FslibError(f"{folder} is not a saved MultiTaskModel: it has no {CARD}")
        try:
            with torch.inference_mode(False):
                return cls._read(folder)
        except (
            Exception
        ) as error:  # torch, safetensors and JSON of any kind raise here, each their own
            raise FslibError(
                f"checkpoint {folder} is damaged ({first_line(error)}): delete it and train again"
            ) from error

    @classmethod
    def _read(cls, folder: Path) -> "MultiTaskModel":
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        encoder, tokenizer, _ = load_encoder(str(folder / "encoder"))
        if "shape" in card:  # checkpoints of older versions do not say
            check_shape("its encoder", encoder.config, card["shape"])
        check_count("max_length", card["max_length"])
        if card["pooling"] not in POOLINGS:
            raise unknown("pooling", card["pooling"], POOLINGS)
        model = cls(
            encoder, tokenizer, _answers(card), card["pooling"], card["max_length"], card["source"]
        )
        weights = safetensors.torch.load_file(folder / "classifiers.safetensors")
        if any(name.endswith(".dense.weight") for name in weights):
            model.set_classifiers(model.answers, dense=True)
        model.eval().classifiers.load_state_dict(weights)
        return model


def _answers(card: dict[str, Any]) -> dict[str, Answer]:
    """Return what a checkpoint's card says of its tasks; those of older versions tell the number of outputs alone."""
    if "answers" not in card:
        return {task: Answer(outputs, None, None) for task, outputs in card["outputs"].items()}
    known = {}
    for task, answer in card["answers"].items():
        names = tuple(answer["label_names"]) if answer["label_names"] is not None else None
        known[task] = Answer(answer["outputs"], names, answer["metric"])
    return known


def check_model(model: object, *tasks: Task) -> None:
    """Raise FslibError for what is no MultiTaskModel, such as DataParallel, and for a task that it was not made for."""
    control_of(model)
    if not hasattr(model, "check_tasks"):
        raise FslibError(
            f"{type(model).__name__} is no MultiTaskModel: make one with MultiTaskModel.from_pretrained"
        )
    if tasks:
        model.check_tasks(tasks)


def pool(
    hidden: Float[Tensor, "batch seq hidden"], mask: Tensor, how: str
) -> Float[Tensor, "batch hidden"]:
    """Return one vector per text from the last hidden states: the first token's, the last real one's, or the mean."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def example_losses(
    logits: Float[Tensor, "batch outputs"], labels: Tensor
) -> Float[Tensor, "batch"]:
    """Return every example's cross-entropy, or its squared error where labels are numbers."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels) ** 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")
