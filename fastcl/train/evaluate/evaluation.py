"""An encoder's accuracies on a source's test images, measured by all ranks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fastcl.train.data.images import Images
from fastcl.train.data.loader import Loader
from fastcl.train.data.sources import Source
from fastcl.train.evaluate.features import Features, gathered, joined, stream
from fastcl.train.evaluate.linear import evaluate_linear, evaluate_long_tail
from fastcl.train.evaluate.neighbours import evaluate_neighbours

_BATCH = 512


class Evaluation:
    """Measures encoders on the images of a source.

    Every rank encodes its share, so that none waits for another longer than a batch takes. Training
    features are compared as they come; only the linear classifiers need them all, shared over the ranks.

    Args:
        source: the images; ``bank`` holds the neighbours of ``test``.
        neighbours: how many vote.
        long_tail: whether classes with many and with few training images are told apart.
    """

    def __init__(self, source: Source, neighbours: int, *, long_tail: bool = False) -> None:
        self.source = source
        self.neighbours = neighbours
        self.long_tail = long_tail

    def measure(self, encoder: nn.Module, device: torch.device, *, linear: bool) -> dict[str, float]:
        """The accuracies by name; with ``linear`` those of linear classifiers, too."""
        assert self.source.test is not None
        queries = gathered(joined(self.features(encoder, self.source.test, device)))
        bank = self.features(encoder, self.source.bank, device)
        kept: list[Features] = []
        labels = self.source.bank.labels
        found = evaluate_neighbours(
            _keeping(bank, kept) if linear else bank, labels, queries, self.neighbours
        )
        if linear:
            found |= evaluate_linear(joined(kept), queries)
        if linear and self.long_tail:
            found |= evaluate_long_tail(joined(kept), queries, labels.bincount())
        return found

    def features(
        self, encoder: nn.Module, images: Images, device: torch.device, only: Sequence[int] | None = None
    ) -> Iterator[Features]:
        """The features of the images at ``only``, by default this rank's share of all, a batch at a time."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = range(rank, len(images), ranks) if only is None else only
        batches = Loader(images, _BATCH, self.source.unreadable, only=own)
        shown = tqdm(batches, "evaluating", leave=False, disable=None if rank == 0 else True)
        return stream(encoder, shown, self.source.normalize, device)


def _keeping(parts: Iterable[Features], kept: list[Features]) -> Iterator[Features]:
    for part in parts:
        kept.append(part)
        yield part
