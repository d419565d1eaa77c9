"""Checkpoints of the paper's released code: state dicts of their shape give the same logits."""

import numpy as np
import pytest
import torch
import transformers as tf
from refusal import refused
from tinymodels import toy_task

import fslib
from fslib import MultiTaskModel, load_released

TASKS = [toy_task("single"), toy_task("pair")]


def weights_of(model: torch.nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    state = model.state_dict().items()
    return {f"{prefix}.{name}": value.clone() for prefix in prefixes for name, value in state}


def released_bert(folder) -> tuple[dict[str, torch.Tensor], tf.BertModel]:
    """Make a state dict as the released code saves it: a pooler, and linear classifiers."""
    torch.manual_seed(1)
    bert = tf.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    for parameter in bert.pooler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = weights_of(bert, "bert", "ptm")
    # a buffer of older transformers
    state["ptm.embeddings.position_ids"] = torch.arange(80)[None]
    for number, task in enumerate(TASKS):
        state |= weights_of(torch.nn.Linear(32, task.n_outputs), f"classifiers.{number}")
    return state, bert


def released_roberta(folder) -> tuple[dict[str, torch.Tensor], tf.RobertaModel]:
    """The same of RoBERTa: no pooler, and classifiers with a dense layer of their own."""
    torch.manual_seed(2)
    options = {"add_pooling_layer": False, "attn_implementation": "eager"}
    roberta = tf.RobertaModel.from_pretrained(folder, **options).eval()
    state = weights_of(roberta, "roberta", "ptm")
    for number, task in enumerate(TASKS):
        state |= weights_of(torch.nn.Linear(32, 32), f"classifiers.{number}.dense")
        state |= weights_of(torch.nn.Linear(32, task.n_outputs), f"classifiers.{number}.out_proj")
    return state, roberta


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_logits_are_those_of_the_released_code(zoo, tmp_path, kind, wrapped):
    state, encoder = {"bert": released_bert, "roberta": released_roberta}[kind](zoo.folder(kind))
    saved = {wrapped + name: value for name, value in state.items()}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    model = load_released(tmp_path, zoo.folder(kind), TASKS)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for number, task in enumerate(TASKS):
        batch, name = model.encode(task.eval).batch([0, 1, 2]), f"classifiers.{number}"
        with torch.no_grad():
            out = encoder(**{k: v for k, v in batch.inputs.items() if k in model.accepts})
            if kind == "bert":  # outputs[1], then the classifier
                expected = linear(out.pooler_output, name)
            else:  # RobertaClassificationHead
                inner = torch.tanh(linear(out.last_hidden_state[:, 0], f"{name}.dense"))
                expected = linear(inner, f"{name}.out_proj")
            found = model(batch.inputs, task.name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_a_model_like_any_other(zoo, tmp_path):
    state, _ = released_bert(zoo.folder("bert"))
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load_released(tmp_path / "pytorch_model.bin", zoo.folder("bert"), TASKS)
    iap = fslib.prune_important_heads(model, TASKS, fractions=[0.25], controls=1, examples=4)
    assert np.isfinite(iap.baseline()).all()
    model.save(tmp_path / "saved")
    again = MultiTaskModel.load(tmp_path / "saved")
    scores, others = fslib.evaluate(model, TASKS), fslib.evaluate(again, TASKS)
    assert all(np.array_equal(scores[t].predictions, others[t].predictions) for t in scores)


def test_what_is_no_such_checkpoint_is_refused(zoo, tmp_path):
    state, _ = released_bert(zoo.folder("bert"))
    folder, file = zoo.folder("bert"), tmp_path / "pytorch_model.bin"
    with refused("there is no checkpoint", "pytorch_model.bin"):
        load_released(tmp_path, folder, TASKS)
    file.write_bytes(b"nothing")
    with refused("cannot be read as a state dict"):
        load_released(file, folder, TASKS)

    def without(word: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in state.items() if word not in name}

    third = {"classifiers.2.weight": torch.ones(2, 32), "classifiers.2.bias": torch.ones(2)}
    for content, parts in (
        ({"epoch": 3}, ("is no state dict",)),
        (without("pooler"), ("no checkpoint of the released code", "pooler")),
        (without("classifiers"), ("no checkpoint of the released code",)),
        (without("layer.2"), ("does not hold the weights", "layer.2")),
        (state | third, ("of 3 tasks",)),
    ):
        torch.save(content, file)
        with refused(*parts):
            load_released(file, folder, TASKS)
    torch.save(state, file)
    with refused("task 0 of", "3 outputs", "pair needs 2"):
        load_released(file, folder, TASKS[::-1])
    with refused("does not hold the weights"):
        load_released(file, zoo.folder("distilbert"), TASKS)
