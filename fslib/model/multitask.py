"""`MultiTaskModel`: one encoder shared by all tasks, one linear classifier per task."""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fslib.data.batches import Batch, Encoded
from fslib.data.tasks import Split, Task, Tasks, as_tasks
from fslib.errors import FslibError, check_among, check_count, checked_path, explained
from fslib.model import encoders
from fslib.model.attention import attach, control_of
from fslib.model.devices import device_of, partial_mark

POOLINGS = ("first", "mean", "last")
Pooled = Float[Tensor, "batch hidden"]
Logits = Float[Tensor, "batch outputs"]
CARD, WEIGHTS = "fslib.json", "classifiers.safetensors"


@dataclass(frozen=True)
class Answer:
    """What a classifier's outputs mean, and how they are scored.

    Attributes:
        outputs: their number: one per label name, or 1.
        label_names: in the outputs' order; none where the output is a number.
        metric: by name.
    """

    outputs: int
    label_names: Sequence[str]
    metric: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_names", tuple(self.label_names))  # JSON has lists

    @classmethod
    def to(cls, task: Task) -> "Answer":
        """Return what a classifier for this task answers."""
        return cls(task.n_outputs, task.label_names, task.metric)

    def __str__(self) -> str:
        return f"{', '.join(self.label_names) or 'a number'} ({self.metric})"


Answers = Mapping[str, Answer]


