"""Tiny models with random weights for tests: 3 layers x 4 heads (so layers != heads), saved as local folders.

Weights are larger than a fresh model's, so that attention is far from even and every head matters visibly.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fslib import MultiTaskModel, make_task
from fslib.data.tasks import Task
from fslib.model.hooked import HOOKED

LAYERS, HEADS, HEAD_DIM = 3, 4, 8
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}

_BERT_LIKE = {
    "vocab_size": 64,
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA_LIKE = {
    "vocab_size": 64,
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,  # grouped-query: two query heads share a key and a value
    "head_dim": HEAD_DIM,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """How to make one, what pooling suits it, and where layer `l`'s attention output projection is."""

    model: str
    config: str
    options: dict[str, Any]
    pooling: str
    projection: Callable[[Any, int], nn.Module]
    framing: tuple[str, str] = ("[CLS]", "[SEP]")  # around a text
    token_types: bool = False


def _bert_projection(encoder: Any, layer: int) -> nn.Module:
    return encoder.encoder.layer[layer].attention.output.dense


def _llama_projection(encoder: Any, layer: int) -> nn.Module:
    return encoder.layers[layer].self_attn.o_proj


ARCHITECTURES = {
    "bert": Architecture(
        "BertModel", "BertConfig", _BERT_LIKE, "first", _bert_projection, token_types=True
    ),
    "roberta": Architecture("RobertaModel", "RobertaConfig", _BERT_LIKE, "first", _bert_projection),
    "xlm-roberta": Architecture(
        "XLMRobertaModel", "XLMRobertaConfig", _BERT_LIKE, "first", _bert_projection
    ),
    "camembert": Architecture(
        "CamembertModel", "CamembertConfig", _BERT_LIKE, "first", _bert_projection
    ),
    "electra": Architecture(
        "ElectraModel",
        "ElectraConfig",
        {**_BERT_LIKE, "embedding_size": 16},
        "first",
        _bert_projection,
        token_types=True,
    ),
    "distilbert": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": 64,
            "dim": HEADS * HEAD_DIM,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 48,
            "max_position_embeddings": 80,
            "pad_token_id": 0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "first",
        lambda encoder, layer: encoder.transformer.layer[layer].attention.out_lin,
    ),
    "albert": Architecture(
        "AlbertModel",
        "AlbertConfig",
        {**_BERT_LIKE, "embedding_size": 16},
        "first",
        lambda encoder, layer: (
            encoder.encoder.albert_layer_groups[0].albert_layers[0].attention.dense
        ),
        token_types=True,
    ),
    "mpnet": Architecture(
        "MPNetModel",
        "MPNetConfig",
        {**_BERT_LIKE, "pad_token_id": 1},
        "first",
        lambda encoder, layer: encoder.encoder.layer[layer].attention.attn.o,
    ),
    "deberta-v2": Architecture(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_BERT_LIKE,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
        },
        "first",
        _bert_projection,
    ),
    "modernbert": Architecture(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **{k: v for k, v in _BERT_LIKE.items() if "dropout" not in k},
            "local_attention": 4,  # shorter than the texts
            "global_attn_every_n_layers": 2,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        "first",
        lambda encoder, layer: encoder.layers[layer].attn.Wo,
    ),
    "gpt2": Architecture(
        "GPT2Model",
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": HEADS * HEAD_DIM,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 80,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "last",
        lambda encoder, layer: encoder.h[layer].attn.c_proj,
        ("", ""),
    ),
    "llama": Architecture(
        "LlamaModel", "LlamaConfig", _LLAMA_LIKE, "last", _llama_projection, ("", "")
    ),
    "qwen3": Architecture(
        "Qwen3Model", "Qwen3Config", _LLAMA_LIKE, "last", _llama_projection, ("", "")
    ),
    "t5": Architecture(
        "T5Model",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 24,  # not heads x head_dim
            "d_kv": HEAD_DIM,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "d_ff": 48,
            "feed_forward_proj": "gated-gelu",  # smooth, for finite differences
            "pad_token_id": 0,
            "eos_token_id": 3,
            "dropout_rate": 0.0,
        },
        "mean",
        lambda encoder, layer: encoder.encoder.block[layer].layer[0].SelfAttention.o,
        ("", "[SEP]"),
    ),
}


