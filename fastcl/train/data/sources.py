"""What a run trains on and is evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.train.data.images import Images, MemoryImages, Unreadable
from fastcl.train.data.photos import normalize, photo_augmentation
from fastcl.train.settings import Settings


@dataclass(frozen=True, eq=False)
class Source:
    """What a method trains on and is evaluated on.

    Attributes:
        train: what the encoder learns from; files give two crops of each image.
        bank: the same images for evaluation.
        test: the images it is evaluated on.
        augment: a batch of images of ``train`` to a batch of random views of them.
        normalize: a batch of images of ``bank`` and ``test`` to what the encoder takes.
        channels: of the images.
        image_size: side of the images.
        unreadable: the files that could not be read.
    """

    train: Images
    bank: Images
    test: Images
    augment: Callable[[Tensor], Tensor]
    normalize: Callable[[Tensor], Tensor]
    channels: int
    image_size: int
    unreadable: Unreadable


def in_memory(settings: Settings, train: MemoryImages, test: MemoryImages) -> Source:
    """The source of images that are read already, within ``settings.limit``."""
    train, test = (
        MemoryImages(part.images[chosen], part.labels[chosen])
        for part in (train, test)
        for chosen in (first_per_class(part.labels, settings.limit),)
    )
    channels, size = train.images.shape[1], settings.image_size or train.images.shape[-1]
    augment = photo_augmentation(size, crop_min=settings.crop_min, jitter=settings.jitter, blur=settings.blur)
    unreadable = Unreadable(settings.max_unreadable)
    return Source(train, train, test, augment, normalize, channels, size, unreadable)


def first_per_class(labels: Tensor, limit: int | None) -> Tensor:
    """The indices of ``limit`` images, the first of each class in turn; of all without a limit."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    earlier = torch.empty_like(labels)  # how many of the same class come before
    for label in labels.unique():
        members = labels == label
        earlier[members] = torch.arange(int(members.sum()))
    return earlier.argsort(stable=True)[:limit].sort().values
