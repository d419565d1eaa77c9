"""Heads are switched off where and only where they are told to be; and models load safely.

On every architecture. Expectations come from outside fslib: from the model as transformers runs it,
with weights or projection inputs changed by hand.
"""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import tinymodels
import torch
from refusal import refused
from safetensors.torch import load_file, save_file
from tinymodels import HEAD_DIM, HEADS, LAYERS, at_projections, heads_at, heads_outputs

from fslib import MultiTaskModel, overlap, pruned, random_heads, top_heads
from fslib.heads import checked_fractions, head_count, head_name
from fslib.model.attention import control_of, tapped

EVERY = pytest.mark.parametrize("name", tinymodels.ARCHITECTURES)
EVERY_HEAD = list(np.ndindex(LAYERS, HEADS))


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


def logits_alone(model, task):
    """Logits of every training text by itself, without padding."""
    encoded = model.encode(task.train)
    alone = (logits_of(model, encoded.batch([i]), task.name) for i in range(len(encoded)))
    return torch.cat(list(alone))


# --- every architecture against itself, untouched -----------------------------------------------


@EVERY
def test_a_model_with_no_head_off_equals_the_untouched_one(zoo, name):
    model, reference = zoo.model(name), tinymodels.untouched(name, zoo.folder(name))
    shape = (model.n_layers, model.n_heads, model.control.head_shapes[0])
    assert shape == (LAYERS, HEADS, (HEADS, HEAD_DIM))
    how = tinymodels.ARCHITECTURES[name].pooling
    assert model.pooling == how
    pool = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[how]
    for task in (zoo.tasks["single"], zoo.tasks["pair"]):
        batch = padded_batch(model, task)
        hidden = hidden_of(reference, batch, model.accepts)
        bare = hidden_of(model.encoder, batch, model.accepts)
        with pruned(model, heads_at()):
            gated = hidden_of(model.encoder, batch, model.accepts)
        for found in (bare, gated):
            torch.testing.assert_close(found, hidden, atol=1e-6, rtol=1e-6)
        pooled = torch.stack([pool(text) for text in hidden.split(batch.mask.sum(1).tolist())])
        expected, found = model.classifiers[task.name](pooled), logits_of(model, batch, task.name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, logits_alone(model, task), atol=1e-5, rtol=1e-5)
        assert (found[1:] - found[:-1]).abs().amax(1).min() > 1e-3, "texts do differ"


@EVERY
def test_pruning_a_head_is_zeroing_its_input_to_the_projection_and_no_more(zoo, name):
    model, reference = zoo.model(name), tinymodels.untouched(name, zoo.folder(name))
    batch = padded_batch(model, zoo.tasks["single"])
    real = batch.mask.bool()
    whole = hidden_of(reference, batch, model.accepts)
    before = heads_outputs(name, model, batch)[:, real]  # (layers, tokens, heads, head_dim)
    for layer, head in EVERY_HEAD:
        on = ~torch.from_numpy(heads_at((layer, head)))[..., None]
        with at_projections(name, reference, lambda at, x, on=on: x * on[at]):
            expected = hidden_of(reference, batch, model.accepts)
        with pruned(model, heads_at((layer, head))):
            found = hidden_of(model.encoder, batch, model.accepts)
            after = heads_outputs(name, model, batch)[:, real]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=f"{layer}, {head}")
        assert not torch.allclose(found, whole, atol=1e-3)
        assert torch.equal(after[: layer + 1], before[: layer + 1] * on[: layer + 1, None])
        assert before[layer][:, head].abs().max() > 0
        if layer + 1 < LAYERS:
            assert not torch.allclose(after[layer + 1], before[layer + 1], atol=1e-3)


def test_a_tokenizer_without_padding_token_pads_without_effect(zoo, tmp_path):
    folder = shutil.copytree(zoo.folder("gpt2"), tmp_path / "gpt2")
    bare = tinymodels.tokenizer(("", ""), unk_token="[UNK]", eos_token="[SEP]")
    bare.save_pretrained(folder)
    model, task = MultiTaskModel.from_pretrained(folder, zoo.tasks), zoo.tasks["single"]
    batch = padded_batch(model, task)
    assert (batch.inputs["input_ids"][batch.mask == 0] == model.tokenizer.eos_token_id).all()
    found = logits_of(model, batch)
    torch.testing.assert_close(found, logits_alone(model, task), atol=1e-5, rtol=1e-5)


