"""Transfer: the source stays as it is, subsets nest, and what should be equal between sources is equal."""

import copy
import importlib
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

WORDS = (
    "house",
    "river",
    "cloud",
    "table",
    "garden",
    "window",
    "paper",
    "music",
    "street",
    "bread",
    "stone",
    "field",
)


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
    return fslib.make_task(
        "easy", (texts[:16], labels[:16]), (texts[16:], labels[16:]), label_names=["minus", "plus"]
    )


@pytest.fixture(scope="module")
def graded():
    """A new regression task: how often a word stands in a text."""
    texts = [" ".join(["good"] * k + [word] * (6 - k)) for word in WORDS[:6] for k in range(6)]
    values = [text.count("good") / 3 for text in texts]
    return fslib.make_task("graded", (texts[:24], values[:24]), (texts[24:], values[24:]))


def snapshot(model):
    named = dict(model.named_parameters())
    control = model.control
    return (
        {name: p.detach().clone() for name, p in named.items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in named.items()},
        {name: p.requires_grad for name, p in named.items()},
        {name: m.training for name, m in model.named_modules()},
        (control.gate, control.fill, control.tap, control.layers, list(control.head_shapes)),
        len(model.encoder._forward_hooks),
        len(model.encoder._forward_pre_hooks),
    )


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_untouched(before, model):
    after = snapshot(model)
    for one, other in zip(before[:2], after[:2], strict=True):
        for name, value in one.items():
            assert value is other[name] is None or torch.equal(value, other[name]), name
    assert before[2:] == after[2:]


class TestFresh:
    def test_same_encoder_one_new_classifier(self, source, easy):
        model = fresh(source, easy)
        assert same_weights(model.encoder, source.encoder)
        assert list(model.classifiers) == ["easy"]
        assert model.classifiers["easy"].weight.shape == (2, 48)
        assert not model.classifiers["easy"].bias.any()
        np.testing.assert_array_equal(
            representations(model, easy.train), representations(source, easy.train)
        )
        assert not any(module.training for module in model.modules())
        assert list(source.classifiers) == ["bbc-shift", "bbc-pair"]

    def test_heads_of_copy_and_source_are_switched_apart(self, source, easy):
        model = fresh(source, easy)
        everything = np.ones((2, 12), dtype=bool)
        expected = representations(source, easy.eval)
        assert model.control is model.encoder.fslib_control
        assert all(m.fslib_control is model.control for m in model.encoder.modules())
        assert model.control is not source.control
        with fslib.pruned(model, everything):
            np.testing.assert_array_equal(representations(source, easy.eval), expected)
            without = representations(model, easy.eval)
        assert not np.allclose(without, expected)
        with fslib.pruned(source, everything):
            np.testing.assert_array_equal(representations(model, easy.eval), expected)
            np.testing.assert_array_equal(representations(source, easy.eval), without)
        assert fslib.head_importance(model, easy).shape == (2, 12)

    def test_copy_of_a_copy_has_no_more_hooks(self, source, easy, graded):
        model = fresh(fresh(source, easy), graded)
        assert len(model.encoder._forward_hooks) == len(source.encoder._forward_hooks)
        assert len(model.encoder._forward_pre_hooks) == len(source.encoder._forward_pre_hooks)

    @pytest.mark.parametrize("name", ["albert", "gpt2", "t5"])
    def test_other_architectures(self, zoo, name):
        source, target = zoo.model(name), replace(toy_task("single"), name="new")
        model = fresh(source, target)
        expected = representations(source, target.eval)
        np.testing.assert_array_equal(representations(model, target.eval), expected)
        with fslib.pruned(model, np.ones((3, 4), dtype=bool)):
            assert not np.allclose(representations(model, target.eval), expected)
            np.testing.assert_array_equal(representations(source, target.eval), expected)

    def test_classifier_is_the_seed_s_whatever_the_source(self, source, easy, tasks):
        other = fslib.MultiTaskModel.from_pretrained("tiny-random", tasks["bbc"], seed=5)
        state = torch.random.get_rng_state()
        one, same, another = fresh(source, easy, 3), fresh(other, easy, 3), fresh(source, easy, 4)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert same_weights(one.classifiers, same.classifiers)
        assert not same_weights(one.encoder, same.encoder)
        assert not same_weights(one.classifiers, another.classifiers)

    def test_frozen_weights_and_gradients_of_the_source_stay_there(self, source, easy, tasks):
        shift = tasks["bbc-shift"]
        source.losses(source.encode(shift.train).batch([0, 1]), shift.name).sum().backward()
        source.encoder.requires_grad_(False)
        source.train()
        before = snapshot(source)
        model = fresh(source, easy)
        assert_untouched(before, source)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def test_known_task_and_pruned_source(self, source, easy, tasks):
        with refused("'bbc-pair'", "bbc-shift, bbc-pair"):
            fresh(source, tasks["bbc-pair"])
        with fslib.pruned(source, np.zeros((2, 12), dtype=bool)), refused("pruned", "outside"):
            fresh(source, easy)


