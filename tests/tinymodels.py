"""Tiny models with random weights for tests: 3 layers x 4 heads (so layers != heads), saved as local folders.

Weights are larger than a fresh model's, so that attention is far from even and every head matters visibly.
"""

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


def _bert_projection(encoder: Any, layer: int) -> nn.Module:
    return encoder.encoder.layer[layer].attention.output.dense


def _llama_projection(encoder: Any, layer: int) -> nn.Module:
    return encoder.layers[layer].self_attn.o_proj


ARCHITECTURES = {
    "bert": Architecture("BertModel", "BertConfig", _BERT_LIKE, "first", _bert_projection),
    "roberta": Architecture("RobertaModel", "RobertaConfig", _BERT_LIKE, "first", _bert_projection),
    "xlm-roberta": Architecture("XLMRobertaModel", "XLMRobertaConfig", _BERT_LIKE, "first", _bert_projection),
    "camembert": Architecture("CamembertModel", "CamembertConfig", _BERT_LIKE, "first", _bert_projection),
    "electra": Architecture(
        "ElectraModel", "ElectraConfig", {**_BERT_LIKE, "embedding_size": 16}, "first", _bert_projection
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
        lambda encoder, layer: encoder.encoder.albert_layer_groups[0].albert_layers[0].attention.dense,
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
    "llama": Architecture("LlamaModel", "LlamaConfig", _LLAMA_LIKE, "last", _llama_projection, ("", "")),
    "qwen3": Architecture("Qwen3Model", "Qwen3Config", _LLAMA_LIKE, "last", _llama_projection, ("", "")),
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
            "pad_token_id": 0,
            "eos_token_id": 3,
            "dropout_rate": 0.0,
        },
        "mean",
        lambda encoder, layer: encoder.encoder.block[layer].layer[0].SelfAttention.o,
        ("", "[SEP]"),
    ),
}
