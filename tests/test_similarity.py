"""Similarities are what their formulas say, from hand-computed arrays and naive loops; measuring changes nothing."""

import tracemalloc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import LAYERS, toy_task, untouched

import fslib
from fslib.model.multitask import pool
from fslib.similarity import (
    cosine,
    head_overlap,
    importance_similarity,
    linear_cka,
    representations,
    task_embedding,
    task_similarity,
    text_embedding,
)


@pytest.fixture
def task(zoo):
    return zoo.tasks["single"]


def word_table(model):
    return model.encoder.get_input_embeddings().weight


def gradients_by_hand(model, task):
    """Each example's own gradient, unpadded and one at a time: {parameter: (n, size)} without the word table."""
    encoded = model.encode(task.train)
    chosen = {name: p for name, p in model.encoder.named_parameters() if p is not word_table(model)}
    found = {name: [] for name in chosen}
    for i in range(len(encoded)):
        batch = encoded.batch([i])
        (logits,), (label,) = model(batch.inputs, task.name), batch.labels
        loss = (
            (logits[0] - label) ** 2
            if task.is_regression
            else torch.logsumexp(logits, 0) - logits[label]
        )
        grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        for (name, p), grad in zip(chosen.items(), grads, strict=True):
            found[name].append(torch.zeros(p.numel()) if grad is None else grad.flatten())
    return {name: torch.stack(rows).double().numpy() for name, rows in found.items()}


def state(model):
    """All that a measurement could leave behind."""
    named = dict(model.named_parameters())
    return (
        {name: p.detach().clone() for name, p in named.items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in named.items()},
        {name: p.requires_grad for name, p in named.items()},
        {name: m.training for name, m in model.named_modules()},
        (model.control.gate, model.control.fill, model.control.tap),
        torch.random.get_rng_state(),
    )


def assert_same(before, after):
    for one, other in zip(before[:2], after[:2], strict=True):
        for name, value in one.items():
            assert value is other[name] is None or torch.equal(value, other[name]), name
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])


