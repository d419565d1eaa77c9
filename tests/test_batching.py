"""Batches: what is padded and how, that nothing is left out or repeated, and how little padding is needed."""

from itertools import islice

import numpy as np
import pytest
import torch
from refusal import refused

from fslib.data.batches import SORT_WINDOW, Encoded, padding_share
from fslib.data.tasks import Split


class Words:
    """A tokenizer: every word is a token, its id its length; the second text of a pair has type 1."""

    pad_token_id = 99

    def __call__(self, texts, pairs, *, truncation, max_length, return_attention_mask):
        rows: dict[str, list[list[int]]] = {"input_ids": [], "token_type_ids": []}
        for text, other in zip(texts, pairs or [""] * len(texts), strict=True):
            parts = [text.split(), other.split()]
            rows["input_ids"].append([len(word) for part in parts for word in part][:max_length])
            rows["token_type_ids"].append(([0] * len(parts[0]) + [1] * len(parts[1]))[:max_length])
        return rows


def split_of(
    texts: list[str], pairs: list[str] | None = None, labels: np.ndarray | None = None
) -> Split:
    labels = np.arange(len(texts)) if labels is None else labels
    return Split(
        tuple(texts), None if pairs is None else tuple(pairs), labels, tuple((t,) for t in texts)
    )


def of_lengths(*lengths: int) -> Encoded:
    """Examples of so many tokens each, example i with label i."""
    return Encoded(split_of(["x " * n for n in lengths]), Words(), max_length=1000)


def many(n: int, seed: int = 0) -> Encoded:
    return of_lengths(*np.random.default_rng(seed).integers(1, 40, n).tolist())


def test_padding_is_on_the_right_with_each_input_s_own_filler():
    encoded = Encoded(split_of(["a bb ccc", "dddd"], ["e", "ff"]), Words(), max_length=10)
    batch = encoded.batch([1, 0])
    assert batch.inputs["input_ids"].tolist() == [[4, 2, 99, 99], [1, 2, 3, 1]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.indices.tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.inputs.values()} == {torch.int64}


def test_the_width_is_that_of_the_longest_in_the_batch_and_not_of_the_split():
    encoded = of_lengths(2, 3, 50)
    assert encoded.batch([0, 1]).mask.shape == (2, 3)
    assert encoded.batch([0]).mask.shape == (1, 2)


def test_regression_labels_are_float32_and_classes_int64():
    scores = Encoded(split_of(["a", "b"], labels=np.array([0.5, 1.5])), Words(), max_length=4)
    assert scores.batch([1]).labels.dtype == torch.float32
    assert of_lengths(1, 1).batch([1]).labels.dtype == torch.int64


def test_labels_are_a_copy():
    labels = np.array([0, 1])
    encoded = Encoded(split_of(["a", "b"], labels=labels), Words(), 4)
    encoded.labels[0] = 7
    assert labels.tolist() == [0, 1]


def test_a_real_tokenizer_marks_the_second_text_and_truncates_the_longer_one(tiny):
    split = split_of(["one two three four five six seven eight", "one"], ["nine", "two three"])
    encoded = Encoded(split, tiny.tokenizer, max_length=8)
    batch = encoded.batch([0, 1])
    assert encoded.lengths.tolist() == [8, 6]
    words = tiny.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0])
    assert words == ["[CLS]", "one", "two", "three", "four", "[SEP]", "nine", "[SEP]"]
    assert batch.inputs["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.inputs["input_ids"][1, 6:].tolist() == [tiny.tokenizer.pad_token_id] * 2


def test_a_model_encodes_to_its_own_greatest_length(tiny, tasks):
    longest = split_of(["word " * 500, "word"])
    assert tiny.max_length == 32
    assert tiny.encode(longest).lengths.tolist() == [32, 3]
    assert max(tiny.encode(task.train).lengths.max() for task in tasks.values()) <= 32


def test_an_example_without_a_token_is_named():
    with refused("example 1", "empty"):
        Encoded(split_of(["a", " ", ""]), Words(), max_length=4)


@pytest.mark.parametrize(("n", "size"), [(1, 4), (4, 4), (103, 8), (5, 1)])
def test_length_order_covers_each_example_once_from_short_to_long(n, size):
    encoded = many(n)
    batches = encoded.in_length_order(size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches) == -(-n // size)
    ordered = encoded.lengths[np.concatenate(batches)]
    assert (np.diff(ordered) >= 0).all()


def test_length_order_keeps_the_order_of_equals():
    assert np.concatenate(of_lengths(2, 1, 2, 1, 2).in_length_order(2)).tolist() == [1, 3, 0, 2, 4]


def first(encoded: Encoded, count: int, size: int, seed: int) -> list[list[int]]:
    return [b.tolist() for b in islice(encoded.forever(size, np.random.default_rng(seed)), count)]


def test_training_order_follows_its_seed_alone():
    encoded = many(60)
    assert first(encoded, 40, 8, seed=3) == first(many(60), 40, 8, seed=3)
    assert first(encoded, 40, 8, seed=3) != first(encoded, 40, 8, seed=4)


@pytest.mark.parametrize(("n", "size"), [(61, 8), (8, 8), (3, 8), (SORT_WINDOW * 4 * 2 + 5, 4)])
def test_each_epoch_covers_each_example_once_in_a_new_order_with_a_ragged_rest(n, size):
    per_epoch = -(-n // size)
    batches = first(many(n), 3 * per_epoch, size, seed=0)
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(n))
        assert sorted(map(len, epoch)) == sorted([size] * (n // size) + [n % size] * (n % size > 0))
    if per_epoch > 1:
        assert epochs[0] != epochs[1] != epochs[2]


def test_training_batches_are_not_in_order_of_length():
    encoded = many(400)
    means = [encoded.lengths[b].mean() for b in first(encoded, 50, 8, seed=0)]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5


def test_training_batches_hold_examples_of_like_length():
    encoded = many(400)
    sorted_batches = first(encoded, 50, 8, seed=0)
    shuffled = np.random.default_rng(0).permutation(400).reshape(50, 8)
    assert padding_share([np.array(b) for b in sorted_batches], encoded.lengths) < 0.1
    assert padding_share(list(shuffled), encoded.lengths) > 0.3


def test_padding_share_by_hand():
    lengths = np.array([1, 2, 3, 10])
    assert padding_share([np.array([0, 1]), np.array([2, 3])], lengths) == pytest.approx(
        1 - 16 / (4 + 20)
    )
    assert padding_share([np.array([3]), np.array([2])], lengths) == 0
    assert padding_share([np.array([0, 1, 2, 3])], lengths) == pytest.approx(1 - 16 / 40)


def test_padding_share_counts_what_the_mask_leaves_out():
    encoded = many(50)
    batches = encoded.in_length_order(8)
    masks = [encoded.batch(b).mask for b in batches]
    computed, real = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
    assert padding_share(batches, encoded.lengths) == pytest.approx(1 - real / computed)