def tokenizer(
    framing: tuple[str, str], token_types: bool = False, **special: str
) -> tf.PreTrainedTokenizerFast:
    """Whole words w0..w39, framed as the architecture frames its texts."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start, end = framing
    words.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (start, "$A", end) if part),
        pair=" ".join(part for part in (start, "$A", end, "$B:1", end and f"{end}:1") if part),
        special_tokens=[(part, vocabulary[part]) for part in framing if part],
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=names, **(special or SPECIAL)
    )


def save(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A new model of an architecture, with its tokenizer, as a local folder (`changes` go to its config)."""
    made = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(tf, made.model)(getattr(tf, made.config)(**{**made.options, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    tokenizer(made.framing, made.token_types).save_pretrained(folder)
    return folder


def untouched(name: str, folder: Path) -> Any:
    """The encoder as transformers itself loads and runs it."""
    auto = tf.T5EncoderModel if name == "t5" else tf.AutoModel
    implementation = "eager" if name in HOOKED else "sdpa"
    return auto.from_pretrained(folder, attn_implementation=implementation).eval()


def projections(name: str, encoder: Any) -> list[nn.Module]:
    """Each layer's attention output projection (ALBERT: the same module for every layer)."""
    return [ARCHITECTURES[name].projection(encoder, layer) for layer in range(LAYERS)]


@contextmanager
def at_projections(
    name: str, encoder: Any, change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Let `change(layer, x)` see, and replace unless it returns None, what enters each layer's projection.

    x: (batch, seq, heads, head_dim), the heads' outputs after everything that fslib does. Layers are told by the
    order of calls in one forward pass.
    """
    calls = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal calls
        layer, calls = calls % LAYERS, calls + 1
        changed = change(layer, args[0].unflatten(-1, (HEADS, HEAD_DIM)))
        return None if changed is None else (changed.flatten(-2), *args[1:])

    handles = [
        module.register_forward_pre_hook(hook)
        for module in dict.fromkeys(projections(name, encoder))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def texts(n: int, rng: np.random.Generator, longest: int = 9) -> list[str]:
    """`n` texts of 2 to `longest` words."""
    return [" ".join(rng.choice(WORDS, rng.integers(2, longest + 1))) for _ in range(n)]


def toy_task(kind: str = "single", train: int = 10, eval: int = 5, seed: int = 0) -> Task:
    """A task of random texts and labels: "single" (3 classes), "pair" (2 classes) or "regression"."""
    rng = np.random.default_rng(seed)
    names = {"single": ("a", "b", "c"), "pair": ("no", "yes"), "regression": ()}[kind]
    sides = []
    for n in (train, eval):
        found = texts(n, rng)
        labels = [i % len(names) for i in range(n)] if names else rng.normal(size=n).tolist()
        sides.append(
            (list(zip(found, texts(n, rng), strict=True)) if kind == "pair" else found, labels)
        )
    return make_task(kind, sides[0], sides[1], label_names=names)


@contextmanager
def one_thread() -> Iterator[None]:
    """For models this small, a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Zoo:
    """Tiny models on demand: each architecture is saved and loaded once, and every caller gets a copy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tasks = {kind: toy_task(kind) for kind in ("single", "pair", "regression")}
        self.loaded: dict[str, MultiTaskModel] = {}

    def folder(self, name: str) -> Path:
        folder = self.root / name
        return folder if folder.is_dir() else save(name, folder)

    def model(self, name: str) -> MultiTaskModel:
        """With classifiers for all three toy tasks, in evaluation mode."""
        if name not in self.loaded:
            model = MultiTaskModel.from_pretrained(self.folder(name), self.tasks)
            with torch.no_grad():
                for classifier in model.classifiers.values():
                    classifier.weight.mul_(
                        20
                    )  # small at first: logits, and losses, would hardly move
            self.loaded[name] = model
        return copy.deepcopy(self.loaded[name])
