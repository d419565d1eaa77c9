"""Similarities are what their formulas say, from hand-computed arrays and naive loops."""

import tracemalloc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import LAYERS, untouched

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


def gradients_by_hand(model, task):
    """Each example's own gradient, unpadded: {parameter: (n, size)} without the word table."""
    encoded, words = model.encode(task.train), model.encoder.get_input_embeddings().weight
    chosen = {name: p for name, p in model.encoder.named_parameters() if p is not words}
    found = {name: [] for name in chosen}
    for i in range(len(encoded)):
        model.zero_grad()
        model.losses(encoded.batch([i]), task.name).sum().backward()
        for name, p in chosen.items():
            found[name].append(torch.zeros(p.numel()) if p.grad is None else p.grad.flatten())
    return {name: torch.stack(rows).double().numpy() for name, rows in found.items()}


def state(model):
    """All that a measurement could leave behind."""
    grads = (None if p.grad is None else p.grad.tolist() for p in model.parameters())
    return (
        [(n, p.tolist(), p.requires_grad) for n, p in model.named_parameters()],
        list(grads),
        [m.training for m in model.modules()],
        (model.control.gate, model.control.fill, model.control.tap),
        torch.random.get_rng_state().tolist(),
    )


# --- TaskEmb ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "single"),
        ("albert", "single"),  # layers that share weights are one component
        ("llama", "pair"),
        ("t5", "regression"),
    ],
)
def test_task_embedding_is_the_mean_of_squared_gradients_of_single_examples(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    by_hand, found = gradients_by_hand(model, task), task_embedding(model, task)
    assert len(found) == (2 if name == "albert" else LAYERS + 1) and "outside" in found
    pieces = {component: [] for component in found}
    for parameter, rows in by_hand.items():
        mine = [c for c in found if parameter.startswith(f"{c}.")]
        pieces[mine[0] if mine else "outside"].append((rows**2).mean(0))
    for component, values in found.items():
        expected = np.concatenate(pieces[component])
        assert values.dtype == np.float32 and (values >= 0).all()
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert sum(len(v) for v in found.values()) == sum(r.shape[1] for r in by_hand.values())


def test_measuring_changes_nothing_nor_does_an_exception(bert, task, monkeypatch):
    expected = task_embedding(bert, task, examples=3)
    bert.losses(bert.encode(task.train).batch([0, 1]), task.name).sum().backward()
    bert.train()
    bert.encoder.encoder.layer[1].eval()
    for parameter in list(bert.parameters())[::3]:
        parameter.requires_grad_(False)
    before = state(bert)
    with torch.no_grad():  # nor do the caller's gradient mode and frozen weights matter
        found = task_embedding(bert, task, examples=3)
    assert all(np.array_equal(found[c], expected[c]) for c in expected)
    text_embedding(bert, task, examples=3)
    with refused("'other'", "single"), fslib.pruned(bert, np.ones((3, 4), dtype=bool)):
        task_embedding(bert, replace(task, name="other"))
    monkeypatch.setattr(bert, "losses", lambda batch, name: 1 / 0)
    with suppress(ZeroDivisionError):
        task_embedding(bert, task)
    assert state(bert) == before


@pytest.mark.parametrize("measure", [task_embedding, text_embedding])
def test_labels_split_examples_and_seed_choose_what_is_embedded(bert, task, measure):
    def found(of=task, **options):
        embedded = measure(bert, of, **options)
        return embedded["outside"] if isinstance(embedded, dict) else embedded

    one, again, other = (found(examples=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.allclose(one, other)
    assert np.array_equal(found(split="eval"), found(replace(task, train=task.eval)))
    turned = replace(task, train=replace(task.train, labels=(task.train.labels + 1) % 3))
    texts_alone = measure is text_embedding
    assert np.array_equal(found(), found(turned)) == texts_alone, "true labels matter"
    with refused("'dev'", "train, eval"):
        found(split="dev")


A = {"l.0": np.array([1.0, 0.0]), "outside": np.array([3.0, 4.0, 0.0])}
B = {"l.0": np.array([0.0, 2.0]), "outside": np.array([40.0, 30.0, 0.0])}


def test_task_similarity_is_the_mean_of_cosines():
    assert task_similarity(A, B) == task_similarity(B, A) == pytest.approx((0 + 24 / 25) / 2)
    scaled = A | {"l.0": 1e12 * A["l.0"]}
    assert task_similarity(scaled, B) == pytest.approx(0.48), "no component outweighs another"
    for other, words in (
        ({"l.1": np.ones(2), "outside": np.ones(3)}, ("of different encoders", "l.0", "l.1")),
        ({"l.0": np.ones(3), "outside": np.ones(3)}, ("(2,)", "(3,)")),
    ):
        with refused(*words):
            task_similarity(A, other)
    with refused("different encoders"):
        task_similarity({}, {})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2], [-2, -4], -1),
        ([3e-20, 4e-20], [4e20, 3e20], 0.96),
        ([0, 0], [1, 1], "zeros"),
        ([1, 1, 1], [1, 1], "(3,)"),
        ([1, np.nan], [1, 1], "finite"),
    ],
)
def test_cosine_by_hand(a, b, expected):
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    if isinstance(expected, str):
        with refused(expected):
            cosine(a, b)
    else:
        assert cosine(a, b) == pytest.approx(expected, abs=1e-15) and abs(cosine(a, b)) <= 1


