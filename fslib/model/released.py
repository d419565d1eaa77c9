"""Checkpoints of the paper's released code, as models of this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fslib.data.tasks import Tasks, as_tasks
from fslib.errors import FslibError, first_line
from fslib.model.multitask import MultiTaskModel

FILES = ("pytorch_model.bin", "model.safetensors")
ENCODER, CLASSIFIERS = "ptm.", "classifiers."
DENSE = {"dense.weight", "dense.bias", "out.weight", "out.bias"}  # of a `DenseClassifier`


def load_released(
    path: str | Path, encoder: str | Path, tasks: Tasks, *, max_length: int = 128
) -> MultiTaskModel:
    """Load a checkpoint that the paper's released code has saved (BERT or RoBERTa).

    Logits are the released code's. Where training goes on from here, dropout lies before the dense
    layer and not behind it, and BERT's pooler is each task's own.

    Args:
        path: its `pytorch_model.bin`, or the folder that holds it.
        encoder: what it was trained from, by name or folder, for its configuration and tokenizer
            ("bert-base").
        tasks: in the order of the checkpoint's task ids, 0 first. A task's labels must be in the
            order that its training data had: the checkpoint does not name them.
        max_length: tokens of an example.

    Raises:
        FslibError: for a file that is missing or no such checkpoint, weights that are not the
            encoder's, and tasks of another number, or with another number of labels.
    """
    files = [each for each in (Path(path), *(Path(path) / n for n in FILES)) if each.is_file()]
    if not files:
        raise FslibError(f"there is no checkpoint {path}, and no {' or '.join(FILES)} in it")
    file = files[0]
    weights = {name.removeprefix("module."): value for name, value in _read(file).items()}
    heads = _heads(file, weights)
    named = as_tasks(tasks)
    if len(named) != len(heads):
        raise FslibError(f"{file} has classifiers of {len(heads)} tasks, not of {list(named)}")
    for (number, head), task in zip(heads.items(), named.values(), strict=True):
        if (outputs := len(head["out.weight"])) != task.n_outputs:
            differ = f"has {outputs} outputs, and {task.name} needs {task.n_outputs}"
            raise FslibError(f"task {number} of {file} {differ}")
    model = MultiTaskModel.from_pretrained(encoder, named, pooling="first", max_length=max_length)
    model.set_classifiers(model.answers, dense=True)
    own, wanted = _part(weights, ENCODER), model.encoder.state_dict()
    if unfit := [n for n, v in wanted.items() if n not in own or own[n].shape != v.shape]:
        raise FslibError(f"{file} does not hold the weights of {encoder}, such as {unfit[0]}")
    model.encoder.load_state_dict({name: own[name] for name in wanted})
    for name, head in zip(named, heads.values(), strict=True):
        model.classifiers[name].load_state_dict(head)
    return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    """Return a state dict; nothing but tensors is read from a file of pickles."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise FslibError(f"{file} cannot be read as a state dict: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FslibError(f"{file} is no state dict: it holds other things than tensors by name")
    return found


def _heads(file: Path, weights: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return {task id: weights of its classifier}.

    Each has a dense layer: BERT's pooler, which all tasks share, or RoBERTa's own.
    """
    pooler = _part(weights, f"{ENCODER}pooler.")
    heads: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(weights, CLASSIFIERS).items():
        task, _, rest = name.partition(".")
        if task.isdigit():
            rest = rest.removeprefix("out_proj.")
            rest = f"out.{rest}" if rest in ("weight", "bias") else rest
            heads.setdefault(int(task), dict(pooler))[rest] = value
    if not heads or any(head.keys() != DENSE for head in heads.values()):
        needs = f"{ENCODER}* with a pooler and {CLASSIFIERS}<id>.*"
        raise FslibError(f"{file} is no checkpoint of the released code: it needs {needs}")
    return dict(sorted(heads.items()))


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
