"""`MultiTaskModel`: one encoder shared by all tasks, one linear classifier per task."""

import inspect
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from fslib.data.batches import Batch, Encoded
from fslib.data.tasks import Split, Task, as_tasks
from fslib.errors import FslibError, first_line, unknown
from fslib.model.attention import attach
from fslib.model.encoders import check_shape, load_encoder, natural_pooling, quiet, shape_of

POOLINGS = ("first", "mean", "last")
CARD = "fslib.json"


class MultiTaskModel(nn.Module):
    """One shared encoder and one linear classifier per task (Li et al., 2023).

    Attributes: encoder, tokenizer, classifiers, tasks (what is needed of each: label names and metric),
    pooling, max_length, n_layers, n_heads, source (the name it was loaded by).
    """

    encoder: Any
    classifiers: Any

    def __init__(
        self, encoder: Any, tokenizer: Any, outputs: Mapping[str, int], pooling: str, max_length: int, source: str
    ) -> None:
        super().__init__()
        self.control = attach(encoder)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.source = source
        self.n_layers, self.n_heads = self.control.layers, self.control.head_shapes[0][0]
        config = encoder.config
        # RoBERTa's position table is 2 longer than the longest text
        limits = [max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", 1 << 30) - 2]
        self.max_length = min(int(limit) for limit in limits if limit and limit > 0)
        self.accepts = set(inspect.signature(encoder.forward).parameters)
        self.dropout = nn.Dropout(0.1)
        self.classifiers = nn.ModuleDict({t: nn.Linear(config.hidden_size, n) for t, n in outputs.items()})
        for classifier in self.classifiers.values():
            nn.init.normal_(classifier.weight, std=0.02)
            nn.init.zeros_(classifier.bias)

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
        seed: for the classifiers, and for the encoder where it is not pre-trained.
        Raises FslibError for an unknown name or pooling, an unreachable Hub, weights that are not
        safetensors, and an architecture whose heads cannot be reached (by name).
        """
        if pooling not in (None, *POOLINGS):
            raise unknown("pooling", pooling, POOLINGS)
        outputs = {t.name: t.n_outputs for t in as_tasks(tasks).values()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, tokenizer, folder = load_encoder(str(name))
            how = pooling or natural_pooling(encoder, tokenizer, folder)
            return cls(encoder, tokenizer, outputs, how, max_length, str(name)).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, split: Split) -> Encoded:
        """Return the token ids of a split, truncated to `max_length` tokens."""
        return Encoded(split, self.tokenizer, self.max_length)

    def forward(self, inputs: dict[str, Tensor], task: str) -> Float[Tensor, "batch outputs"]:
        """Return logits (or the one regression value) of one task for a batch of token ids and their mask."""
        if task not in self.classifiers:
            raise unknown("task of this model", task, self.classifiers)
        taken = {k: v for k, v in inputs.items() if k in self.accepts}
        hidden = self.encoder(**taken).last_hidden_state  # (batch, seq, hidden)
        return self.classifiers[task](self.dropout(pool(hidden, inputs["attention_mask"], self.pooling)))

    def losses(self, batch: Batch, task: str) -> Float[Tensor, "batch"]:
        """Return every example's own loss: cross-entropy, or squared error for regression."""
        return example_losses(self(batch.inputs, task), batch.labels)

    def n_parameters(self) -> int:
        """Count the parameters of encoder and classifiers."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write encoder, tokenizer and classifiers as safetensors and JSON; the folder appears whole or not at all."""
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.partial-{platform.node()}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        card = {
            "source": self.source,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "outputs": {t: c.out_features for t, c in self.classifiers.items()},
            "shape": shape_of(self.encoder.config),
        }
        try:
            partial.mkdir(parents=True)
            with quiet():
                self.encoder.save_pretrained(partial / "encoder")
                self.tokenizer.save_pretrained(partial / "encoder")
            safetensors.torch.save_file(self.classifiers.state_dict(), partial / "classifiers.safetensors")
            (partial / CARD).write_text(json.dumps(card, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> "MultiTaskModel":
        """Read what `save` wrote. Raises FslibError if the folder is missing, incomplete or damaged."""
        folder = Path(folder)
        if not (folder / CARD).is_file():
            raise FslibError(f"{folder} is not a saved MultiTaskModel: it has no {CARD}")
        try:
            card = json.loads((folder / CARD).read_text())
            encoder, tokenizer, _ = load_encoder(str(folder / "encoder"))
            if "shape" in card:  # checkpoints of older versions do not say
                check_shape("its encoder", encoder.config, card["shape"])
            model = cls(encoder, tokenizer, card["outputs"], card["pooling"], card["max_length"], card["source"])
            model.eval().classifiers.load_state_dict(safetensors.torch.load_file(folder / "classifiers.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise FslibError(
                f"checkpoint {folder} is damaged ({first_line(error)}): delete it and train again"
            ) from error
        return model


def pool(hidden: Float[Tensor, "batch seq hidden"], mask: Tensor, how: str) -> Float[Tensor, "batch hidden"]:
    """Return one vector per text from the last hidden states: the first token's, the last real one's, or the mean."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def example_losses(logits: Float[Tensor, "batch outputs"], labels: Tensor) -> Float[Tensor, "batch"]:
    """Return every example's cross-entropy, or its squared error where labels are numbers."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels) ** 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")
