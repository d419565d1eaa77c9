"""From texts to batches, and whose turn it is: token ids, batches of like length, the task of every training step.

Padding is computed on like any token, so the examples of a batch are of like length and need little of it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from fslib.data.tasks import Split
from fslib.errors import FslibError, check_count, unknown

PADDING = {
    "input_ids": 0,
    "token_type_ids": 0,
}  # what an encoder may take beside the mask, and its filler
TOKENIZED_AT_ONCE = 1000  # a tokenizer's own output takes much more memory than the ids
SORT_WINDOW = 32  # training: examples are sorted by length within this many shuffled batches
SAMPLINGS = ("proportional", "sqrt", "uniform", "annealed")


@dataclass(frozen=True)
class Batch:
    """One batch.

    inputs: what the encoder takes, (batch, seq) each, `attention_mask` 1 on real tokens.
    labels: (batch,). indices: positions of the examples in their split.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    indices: np.ndarray

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            {k: v.to(device) for k, v in self.inputs.items()}, self.labels.to(device), self.indices
        )


class Encoded:
    """A split as token ids, ready to be batched in any order.

    `truncated` and `lost` say what `max_length` and the vocabulary leave of the texts.
    """

    def __init__(self, split: Split, tokenizer: Any, max_length: int) -> None:
        check_count("max_length", max_length)
        self.split, self.tokenizer, self.max_length = split, tokenizer, max_length
        self.columns: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(split), TOKENIZED_AT_ONCE):
            part = slice(start, start + TOKENIZED_AT_ONCE)
            rows = tokenizer(
                list(split.texts[part]),
                None if split.pairs is None else list(split.pairs[part]),
                truncation="longest_first",
                max_length=max_length,
                return_attention_mask=False,
            )
            for name in PADDING.keys() & rows.keys():
                self.columns.setdefault(name, []).extend(
                    np.asarray(row, dtype=np.int32) for row in rows[name]
                )
        self.padding = {**PADDING, "input_ids": tokenizer.pad_token_id}
        self.labels = torch.from_numpy(np.asarray(split.labels).copy())
        self.labels = self.labels.float() if self.labels.is_floating_point() else self.labels
        if empty := [i for i, r in enumerate(self.columns["input_ids"]) if not len(r)]:
            raise FslibError(f"example {empty[0]} has no token: drop empty texts")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each example."""
        return np.array([len(row) for row in self.columns["input_ids"]])

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples, padding among them."""
        return max(
            self.padding["input_ids"], *(int(row.max()) for row in self.columns["input_ids"])
        )

    @cached_property
    def truncated(self) -> Bool[np.ndarray, " n"]:
        """(n,) True where `max_length` cuts tokens off an example."""
        cut = self.lengths >= self.max_length  # only these can be
        at = np.flatnonzero(cut)
        cut[at] = [len(ids) > self.max_length for ids in _ids(self.split.take(at), self.tokenizer)]
        return cut

    @cached_property
    def lost(self) -> Bool[np.ndarray, " n"]:
        """(n,) True where the model sees nothing of a text: no token of it that its vocabulary knows, or none at all.

        That is a text that is blank or in a script that the tokenizer does not have, and one of a pair that
        `max_length` leaves no room for.
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
        lengths = torch.from_numpy(self.lengths[indices])
        width = int(lengths.max())
        inputs = {}
        for name, rows in self.columns.items():
            table = np.full((len(indices), width), self.padding[name], dtype=np.int64)
            for r, i in enumerate(indices):
                table[r, : len(rows[i])] = rows[i]
            inputs[name] = torch.from_numpy(table)
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return Batch(inputs, self.labels[torch.from_numpy(indices)], indices)

    def in_length_order(self, batch_size: int) -> list[np.ndarray]:
        """Return batches of indices over all examples, each once, sorted by length (for evaluation and importance)."""
        check_count("batch_size", batch_size)
        order = np.argsort(self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def forever(self, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield batches of indices for training, without end: every example once per epoch, a new order each epoch.

        Examples are shuffled, sorted by length within windows of SORT_WINDOW batches, cut into batches, and the
        batches shuffled. A ragged rest of an epoch is a smaller batch.
        """
        while True:
            order = rng.permutation(len(self))
            batches = []
            for start in range(0, len(order), SORT_WINDOW * batch_size):
                window = order[start : start + SORT_WINDOW * batch_size]
                window = window[np.argsort(self.lengths[window], kind="stable")]
                batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            for i in rng.permutation(len(batches)):
                yield batches[i]


def _ids(split: Split, tokenizer: Any, **options: Any) -> Iterator[list[int]]:
    """Yield every example's token ids, none cut off."""
    for start in range(0, len(split), TOKENIZED_AT_ONCE):
        part = slice(start, start + TOKENIZED_AT_ONCE)
        pairs = None if split.pairs is None else list(split.pairs[part])
        yield from tokenizer(list(split.texts[part]), pairs, verbose=False, **options)["input_ids"]


def padding_share(batches: Sequence[np.ndarray], lengths: np.ndarray) -> float:
    """Return the share of computed tokens that are padding, in [0, 1)."""
    computed = sum(int(lengths[b].max()) * len(b) for b in batches)
    return 1 - sum(int(lengths[b].sum()) for b in batches) / computed


def sampling_weights(
    sizes: Num[np.ndarray, " tasks"], sampling: str, epoch: int = 1, epochs: int = 1
) -> Float[np.ndarray, " tasks"]:
    """Return the probability of each task in one step of `epoch` (1..epochs); sums to 1.

    proportional: n; sqrt: n**0.5; uniform: 1; annealed: n**a with a = 1 - 0.8 (epoch-1)/(epochs-1), from
    proportional towards even (Stickland and Murray, 2019); a = 1 when there is one epoch.
    """
    if sampling not in SAMPLINGS:
        raise unknown("sampling", sampling, SAMPLINGS)
    check_count("epochs", epochs)
    check_count("epoch", epoch)
    if epoch > epochs:
        raise FslibError(f"epoch {epoch} is outside 1..{epochs}")
    annealed = 1.0 if epochs == 1 else 1 - 0.8 * (epoch - 1) / (epochs - 1)
    power = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0, "annealed": annealed}[sampling]
    weights = np.asarray(sizes, dtype=float) ** power
    return weights / weights.sum()


def task_order(sizes: list[int], steps: int, sampling: str, epochs: int, seed: int) -> list[int]:
    """Draw the task of every step, by its index, with `sampling_weights`; `steps` are cut into `epochs` equal parts."""
    check_count("steps", steps)
    check_count("epochs", epochs)
    check_count("seed", seed, 0)
    rng = np.random.default_rng([seed, 0])
    parts = Counter(
        1 + step * epochs // steps if epochs <= steps else 1 + step for step in range(steps)
    )
    order: list[int] = []
    for epoch, length in parts.items():
        chances = sampling_weights(np.array(sizes), sampling, epoch, epochs)
        order += rng.choice(len(sizes), length, p=chances).tolist()
    return order
