"""Batches of images, in an order that the seed and the epoch determine."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from fastcl.train.data.images import Images, Unreadable


class Loader:
    """Batches (images, labels, indices) of a data set: shuffled and whole for training, else all in order.

    The order of an epoch depends on ``seed`` and the epoch only; ranks share its batches.

    Args:
        images: the data set.
        batch_size: images per batch, on this rank.
        unreadable: told of files that could not be read.
        seed: of the order; None: in order.
        only: the places of the images to give in order; None: all.
        rank: of this process among ``ranks``, in an order by ``seed``.
        ranks: how many processes share the data set.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        unreadable: Unreadable,
        *,
        seed: int | None = None,
        only: Sequence[int] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.sampler: DistributedSampler[Any] | Sequence[int] | None = None  # Lightning tells it the epoch
        if seed is not None:
            self.sampler = DistributedSampler(images, ranks, rank, shuffle=True, seed=seed, drop_last=True)
        elif only is not None:
            self.sampler = only
        self.batches: DataLoader[Any] = DataLoader(
            images,
            batch_size,
            sampler=self.sampler,
            drop_last=seed is not None,
            num_workers=images.workers,
            collate_fn=images.collate,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_terminal,
        )
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for images, labels, indices, problems in self.batches:
            self.unreadable.report(problems)
            yield images, labels, indices


def _ignore_terminal(worker: int) -> None:
    """A terminal's signals reach the workers too, but it is the main process that ends them."""
    for of_terminal in (signal.SIGINT, signal.SIGHUP):
        signal.signal(of_terminal, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