# --- pruned: what it takes, nests and leaves behind ---------------------------------------------


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_mean_ablation_puts_the_mean_in_place_of_the_heads_output(zoo, name):
    model, reference = zoo.model(name), tinymodels.untouched(name, zoo.folder(name))
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
    options = {"ablation": ablation, "mean": mean}
    outer, inner = heads_at((0, 1), (1, 2)), heads_at((1, 2), (2, 0))

    def logits_without(chosen):
        with pruned(bert, chosen, **options):
            return logits_of(bert, batch)

    whole, both, one = logits_of(bert, batch), logits_without(outer | inner), logits_without(outer)
    with pruned(bert, outer, **options):
        with pruned(bert, inner, **options):
            assert torch.equal(logits_of(bert, batch), both)
        assert torch.equal(logits_of(bert, batch), one)
    assert torch.equal(logits_of(bert, batch), whole)
    assert not torch.allclose(both, one) and not torch.allclose(one, whole)


def test_an_exception_leaves_the_model_whole_and_a_copy_has_a_control_of_its_own(bert, zoo):
    batch, twin = padded_batch(bert, zoo.tasks["single"]), copy.deepcopy(bert)
    whole = logits_of(bert, batch)
    with pytest.raises(KeyError), pruned(bert, ~heads_at()):
        raise KeyError
    with pytest.raises(KeyError), tapped(bert, lambda layer, ctx: {}[layer]):
        logits_of(bert, batch)
    for one, other in ((bert, twin), (twin, bert)):
        with pruned(one, ~heads_at()):
            assert torch.equal(logits_of(other, batch), whole)
            assert not torch.allclose(logits_of(one, batch), whole)


def test_a_head_set_may_be_a_tensor_or_a_list_and_nothing_else(bert, zoo):
    batch, chosen = padded_batch(bert, zoo.tasks["single"]), heads_at((0, 1), (2, 3))
    found, mean = [], torch.zeros(LAYERS, HEADS, HEAD_DIM)
    for form in (chosen, torch.from_numpy(chosen), chosen.tolist()):
        with pruned(bert, form):
            found.append(logits_of(bert, batch))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for wrong in (chosen.T, torch.zeros(LAYERS, HEADS)):
        with refused("bool array of shape (3, 4)"), pruned(bert, wrong):
            pass
    for options in ({"ablation": "median"}, {"ablation": "mean"}, {"mean": mean}):
        with refused("mean"), pruned(bert, chosen, **options):
            pass
    inner = pruned(bert, chosen, ablation="mean", mean=mean)
    with pruned(bert, chosen), refused("same ablation"), inner:
        pass
    with refused("Linear has no head control"):
        control_of(torch.nn.Linear(2, 2))


def test_a_forward_that_would_misplace_heads_is_refused(bert, zoo):
    batch = padded_batch(bert, zoo.tasks["single"])
    skipping, recomputing = copy.deepcopy(bert), copy.deepcopy(bert)
    with refused("head_mask", "fslib.pruned"):
        bert.encoder(batch.inputs["input_ids"], batch.mask, head_mask=torch.ones(LAYERS, HEADS))
    del skipping.encoder.encoder.layer[1]
    with refused("2 times for 3 layers", "layerdrop"):
        logits_of(skipping, batch)
    recomputing.encoder.gradient_checkpointing_enable()
    with refused("gradient checkpointing"):
        recomputing.train()(batch.inputs, "single")


# --- head sets ----------------------------------------------------------------------------------


