"""Work left out while heads are pruned: it changes no prediction, and is as much as the shapes say."""

import copy

import numpy as np
import pytest
import torch
from tinymodels import ARCHITECTURES, HEADS, LAYERS, save, tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fslib import (
    MultiTaskModel,
    contributions,
    evaluate,
    importance,
    mean_context,
    prune_important_heads,
    pruned,
    pruning,
)
from fslib.model import shortcuts as module
from fslib.model.attention import tapped
from fslib.model.shortcuts import Shortcuts, first_token, same_batch, shortcuts

EVERY = pytest.mark.parametrize("name", sorted(ARCHITECTURES))
ONE_TOKEN = {"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"}  # with projections of their own


def some_heads(*places):
    heads = np.zeros((LAYERS, HEADS), dtype=bool)
    for place in places:
        heads[place] = True
    return heads


SETS = [some_heads((0, 1), (2, 3)), some_heads((1, 0)), some_heads((2, 0), (2, 1)), ~some_heads()]


def logits(model, task, heads, batch, **options):
    with pruned(model, heads, **options), torch.inference_mode():
        return model(batch.inputs, task.name)


@EVERY
def test_an_architecture_takes_the_shortcuts_that_it_allows(zoo, name):
    taken = shortcuts(zoo.model(name))
    assert taken.first and bool(taken.last) == (name in ONE_TOKEN)


@EVERY
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_logits_are_those_of_whole_passes(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    batch = model.encode(task.eval).batch(range(5))
    means = mean_context(model, task)
    for options in ({}, {"ablation": "mean", "mean": means}):
        expected = [logits(model, task, heads, batch, **options) for heads in SETS]
        taken = shortcuts(model)
        with same_batch(taken):
            found = [logits(model, task, heads, batch, **options) for heads in SETS]
        assert all(map(torch.equal, found, expected))
        with same_batch(taken), first_token(model.encoder, taken):
            found = [logits(model, task, heads, batch, **options) for heads in SETS]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
    again = logits(model, task, SETS[0], batch, **options)
    assert torch.equal(again, expected[0])  # nothing is left behind


@EVERY
def test_predictions_of_every_set_are_those_without_shortcuts(zoo, name, monkeypatch):
    with_, options = zoo.model(name), {"fractions": [0.25, 0.5], "controls": 2, "batch_size": 2}
    without = copy.deepcopy(with_)
    found = prune_important_heads(with_, zoo.tasks, **options).arrays()
    monkeypatch.setattr(pruning, "shortcuts", lambda model: Shortcuts())
    for key, expected in prune_important_heads(without, zoo.tasks, **options).arrays().items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=key)
        else:
            assert np.array_equal(found[key], expected), key


def test_a_mean_over_tokens_needs_all_of_them_and_is_the_same_bit_by_bit(zoo, monkeypatch):
    model = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, pooling="mean")
    assert shortcuts(model).last is None
    found = prune_important_heads(model, zoo.tasks, [0.5], 2).arrays()
    monkeypatch.setattr(pruning, "shortcuts", lambda model: Shortcuts())
    for key, expected in prune_important_heads(model, zoo.tasks, [0.5], 2).arrays().items():
        assert np.array_equal(found[key], expected), key


def counted(work):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_as_many_operations_are_left_out_as_the_shapes_say(zoo):
    model, task = zoo.model("bert"), zoo.tasks["single"]
    batch, taken = model.encode(task.eval).batch([0, 1, 2]), shortcuts(model)
    rows, tokens = batch.mask.shape
    width, inner = model.encoder.config.hidden_size, model.encoder.config.intermediate_size

    def passes(number):
        for heads in SETS[:number]:
            logits(model, task, heads, batch)

    whole = counted(lambda: passes(3))
    with same_batch(taken):
        shared = counted(lambda: passes(3))
    assert whole - shared == 2 * 3 * 2 * rows * tokens * width**2  # two passes less of query, key and value
    with first_token(model.encoder, taken):
        short = counted(lambda: passes(1))
    linear = 2 * width**2 + 2 * width * inner  # query and output; feed-forward
    attention = 2 * tokens * width
    assert whole / 3 - short == 2 * rows * (tokens - 1) * (linear + attention)


def test_a_layer_that_says_something_else_of_one_token_is_computed_whole(zoo):
    model = zoo.model("bert")
    last = model.encoder.encoder.layer[-1]
    forward = last.forward

    def of_all(hidden_states, *words, **options):  # the mean of what it is given comes into every token
        return forward(hidden_states, *words, **options) + hidden_states.mean(1, keepdim=True)

    last.forward = of_all
    assert shortcuts(model).last is None


