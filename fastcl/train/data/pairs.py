"""Samples with two sides, such as an image and its name, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastcl.train.data.images import Read, Unreadable


class MemoryPairs(Dataset[Read]):
    """Pairs: two tensors of N rows each, of which rows i belong together, and their labels (N,), int64."""

    workers = 0

    def __init__(self, first: Tensor, second: Tensor, labels: Tensor) -> None:
        self.sides = (first, second)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Read:
        """The batch of ``indices``: both sides."""
        return Read([side[indices] for side in self.sides], self.labels[indices], torch.tensor(indices))

    def collate(self, batch: Read) -> Read:
        """Nothing is left to do."""
        return batch


@dataclass(frozen=True, eq=False)
class PairSource:
    """Pairs to train on; subclasses add what the evaluation needs.

    Attributes:
        train: the pairs.
        augment: per side, a batch of it to a batch of random views of it.
    """

    train: MemoryPairs
    augment: Sequence[Callable[[Tensor], Tensor]]

    classes = ()
    unreadable = Unreadable(0)
