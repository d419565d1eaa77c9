"""`fslib.check`: what works is shown to work, and what does not is refused with its reason."""

import pytest
import torch
import transformers as tf
from refusal import refused
from tinymodels import ARCHITECTURES, HEADS, LAYERS, disturbed, save, tokenizer, trace

import fslib
from fslib import checks
from fslib.model.attention import gated


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_that_is_used_passes_every_check_and_stays_as_it_was(zoo, name):
    model = zoo.model(name)
    before = trace(disturbed(model) if name == "bert" else model)
    for given in (model, zoo.folder(name)):
        report = fslib.check(given)
        assert report.works and (report.layers, report.heads) == (LAYERS, HEADS), report
        assert len(report.passed) == 3 and report.rows == ""
        assert report.pooling == ARCHITECTURES[name].pooling
    assert trace(model) == before
    said = str(report)
    for part in (f"works, {LAYERS} layers of {HEADS} heads", "12 of 12 heads tried", "IAT: finds"):
        assert part in said


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def test_a_model_whose_attention_cannot_be_reached_is_refused_by_name(zoo, tmp_path):
    model = tf.RoFormerModel(tf.RoFormerConfig(**SMALL))
    report = fslib.check(model)
    assert not report.works and "RoFormerModel cannot be used" in report.refused
    assert str(report).startswith("RoFormerModel (RoFormerModel): refused. ")
    model.save_pretrained(tmp_path)
    tokenizer(("[CLS]", "[SEP]")).save_pretrained(tmp_path)
    report = fslib.check(tmp_path)
    assert not report.works and report.refused.startswith("RoFormerModel at")
    with refused("RoFormerModel", "cannot be used", "BERT, RoBERTa"):
        fslib.MultiTaskModel.from_pretrained(tmp_path, zoo.tasks)
    with refused("unknown model 'bort'"):
        fslib.check("bort")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("positions", [["p2c", "c2p"], ["c2p"], []])
def test_deberta_works_however_it_attends_to_positions(zoo, tmp_path, shared, positions):
    options = {"relative_attention": bool(positions), "pos_att_type": positions}
    report = fslib.check(save("deberta-v2", tmp_path, share_att_key=shared, **options))
    assert report.works and len(report.passed) == 3 and not report.rows, report


def test_what_a_head_does_otherwise_is_seen(zoo):
    model = zoo.model("bert").encoder
    whole = model.embeddings.forward

    def mixed(*words, **options):
        embedded = whole(*words, **options)
        return embedded + embedded.mean(1, keepdim=True)

    model.embeddings.forward = mixed
    report = fslib.check(model)
    assert report.works and report.passed[-1] == checks.MIXES


def test_a_head_that_does_nothing_and_one_that_is_not_zeroed_are_seen(zoo, monkeypatch):
    model = zoo.model("bert").encoder
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight[:, :8] = 0  # head 0 is not read
    assert "head 0 of layer 1 off changes nothing" in fslib.check(model).refused

    def halved(encoder, heads):
        return gated(encoder, torch.from_numpy(1 - heads / 2))

    monkeypatch.setattr(checks, "pruned", halved)
    assert "is not what zeros in its place do" in fslib.check(zoo.model("bert")).refused


def test_iat_says_why_it_cannot(zoo):
    model = zoo.model("bert")
    for parameter in model.encoder.encoder.layer[0].attention.self.parameters():
        parameter.requires_grad_(False)
    report = fslib.check(model)
    assert report.works and "cannot train head 0 of layer 0: it has no" in report.rows


def test_a_head_whose_output_no_module_reads_as_it_is_cannot_be_checked(zoo):
    model = zoo.model("bert").encoder
    attention = model.encoder.layer[1].attention
    whole = attention.output.forward
    attention.output.forward = lambda states, before: whole(states * 2, before)
    report = fslib.check(model)
    assert "layer 1 does not hand its heads' outputs to a projection" in report.refused
    assert report.passed == ["the empty set changes nothing, bit by bit"]