class TestTaskEmbedding:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("bert", "single"),
            ("bert", "pair"),
            ("bert", "regression"),
            ("albert", "single"),
            ("distilbert", "single"),
            ("modernbert", "single"),
            ("gpt2", "single"),
            ("llama", "pair"),
            ("t5", "regression"),
        ],
    )
    def test_mean_of_squared_gradients_of_single_examples(self, zoo, name, kind):
        model, task = zoo.model(name), zoo.tasks[kind]
        by_hand = gradients_by_hand(model, task)
        expected = np.concatenate([(rows**2).mean(0) for rows in by_hand.values()])
        found = task_embedding(model, task)
        # components follow the order in which parameters are named, but for those outside of layers
        pieces = {
            c: [(rows**2).mean(0) for n, rows in by_hand.items() if n.startswith(f"{c}.")]
            for c in found
        }
        pieces["outside"] = [
            (r**2).mean(0)
            for n, r in by_hand.items()
            if not any(n.startswith(f"{c}.") for c in found)
        ]
        for component, values in found.items():
            assert values.dtype == np.float32
            assert (values >= 0).all()
            by_hand_there = np.concatenate(pieces[component])
            np.testing.assert_allclose(
                values, by_hand_there, rtol=1e-3, atol=1e-6 * by_hand_there.max()
            )
        assert sum(values.size for values in found.values()) == len(expected)

    def test_it_is_not_the_square_of_the_mean_gradient(self, bert, task):
        by_hand = gradients_by_hand(bert, task)
        name = "encoder.layer.1.output.dense.weight"
        of_means, of_examples = (
            (by_hand[name].mean(0) ** 2).sum(),
            (by_hand[name] ** 2).mean(0).sum(),
        )
        assert of_means < 0.7 * of_examples  # gradients of different examples cancel
        layer = task_embedding(bert, task)["encoder.layer.1"]
        expected = sum(
            (rows**2).mean(0).sum()
            for n, rows in by_hand.items()
            if n.startswith("encoder.layer.1.")
        )
        np.testing.assert_allclose(layer.sum(dtype=float), expected, rtol=1e-4)

    def test_true_labels_matter(self, bert, task):
        wrong = replace(task, train=replace(task.train, labels=(task.train.labels + 1) % 3))
        assert not np.allclose(
            task_embedding(bert, task)["outside"], task_embedding(bert, wrong)["outside"]
        )

    @pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5", "modernbert"])
    def test_a_component_for_each_layer_and_one_for_the_rest(self, zoo, name):
        model = zoo.model(name)
        found = task_embedding(model, zoo.tasks["single"], examples=2)
        assert len(found) == LAYERS + 1
        assert "outside" in found
        sizes = sum(p.numel() for p in model.encoder.parameters()) - word_table(model).numel()
        assert sum(len(values) for values in found.values()) == sizes

    def test_layers_that_share_weights_are_one_component(self, zoo, task):
        assert len(task_embedding(zoo.model("albert"), task, examples=2)) == 2

    def test_measuring_changes_nothing(self, bert, task):
        bert.losses(bert.encode(task.train).batch([0, 1]), task.name).sum().backward()
        bert.train()
        bert.encoder.encoder.layer[1].eval()
        for parameter in list(bert.parameters())[::3]:
            parameter.requires_grad_(False)
        before = state(bert)
        task_embedding(bert, task, examples=3)
        text_embedding(bert, task, examples=3)
        assert_same(before, state(bert))

    def test_nor_after_an_exception(self, bert, task, monkeypatch):
        bert.train()
        word_table(bert).requires_grad_(False)
        before = state(bert)
        with refused("'other'", "single"):
            task_embedding(bert, replace(task, name="other"))
        with refused("'other'"), fslib.pruned(bert, np.ones((3, 4), dtype=bool)):
            task_embedding(bert, replace(task, name="other"))
        monkeypatch.setattr(bert, "losses", lambda batch, name: 1 / 0)
        with suppress(ZeroDivisionError):
            task_embedding(bert, task)
        assert_same(before, state(bert))

    def test_caller_s_gradient_mode_and_frozen_weights_do_not_matter(self, bert, task):
        expected = task_embedding(bert, task, examples=3)
        bert.requires_grad_(False).train()
        with torch.no_grad():
            found = task_embedding(bert, task, examples=3)
        assert all(np.array_equal(found[c], expected[c]) for c in expected)

    def test_examples_are_drawn_by_seed_from_a_split(self, bert, task):
        one, again, other = (
            task_embedding(bert, task, examples=3, seed=s)["outside"] for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)
        held_out = task_embedding(bert, task, split="eval")["outside"]
        as_train = task_embedding(bert, replace(task, train=task.eval))["outside"]
        np.testing.assert_array_equal(held_out, as_train)
        with refused("'dev'", "train, eval"):
            task_embedding(bert, task, split="dev")
        with refused("examples 0"):
            task_embedding(bert, task, examples=0)


A = {"l.0": np.array([1.0, 0.0]), "outside": np.array([3.0, 4.0, 0.0])}
B = {"l.0": np.array([0.0, 2.0]), "outside": np.array([40.0, 30.0, 0.0])}


class TestTaskSimilarity:
    def test_mean_of_cosines_by_hand(self):
        assert task_similarity(A, B) == pytest.approx((0 + 24 / 25) / 2)
        assert task_similarity(B, A) == task_similarity(A, B)

    def test_no_component_outweighs_another(self):
        scaled = {"l.0": 1e12 * A["l.0"], "outside": A["outside"]}
        assert task_similarity(scaled, B) == pytest.approx(0.48)

    def test_a_task_is_like_itself_and_more_like_its_own_half_than_another(self, zoo, bert):
        pair, other = zoo.tasks["pair"], toy_task("regression", train=30)
        whole = task_embedding(bert, pair)
        assert task_similarity(whole, whole) == pytest.approx(1)
        near, far = task_embedding(bert, pair, examples=5), task_embedding(bert, other)
        assert 0 <= task_similarity(whole, far) < task_similarity(whole, near) < 1

    def test_embeddings_that_cannot_be_compared(self):
        with refused("different encoders", "l.0", "l.1"):
            task_similarity(A, {"l.1": np.ones(2), "outside": np.ones(3)})
        with refused("(2,)", "(3,)"):
            task_similarity(A, {"l.0": np.ones(3), "outside": np.ones(3)})
        with refused("zeros"):
            task_similarity(A, {"l.0": np.zeros(2), "outside": np.ones(3)})
        with refused("different encoders"):
            task_similarity({}, {})


