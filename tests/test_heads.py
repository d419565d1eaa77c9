"""Heads are switched off where and only where they are told to be, on every architecture; and models load safely.

Expectations come from outside fslib: from the model as transformers runs it, with weights or projection inputs
changed by hand.
"""

import copy
import itertools
import json
import math
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from tinymodels import (
    ARCHITECTURES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    at_projections,
    projections,
    save,
    tokenizer,
)
from tinymodels import untouched as load_untouched

from fslib import FslibError, MultiTaskModel, overlap, pruned, random_heads, top_heads
from fslib.heads import head_count
from fslib.model.attention import control_of, tapped

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
EVERY_HEAD = list(itertools.product(range(LAYERS), range(HEADS)))


def heads_at(*places):
    """The head set of these (layer, head) places."""
    chosen = np.zeros((LAYERS, HEADS), dtype=bool)
    for place in places:
        chosen[place] = True
    return chosen


def padded_batch(model, task):
    """All training examples in one batch, which has padding."""
    batch = model.encode(task.train).batch(range(len(task.train)))
    assert (batch.mask == 0).any() and (batch.mask.sum(1) == batch.mask.shape[1]).any()
    return batch


@torch.no_grad()
def hidden_of(encoder, batch, accepted):
    """Last hidden states at real tokens, (tokens, hidden)."""
    inputs = {k: v for k, v in batch.inputs.items() if k in accepted}
    return encoder(**inputs).last_hidden_state[batch.mask.bool()]


@torch.no_grad()
def logits_of(model, batch, task="single"):
    return model(batch.inputs, task)


def heads_outputs(name, model, batch):
    """What enters each layer's output projection: (layers, batch, seq, heads, head_dim)."""
    seen = []
    with at_projections(name, model.encoder, lambda layer, x: seen.append(x.clone())):
        logits_of(model, batch)
    return torch.stack(seen)


# --- every architecture against itself, untouched -----------------------------------------------------------------


@EVERY
def test_an_empty_set_equals_the_untouched_model(zoo, name):
    model, reference = zoo.model(name), load_untouched(name, zoo.folder(name))
    for task in (zoo.tasks["single"], zoo.tasks["pair"]):
        batch = padded_batch(model, task)
        hidden = hidden_of(reference, batch, model.accepts)
        bare = hidden_of(model.encoder, batch, model.accepts)
        with pruned(model, heads_at()):
            gated = hidden_of(model.encoder, batch, model.accepts)
        torch.testing.assert_close(bare, hidden, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gated, hidden, atol=1e-6, rtol=1e-6)


@EVERY
def test_logits_are_the_classifier_on_the_pooled_untouched_states(zoo, name):
    model, reference = zoo.model(name), load_untouched(name, zoo.folder(name))
    assert model.pooling == ARCHITECTURES[name].pooling
    batch = padded_batch(model, zoo.tasks["single"])
    pools = {
        "first": lambda rows: rows[0],
        "mean": lambda rows: rows.mean(0),
        "last": lambda rows: rows[-1],
    }
    pooled = []
    for hidden in hidden_of(reference, batch, model.accepts).split(batch.mask.sum(1).tolist()):
        pooled.append(pools[ARCHITECTURES[name].pooling](hidden))
    classifier = model.classifiers["single"]
    expected = torch.stack(pooled) @ classifier.weight.T + classifier.bias
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-5, rtol=1e-5)


@EVERY
def test_pruning_a_head_equals_zeroing_its_columns_of_the_projection(zoo, name):
    model, reference = zoo.model(name), load_untouched(name, zoo.folder(name))
    batch = padded_batch(model, zoo.tasks["single"])
    whole = hidden_of(reference, batch, model.accepts)
    for layer, head in EVERY_HEAD:
        columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        if (
            name == "albert"
        ):  # one projection for all layers: silence its input at the layer's own call instead
            silence = torch.ones(LAYERS, HEADS, 1)
            silence[layer, head] = 0
            with at_projections(name, reference, lambda at, x, silence=silence: x * silence[at]):
                expected = hidden_of(reference, batch, model.accepts)
        else:
            maimed = copy.deepcopy(reference)
            projection = projections(name, maimed)[layer]
            with torch.no_grad():
                (
                    projection.weight
                    if isinstance(projection, tf.pytorch_utils.Conv1D)
                    else projection.weight.T
                )[columns] = 0
            expected = hidden_of(maimed, batch, model.accepts)
        with pruned(model, heads_at((layer, head))):
            found = hidden_of(model.encoder, batch, model.accepts)
        torch.testing.assert_close(
            found, expected, atol=1e-6, rtol=1e-5, msg=f"layer {layer}, head {head}"
        )
        assert not torch.allclose(found, whole, atol=1e-3)