class Classifiers(nn.ModuleDict):
    """A classifier per task, {name: classifier}, under any name: `train`, `type`, `keys`, too.

    Why not a plain ModuleDict: it refuses names that are attributes of modules. Here names are keys
    and nothing else.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Keep a classifier under its name."""
        self._modules[name] = module  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        # as in a module without such a key: a task may be called `training`, every module's mode
        if name in self.__dict__.get("_modules", ()):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class DenseClassifier(nn.Module):
    """A classifier behind a dense layer and a tanh, as the paper's released code has them."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, pooled: Pooled) -> Logits:
        """Return logits, or the one regression value."""
        return self.out(torch.tanh(self.dense(pooled)))


class MultiTaskModel(nn.Module):
    """One shared encoder and one linear classifier per task (Li et al., 2023).

    Attributes:
        encoder: a transformers model whose heads a `HeadControl` reaches.
        control: what is done to them.
        tokenizer: the encoder's.
        classifiers: {task: classifier}.
        answers: {task: what its classifier answers}.
        pooling: first, mean or last.
        max_length: tokens of an example, the special ones among them.
        n_layers, n_heads: of the encoder; heads a layer.
        source: the name it was loaded by.
    """

    encoder: Any
    classifiers: Any

    def __init__(
        self, encoder: Any, tokenizer: Any, answers: Answers, how: str, max_length: int, source: str
    ) -> None:
        super().__init__()
        check_among("pooling", how, POOLINGS)
        check_count("max_length", max_length)
        self.control = attach(encoder)  # one for all models that hold this encoder
        self.encoder, self.tokenizer = encoder, tokenizer
        self.pooling, self.source = how, source
        self.n_layers, self.n_heads = self.control.layers, self.control.head_shapes[0][0]
        # RoBERTa's position table is 2 longer than the longest text
        positions = getattr(encoder.config, "max_position_embeddings", 1 << 30) - 2
        limits = [max_length, tokenizer.model_max_length, positions]
        self.max_length = min(int(limit) for limit in limits if limit and limit > 0)
        self.accepts = set(inspect.signature(encoder.forward).parameters)
        self.dropout = nn.Dropout(0.1)
        self.set_classifiers(answers)

    def set_classifiers(self, answers: Answers, *, dense: bool = False) -> None:
        """Give the model new classifiers with random weights: linear, or dense ones."""
        width, kind = self.encoder.config.hidden_size, DenseClassifier if dense else nn.Linear
        self.answers = dict(answers)
        self.classifiers = Classifiers({t: kind(width, a.outputs) for t, a in answers.items()})
        for name, parameter in self.classifiers.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
        self.classifiers.to(self.device, next(self.encoder.parameters()).dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        tasks: Tasks,
        *,
        pooling: str | None = None,
        max_length: int = 128,
        seed: int = 0,
    ) -> "MultiTaskModel":
        """Load an encoder, with new classifiers for `tasks`.

        Args:
            name: fslib's name of an encoder, a local folder, or a Hub id.
            tasks: one, several, or several by name.
            pooling: first, mean or last; None takes what the model is: a sentence-transformers
                folder says so itself, a decoder has only its last token, an encoder with a start
                token uses that, else the mean.
            max_length: tokens of an example, the special ones among them; what is longer is cut
                off (`Encoded.truncated`).
            seed: for the classifiers, and for an encoder that is not pre-trained.

        Raises:
            FslibError: for an unknown name or pooling, an unreachable Hub, weights that are not
                safetensors, and an architecture whose heads cannot be reached (by name).
        """
        check_count("seed", seed, 0)
        named, known = as_tasks(tasks), (*encoders.ENCODERS, *encoders.PRETRAINED)
        if Path(str(name)).is_dir() and str(name) not in known:
            name = Path(name).absolute()  # a relative path changes with the working folder
        # weights made in inference mode could never have a gradient
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, tokenizer, folder = encoders.load_encoder(str(name))
            if pooling is None:
                pooling = encoders.natural_pooling(encoder, tokenizer, folder)
            answers = {task: Answer.to(t) for task, t in named.items()}
            model = cls(encoder, tokenizer, answers, pooling, max_length, str(name)).eval()
        for task in named.values():
            model.check_room(task.train)
        return model

    @property
    def device(self) -> torch.device:
        return device_of(self.encoder)

    def check_room(self, split: Split) -> None:
        """Raise FslibError if `max_length` has no room for a token of each text of an example."""
        texts = 1 if split.pairs is None else 2
        special = self.tokenizer.num_special_tokens_to_add(pair=texts == 2)
        check_count("max_length", self.max_length, special + texts)

    def encode(self, split: Split) -> Encoded:
        """Return the token ids of a split, truncated to `max_length` tokens.

        Raises:
            FslibError: where that leaves nothing of a text, and for ids that the encoder has no
                embedding for: then the tokenizer is another model's.
        """
        self.check_room(split)
        encoded = Encoded(split, self.tokenizer, self.max_length)
        known = self.encoder.get_input_embeddings().num_embeddings
        largest = max(int(row.max()) for row in encoded.columns["input_ids"])
        if (id_ := max(largest, self.tokenizer.pad_token_id)) >= known:
            raise FslibError(f"token id {id_}, but {self.source} has embeddings for {known} tokens")
        return encoded

    def forward(self, inputs: dict[str, Tensor], task: str) -> Logits:
        """Return logits, or the one regression value, of one task.

        Args:
            inputs: token ids, their mask and what else the tokenizer gives, (batch, seq) each.
            task: by name.
        """
        check_among("task of this model", task, self.classifiers)
        taken = {k: v for k, v in inputs.items() if k in self.accepts}
        hidden = self.encoder(**taken).last_hidden_state  # (batch, seq, hidden)
        pooled = pool(hidden, inputs["attention_mask"], self.pooling)
        return self.classifiers[task](self.dropout(pooled))

    def losses(self, batch: Batch, task: str) -> Float[Tensor, "batch"]:
        """Return every example's own loss: cross-entropy, or squared error for regression."""
        return example_losses(self(batch.inputs, task), batch.labels)

    def n_parameters(self) -> int:
        """Count the parameters of encoder and classifiers."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write encoder, tokenizer and classifiers as safetensors and JSON.

        The folder appears whole or not at all.
        """
        folder = checked_path("folder of a model", folder)
        partial = folder.with_name(folder.name + partial_mark())
        shutil.rmtree(partial, ignore_errors=True)
        card = {name: getattr(self, name) for name in ("source", "pooling", "max_length")}
        card["answers"] = {t: asdict(a) for t, a in self.answers.items()}
        card["shape"] = encoders.shape_of(self.encoder.config)
        try:
            partial.mkdir(parents=True)
            with encoders.quiet():
                self.encoder.save_pretrained(partial / "encoder")
                self.tokenizer.save_pretrained(partial / "encoder")
            safetensors.torch.save_file(self.classifiers.state_dict(), partial / WEIGHTS)
            (partial / CARD).write_text(json.dumps(card, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> "MultiTaskModel":
        """Read what `save` wrote.

        Raises:
            FslibError: for a folder that is missing or incomplete, and for a file that is
                damaged or does not fit the others, by name.
        """
        folder = checked_path("folder of a model", folder)
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            answers = {task: Answer(**answer) for task, answer in card["answers"].items()}
            options = card["pooling"], card["max_length"], card["source"]
            with torch.inference_mode(False):
                encoder, tokenizer, _ = encoders.load_encoder(str(folder / "encoder"))
                encoders.check_shape("its encoder", encoder.config, card["shape"])
                model = cls(encoder, tokenizer, answers, *options)
                weights = safetensors.torch.load_file(folder / WEIGHTS)
                if any(name.endswith(".dense.weight") for name in weights):
                    model.set_classifiers(answers, dense=True)
                model.eval().classifiers.load_state_dict(weights)
        except Exception as error:  # torch, safetensors and JSON of any kind each raise their own
            raise FslibError(f"checkpoint {folder} cannot be loaded: {explained(error)}") from error
        return model


def check_model(model: object, *tasks: Task) -> None:
    """Make sure that a model is one of this package, and made for these tasks.

    A task's name is not enough: on labels in another order, a classifier's answers would be scored
    as their opposites.

    Raises:
        FslibError: for what is no MultiTaskModel, such as DataParallel, a task that the model has
            no classifier for, and one that asks something else under the same name.
    """
    control_of(model)
    if not isinstance(model, MultiTaskModel):
        name = type(model).__name__
        raise FslibError(f"{name} is no MultiTaskModel: use MultiTaskModel.from_pretrained")
    for task in tasks:
        as_tasks(task)  # refuses what is no task
        check_among("task of this model", task.name, model.answers)
        own, asked = model.answers[task.name], Answer.to(task)
        if own != asked:
            made = f"is not the one this model was made for: {asked}, not {own}"
            raise FslibError(f"task {task.name} {made}: give it another name")


def pool(hidden: Float[Tensor, "batch seq hidden"], mask: Tensor, how: str) -> Pooled:
    """Return one vector per text: the first token's, the last real token's, or the mean."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def example_losses(logits: Logits, labels: Tensor) -> Float[Tensor, "batch"]:
    """Return every example's cross-entropy, or its squared error where labels are numbers."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels) ** 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")
