"""Which of transformers' text encoders and decoders can be used here.

    python tests/benchmarks/architectures.py [--write] [NAME ...]

For every configuration class behind AutoModel and AutoModelForTextEncoding whose model reads token
ids, a model of a few layers with random weights is made and given to `fslib.check`. --write puts
the table into results/architectures.csv. NAME: model types to try (`bert`), instead of all. A class
that cannot be made so small is listed as such, and counts neither way. "unsure" is what is loaded
but does not pass the checks.
"""

import csv
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fslib
from fslib.errors import FslibError, first_line
from fslib.model.attention import ATTENTION
from fslib.model.encoders import new_encoder, quiet

TABLE = Path(__file__).resolve().parents[2] / "results" / "architectures.csv"
COLUMNS = ["model type", "class", "result", "IAT", "why"]
LAYERS, HEADS, HEAD_DIM, VOCABULARY = 3, 4, 8, 64
WIDTH = HEADS * HEAD_DIM
LARGEST = 20_000_000  # weights of a model that counts as small
MEMORY = 8 * 2**30  # bytes, more than which no small model takes
INTERFACE = "its attention does not pass transformers' attention interface"
REFUSALS = {  # what transformers says -> what it means
    "attention implementation": INTERFACE,
    "does not support": INTERFACE,
    f"'{ATTENTION}'": INTERFACE,
    "Unrecognized configuration class": (
        "an encoder-decoder whose encoder transformers does not load alone"
    ),
}
# By whatever name a configuration has them.
SMALL: dict[str, Any] = {
    name: value
    for names, value in {
        "hidden_size n_embd d_model dim emb_dim model_dim": WIDTH,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers": LAYERS,
        "decoder_layers num_decoder_layers": LAYERS,
        "num_attention_heads n_head n_heads num_heads": HEADS,
        "encoder_attention_heads decoder_attention_heads": HEADS,
        "num_key_value_heads num_kv_heads multi_query_group_num": 2,
        "head_dim d_kv attention_head_size": HEAD_DIM,
        "qk_nope_head_dim qk_rope_head_dim v_head_dim": HEAD_DIM,
        "intermediate_size n_inner d_ff ffn_dim hidden_dim ffn_hidden_size": 48,
        "encoder_ffn_dim decoder_ffn_dim moe_intermediate_size": 48,
        "shared_expert_intermediate_size dense_intermediate_size": 48,
        "max_position_embeddings n_positions max_seq_len max_sequence_length": 80,
        "vocab_size": VOCABULARY,
        "embedding_size q_lora_rank kv_lora_rank": 16,
        "num_local_experts num_experts n_routed_experts sliding_window": 4,
        "num_experts_per_tok": 2,
        "n_group topk_group pad_token_id bos_token_id eos_token_id": 1,
        "layerdrop encoder_layerdrop decoder_layerdrop": 0.0,
        "layer_types": None,
    }.items()
    for name in names.split()
}


def text_models() -> dict[str, tuple[type, str]]:
    """Return {model type: (config class, name of the model)} of models that read token ids."""
    encoders = dict(modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
    found = {}
    for kind, given in (dict(modeling_auto.MODEL_MAPPING_NAMES) | encoders).items():
        name = given[0] if isinstance(given, list | tuple) else given
        try:
            config_class = CONFIG_MAPPING[kind]
            reads = getattr(transformers, name).main_input_name == "input_ids"
        except (KeyError, AttributeError, ImportError):  # of models that need another package
            continue
        config = config_class() if reads else None
        if hasattr(config, "vocab_size") and not hasattr(config, "vision_config"):
            found[kind] = config_class, name
    return found


def small(config_class: type) -> Any:
    """Return a configuration of a few layers."""
    config = config_class()
    own = vars(config_class).items()
    fixed = {name for name, value in own if isinstance(value, property) and value.fset is None}
    known = {name for name in SMALL if hasattr(config, name)} - fixed
    made = config_class(**{name: SMALL[name] for name in SMALL if name in known})
    made.use_cache = False
    return made


def tiny(config: Any, make: Callable[[Any], Any]) -> Any:
    """Return a model with random weights, larger than new ones: every head matters."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in make(config).parameters())
    if weights > LARGEST:
        raise FslibError(f"it has {weights:,} weights although its configuration was made small")
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model


def does_not_run(config_class: type) -> str:
    """Return why transformers itself does not run so small a model, "" if it does."""
    try:
        model = tiny(small(config_class), transformers.AutoModel.from_config)
        ids = torch.arange(5, 11)[None]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # as below
        return f"so small, transformers does not run it: {first_line(error)}"
    return ""


def row(kind: str, config_class: type, name: str) -> dict[str, object]:
    """Return what became of one architecture."""
    found: dict[str, object] = {"model type": kind, "class": name, "result": "refused"}
    try:
        with quiet():
            model = tiny(small(config_class), new_encoder)
            report = fslib.check(model)
    except Exception as error:  # three hundred architectures, each with its own idea of a small one
        known = [why for sign, why in REFUSALS.items() if sign in str(error)]
        if why := does_not_run(config_class):
            return found | {"result": "not built", "why": why}
        if known or isinstance(error, FslibError):
            return found | {"why": next(iter(known), str(error))}
        return found | {"result": "CRASHED", "why": f"{type(error).__name__}: {first_line(error)}"}
    if report.works:
        why = "; ".join(report.passed)
        return found | {"result": "works", "why": why, "IAT": report.rows or "yes"}
    # only what cannot be used is refused when it is loaded
    unsure = {} if "cannot be used" in report.refused else {"result": "unsure"}
    return found | unsure | {"why": report.refused}


def main() -> int:
    """Check all of them, print the table and write it if asked to; 1 if nothing works."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chosen = [word for word in sys.argv[1:] if not word.startswith("-")]
    rows, started = [], time.perf_counter()
    for kind, model in sorted(text_models().items()):
        if not chosen or kind in chosen:
            rows.append(row(kind, *model))
            print(*rows[-1].values(), sep=" | ", flush=True)
    counts = Counter(str(r["result"]) for r in rows)
    print(f"{len(rows)} architectures in {time.perf_counter() - started:.0f} s: {dict(counts)}")
    if "--write" in sys.argv:
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0 if counts["works"] else 1


if __name__ == "__main__":
    sys.exit(main())
