"""Turn texts into batches of like length, and draw whose turn it is at every step.

Padding is computed on like any token, so the examples of a batch are of like length.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fslib.data.tasks import Split
from fslib.errors import FslibError, check_among, check_count

# what an encoder may take beside the mask, and its filler
PADDING = {"input_ids": 0, "token_type_ids": 0}
TOKENIZED_AT_ONCE = 1000  # a tokenizer's own output takes much more memory than the ids
SORT_WINDOW = 32  # training: examples are sorted by length within this many shuffled batches
SAMPLINGS = ("proportional", "sqrt", "uniform", "annealed")


@dataclass(frozen=True)
class Batch:
    """Some examples of a split, padded.

    Args:
        inputs: what the encoder takes, (batch, seq) each, `attention_mask` 1 on real tokens.
        labels: (batch,).
        indices: (batch,) positions of the examples in their split.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    indices: np.ndarray

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        inputs = {name: values.to(device) for name, values in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.indices)


class Encoded:
    """A split as token ids, ready to be batched in any order.

    `truncated` and `lost` say what `max_length` and the vocabulary leave of the texts.

    Args:
        split: the examples.
        tokenizer: of the transformers library.
        max_length: tokens of an example, the special ones among them; what is longer is cut off.

    Raises:
        FslibError: an example has no token.
    """

    def __init__(self, split: Split, tokenizer: Any, max_length: int) -> None:
        check_count("max_length", max_length)
        self.split, self.tokenizer, self.max_length = split, tokenizer, max_length
        self.columns: dict[str, list[np.ndarray]] = {}
        cut = {"truncation": "longest_first", "max_length": max_length}
        for part in _tokenized(split, tokenizer, return_attention_mask=False, **cut):
            for name in PADDING.keys() & part.keys():
                rows = [np.asarray(row, dtype=np.int32) for row in part[name]]
                self.columns.setdefault(name, []).extend(rows)
        self.padding = {**PADDING, "input_ids": tokenizer.pad_token_id}
        self.labels = torch.from_numpy(np.asarray(split.labels).copy())
        self.labels = self.labels.float() if self.labels.is_floating_point() else self.labels
        if not self.lengths.all():
            raise FslibError(f"example {self.lengths.argmin()} has no token: drop empty texts")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each example."""
        return np.array([len(row) for row in self.columns["input_ids"]])

    @cached_property
    def truncated(self) -> Bool[np.ndarray, " n"]:
        """(n,) True where `max_length` cuts tokens off an example."""
        cut = self.lengths >= self.max_length  # only these can be
        at = np.flatnonzero(cut)
        cut[at] = [len(ids) > self.max_length for ids in _ids(self.split.take(at), self.tokenizer)]
        return cut

    @cached_property
    def lost(self) -> Bool[np.ndarray, " n"]:
        """(n,) True where the model sees nothing of a text, or of one text of a pair.

        A text may be blank, in a script that the tokenizer does not have, or without a word that
        its vocabulary knows; and `max_length` may leave no room for one of a pair.
        """
        sides = [side for side in (self.split.texts, self.split.pairs) if side is not None]
        added = self.tokenizer.num_special_tokens_to_add(pair=len(sides) == 2)
        lost = self.truncated & (self.max_length - added < len(sides))
        special = set(self.tokenizer.all_special_ids)  # the unknown token among them
        for side in sides:
            alone = Split(side, None, self.split.labels, self.split.documents)
            found = _ids(alone, self.tokenizer, add_special_tokens=False)
            lost |= [special.issuperset(ids) for ids in found]
        return lost

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return the examples at `indices`, padded on the right to the longest of them."""
        indices = np.asarray(indices, dtype=np.int64)
        inputs = {}
        for name, rows in self.columns.items():
            chosen = [torch.from_numpy(rows[i]).long() for i in indices]
            inputs[name] = pad_sequence(chosen, True, self.padding[name])
        lengths = torch.from_numpy(self.lengths[indices])
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return Batch(inputs, self.labels[torch.from_numpy(indices)], indices)

    def in_length_order(self, batch_size: int) -> list[np.ndarray]:
        """Return batches of indices, sorted by length, each example once: for scoring."""
        check_count("batch_size", batch_size)
        return _in_batches(np.argsort(self.lengths, kind="stable"), batch_size)

    def forever(self, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield batches of indices for training, without end.

        Every example comes once per epoch, in a new order each epoch: examples are shuffled, sorted
        by length within windows of SORT_WINDOW batches, cut into batches, and the batches shuffled.
        A ragged rest of an epoch is a smaller batch.
        """
        while True:
            batches = []
            for window in _in_batches(rng.permutation(len(self)), SORT_WINDOW * batch_size):
                in_order = window[np.argsort(self.lengths[window], kind="stable")]
                batches += _in_batches(in_order, batch_size)
            for i in rng.permutation(len(batches)):
                yield batches[i]


def _in_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _tokenized(split: Split, tokenizer: Any, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a tokenizer's output for some examples after the other."""
    for start in range(0, len(split), TOKENIZED_AT_ONCE):
        part = slice(start, start + TOKENIZED_AT_ONCE)
        pairs = None if split.pairs is None else list(split.pairs[part])
        yield tokenizer(list(split.texts[part]), pairs, **options)


def _ids(split: Split, tokenizer: Any, **options: Any) -> Iterator[list[int]]:
    """Yield every example's token ids, none cut off."""
    for part in _tokenized(split, tokenizer, verbose=False, **options):
        yield from part["input_ids"]


def sampling_weights(
    sizes: Num[np.ndarray, " tasks"], sampling: str, epoch: int = 1, epochs: int = 1
) -> Float[np.ndarray, " tasks"]:
    """Return the probability of each task in one step.

    proportional: n; sqrt: n**0.5; uniform: 1; annealed: n**a with a = 1 - 0.8 (epoch-1)/(epochs-1),
    from proportional towards even (Stickland and Murray, 2019); a = 1 when there is one epoch.

    Args:
        sizes: n, the examples of each task.
        sampling: one of SAMPLINGS.
        epoch: 1..epochs.
        epochs: of the whole training.

    Returns:
        Probabilities that sum to 1.
    """
    check_among("sampling", sampling, SAMPLINGS)
    if not 1 <= epoch <= epochs:
        raise FslibError(f"epoch {epoch} is outside 1..{epochs}")
    annealed = 1.0 if epochs == 1 else 1 - 0.8 * (epoch - 1) / (epochs - 1)
    power = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0, "annealed": annealed}[sampling]
    weights = np.asarray(sizes, dtype=float) ** power
    return weights / weights.sum()


def task_order(sizes: list[int], steps: int, sampling: str, epochs: int, seed: int) -> list[int]:
    """Draw the task of every step, by its index, with `sampling_weights`.

    Args:
        sizes: the examples of each task.
        steps: cut into `epochs` equal parts.
        sampling: one of SAMPLINGS.
        epochs: of the whole training.
        seed: of the draw.
    """
    check_count("steps", steps)
    check_count("epochs", epochs)
    check_count("seed", seed, 0)
    rng = np.random.default_rng([seed, 0])
    parts = Counter(1 + (s * epochs // steps if epochs <= steps else s) for s in range(steps))
    order: list[int] = []
    for epoch, length in parts.items():
        chances = sampling_weights(np.array(sizes), sampling, epoch, epochs)
        order += rng.choice(len(sizes), length, p=chances).tolist()
    return order