class TestCosine:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([1, 0], [0, 3], 0),
            ([3, 4], [4, 3], 0.96),
            ([1, 2], [-2, -4], -1),
            ([3e-20, 4e-20], [4e20, 3e20], 0.96),
            ([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1),
        ],
    )
    def test_by_hand(self, a, b, expected):
        found = cosine(np.array(a, dtype=float), np.array(b, dtype=float))
        assert found == pytest.approx(expected, abs=1e-15)
        assert -1 <= found <= 1

    def test_no_cosine(self):
        with refused("zeros"):
            cosine(np.zeros(3), np.ones(3))
        with refused("(3,)", "(4,)"):
            cosine(np.ones(3), np.ones(4))
        with refused("finite"):
            cosine(np.array([1.0, np.nan]), np.ones(2))


class TestRepresentations:
    def test_they_are_what_the_classifiers_see(self, bert, task):
        found = representations(bert, task.train)
        assert found.shape == (10, bert.encoder.config.hidden_size)
        logits = bert.classifiers["single"](torch.from_numpy(found))
        expected = bert(bert.encode(task.train).batch(range(10)).inputs, "single")
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("how", ["first", "mean", "last"])
    def test_against_the_untouched_encoder_text_by_text(self, zoo, bert, task, how):
        reference, found = (
            untouched("bert", zoo.folder("bert")),
            representations(bert, task.train, pooling=how),
        )
        for text, row in zip(task.train.texts, found, strict=True):
            tokens = bert.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                hidden = reference(**tokens).last_hidden_state
            np.testing.assert_allclose(
                pool(hidden, tokens["attention_mask"], how)[0], row, rtol=1e-3, atol=1e-4
            )

    def test_split_list_and_batch_size_make_no_difference(self, bert, task):
        expected = representations(bert, task.train)
        np.testing.assert_allclose(
            representations(bert, list(task.train.texts)), expected, atol=1e-5
        )
        np.testing.assert_allclose(
            representations(bert, task.train, batch_size=3), expected, atol=1e-5
        )

    def test_dropout_is_off_and_pruning_shows(self, tiny, tasks):
        expected = representations(tiny, tasks["bbc"].eval)
        tiny.train()
        np.testing.assert_array_equal(representations(tiny, tasks["bbc"].eval), expected)
        assert tiny.training
        with fslib.pruned(tiny, np.ones((2, 12), dtype=bool)):
            assert not np.allclose(representations(tiny, tasks["bbc"].eval), expected)

    def test_refusals(self, bert):
        with refused("no text"):
            representations(bert, [])
        with refused("'max'", "first, mean, last"):
            representations(bert, ["w1 w2"], pooling="max")


