"""Encoders that no single device holds: scored and pruned like any other, from weights that wait on disk."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tinymodels import HEADS, LAYERS
from torch.autograd.graph import saved_tensors_hooks

from fslib import (
    FslibError,
    MultiTaskModel,
    check,
    evaluate,
    head_importance,
    mean_context,
    prune_important_heads,
    pruned,
    train,
)
from fslib.importance import ESTIMATORS
from fslib.model import spread as module
from fslib.similarity import task_embedding, text_embedding

NAMES = ("bert", "gpt2", "llama", "t5")
HALVES = {  # the first layer in memory, all that can be on disk
    "bert": {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "cpu"},
    "gpt2": {"wte": "cpu", "wpe": "cpu", "drop": "cpu", "h.0": "cpu", "h.1": "disk", "h.2": "cpu", "ln_f": "cpu"},
}


def spread(zoo, name, tmp_path, device_map="auto", **options):
    """The model on as little memory as `accelerate` takes for none: all of its weights are on disk."""
    model = MultiTaskModel.from_pretrained(
        options.pop("folder", zoo.folder(name)),
        zoo.tasks,
        device_map=device_map,
        offload_folder=tmp_path / "weights",
        **({"max_memory": {"cpu": 2000}} if device_map == "auto" else {}),
    )
    assert any(parameter.is_meta for parameter in model.encoder.parameters())
    model.classifiers.load_state_dict(zoo.model(name).classifiers.state_dict())
    return model


@pytest.fixture(params=NAMES)
def both(request, zoo, tmp_path):
    return zoo.model(request.param), spread(zoo, request.param, tmp_path)


def test_importance_and_pruning_are_those_of_the_whole_model(zoo, both):
    whole, parts = both
    assert parts.device == torch.device("cpu")
    for task in zoo.tasks.values():
        for estimator in ESTIMATORS:
            expected, found = (head_importance(model, task, estimator=estimator) for model in both)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=estimator)
        torch.testing.assert_close(mean_context(parts, task), mean_context(whole, task))
        expected, found = (text_embedding(model, task) for model in both)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    expected, found = (prune_important_heads(model, zoo.tasks, [0.25, 0.5], 2).arrays() for model in both)
    for name, values in expected.items():
        largest = float(np.abs(values).max())  # the last layer is computed for one token of the whole model alone
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6 * largest, err_msg=name)
    assert all(parameter.is_meta for parameter in parts.encoder.parameters())


def test_heads_are_switched_off_by_zero_and_by_their_mean(zoo, both):
    task, heads = zoo.tasks["regression"], np.zeros((LAYERS, HEADS), dtype=bool)
    heads[0, 1] = heads[1, 3] = True
    for options in ({}, {"ablation": "mean", "mean": mean_context(both[0], task)}):
        found = []
        for model in both:
            with pruned(model, heads, **options):
                found.append(evaluate(model, task)[task.name].predictions)
        np.testing.assert_allclose(*found, rtol=1e-5)
        assert np.abs(found[0] - evaluate(both[0], task)[task.name].predictions).max() > 1e-4


@pytest.mark.parametrize("name", HALVES)
def test_a_device_for_each_module(zoo, tmp_path, name):
    whole, parts = zoo.model(name), spread(zoo, name, tmp_path, HALVES[name])
    assert 0 < sum(p.is_meta for p in parts.encoder.parameters()) < len(list(parts.encoder.parameters()))
    for task in zoo.tasks.values():
        expected, found = (head_importance(model, task) for model in (whole, parts))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_weights_of_sixteen_bits_are_computed_with_as_thirty_two(zoo, tmp_path):
    folder = tmp_path / "half"
    zoo.model("bert").encoder.save_pretrained(folder)
    zoo.model("bert").tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    whole = MultiTaskModel.from_pretrained(folder, zoo.tasks)
    parts = spread(zoo, "bert", tmp_path, folder=folder)
    parts.classifiers.load_state_dict(whole.classifiers.state_dict())
    task = zoo.tasks["regression"]
    expected, found = (evaluate(model, task)[task.name].predictions for model in (whole, parts))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_weight_that_waits_on_disk_is_kept_for_the_backward_pass(zoo, tmp_path, monkeypatch):
    task, kept = zoo.tasks["single"], []

    def watched(pack, unpack):
        return saved_tensors_hooks(lambda tensor: kept.append(pack(tensor)) or kept[-1], unpack)

    monkeypatch.setattr(module, "saved_tensors_hooks", watched)
    head_importance(spread(zoo, "bert", tmp_path), task, examples=3)
    left = [saved for saved in kept if not isinstance(saved, torch.Tensor)]
    matrices = {tuple(p.shape) for p in zoo.model("bert").encoder.encoder.parameters() if p.ndim == 2}
    assert {saved.name for saved in left} >= {"weight"} and len(left) >= 6 * LAYERS - 4  # of the first, what is above
    assert not [t for t in kept if isinstance(t, torch.Tensor) and {t.shape, t.shape[::-1]} & matrices]


def test_training_and_gradients_of_weights_are_refused_by_name(zoo, tmp_path):
    model, task = spread(zoo, "bert", tmp_path), zoo.tasks["single"]
    for refused in (lambda: train(model, task, steps=1), lambda: task_embedding(model, task)):
        with pytest.raises(FslibError, match="this BertModel was loaded with device_map: its heads can be scored"):
            refused()
    assert "was loaded with device_map" in str(check(model))


@pytest.mark.parametrize("option", [{"max_memory": {"cpu": 1}}, {"offload_folder": "here"}])
def test_what_goes_with_device_map_is_not_ignored(zoo, option):
    with pytest.raises(FslibError, match="max_memory and offload_folder go with device_map"):
        MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, **option)


@pytest.mark.parametrize("device_map", ["atuo", {"encoder": "disk"}])
def test_a_bad_device_map_is_one_clear_line(zoo, tmp_path, device_map):
    with pytest.raises(FslibError, match=r"model folder .* cannot be loaded: "):
        MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, device_map=device_map)
