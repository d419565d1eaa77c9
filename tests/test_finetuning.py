"""Transfer: the source stays as it is, subsets nest, and sources are compared in pairs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from sklearn.linear_model import LogisticRegression
from tinymodels import one_thread, toy_task

import fslib
from fslib.finetuning import fresh, training_subset, transfer
from fslib.similarity import representations

WORDS = ("house", "river", "cloud", "table", "garden", "window", "paper", "music", "street")
WORDS += ("bread", "stone", "field")
EVERYTHING = np.ones((2, 12), dtype=bool)
SETTINGS = {"steps": 5, "batch_size": 4, "lr": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def source(tasks):
    """A model for two tasks."""
    chosen = [tasks["bbc-shift"], tasks["bbc-pair"]]
    return fslib.MultiTaskModel.from_pretrained("tiny-random", chosen, max_length=32)


@pytest.fixture(scope="module")
def easy():
    """A new task that one word decides."""
    texts = [f"{word} {mood}" for word in WORDS for mood in ("good", "bad")]
    labels = ["plus" if text.endswith("good") else "minus" for text in texts]
    sides = (texts[:16], labels[:16]), (texts[16:], labels[16:])
    return fslib.make_task("easy", *sides, label_names=["minus", "plus"])


@pytest.fixture(scope="module")
def graded():
    """A new regression task: how often a word stands in a text."""
    texts = [" ".join(["good"] * k + [word] * (6 - k)) for word in WORDS[:6] for k in range(6)]
    values = [text.count("good") / 3 for text in texts]
    return fslib.make_task("graded", (texts[:24], values[:24]), (texts[24:], values[24:]))


def snapshot(model):
    """All that must not change in a source."""
    control = model.control
    grads = (None if p.grad is None else p.grad.tolist() for p in model.parameters())
    return (
        [(n, p.tolist(), p.requires_grad) for n, p in model.named_parameters()],
        list(grads),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        (control.gate, control.fill, control.tap, control.layers, control.head_shapes),
        torch.random.get_rng_state().tolist(),
    )


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a fresh model ------------------------------------------------------------------------------


def test_a_fresh_model_has_the_sources_encoder_and_one_new_classifier(source, easy, graded):
    model = fresh(source, easy)
    assert same_weights(model.encoder, source.encoder) and list(model.classifiers) == ["easy"]
    assert model.classifiers["easy"].weight.shape == (2, 48)
    assert list(source.classifiers) == ["bbc-shift", "bbc-pair"]
    hooks = [[len(m._forward_hooks) for m in x.modules()] for x in (model, fresh(model, graded))]
    assert hooks[0] == hooks[1], "of a copy's copy, too"
    assert fslib.head_importance(model, easy).shape == (2, 12)


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "t5"])
def test_heads_of_copy_and_source_are_switched_apart(zoo, name):
    source, target = zoo.model(name), replace(toy_task("single"), name="new")
    model, everything = fresh(source, target), np.ones((3, 4), dtype=bool)
    assert all(m.fslib_control is model.control for m in model.encoder.modules())
    expected = representations(source, target.eval)
    np.testing.assert_array_equal(representations(model, target.eval), expected)
    for one, other in ((model, source), (source, model)):
        with fslib.pruned(one, everything):
            np.testing.assert_array_equal(representations(other, target.eval), expected)
            assert not np.allclose(representations(one, target.eval), expected)


def test_a_classifier_is_the_seeds_whatever_the_source(source, easy, tasks):
    other = fslib.MultiTaskModel.from_pretrained("tiny-random", tasks["bbc"], seed=5)
    state = torch.random.get_rng_state()
    one, same, another = fresh(source, easy, 3), fresh(other, easy, 3), fresh(source, easy, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_weights(one.classifiers, same.classifiers)
    assert not same_weights(one.encoder, same.encoder)
    assert not same_weights(one.classifiers, another.classifiers)


def test_the_source_stays_bit_for_bit(source, easy, tasks):
    shift = tasks["bbc-shift"]
    source.losses(source.encode(shift.train).batch([0, 1]), shift.name).sum().backward()
    source.encoder.requires_grad_(False)
    source.train()
    source.encoder.embeddings.eval()
    before, model = snapshot(source), fresh(source, easy)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    transfer(source, easy, **SETTINGS)
    transfer(source, easy, part="classifier")
    assert snapshot(source) == before


# --- subsets ------------------------------------------------------------------------------------


def test_smaller_subsets_lie_inside_larger_ones_and_texts_keep_their_labels(tasks, easy, graded):
    task = tasks["bbc"]
    label_of, found = dict(zip(task.train.texts, task.train.labels, strict=True)), []
    for size in (5, 8, 20, 48):
        part = training_subset(task, size, seed=1)
        found.append(set(part.train.texts))
        assert len(found[-1]) == size and part.eval is task.eval
        assert [label_of[text] for text in part.train.texts] == list(part.train.labels)
    assert all(a < b for a, b in itertools.pairwise(found))
    for chosen in (task, graded):
        one, again, other = (training_subset(chosen, 10, s).train.texts for s in (0, 0, 1))
        assert one == again != other
    assert training_subset(easy, None) is easy
    assert training_subset(easy, 16, seed=3).fingerprint == easy.fingerprint
    assert len(training_subset(graded, 2).train) == 2


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_there_from_the_first(seed):
    labels = [0] * 95 + [1] * 4 + [2]  # so rare that most random samples would miss it
    sides = ([f"text {i}" for i in range(100)], labels), (["a", "b"], [0, 1])
    task = fslib.make_task("rare", *sides, label_names=["a", "b", "c"])
    parts = [training_subset(task, size, seed).train for size in (3, 4, 10)]
    assert all(set(part.labels) == {0, 1, 2} for part in parts)
    assert set(parts[0].texts) < set(parts[1].texts) < set(parts[2].texts)


# --- learning -----------------------------------------------------------------------------------


def test_full_is_training_of_a_fresh_copy_on_the_subset(source, easy, graded):
    found = transfer(source, easy, size=8, seed=2, **SETTINGS)
    task, model = training_subset(easy, 8, 2), fresh(source, easy, 2)
    history = fslib.train(model, task, seed=2, **SETTINGS)
    assert (found.size, found.part, found.history) == (8, "full", history)
    expected = fslib.evaluate(model, easy)["easy"]
    np.testing.assert_array_equal(found.score.predictions, expected.predictions)
    assert not same_weights(model.encoder, source.encoder)
    other = transfer(source, easy, size=8, seed=3, **SETTINGS)
    assert other.history.losses != history.losses
    score = transfer(source, graded, size=10, **SETTINGS).score
    assert (score.metric, score.predictions.dtype) == ("spearman", np.float32)
    assert transfer(source, graded, part="classifier").score.value > 0.8
    assert transfer(source, easy, steps=60, batch_size=8, lr=3e-3).score.value >= 0.9, "it learns"


def test_the_classifier_is_logistic_regression_on_frozen_representations(source, easy):
    found = transfer(source, easy, part="classifier", seed=1)
    x, new = representations(source, easy.train), representations(source, easy.eval)
    mean, spread = x.mean(0), x.std(0)
    model = LogisticRegression(max_iter=1000).fit((x - mean) / spread, easy.train.labels)
    np.testing.assert_array_equal(found.score.predictions, model.predict((new - mean) / spread))
    assert found.score.predictions.dtype == np.int64
    assert (found.size, found.part, found.history) == (16, "classifier", None)


def test_settings_that_make_no_sense_are_refused(source, easy):
    for size in (17, 1, 0):
        with refused(f"size {size}", "easy"):
            transfer(source, easy, size=size)
    with refused("'ful'", "did you mean 'full'", "classifier"):
        transfer(source, easy, part="ful")


def test_targets_and_sources_that_do_not_suit_are_refused(source, easy, tasks, graded):
    for call in (fresh, transfer):
        with refused("'bbc-pair'", "one of the source's own"):
            call(source, tasks["bbc-pair"])
        with fslib.pruned(source, ~EVERYTHING), refused("pruned", "outside"):
            call(source, easy)
    with refused("size 4", "bbc", "5 (one example of each class)", "48"):
        training_subset(tasks["bbc"], 4)
    with refused("size 1", "graded"):
        training_subset(graded, 1)