@EVERY
def test_one_gate_acts_on_one_head_alone(zoo, name):
    model = zoo.model(name)
    batch = padded_batch(model, zoo.tasks["single"])
    real = batch.mask.bool()
    before = heads_outputs(name, model, batch)[:, real]  # (layers, tokens, heads, head_dim)
    for layer, head in EVERY_HEAD:
        with pruned(model, heads_at((layer, head))):
            after = heads_outputs(name, model, batch)[:, real]
        others = [h for h in range(HEADS) if h != head]
        assert torch.equal(after[:layer], before[:layer])
        assert torch.equal(after[layer][:, others], before[layer][:, others])
        assert after[layer][:, head].abs().max() == 0 < before[layer][:, head].abs().max()
        if layer + 1 < LAYERS:
            assert not torch.allclose(after[layer + 1], before[layer + 1], atol=1e-3)


@EVERY
def test_pruning_all_heads_changes_the_logits(zoo, name):
    model = zoo.model(name)
    batch = padded_batch(model, zoo.tasks["single"])
    whole = logits_of(model, batch)
    with pruned(model, ~heads_at()):
        assert (logits_of(model, batch) - whole).abs().amax(1).min() > 1e-2  # of every text
        assert heads_outputs(name, model, batch).abs().max() == 0


@EVERY
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_padding_does_not_change_the_logits(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    together = logits_of(model, padded_batch(model, task), kind)
    encoded = model.encode(task.train)
    alone = torch.cat([logits_of(model, encoded.batch([i]), kind) for i in range(len(encoded))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[1:] - together[:-1]).abs().amax(1).min() > 1e-3  # texts do differ


@EVERY
def test_shape_of_the_model_is_known(zoo, name):
    model = zoo.model(name)
    assert (model.n_layers, model.n_heads, model.control.head_shapes[0]) == (
        LAYERS,
        HEADS,
        (HEADS, HEAD_DIM),
    )


def test_a_tokenizer_without_padding_token_pads_without_effect(zoo, tmp_path):
    folder = shutil.copytree(zoo.folder("gpt2"), tmp_path / "gpt2")
    tokenizer(("", ""), unk_token="[UNK]", eos_token="[SEP]").save_pretrained(folder)
    model = MultiTaskModel.from_pretrained(folder, zoo.tasks)
    batch = padded_batch(model, zoo.tasks["single"])
    assert (batch.inputs["input_ids"][batch.mask == 0] == model.tokenizer.eos_token_id).all()
    encoded = model.encode(zoo.tasks["single"].train)
    alone = torch.cat([logits_of(model, encoded.batch([i])) for i in range(len(encoded))])
    torch.testing.assert_close(logits_of(model, batch), alone, atol=1e-5, rtol=1e-5)


UNREACHABLE = {
    "RoFormer": tf.RoFormerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    ),
    "Deberta": tf.DebertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    ),
}


@pytest.mark.parametrize("family", UNREACHABLE)
def test_an_architecture_whose_heads_cannot_be_reached_is_refused_by_name(zoo, tmp_path, family):
    getattr(tf, f"{family}Model")(UNREACHABLE[family]).save_pretrained(tmp_path)
    tokenizer(("[CLS]", "[SEP]")).save_pretrained(tmp_path)
    with pytest.raises(
        FslibError, match=f"{family}Model.*use an architecture.*BERT, RoBERTa"
    ) as error:
        MultiTaskModel.from_pretrained(tmp_path, zoo.tasks)
    assert "\n" not in str(error.value)