class TestSubset:
    def test_smaller_ones_lie_inside_larger_ones(self, tasks):
        task = tasks["bbc"]
        found = [set(training_subset(task, size, seed=1).train.texts) for size in (5, 8, 20, 48)]
        assert [len(texts) for texts in found] == [5, 8, 20, 48]
        assert all(a < b for a, b in itertools.pairwise(found))
        assert found[-1] == set(task.train.texts)

    def test_texts_keep_their_labels_and_eval_stays(self, tasks):
        task = tasks["bbc"]
        part = training_subset(task, 12)
        label_of = dict(zip(task.train.texts, task.train.labels, strict=True))
        assert [label_of[text] for text in part.train.texts] == list(part.train.labels)
        assert part.eval is task.eval
        assert (part.name, part.metric, part.label_names) == (
            task.name,
            task.metric,
            task.label_names,
        )

    @pytest.mark.parametrize("seed", range(20))
    def test_every_class_is_there_from_the_first(self, seed):
        labels = [0] * 95 + [1] * 4 + [2]  # so rare that most random samples would miss it
        texts = [f"text {i}" for i in range(100)]
        task = fslib.make_task(
            "rare", (texts, labels), (["a", "b"], [0, 1]), label_names=["a", "b", "c"]
        )
        parts = [training_subset(task, size, seed).train for size in (3, 4, 10)]
        assert all(set(part.labels) == {0, 1, 2} for part in parts)
        assert set(parts[0].texts) < set(parts[1].texts) < set(parts[2].texts)

    def test_seed_chooses(self, tasks, graded):
        for task in (tasks["bbc"], graded):
            one, again, other = (training_subset(task, 10, seed).train.texts for seed in (0, 0, 1))
            assert one == again
            assert one != other

    def test_all_is_all(self, easy, graded):
        assert training_subset(easy, None) is easy
        assert training_subset(easy, 16, seed=3).fingerprint == easy.fingerprint
        assert len(training_subset(graded, 2).train) == 2

    def test_sizes_that_do_not_suit(self, tasks, easy, graded):
        with refused("size 4", "bbc", "5 (one example of each class)", "48"):
            training_subset(tasks["bbc"], 4)
        for task, size in ((easy, 17), (easy, 1), (easy, 0), (graded, 1), (graded, -3)):
            with refused(f"size {size}", task.name):
                training_subset(task, size)
        with refused("seed -1"):
            training_subset(easy, 4, seed=-1)


SETTINGS = {"steps": 5, "batch_size": 4, "lr": 3e-3}


