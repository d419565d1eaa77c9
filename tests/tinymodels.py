"""Tiny models with random weights for tests, saved as local folders.

They have 3 layers x 4 heads, so layers != heads. Weights are larger than a new model's, so that
attention is far from even and every head matters visibly.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fslib import MultiTaskModel, make_task
from fslib.data.batches import Batch
from fslib.data.tasks import Task
from fslib.model.hooked import HOOKED

LAYERS, HEADS, HEAD_DIM = 3, 4, 8
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}

BASE = {"vocab_size": 64, "pad_token_id": 0}
BERT_LIKE = BASE | {
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WITHOUT_DROPOUT = {name: value for name, value in BERT_LIKE.items() if "dropout" not in name}
LLAMA_LIKE = WITHOUT_DROPOUT | {
    "num_key_value_heads": 2,  # grouped-query: two query heads share a key and a value
    "head_dim": HEAD_DIM,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NARROW = BERT_LIKE | {"embedding_size": 16}
DISTILBERT = {"dim": HEADS * HEAD_DIM, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48}
DISTILBERT |= BASE | {"max_position_embeddings": 80, "dropout": 0.0, "attention_dropout": 0.0}
DEBERTA = BERT_LIKE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"position_buckets": 4}
# it looks less far than its texts are long
MODERNBERT = WITHOUT_DROPOUT | {"local_attention": 4, "global_attn_every_n_layers": 2}
MODERNBERT |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = BASE | {"n_embd": HEADS * HEAD_DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 80}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = BASE | {"d_model": 24, "d_kv": HEAD_DIM, "num_layers": LAYERS, "num_heads": HEADS, "d_ff": 48}
# d_model is not heads x head_dim; the activation is smooth, for finite differences
T5 |= {"feed_forward_proj": "gated-gelu", "eos_token_id": 3, "dropout_rate": 0.0}

BERT_PROJECTION = "encoder.layer.{}.attention.output.dense"
LLAMA_PROJECTION = "layers.{}.self_attn.o_proj"
ALBERT_PROJECTION = "encoder.albert_layer_groups.0.albert_layers.0.attention.dense"
FRAMED, BARE, ENDED = ("[CLS]", "[SEP]"), ("", ""), ("", "[SEP]")


class Architecture(NamedTuple):
    """How to make a model, and what suits it.

    kind: begins the names of its classes. projection: the name of a layer's attention output
    projection. framing: what stands before and after a text.
    """

    kind: str
    options: dict[str, Any]
    projection: str = BERT_PROJECTION
    pooling: str = "first"
    framing: tuple[str, str] = FRAMED
    token_types: bool = False


ARCHITECTURES = {
    "bert": Architecture("Bert", BERT_LIKE, token_types=True),
    "roberta": Architecture("Roberta", BERT_LIKE),
    "electra": Architecture("Electra", NARROW, token_types=True),
    "distilbert": Architecture("DistilBert", DISTILBERT, "transformer.layer.{}.attention.out_lin"),
    "albert": Architecture("Albert", NARROW, ALBERT_PROJECTION, token_types=True),
    "mpnet": Architecture(
        "MPNet", BERT_LIKE | {"pad_token_id": 1}, "encoder.layer.{}.attention.attn.o"
    ),
    "deberta-v2": Architecture("DebertaV2", DEBERTA),
    "modernbert": Architecture("ModernBert", MODERNBERT, "layers.{}.attn.Wo"),
    "gpt2": Architecture("GPT2", GPT2, "h.{}.attn.c_proj", "last", BARE),
    "llama": Architecture("Llama", LLAMA_LIKE, LLAMA_PROJECTION, "last", BARE),
    "qwen3": Architecture("Qwen3", LLAMA_LIKE, LLAMA_PROJECTION, "last", BARE),
    "t5": Architecture("T5", T5, "encoder.block.{}.layer.0.SelfAttention.o", "mean", ENDED),
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
    """Save a new model and its tokenizer as a local folder; `changes` go to its config."""
    made = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(tf, f"{made.kind}Config")(**made.options | changes)
        model = getattr(tf, f"{made.kind}Model")(config)
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
    path = ARCHITECTURES[name].projection
    return [encoder.get_submodule(path.format(layer)) for layer in range(LAYERS)]


@contextmanager
def at_projections(
    name: str, encoder: Any, change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Let `change(layer, x)` see, and replace, what enters each layer's projection.

    Layers are told by the order of calls in one forward pass.

    Args:
        name: of the architecture.
        encoder: the model.
        change: gets x, (batch, seq, heads, head_dim), the heads' outputs after everything that
            fslib does; None leaves it.
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


@torch.no_grad()
def heads_outputs(name: str, model: MultiTaskModel, batch: Batch, task: str = "single") -> Tensor:
    """What enters each layer's output projection: (layers, batch, seq, heads, head_dim)."""
    seen: list[Tensor] = []
    with at_projections(name, model.encoder, lambda layer, x: seen.append(x.clone())):
        model(batch.inputs, task)
    return torch.stack(seen)


def heads_at(*places: tuple[int, int]) -> np.ndarray:
    """The head set of these (layer, head) places."""
    chosen = np.zeros((LAYERS, HEADS), dtype=bool)
    for place in places:
        chosen[place] = True
    return chosen


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the parameters that are not bit-equal to what they were."""
    return {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}


def trace(model: MultiTaskModel) -> dict[str, Any]:
    """Everything that a measurement could disturb, as comparable values."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "weights": [p.tolist() for p in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
        "control": (model.control.gate, model.control.fill, model.control.tap),
        "inputs": (model.control.inputs, model.control.weights),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
    }


def disturbed(model: MultiTaskModel) -> MultiTaskModel:
    """Give a model modes, gradients and frozen weights that no measurement would."""
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
    model.classifiers["pair"].eval()
    model.encoder.embeddings.eval().requires_grad_(False)
    return model


def at_every_update(monkeypatch: Any, look: Callable[[torch.optim.Optimizer], object]) -> None:
    """Call `look` with the optimizer before each of AdamW's updates."""

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            look(self)
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)


def texts(n: int, rng: np.random.Generator, longest: int = 9) -> list[str]:
    """`n` texts of 2 to `longest` words."""
    return [" ".join(rng.choice(WORDS, rng.integers(2, longest + 1))) for _ in range(n)]


def toy_task(kind: str = "single", train: int = 10, eval: int = 5, seed: int = 0) -> Task:
    """Make a task of random texts: "single" (3 classes), "pair" (2 classes) or "regression"."""
    rng = np.random.default_rng(seed)
    names = {"single": ("a", "b", "c"), "pair": ("no", "yes"), "regression": ()}[kind]
    sides = []
    for n in (train, eval):
        found: list[Any] = texts(n, rng)
        labels = [i % len(names) for i in range(n)] if names else rng.normal(size=n).tolist()
        if kind == "pair":
            found = list(zip(found, texts(n, rng), strict=True))
        sides.append((found, labels))
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
    """Tiny models on demand: each is saved and loaded once, and every caller gets a copy."""

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
                    classifier.weight.mul_(20)  # small at first: losses would hardly move
            self.loaded[name] = model
        return copy.deepcopy(self.loaded[name])