# --- pruned: what it takes, nests and leaves behind ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_mean_ablation_puts_the_mean_in_place_of_the_heads_output(zoo, name):
    model, reference = zoo.model(name), load_untouched(name, zoo.folder(name))
    batch = padded_batch(model, zoo.tasks["single"])
    mean = torch.randn(LAYERS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    chosen = heads_at((0, 1), (0, 3), (2, 2))

    def replace(layer, x):
        return torch.where(torch.from_numpy(chosen[layer])[:, None], mean[layer], x)

    with at_projections(name, reference, replace):
        expected = hidden_of(reference, batch, model.accepts)
    with pruned(model, chosen, ablation="mean", mean=mean):
        found = hidden_of(model.encoder, batch, model.accepts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_nested_blocks_switch_off_the_union_and_each_is_undone_by_itself(bert, zoo, ablation):
    batch = padded_batch(bert, zoo.tasks["single"])
    mean = torch.ones(LAYERS, HEADS, HEAD_DIM) if ablation == "mean" else None
    outer, inner = heads_at((0, 1), (1, 2)), heads_at((1, 2), (2, 0))

    def logits_without(chosen):
        with pruned(bert, chosen, ablation=ablation, mean=mean):
            return logits_of(bert, batch)

    whole, both, one = logits_of(bert, batch), logits_without(outer | inner), logits_without(outer)
    with pruned(bert, outer, ablation=ablation, mean=mean):
        with pruned(bert, inner, ablation=ablation, mean=mean):
            assert torch.equal(logits_of(bert, batch), both)
        assert torch.equal(logits_of(bert, batch), one)
    assert torch.equal(logits_of(bert, batch), whole)
    assert not torch.allclose(both, one) and not torch.allclose(one, whole)


def test_an_exception_inside_the_block_leaves_the_model_whole(bert, zoo):
    batch = padded_batch(bert, zoo.tasks["single"])
    whole = logits_of(bert, batch)
    with pytest.raises(KeyError), pruned(bert, ~heads_at()):
        raise KeyError
    with pytest.raises(KeyError), tapped(bert, lambda layer, ctx: {}[layer]):
        logits_of(bert, batch)
    assert torch.equal(logits_of(bert, batch), whole)


def test_a_copy_of_a_model_has_a_control_of_its_own(bert, zoo):
    batch, twin = padded_batch(bert, zoo.tasks["single"]), copy.deepcopy(bert)
    whole = logits_of(bert, batch)
    with pruned(bert, ~heads_at()):
        assert torch.equal(logits_of(twin, batch), whole)
        assert not torch.allclose(logits_of(bert, batch), whole)
    with pruned(twin, ~heads_at()):
        assert torch.equal(logits_of(bert, batch), whole)
        assert not torch.allclose(logits_of(twin, batch), whole)


@pytest.mark.parametrize(
    "convert", [torch.from_numpy, lambda a: a.tolist()], ids=["tensor", "list"]
)
def test_a_head_set_may_be_a_tensor_or_a_list(bert, zoo, convert):
    batch, chosen = padded_batch(bert, zoo.tasks["single"]), heads_at((0, 1), (2, 3))
    with pruned(bert, chosen):
        expected = logits_of(bert, batch)
    with pruned(bert, convert(chosen)):
        assert torch.equal(logits_of(bert, batch), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((HEADS, LAYERS), dtype=bool),
        np.zeros(LAYERS * HEADS, dtype=bool),
        np.zeros((LAYERS, HEADS)),
        np.zeros((LAYERS, HEADS), dtype=int),
        torch.zeros(LAYERS, HEADS),
        [[0, 1]],
    ],
    ids=["transposed", "flat", "float", "int", "float tensor", "indices"],
)
def test_a_head_set_of_wrong_shape_or_type_is_refused(bert, wrong):
    with pytest.raises(FslibError, match=r"bool array of shape \(3, 4\)"), pruned(bert, wrong):
        pass


def test_ablations_that_make_no_sense_are_refused(bert):
    mean = torch.zeros(LAYERS, HEADS, HEAD_DIM)
    for options in ({"ablation": "median"}, {"ablation": "mean"}, {"mean": mean}):
        with (
            pytest.raises(FslibError, match=r"zero.*mean|mean_context"),
            pruned(bert, heads_at(), **options),
        ):
            pass
    with pruned(bert, heads_at()):
        inner = pruned(bert, heads_at(), ablation="mean", mean=mean)
        with pytest.raises(FslibError, match="same ablation"), inner:
            pass


def test_a_head_mask_keyword_is_refused(bert):
    ids = torch.tensor([[2, 5, 3]])
    with pytest.raises(FslibError, match=r"head_mask.*fslib\.pruned"):
        bert.encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), head_mask=torch.ones(LAYERS, HEADS)
        )


