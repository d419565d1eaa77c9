"""Batches: what is padded and how, that nothing is left out or repeated, how little is padded."""

from itertools import islice

import numpy as np
import pytest
import torch
from refusal import refused

from fslib.data.batches import SORT_WINDOW, TOKENIZED_AT_ONCE, Encoded
from fslib.data.tasks import Split


class Words:
    """A tokenizer: every word is a token, its id its length; the second text has type 1."""

    pad_token_id = 99

    def __call__(self, texts, pairs, *, truncation, max_length, return_attention_mask):
        rows = {"input_ids": [], "token_type_ids": []}
        for text, other in zip(texts, pairs or [""] * len(texts), strict=True):
            parts = [text.split(), other.split()]
            rows["input_ids"].append([len(word) for part in parts for word in part][:max_length])
            rows["token_type_ids"].append(([0] * len(parts[0]) + [1] * len(parts[1]))[:max_length])
        return rows


def split_of(texts, pairs=None, labels=None) -> Split:
    labels = np.arange(len(texts)) if labels is None else labels
    return Split(tuple(texts), pairs and tuple(pairs), labels, tuple((t,) for t in texts))


def of_lengths(*lengths: int) -> Encoded:
    """Examples of so many tokens each, example i with label i."""
    return Encoded(split_of(["x " * n for n in lengths]), Words(), max_length=1000)


def many(n: int, seed: int = 0) -> Encoded:
    return of_lengths(*np.random.default_rng(seed).integers(1, 40, n).tolist())


def padding(encoded: Encoded, batches) -> float:
    """The share of tokens in these batches that are padding."""
    masks = [encoded.batch(indices).mask for indices in batches]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def first(encoded: Encoded, count: int, size: int, seed: int) -> list[list[int]]:
    batches = encoded.forever(size, np.random.default_rng(seed))
    return [indices.tolist() for indices in islice(batches, count)]


def test_padding_is_on_the_right_with_each_input_s_own_filler():
    encoded = Encoded(split_of(["a bb ccc", "dddd"], ["e", "ff"]), Words(), max_length=10)
    batch = encoded.batch([1, 0])
    assert batch.inputs["input_ids"].tolist() == [[4, 2, 99, 99], [1, 2, 3, 1]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.labels.tolist(), batch.indices.tolist()) == ([1, 0], [1, 0])
    assert {tensor.dtype for tensor in batch.inputs.values()} == {torch.int64}
    assert encoded.batch([1]).mask.shape == (1, 2)  # as wide as the longest in the batch


def test_labels_are_a_copy_float32_for_regression_and_int64_for_classes():
    scores = np.array([0.5, 1.5])
    encoded = Encoded(split_of(["a", "b"], labels=scores), Words(), max_length=4)
    encoded.labels[0] = 7
    assert scores.tolist() == [0.5, 1.5] and encoded.batch([1]).labels.dtype == torch.float32
    assert of_lengths(1, 1).batch([1]).labels.dtype == torch.int64


def test_examples_are_tokenized_in_parts_and_keep_their_order():
    n = 2 * TOKENIZED_AT_ONCE + 1
    lengths = [1 + i % 7 for i in range(n)]
    assert of_lengths(*lengths).lengths.tolist() == lengths


def test_a_real_tokenizer_marks_the_second_text_and_truncates_the_longer_one(tiny):
    split = split_of(["one two three four five six seven eight", "one"], ["nine", "two three"])
    inputs = Encoded(split, tiny.tokenizer, max_length=8).batch([0, 1]).inputs
    words = tiny.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words == ["[CLS]", "one", "two", "three", "four", "[SEP]", "nine", "[SEP]"]
    assert inputs["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert tiny.encode(split_of(["word " * 500, "word"])).lengths.tolist() == [32, 3]


def test_what_is_truncated_and_lost(bert):
    texts = split_of(["w1 w2", "w1 w2 w3", " ", "zebra gnu", "w1 zebra"])
    encoded = Encoded(texts, bert.tokenizer, 4)  # [CLS] and [SEP] take two
    assert encoded.truncated.tolist() == [False, True, False, False, False]
    assert encoded.lost.tolist() == [False, False, True, True, False]
    assert not Encoded(texts, bert.tokenizer, 5).truncated.any()
    pairs = split_of(["w1", "w1 w2"], ["w2", "w3"])
    for length, cut, lost in ((6, [0, 0], [0, 0]), (5, [0, 1], [0, 0]), (4, [1, 1], [1, 1])):
        encoded = Encoded(pairs, bert.tokenizer, length)
        assert (encoded.truncated.tolist(), encoded.lost.tolist()) == (cut, lost)


def test_an_example_without_a_token_is_named():
    with refused("example 1", "empty"):
        Encoded(split_of(["a", " ", ""]), Words(), max_length=4)


@pytest.mark.parametrize(("n", "size"), [(1, 4), (4, 4), (103, 8), (5, 1)])
def test_length_order_covers_each_example_once_from_short_to_long(n, size):
    encoded = many(n)
    batches = encoded.in_length_order(size)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(n)) and len(batches) == -(-n // size)
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert (np.diff(encoded.lengths[order]) >= 0).all()
    equals = np.concatenate(of_lengths(2, 1, 2, 1, 2).in_length_order(2))
    assert equals.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize(("n", "size"), [(61, 8), (8, 8), (3, 8), (SORT_WINDOW * 4 * 2 + 5, 4)])
def test_each_epoch_covers_each_example_once_in_a_new_order_with_a_ragged_rest(n, size):
    per_epoch = -(-n // size)
    batches = first(many(n), 3 * per_epoch, size, seed=0)
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(n))
        assert sorted(map(len, epoch)) == sorted([size] * (n // size) + [n % size] * (n % size > 0))
    assert per_epoch == 1 or epochs[0] != epochs[1] != epochs[2]
    assert batches == first(many(n), 3 * per_epoch, size, seed=0)
    assert per_epoch == 1 or batches != first(many(n), 3 * per_epoch, size, seed=1)


def test_training_batches_hold_examples_of_like_length_in_no_order_of_length():
    encoded = many(400)
    batches = first(encoded, 50, 8, seed=0)
    means = [encoded.lengths[indices].mean() for indices in batches]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5
    shuffled = np.random.default_rng(0).permutation(400).reshape(50, 8)
    assert padding(encoded, batches) < 0.1 and padding(encoded, shuffled) > 0.3