class TestTextEmbedding:
    def test_mean_over_texts_of_mean_over_tokens(self, zoo, bert, task):
        reference = untouched("bert", zoo.folder("bert"))
        with torch.no_grad():
            rows = [
                reference(**bert.tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
                for text in task.train.texts
            ]
        np.testing.assert_allclose(
            text_embedding(bert, task), torch.stack(rows).mean(0), rtol=1e-3, atol=1e-4
        )

    def test_labels_do_not_matter(self, bert, task):
        other = replace(task, train=replace(task.train, labels=(task.train.labels + 1) % 3))
        np.testing.assert_array_equal(text_embedding(bert, task), text_embedding(bert, other))
        assert cosine(text_embedding(bert, task), text_embedding(bert, other)) == pytest.approx(1)

    def test_examples_are_drawn_by_seed(self, bert, task):
        one, again, other = (text_embedding(bert, task, examples=3, seed=s) for s in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)
        with refused("examples 0"):
            text_embedding(bert, task, examples=0)
        with refused("'test'", "train, eval"):
            text_embedding(bert, task, split="test")


class TestCKA:
    @pytest.fixture
    def x(self):
        return np.random.default_rng(0).normal(size=(60, 5)) * [1, 2, 3, 4, 5]

    @pytest.fixture
    def y(self, x):
        return x[:, :3] + np.random.default_rng(1).normal(size=(60, 3))

    def test_by_hand(self):
        # one feature each: the squared correlation, here of (1, 2, 3) with (1, 3, 2)
        assert linear_cka(
            np.array([[1.0], [2], [3]]), np.array([[1.0], [3], [2]])
        ) == pytest.approx(0.25)
        # y'x = (2, 2), x'x = diag(2, 2), y'y = 4: 8 / (sqrt(8) * 4)
        x, y = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), np.array([[1.0], [-1], [1], [-1]])
        assert linear_cka(x, y) == pytest.approx(np.sqrt(0.5))

    def test_invariances(self, x, y):
        rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
        found = linear_cka(x, y)
        assert 0.1 < found < 0.99
        assert linear_cka(y, x) == pytest.approx(found)
        assert linear_cka(x @ rotation, y) == pytest.approx(found)
        assert linear_cka(1e-9 * x, 1e9 * y) == pytest.approx(found)
        assert linear_cka(x + 100, y - np.arange(3)) == pytest.approx(found)
        assert linear_cka(x, -3 * x @ rotation + 7) == pytest.approx(1)
        order = np.random.default_rng(3).permutation(60)
        assert linear_cka(x[order], y[order]) == pytest.approx(found)

    def test_it_sees_what_it_should(self, x, y):
        assert linear_cka(x * [9, 1, 1, 1, 1], y) != pytest.approx(linear_cka(x, y), abs=0.01)
        assert linear_cka(x, y[::-1]) < linear_cka(x, y) / 2  # other texts

    def test_fewer_texts_than_features_gives_the_same_formula(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(12, 9))
        y = x[:, :8] + rng.normal(size=(12, 8))
        cx, cy = x - x.mean(0), y - y.mean(0)
        norms = np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy)
        assert linear_cka(x, y) == pytest.approx(np.linalg.norm(cy.T @ cx) ** 2 / norms)

    def test_unrelated_features_have_what_the_docstring_says(self):
        rng = np.random.default_rng(0)
        for n, p, q in ((2000, 10, 20), (50, 100, 100)):
            found = linear_cka(rng.normal(size=(n, p)), rng.normal(size=(n, q)))
            assert found == pytest.approx(np.sqrt(p * q / ((n + p) * (n + q))), rel=0.15)

    def test_many_texts_need_no_products_of_texts_with_texts(self):
        x = np.random.default_rng(0).normal(size=(20_000, 4))
        tracemalloc.start()
        linear_cka(x, x[:, ::-1])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * x.nbytes  # (n, n) would be 5,000 times x

    def test_single_precision(self, x, y):
        assert linear_cka(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(
            linear_cka(x, y), abs=1e-5
        )

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_constant_features(self, x, dtype):
        for constant in (np.zeros((60, 2)), np.tile([0.1, 1e6 / 3], (60, 1))):
            with refused("same for every text"):
                linear_cka(x.astype(dtype), constant.astype(dtype))

    def test_refusals(self, x, y):
        with refused("60 and 59"):
            linear_cka(x, y[1:])
        with refused("at least 2", "1 and 1"):
            linear_cka(x[:1], y[:1])
        with refused("finite"):
            linear_cka(x, np.full_like(y, np.inf))

    def test_of_two_models_on_the_same_texts(self, zoo, bert, task):
        mine, other = (
            representations(bert, task.train),
            representations(zoo.model("gpt2"), task.train),
        )
        assert linear_cka(mine, mine) == pytest.approx(1)
        assert 0 < linear_cka(mine, other) < 1


class TestImportance:
    MAP = np.array([[6.0, 5, 1], [2, 3, 4]])

    def test_rank_correlation_of_maps(self):
        assert importance_similarity(self.MAP, 10 * self.MAP**3) == pytest.approx(1)
        assert importance_similarity(self.MAP, -self.MAP) == pytest.approx(-1)
        other = np.array(
            [[5.0, 6, 1], [2, 3, 4]]
        )  # two neighbours in rank exchanged: 1 - 6 * 2 / (6 * 35)
        assert importance_similarity(self.MAP, other) == pytest.approx(1 - 12 / 210)

    def test_jaccard_of_top_heads(self):
        other = np.array([[6.0, 1, 1], [1, 1, 5]])
        assert head_overlap(self.MAP, other, fraction=0.34) == pytest.approx(
            1 / 3
        )  # 2 heads each, 1 of them shared
        assert head_overlap(self.MAP, other, fraction=1.0) == 1
        assert head_overlap(self.MAP, self.MAP) == 1

    def test_refusals(self):
        for measure in (importance_similarity, head_overlap):
            with refused("(2, 3)", "(3, 2)"):
                measure(self.MAP, self.MAP.T)
            with refused("finite"):
                measure(self.MAP, np.full((2, 3), np.nan))
        with refused("0.1", "6 heads", "larger"):
            head_overlap(self.MAP, self.MAP, fraction=0.1)
        with refused("1.5"):
            head_overlap(self.MAP, self.MAP, fraction=1.5)
