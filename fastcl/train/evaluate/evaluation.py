"""An encoder's accuracies on a source's test images, measured by all ranks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fastcl.train.data.images import Images
from fastcl.train.data.loader import Loader
from fastcl.train.data.sources import Source
from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.features import BATCH, Features, gathered, joined, stream
from fastcl.train.evaluate.linear import LINEAR, LONG_TAIL, evaluate_linear, evaluate_long_tail
from fastcl.train.evaluate.neighbours import evaluate_neighbours
from fastcl.train.evaluate.pictures import draw_embedding, evenly
from fastcl.train.settings import Settings


class ImageEvaluation(Evaluation):
    """Measures encoders on the images of a source.

    Every rank encodes its share, so that none waits for another longer than a batch takes. Training
    features are compared as they come; only the linear classifiers need them all, shared over the ranks.

    Args:
        source: the images; ``bank`` holds the neighbours of ``test``.
        settings: of the run.

    Raises:
        ValueError: fewer test images than processes.
    """

    measures = ("knn_top1", "knn_top1_few")
    lines: ClassVar[Mapping[str, str]] = {
        "knn_top1": "neighbours, all labels",
        "knn_top1_few": "neighbours, one label per class",
        "linear_top1": "linear classifier",
    }

    def __init__(self, source: Source, settings: Settings) -> None:
        if source.test is not None and len(source.test) < settings.processes:
            raise ValueError(
                f"data must have a test image per process, got {len(source.test)} for {settings.processes}"
            )
        self.source = source
        self.neighbours = settings.neighbours
        self.possible = source.test is not None
        self.long_tail = settings.imbalance > 1
        self.rare = (*LINEAR, *LONG_TAIL) if self.long_tail else LINEAR

    def measure(self, network: nn.Module, device: torch.device, *, thorough: bool) -> dict[str, float]:
        """The accuracies by name; with ``thorough`` those of linear classifiers, too."""
        assert self.source.test is not None
        queries = gathered(joined(self.features(network, self.source.test, device)))
        bank = self.training_features(network, device)
        kept: list[Features] = []
        labels = self.source.bank.labels
        found = evaluate_neighbours(
            _keeping(bank, kept) if thorough else bank, labels, queries, self.neighbours
        )
        if thorough:
            found |= evaluate_linear(joined(kept), queries)
        if thorough and self.long_tail:
            found |= evaluate_long_tail(joined(kept), queries, labels.bincount())
        return found

    def draw(self, network: nn.Module, device: torch.device, folder: Path, title: str) -> list[str]:
        """The test images' features in two dimensions."""
        images = self.source.test or self.source.bank
        drawn = self.features(network, images, device, evenly(len(images)).tolist())
        draw_embedding(joined(drawn), self.source.classes, folder / "embedding.png", title)
        return ["embedding.png"]

    def training_features(self, network: nn.Module, device: torch.device) -> Iterator[Features]:
        """Features of the training images, this rank's share, a batch at a time."""
        return self.features(network, self.source.bank, device)

    def features(
        self, encoder: nn.Module, images: Images, device: torch.device, only: Sequence[int] | None = None
    ) -> Iterator[Features]:
        """The features of the images at ``only``, by default this rank's share of all, a batch at a time."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = range(rank, len(images), ranks) if only is None else only
        batches = Loader(images, BATCH, self.source.unreadable, only=own)
        shown = tqdm(batches, "evaluating", leave=False, disable=None if rank == 0 else True)
        return stream(encoder, shown, self.source.normalize, device)


def _keeping(parts: Iterable[Features], kept: list[Features]) -> Iterator[Features]:
    for part in parts:
        kept.append(part)
        yield part