@EVERY
@pytest.mark.parametrize("kind", ["single", "pair", "regression"])
def test_importance_is_that_of_whole_passes(zoo, name, kind, monkeypatch):
    model, task = zoo.model(name).double(), zoo.tasks[kind]  # in float32, sums of many tokens round to a few 10^-6
    found = contributions(model, task, batch_size=3)
    monkeypatch.setattr(importance, "shortcuts", lambda model: Shortcuts())
    expected = contributions(model, task, batch_size=3)
    assert np.array_equal(found.tokens, expected.tokens)
    for one, other in ((found.absolute, expected.absolute), (found.signed, expected.signed)):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def both_ways(model, tasks, monkeypatch, **options):
    """Predictions with shortcuts and without."""
    found = prune_important_heads(model, tasks, [0.25, 0.5], 2, **options).arrays()
    with monkeypatch.context() as patched:
        patched.setattr(pruning, "shortcuts", lambda model: Shortcuts())
        return found, prune_important_heads(model, tasks, [0.25, 0.5], 2, **options).arrays()


def test_a_module_that_runs_twice_on_real_batches_is_right_both_times(zoo, tmp_path, monkeypatch):
    folder = save("gpt2", tmp_path / "types")
    tokenizer(("[CLS]", "[SEP]"), token_types=True).save_pretrained(folder)  # embedded by the words' own table
    model = MultiTaskModel.from_pretrained(folder, zoo.tasks)
    assert "token_type_ids" in model.encode(zoo.tasks["pair"].eval).batch([0]).inputs and shortcuts(model).first
    found, expected = both_ways(model, zoo.tasks, monkeypatch, batch_size=2)
    for key in expected:
        assert np.array_equal(found[key], expected[key]), key


def test_a_causal_layer_is_computed_whole(tmp_path, zoo):
    folder = save("bert", tmp_path / "decoder", is_decoder=True)
    assert shortcuts(MultiTaskModel.from_pretrained(folder, zoo.tasks, pooling="first")).last is None


def test_weights_of_sixteen_bits_are_computed_whole(zoo):
    assert shortcuts(zoo.model("bert").half()).last is None


def test_who_looks_at_the_last_layer_sees_all_tokens(zoo):
    model = zoo.model("bert")
    with tapped(model, lambda layer, ctx: ctx):
        assert shortcuts(model).last is None
    handle = model.encoder.encoder.layer[-1].output.register_forward_hook(lambda *words: None)
    assert shortcuts(model).last is None
    handle.remove()
    assert shortcuts(model).last is not None


def test_a_forward_of_a_modules_own_is_kept(zoo, monkeypatch):
    model, task = zoo.model("bert"), zoo.tasks["regression"]
    norm = model.encoder.embeddings.LayerNorm
    own = norm.forward
    norm.forward = lambda states: own(states) + 0.5
    patched, before = norm.forward, evaluate(model, task)[task.name].predictions
    found, expected = both_ways(model, zoo.tasks, monkeypatch)
    assert norm.forward is patched and np.array_equal(evaluate(model, task)[task.name].predictions, before)
    np.testing.assert_allclose(found["lesioned/regression"], expected["lesioned/regression"], atol=1e-5)
    with same_batch(shortcuts(model)), same_batch(shortcuts(model)):
        pass
    assert norm.forward is patched


def test_a_module_that_changes_from_pass_to_pass_is_not_kept(zoo, monkeypatch):
    model = zoo.model("bert")
    assert shortcuts(model).first

    def in_place(module, args, output):
        return output.add_(0.1)

    model.encoder.embeddings.LayerNorm.register_forward_hook(in_place)
    assert shortcuts(model).first == ()


def test_models_are_left_as_they_were_also_after_an_error(zoo):
    model, task = zoo.model("bert"), zoo.tasks["single"]
    before = evaluate(model, task)[task.name].predictions
    taken = shortcuts(model)
    with pytest.raises(KeyError), same_batch(taken), first_token(model.encoder, taken):
        raise KeyError
    assert "forward" not in vars(taken.first[0]) and model.control.arrange is None
    assert np.array_equal(evaluate(model, task)[task.name].predictions, before)
    assert not any(part._forward_pre_hooks for part in taken.last)


def test_a_first_token_alone_is_what_comes_out(zoo):
    model = zoo.model("bert")
    with torch.no_grad(), first_token(model.encoder, shortcuts(model)):
        assert module._hidden(model.encoder).shape == (2, 1, 32)