def test_top_heads_by_hand_ties_go_to_the_lower_layer_then_head():
    importance = np.array([[1.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
    assert top_heads(importance, 0.34).nonzero()[1].tolist() == [1, 0]  # k = 2: both 2.0
    assert top_heads(importance, 0.5).tolist() == [[True, True, False], [True, False, False]]
    assert top_heads(np.zeros((2, 3)), 0.67).tolist() == [[True] * 3, [True, False, False]]
    assert top_heads(importance, 1.0).all() and not top_heads(importance, 0.16).any()
    assert head_name(3, 4) == "L4H5"


def test_min_per_layer_leaves_that_many_heads_in_every_layer():
    importance = np.array([[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, 3.0, 2.0]])
    assert top_heads(importance, 0.5).sum(1).tolist() == [4, 0]
    found = top_heads(importance, 0.5, min_per_layer=1)
    assert found.tolist() == [[True] * 3 + [False], [True] + [False] * 3]
    assert top_heads(importance, 1.0, min_per_layer=1).sum(1).tolist() == [3, 3]
    assert not top_heads(importance, 1.0, min_per_layer=4).any()
    with refused("min_per_layer 5"):
        top_heads(importance, 0.5, min_per_layer=5)
    with refused("finite"):
        top_heads(importance * np.inf, 0.5)


def test_k_is_exact_for_every_percentage():
    for total in (1, 12, 72, 100, 144, 399):
        counts = [head_count(percent / 100, total) for percent in range(1, 101)]
        assert counts == [percent * total // 100 for percent in range(1, 101)]
    with refused("fraction 1.01 is outside (0, 1]"):
        head_count(1.01, 12)


def test_fractions_come_back_in_order():
    # of 2 heads, one in each layer: 4 x 4 sets, less the top heads themselves
    assert checked_fractions([0.5, 0.25], (2, 4), 15) == (0.25, 0.5)
    with refused("controls=16", "at most 15 other sets of 2 heads"):
        checked_fractions([0.25], (2, 4), 16)
    with refused("alphas 0.3 and 0.26"):
        checked_fractions([0.3, 0.26], (1, 4), what="alpha")


def test_random_heads_depend_on_the_generator_alone_and_are_even_over_a_layer():
    like = heads_at((0, 0), (0, 1), (2, 3))
    first, again, other = (random_heads(like, 5, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    one = heads_at((1, 0))
    share = np.mean([random_heads(one, 1, np.random.default_rng(s))[0] for s in range(400)], 0)
    assert np.abs(share[1] - 0.25).max() < 0.09  # four standard errors
    assert not share[[0, 2]].any()


def test_random_heads_can_exhaust_what_exists_but_not_more():
    rng, like, wide = np.random.default_rng(0), heads_at((0, 0), (1, 0), (1, 1)), np.arange(12) < 4
    assert len({d.tobytes() for d in random_heads(like, 24, rng)}) == 24  # 4 x 6 x 1 sets
    assert len({d.tobytes() for d in random_heads(wide[None], 495, rng)}) == 495  # 12 choose 4
    assert random_heads(~heads_at(), 1, rng).all()
    for heads, n, word in ((like, 25, "only 24 distinct"), (heads_at(), 2, "only 1 distinct")):
        with refused(f"{n} controls asked", word):
            random_heads(heads, n, rng)


def test_controls_of_sets_that_grow_grow_alike_and_differ_at_every_step():
    importance = np.random.default_rng(0).random((LAYERS, HEADS))
    growing = np.array([top_heads(importance, fraction) for fraction in (0.25, 0.5, 0.75)])
    found = random_heads(growing, 6, np.random.default_rng(1))
    assert found.shape == (6, 3, LAYERS, HEADS)
    assert (found.sum(-1) == growing.sum(-1)).all()
    assert not (found[:, :-1] & ~found[:, 1:]).any()
    assert all(len(np.unique(found[:, step].reshape(6, -1), axis=0)) == 6 for step in range(3))


def test_random_heads_other_than_the_set_itself():
    like = heads_at((0, 0))
    nested = np.stack([like, heads_at((0, 0), (1, 1))])
    for seed in range(20):
        for sets in (like, nested):
            drawn = random_heads(sets, 3, np.random.default_rng(seed), others=True)
            assert not (drawn == sets).all((-1, -2)).any()
    for sets, n, word in ((like, 4, "only 3 other"), (~heads_at(), 1, "only 0 other")):
        with refused(word):
            random_heads(sets, n, np.random.default_rng(0), others=True)


def test_overlap_is_the_jaccard_index():
    one, other = heads_at((0, 0), (1, 1)), heads_at((1, 1), (2, 0))
    assert overlap(one, other) == overlap(other, one) == pytest.approx(1 / 3)
    assert overlap(one, one) == overlap(heads_at(), heads_at()) == 1 and overlap(one, ~one) == 0


# --- saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5", "albert", "gpt2"])
def test_a_saved_model_comes_back_the_same(zoo, tmp_path, name):
    model, folder = zoo.model(name), tmp_path / "model"
    model.save(folder)
    (folder / "left over").touch()
    model.save(folder)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert {Path(f).suffix for f in files} == {".json", ".safetensors"}
    assert {"classifiers.safetensors", "encoder/model.safetensors", "fslib.json"} <= set(files)
    assert list(tmp_path.glob("*partial*")) == []
    back, batch = MultiTaskModel.load(folder), padded_batch(model, zoo.tasks["pair"])
    whole = logits_of(model, batch, "pair")
    assert torch.equal(logits_of(back, batch, "pair"), whole)
    for field in ("pooling", "max_length", "source", "answers", "training"):
        assert getattr(back, field) == getattr(model, field)
    with pruned(back, ~heads_at()):
        assert not torch.allclose(logits_of(back, batch, "pair"), whole)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [cut, without_a_tensor, Path.unlink])
@pytest.mark.parametrize("place", ["saved/encoder/model", "saved/classifiers", "bert/model"])
def test_damaged_weights_are_one_clear_line(bert, zoo, tmp_path, place, damage):
    bert.save(tmp_path / "saved")
    shutil.copytree(zoo.folder("bert"), tmp_path / "bert")
    damage(tmp_path / f"{place}.safetensors")
    folder = tmp_path / Path(place).parts[0]
    with refused(folder, "cannot be loaded"):
        if folder.name == "saved":
            MultiTaskModel.load(folder)
        else:
            MultiTaskModel.from_pretrained(folder, zoo.tasks)


def test_weights_of_another_encoder_are_refused(bert, zoo, tmp_path):
    saved, other = tmp_path / "saved", tmp_path / "other"
    tinymodels.save("bert", other, intermediate_size=40)
    shutil.copy(zoo.folder("bert") / "config.json", other)
    with refused(other, "cannot be loaded"):
        MultiTaskModel.from_pretrained(other, zoo.tasks)
    bert.save(saved)
    shutil.copy(zoo.folder("t5") / "config.json", saved / "encoder" / "config.json")
    with refused(saved, "cannot be loaded: "):
        MultiTaskModel.load(saved)
    shutil.rmtree(saved / "encoder")
    shutil.copytree(zoo.folder("t5"), saved / "encoder")  # 24 wide, the classifiers expect 32
    with refused(saved, "cannot be loaded: "):
        MultiTaskModel.load(saved)
    (saved / "fslib.json").unlink()
    with refused(saved, "fslib.json"):
        MultiTaskModel.load(saved)


IN_ANOTHER_PROCESS = """
import pickle, sys
import torch, fslib
assert "transformers.modeling_utils" not in sys.modules, "half the time of an import"
model, inputs, heads = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad(), fslib.pruned(model, heads):
    print(model(inputs, "single").tolist())
"""


def test_a_pickled_model_is_pruned_in_another_process(bert, zoo, tmp_path):
    """Where nothing has yet registered fslib's attention with transformers."""
    batch, heads = padded_batch(bert, zoo.tasks["single"]), heads_at((0, 0), (1, 2), (2, 3))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((bert.eval(), batch.inputs, heads)))
    words = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "model.pickle")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    whole = logits_of(bert, batch)
    with pruned(bert, heads):
        without = logits_of(bert, batch)
    assert np.allclose(json.loads(done.stdout), without.tolist(), atol=1e-6)
    assert not torch.equal(whole, without)


def test_pickled_weights_and_code_in_a_folder_are_never_run(zoo, tmp_path, monkeypatch):
    folder, sprung = shutil.copytree(zoo.folder("bert"), tmp_path / "bert"), tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    with refused(folder, "cannot be loaded", "safetensors"):
        MultiTaskModel.from_pretrained(folder, zoo.tasks)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "trap"}
    config["auto_map"] = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"import pathlib; pathlib.Path({str(sprung)!r}).touch()")
    with refused(folder, "cannot be loaded"):
        MultiTaskModel.from_pretrained(folder, zoo.tasks)
    assert not opened and not sprung.exists()


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no connection"])
def test_an_unreachable_hub_is_one_clear_line(zoo, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with refused("no-one/no-such-model", "Hub did not supply it (offline?"):
        MultiTaskModel.from_pretrained("no-one/no-such-model", zoo.tasks)


def test_names_that_are_unknown_get_the_nearest_one(bert, zoo):
    for name, near in (("minilm-l7", "minilm-l6"), ("minilm6", "minilm-l6"), ("tiny", "tiny-r")):
        with refused(f"unknown model '{name}': did you mean '{near}"):
            MultiTaskModel.from_pretrained(name, zoo.tasks)
    with refused("unknown pooling 'lst': did you mean 'last'"):
        MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, pooling="lst")
    with refused("unknown task of this model 'pear': did you mean 'pair'"):
        bert(padded_batch(bert, zoo.tasks["pair"]).inputs, "pear")


def test_a_pooling_of_choice_is_used(zoo):
    folder, ways = zoo.folder("bert"), ("first", "last")
    models = [MultiTaskModel.from_pretrained(folder, zoo.tasks, pooling=way) for way in ways]
    batch = padded_batch(models[0], zoo.tasks["single"])
    assert [model.pooling for model in models] == ["first", "last"]
    assert not torch.allclose(*(logits_of(model, batch) for model in models))