# --- representations ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["first", "mean", "last"])
def test_representations_against_the_untouched_encoder_text_by_text(zoo, bert, task, how):
    reference = untouched("bert", zoo.folder("bert"))
    found, rows = representations(bert, task.train, pooling=how), []
    for text in task.train.texts:
        tokens = bert.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = reference(**tokens).last_hidden_state
        rows.append(pool(hidden, tokens["attention_mask"], how)[0].numpy())
    np.testing.assert_allclose(found, rows, rtol=1e-3, atol=1e-4)
    if how == "mean":
        np.testing.assert_allclose(text_embedding(bert, task), np.mean(rows, 0), 1e-3, 1e-4)
    for texts, size in ((list(task.train.texts), 32), (task.train, 3)):
        again = representations(bert, texts, pooling=how, batch_size=size)
        np.testing.assert_allclose(again, found, atol=1e-5)


def test_representations_are_what_the_classifiers_see(bert, task):
    found = representations(bert, task.train)
    logits = bert.classifiers["single"](torch.from_numpy(found))
    expected = bert(bert.encode(task.train).batch(range(10)).inputs, "single")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    bert.encoder.embeddings.dropout.p = 0.5
    bert.train()
    assert np.array_equal(representations(bert, task.train), found) and bert.training
    with fslib.pruned(bert, np.ones((3, 4), dtype=bool)):
        assert not np.allclose(representations(bert, task.train), found)
    with refused("no text"):
        representations(bert, [])
    with refused("'max'", "first, mean, last"):
        representations(bert, ["w1 w2"], pooling="max")


# --- CKA ----------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(60, 5)) * [1, 2, 3, 4, 5]


@pytest.fixture
def y(x):
    return x[:, :3] + np.random.default_rng(1).normal(size=(60, 3))


def test_cka_by_hand():
    # one feature each: the squared correlation, here of (1, 2, 3) with (1, 3, 2)
    a, b = np.array([[1.0], [2], [3]]), np.array([[1.0], [3], [2]])
    assert linear_cka(a, b) == pytest.approx(0.25)
    # y'x = (2, 2), x'x = diag(2, 2), y'y = 4: 8 / (sqrt(8) * 4)
    a, b = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), np.array([[1.0], [-1], [1], [-1]])
    assert linear_cka(a, b) == pytest.approx(np.sqrt(0.5))


def test_what_cka_sees_and_what_not(x, y):
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    order, found = np.random.default_rng(3).permutation(60), linear_cka(x, y)
    alike = [(y, x), (x @ rotation, y), (1e-9 * x, 1e9 * y), (x[order], y[order])]
    for a, b in [*alike, (x + 100, y - np.arange(3))]:
        assert linear_cka(a, b) == pytest.approx(found)
    assert linear_cka(x, -3 * x @ rotation + 7) == pytest.approx(1)
    single = linear_cka(x.astype(np.float32), y.astype(np.float32))
    assert single == pytest.approx(found, abs=1e-5)
    assert linear_cka(x, y[::-1]) < found / 2, "other texts"


def test_fewer_texts_than_features_gives_the_same_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 9))
    y = x[:, :8] + rng.normal(size=(12, 8))
    cx, cy = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy)
    assert linear_cka(x, y) == pytest.approx(np.linalg.norm(cy.T @ cx) ** 2 / norms)


def test_many_texts_need_no_products_of_texts_with_texts():
    x = np.random.default_rng(0).normal(size=(20_000, 4))
    tracemalloc.start()
    linear_cka(x, x[:, ::-1])
    assert tracemalloc.get_traced_memory()[1] < 20 * x.nbytes  # (n, n) would be 5,000 times x
    tracemalloc.stop()


def test_features_without_cka_are_refused(x, y):
    for dtype in (np.float32, np.float64):
        with refused("same for every text"):
            linear_cka(x.astype(dtype), np.tile([0.1, 1e6 / 3], (60, 1)).astype(dtype))
    broken = np.full_like(y, np.inf)
    for a, b, word in ((x, y[1:], "60 and 59"), (x[:1], y[:1], "same"), (x, broken, "finite")):
        with refused(word):
            linear_cka(a, b)


# --- heads --------------------------------------------------------------------------------------


def test_importance_similarity_and_head_overlap_by_hand():
    a = np.array([[9.0, 8, 1, 0], [7, 2, 3, 4]])
    b = np.array([[9.0, 0, 8, 1], [7, 2, 3, 4]])
    # ranks of the first layer 8 7 2 1 against 8 1 7 2: d = 0 6 5 1
    assert importance_similarity(a, b) == pytest.approx(1 - 6 * (36 + 25 + 1) / (8 * 63))
    assert importance_similarity(a, np.ones((2, 4))) == 0, "flat"
    assert head_overlap(a, b, 0.25) == pytest.approx(1 / 3)  # of 2 each, 1 shared
    assert head_overlap(a, b) == pytest.approx(1 / 3) and head_overlap(a, b, 1.0) == 1
    with refused("shape (4, 2), where (2, 4)"):
        importance_similarity(a, a.T)
    with refused("fraction 0.1 of 8 heads"):
        head_overlap(a, b, 0.1)