class TestFull:
    def test_source_stays_bit_for_bit(self, source, easy):
        source.train()
        source.encoder.eval()
        before, state = snapshot(source), torch.random.get_rng_state()
        transfer(source, easy, **SETTINGS)
        transfer(source, easy, part="classifier")
        assert_untouched(before, source)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_it_is_training_of_a_fresh_copy_on_the_subset(self, source, easy):
        found = transfer(source, easy, size=8, seed=2, evaluate_every=5, **SETTINGS)
        task, model = training_subset(easy, 8, 2), fresh(source, easy, 2)
        history = fslib.train(model, task, seed=2, evaluate_every=5, **SETTINGS)
        assert (found.size, found.part, found.history) == (8, "full", history)
        expected = fslib.evaluate(model, easy)["easy"]
        np.testing.assert_array_equal(found.score.predictions, expected.predictions)
        assert history.evaluations[-1]["easy"] == found.score.value
        assert not same_weights(model.encoder, source.encoder)

    def test_it_learns(self, source, easy):
        found = transfer(source, easy, steps=60, batch_size=8, lr=3e-3)
        assert found.size == 16
        assert found.score.value >= 0.9
        np.testing.assert_array_equal(found.score.labels, easy.eval.labels)

    def test_seed_repeats_and_another_differs(self, source, easy):
        one, again, other = (transfer(source, easy, size=8, seed=s, **SETTINGS) for s in (0, 0, 1))
        assert one.history == again.history
        np.testing.assert_array_equal(one.score.predictions, again.score.predictions)
        assert one.history.losses != other.history.losses

    def test_regression(self, source, graded):
        found = transfer(source, graded, size=10, **SETTINGS)
        assert found.score.metric == "spearman"
        assert found.score.predictions.dtype == np.float32


class TestClassifier:
    def test_it_is_logistic_regression_on_frozen_representations(self, source, easy):
        found = transfer(source, easy, part="classifier")
        x, new = representations(source, easy.train), representations(source, easy.eval)
        mean, spread = x.mean(0), x.std(0)
        model = LogisticRegression(max_iter=1000).fit((x - mean) / spread, easy.train.labels)
        np.testing.assert_array_equal(found.score.predictions, model.predict((new - mean) / spread))
        assert (found.size, found.part, found.history) == (16, "classifier", None)
        assert found.score.metric == "accuracy"

    def test_the_scale_of_the_source_s_representations_does_not_matter(
        self, source, tasks, monkeypatch
    ):
        expected = transfer(source, tasks["bbc"], part="classifier").score
        module = importlib.import_module(
            "fslib.transfer"
        )  # by name: the package may export a function of that name
        monkeypatch.setattr(
            module, "representations", lambda *args: 100 * representations(*args) + 3
        )
        found = transfer(source, tasks["bbc"], part="classifier").score
        np.testing.assert_array_equal(found.predictions, expected.predictions)

    def test_many_classes_and_regression(self, source, tasks, graded):
        assert (
            transfer(source, tasks["bbc"], size=20, part="classifier").score.predictions.dtype
            == np.int64
        )
        found = transfer(source, graded, part="classifier").score
        assert found.predictions.dtype == np.float32
        assert found.value > 0.8

    def test_seed_is_the_subset_s(self, source, easy):
        one, again, other = (
            transfer(source, easy, size=4, part="classifier", seed=s).score for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(one.predictions, again.predictions)
        assert one.predictions.shape == other.predictions.shape
        whole = [transfer(source, easy, part="classifier", seed=s).score for s in (0, 1)]
        np.testing.assert_array_equal(whole[0].predictions, whole[1].predictions)

    def test_source_matters(self, source, tasks):
        other = copy.deepcopy(source)
        fslib.train(other, tasks["bbc-shift"], steps=5, lr=1e-2)
        scores = [
            transfer(model, tasks["bbc"], part="classifier").score for model in (source, other)
        ]
        assert (scores[0].predictions != scores[1].predictions).any()


class TestRefusals:
    @pytest.mark.parametrize("part", ["full", "classifier"])
    def test_inputs(self, source, easy, tasks, part):
        with refused("'bbc-pair'", "not trained on"):
            transfer(source, tasks["bbc-pair"], part=part)
        with refused("size 1", "easy"):
            transfer(source, easy, size=1, part=part)
        with refused("size 17", "easy"):
            transfer(source, easy, size=17, part=part)
        with refused("steps 0"):
            transfer(source, easy, steps=0, part=part)
        with refused("seed -1"):
            transfer(source, easy, seed=-1, part=part)

    def test_part(self, source, easy):
        with refused("'ful'", "did you mean 'full'", "classifier"):
            transfer(source, easy, part="ful")

    def test_settings_of_training(self, source, easy):
        with refused("lr 0"):
            transfer(source, easy, lr=0.0)
        with refused("batch_size 0"):
            transfer(source, easy, batch_size=0)