def test_a_forward_that_would_misplace_heads_is_refused(bert, zoo):
    batch = padded_batch(bert, zoo.tasks["single"])
    skipping, recomputing = copy.deepcopy(bert), copy.deepcopy(bert)
    del skipping.encoder.encoder.layer[1]
    with pytest.raises(FslibError, match="attention 2 times for 3 layers"):
        logits_of(skipping, batch)
    recomputing.encoder.gradient_checkpointing_enable()
    with pytest.raises(FslibError, match="gradient checkpointing"):
        recomputing.train()(batch.inputs, "single")


def test_a_model_without_control_is_refused():
    with pytest.raises(FslibError, match="Linear has no head control"):
        control_of(torch.nn.Linear(2, 2))


# --- head sets ----------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_layer_then_the_lower_head():
    importance = np.array([[1.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
    assert top_heads(importance, 0.34).nonzero()[1].tolist() == [1, 0]  # k = 2: both 2.0
    assert top_heads(importance, 0.5).tolist() == [[True, True, False], [True, False, False]]
    assert top_heads(np.zeros((2, 3)), 0.67).tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("fraction", "total", "k"),
    [
        (0.3, 24, 7),
        (0.5, 15, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 30, 3),
        (1.0, 15, 15),
        (0.05, 12, 0),
    ],
)
def test_k_is_the_floor_of_the_exact_product(fraction, total, k):
    assert head_count(fraction, total) == k


@given(st.integers(1, 100), st.integers(1, 400))
def test_k_is_exact_for_every_percentage(percent, total):
    assert head_count(percent / 100, total) == percent * total // 100


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, 30.0, math.nan, math.inf])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(FslibError, match=r"outside \(0, 1\]"):
        top_heads(np.ones((LAYERS, HEADS)), fraction)


def test_full_and_empty_sets():
    importance = np.random.default_rng(0).random((LAYERS, HEADS))
    assert top_heads(importance, 1.0).all()
    assert not top_heads(importance, 0.08).any()  # less than one head of 12


def test_min_per_layer_leaves_that_many_heads_in_every_layer():
    importance = np.array([[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, 3.0, 2.0]])
    assert top_heads(importance, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert top_heads(importance, 0.5, min_per_layer=1).tolist() == [
        [True] * 3 + [False],
        [True] + [False] * 3,
    ]
    assert top_heads(importance, 1.0, min_per_layer=1).sum(1).tolist() == [3, 3]
    assert not top_heads(importance, 1.0, min_per_layer=4).any()
    for wrong in (-1, 5):
        with pytest.raises(FslibError, match=f"min_per_layer {wrong}"):
            top_heads(importance, 0.5, min_per_layer=wrong)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_importance_that_is_not_finite_is_refused(wrong):
    with pytest.raises(FslibError, match="finite"):
        top_heads(np.array([[1.0, wrong, 0.0]]), 0.5)


def test_random_heads_depend_on_the_generator_alone():
    like = heads_at((0, 0), (0, 1), (2, 3))
    first, again, other = (random_heads(like, 5, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_heads_can_exhaust_what_exists_but_not_more():
    like = heads_at((0, 0), (1, 0), (1, 1))  # 4 x 6 x 1 sets
    found = random_heads(like, 24, np.random.default_rng(0))
    assert len({draw.tobytes() for draw in found}) == 24
    with pytest.raises(FslibError, match=r"25 controls asked, but only 24 distinct"):
        random_heads(like, 25, np.random.default_rng(0))
    assert random_heads(~heads_at(), 1, np.random.default_rng(0)).all()
    with pytest.raises(FslibError, match="only 1 distinct"):
        random_heads(heads_at(), 2, np.random.default_rng(0))


def test_all_of_many_sets_can_be_drawn():
    like = np.zeros((1, 12), dtype=bool)
    like[0, :4] = True
    found = random_heads(
        like, 495, np.random.default_rng(0)
    )  # 12 choose 4; the last one takes thousands of draws
    assert len({draw.tobytes() for draw in found}) == 495


def test_controls_of_sets_that_grow_grow_alike_and_differ_at_every_step():
    importance = np.random.default_rng(0).random((LAYERS, HEADS))
    growing = np.array([top_heads(importance, fraction) for fraction in (0.25, 0.5, 0.75)])
    found = random_heads(growing, 6, np.random.default_rng(1))
    assert found.shape == (6, 3, LAYERS, HEADS)
    assert (found.sum(-1) == growing.sum(-1)).all()
    assert not (found[:, :-1] & ~found[:, 1:]).any()
    for step in range(3):
        assert len(np.unique(found[:, step].reshape(6, -1), axis=0)) == 6


def test_random_heads_other_than_the_set_itself():
    like = heads_at((0, 0))
    nested = np.stack([like, heads_at((0, 0), (1, 1))])
    for seed in range(20):
        assert not any(
            np.array_equal(draw, like)
            for draw in random_heads(like, 3, np.random.default_rng(seed), others=True)
        )
        drawn = random_heads(nested, 3, np.random.default_rng(seed), others=True)
        assert not (drawn == nested).all((-1, -2)).any()
    with pytest.raises(FslibError, match="only 3 other"):
        random_heads(like, 4, np.random.default_rng(0), others=True)
    with pytest.raises(FslibError, match="only 0 other"):
        random_heads(~heads_at(), 1, np.random.default_rng(0), others=True)


def test_random_heads_are_even_over_the_heads_of_a_layer():
    draws = [
        random_heads(heads_at((1, 0)), 1, np.random.default_rng(seed))[0] for seed in range(400)
    ]
    share = np.mean(draws, axis=0)
    assert np.abs(share[1] - 0.25).max() < 0.09  # four standard errors
    assert not share[[0, 2]].any()


def test_overlap_of_hand_made_sets():
    a, b = heads_at((0, 0), (0, 1), (1, 2)), heads_at((0, 1), (1, 2), (2, 3))
    assert overlap(a, b) == 0.5
    assert overlap(a, ~a) == 0.0
    assert overlap(heads_at(), heads_at()) == 1.0
    assert overlap(heads_at(), a) == 0.0


sizes = st.tuples(st.integers(1, 6), st.integers(1, 7)).filter(lambda shape: shape[0] != shape[1])
head_sets = sizes.flatmap(lambda shape: arrays(bool, shape))
head_set_pairs = sizes.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))
scores = sizes.flatmap(
    lambda shape: arrays(float, shape, elements=st.integers(0, 5).map(float))
)  # many ties
fractions = st.floats(0.01, 1.0)


@given(scores, fractions)
def test_top_heads_are_k_and_none_outside_is_better(importance, fraction):
    chosen = top_heads(importance, fraction)
    assert chosen.shape == importance.shape and chosen.sum() == head_count(
        fraction, importance.size
    )
    assume(chosen.any() and not chosen.all())
    assert importance[chosen].min() >= importance[~chosen].max()
    edge = np.flatnonzero(importance.ravel() == importance[chosen].min())
    taken = chosen.ravel()[edge]
    assert (np.diff(taken.astype(int)) <= 0).all()  # among equals, first come first


@given(scores, fractions, fractions)
def test_a_larger_fraction_adds_heads_and_drops_none(importance, one, other):
    small, large = sorted((one, other))
    assert not (top_heads(importance, small) & ~top_heads(importance, large)).any()


@given(scores, fractions, st.data())
def test_min_per_layer_is_kept_and_takes_the_best_of_the_rest(importance, fraction, data):
    layers, heads = importance.shape
    kept = data.draw(st.integers(0, heads))
    chosen = top_heads(importance, fraction, min_per_layer=kept)
    assert (chosen.sum(1) <= heads - kept).all()
    assert chosen.sum() == min(head_count(fraction, importance.size), layers * (heads - kept))
    for row, scored in zip(chosen, importance, strict=True):
        if row.any() and not row.all():
            assert scored[row].min() >= scored[~row].max()


@given(head_sets, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_random_heads_match_layer_by_layer_and_differ_from_each_other(like, n, seed):
    assume(math.prod(math.comb(like.shape[1], int(c)) for c in like.sum(1)) >= n)
    draws = random_heads(like, n, np.random.default_rng(seed))
    assert draws.shape == (n, *like.shape) and draws.dtype == bool
    assert (draws.sum(2) == like.sum(1)).all()
    assert len(np.unique(draws.reshape(n, -1), axis=0)) == n


@given(head_set_pairs)
def test_overlap_is_the_jaccard_index(pair):
    a, b = ({tuple(place) for place in np.argwhere(heads)} for heads in pair)
    assert overlap(*pair) == overlap(*pair[::-1]) == (len(a & b) / len(a | b) if a | b else 1.0)


@settings(max_examples=20, deadline=None)
@given(arrays(bool, (LAYERS, HEADS)), arrays(bool, (LAYERS, HEADS)))
def test_any_two_sets_switch_off_their_union_and_nothing_else(zoo, a, b):
    model = zoo.loaded.get("llama") or zoo.model("llama")
    batch = padded_batch(model, zoo.tasks["single"])
    with pruned(model, a), pruned(model, b):
        silent = (
            (heads_outputs("llama", model, batch) == 0).all(-1).all(2).all(1).numpy()
        )  # (layers, heads)
    assert np.array_equal(silent, a | b)


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(bert, tmp_path):
    bert.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_the_same(bert, saved, zoo):
    back = MultiTaskModel.load(saved)
    batch = padded_batch(back, zoo.tasks["pair"])
    assert torch.equal(logits_of(back, batch, "pair"), logits_of(bert, batch, "pair"))
    assert {n: p.shape for n, p in back.named_parameters()} == {
        n: p.shape for n, p in bert.named_parameters()
    }
    assert (back.pooling, back.max_length, back.source) == (
        bert.pooling,
        bert.max_length,
        bert.source,
    )
    assert not back.training
    with pruned(back, ~heads_at()):
        assert not torch.allclose(logits_of(back, batch, "pair"), logits_of(bert, batch, "pair"))


@pytest.mark.parametrize("name", ["t5", "albert", "gpt2"])
def test_other_architectures_come_back_the_same(zoo, tmp_path, name):
    model = zoo.model(name)
    model.save(tmp_path / "model")
    back, batch = MultiTaskModel.load(tmp_path / "model"), padded_batch(model, zoo.tasks["single"])
    assert torch.equal(logits_of(back, batch), logits_of(model, batch))


def test_saving_writes_safetensors_and_json_only_and_replaces_what_was_there(bert, saved):
    (saved / "left over").touch()
    bert.save(saved)
    files = sorted(p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file())
    assert {Path(f).suffix for f in files} == {".json", ".safetensors"}
    assert {"classifiers.safetensors", "encoder/model.safetensors", "fslib.json"} <= set(files)
    assert list(saved.parent.iterdir()) == [saved]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def scribble(path):
    path.write_bytes(b"\xff" * 64)


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage", [cut, scribble, without_a_tensor, Path.unlink], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("file", ["classifiers.safetensors", "encoder/model.safetensors"])
def test_damaged_or_missing_weights_are_one_clear_line(saved, file, damage):
    damage(saved / file)
    assert_one_line(saved, MultiTaskModel.load, f"cannot be loaded, {file.split('/')[0]} does not fit")


@pytest.mark.parametrize("damage", [scribble, Path.unlink, lambda path: path.write_text("{}")])
@pytest.mark.parametrize("file", ["fslib.json", "encoder/config.json"])
def test_damaged_or_missing_descriptions_are_one_clear_line(saved, file, damage):
    damage(saved / file)
    assert_one_line(saved, MultiTaskModel.load, "cannot be loaded|is not a saved MultiTaskModel")


def assert_one_line(folder, load, pattern):
    with pytest.raises(FslibError, match=pattern) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_folder_that_holds_another_architecture_is_refused(saved, zoo):
    config = zoo.folder("t5") / "config.json"
    shutil.copy(config, saved / "encoder" / "config.json")
    assert_one_line(saved, MultiTaskModel.load, "cannot be loaded, encoder does not fit")


def test_an_encoder_of_another_size_is_refused(saved, zoo):
    shutil.rmtree(saved / "encoder")
    shutil.copytree(zoo.folder("t5"), saved / "encoder")  # 24 wide, the classifiers expect 32
    assert_one_line(saved, MultiTaskModel.load, "cannot be loaded, encoder does not fit")


def test_a_missing_folder_is_refused(tmp_path):
    assert_one_line(tmp_path / "nowhere", MultiTaskModel.load, "is not a saved MultiTaskModel")


@pytest.mark.parametrize(
    "damage", [cut, scribble, without_a_tensor, Path.unlink], ids=lambda f: f.__name__
)
def test_a_model_folder_with_damaged_weights_is_refused(zoo, tmp_path, damage):
    folder = shutil.copytree(zoo.folder("bert"), tmp_path / "bert")
    damage(folder / "model.safetensors")
    assert_one_line(
        folder, lambda f: MultiTaskModel.from_pretrained(f, zoo.tasks), "cannot be loaded"
    )


def test_a_model_folder_whose_weights_have_other_shapes_is_refused(zoo, tmp_path):
    folder = save("bert", tmp_path / "bert", intermediate_size=40)
    shutil.copy(zoo.folder("bert") / "config.json", folder / "config.json")
    assert_one_line(
        folder, lambda f: MultiTaskModel.from_pretrained(f, zoo.tasks), "cannot be loaded"
    )


IN_ANOTHER_PROCESS = """
import pickle, sys
import torch, fslib
assert "transformers.modeling_utils" not in sys.modules, "half the time of an import, before any encoder is asked for"
model, inputs, heads = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad(), fslib.pruned(model, heads):
    print(model(inputs, "single").tolist())
"""


def test_a_pickled_model_is_pruned_in_another_process(bert, zoo, tmp_path):
    """Where nothing has yet registered fslib's attention with transformers, which `import fslib` leaves closed."""
    inputs = padded_batch(bert, zoo.tasks["single"]).inputs
    heads = heads_at((0, 0), (1, 2), (2, 3))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((bert.eval(), inputs, heads)))
    words = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "model.pickle")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    with torch.no_grad():
        whole = bert(inputs, "single")
        with pruned(bert, heads):
            without = bert(inputs, "single")
    assert np.allclose(json.loads(done.stdout), without.tolist(), atol=1e-6) and not torch.equal(
        whole, without
    )


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_weights_are_refused_and_never_unpickled(zoo, tmp_path, monkeypatch):
    folder = shutil.copytree(zoo.folder("bert"), tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    assert_one_line(
        folder,
        lambda f: MultiTaskModel.from_pretrained(f, zoo.tasks),
        "cannot be loaded.*safetensors",
    )
    assert not opened and not (tmp_path / "sprung").exists()


def test_code_in_a_model_folder_is_never_run(zoo, tmp_path):
    folder = shutil.copytree(zoo.folder("bert"), tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "trap",
        "auto_map": {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()"
    )
    assert_one_line(
        folder, lambda f: MultiTaskModel.from_pretrained(f, zoo.tasks), "cannot be loaded"
    )
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "near"), [("minilm-l7", "minilm-l6"), ("minilm6", "minilm-l6"), ("tiny", "tiny-r")]
)
def test_an_unknown_model_gets_the_nearest_name(zoo, name, near):
    with pytest.raises(FslibError, match=f"unknown model '{name}': did you mean '{near}") as error:
        MultiTaskModel.from_pretrained(name, zoo.tasks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no connection"])
def test_an_unreachable_hub_is_one_clear_line(zoo, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9"
    )  # nobody listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with pytest.raises(
        FslibError, match=r"no-one/no-such-model.*Hub did not supply it \(offline\?"
    ) as error:
        MultiTaskModel.from_pretrained("no-one/no-such-model", zoo.tasks)
    assert "\n" not in str(error.value)


def test_an_unknown_pooling_is_refused(zoo):
    with pytest.raises(FslibError, match="unknown pooling 'lst': did you mean 'last'"):
        MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, pooling="lst")


def test_a_pooling_of_choice_is_used(zoo):
    first, last = (
        MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, pooling=p)
        for p in ("first", "last")
    )
    batch = padded_batch(first, zoo.tasks["single"])
    assert (first.pooling, last.pooling) == ("first", "last")
    assert not torch.allclose(logits_of(first, batch), logits_of(last, batch))


def test_a_task_the_model_has_not_is_refused(bert, zoo):
    with pytest.raises(FslibError, match="unknown task of this model 'pear': did you mean 'pair'"):
        bert(padded_batch(bert, zoo.tasks["pair"]).inputs, "pear")
