"""What a run trains on and is evaluated on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.train.data.images import Images, MemoryImages, Unreadable
from fastcl.train.data.photos import normalize, photo_augmentation
from fastcl.train.settings import SMALL_CROP_MIN, Settings

_NARROWEST = 3 / 4  # crop's width, by its height


@dataclass(frozen=True, eq=False)
class Source:
    """What a method trains on and is evaluated on.

    Attributes:
        train: what the encoder learns from; files give a crop per view of each image.
        bank: the same images for evaluation.
        test: the images it is evaluated on; None: there are none.
        classes: names of the labels, in order; empty: images without labels.
        augment: per view, a batch of images of ``train`` to a batch of random views of them.
        normalize: a batch of images of ``bank`` and ``test`` to what the encoder takes.
        channels: of the images.
        image_size: side of the images.
        unreadable: the files that could not be read.
    """

    train: Images
    bank: Images
    test: Images | None
    classes: tuple[str, ...]
    augment: Sequence[Callable[[Tensor], Tensor]]
    normalize: Callable[[Tensor], Tensor]
    channels: int
    image_size: int
    unreadable: Unreadable


def in_memory(
    settings: Settings, train: MemoryImages, test: MemoryImages | None, classes: Sequence[str]
) -> Source:
    """The source of images that are read already, within ``settings.limit``.

    Raises:
        ValueError: images so small that a crop can be a single pixel wide, of which no view can be made.
    """
    train = _chosen(train, long_tailed(train.labels, settings.limit, settings.imbalance))
    kept = None if test is None else _chosen(test, first_per_class(test.labels, settings.limit))
    channels, size = train.images.shape[1], settings.image_size or train.images.shape[-1]
    views = crops(settings, size)
    side, share = min(train.images.shape[-2:]), min(smallest for _, (smallest, _) in views)
    if side * math.sqrt(share * _NARROWEST) < 1.5:
        raise ValueError(
            f"data must be images whose smallest crops, {share:g} of their area, are 2 pixels wide, "
            f"got images of {side} pixel(s) a side"
        )
    augment = [
        photo_augmentation(view, crop=crop, jitter=settings.jitter, blur=settings.blur)
        for view, crop in views
    ]
    unreadable = Unreadable(settings.max_unreadable)
    return Source(train, train, kept, tuple(classes), augment, normalize, channels, size, unreadable)


def has_colours(source: Source) -> bool:
    """Whether the images are not all grey, as far as those in memory tell."""
    if not isinstance(source.train, MemoryImages):
        return source.channels == 3
    images = source.train.images
    return bool((images[:, :1] != images[:, 1:]).any())


def crops(settings: Settings, size: int) -> list[tuple[int, tuple[float, float]]]:
    """Per view, its side and the shares of the image that it may show: two views, then the small crops.

    Caron et al. 2020, https://arxiv.org/abs/2006.09882, for the small ones.
    """
    small = settings.small_crop_size or max(2, round(size * 3 / 7))
    shares = (SMALL_CROP_MIN, settings.small_crop_max)
    return [(size, (settings.crop_min, 1.0))] * 2 + [(small, shares)] * settings.small_crops


def _chosen(images: MemoryImages, chosen: Tensor) -> MemoryImages:
    return MemoryImages(images.images[chosen], images.labels[chosen])


def first_per_class(labels: Tensor, limit: int | None) -> Tensor:
    """The indices of ``limit`` images, the first of each class in turn; of all without a limit."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    return _earlier(labels).argsort(stable=True)[:limit].sort().values


def long_tailed(labels: Tensor, limit: int | None, imbalance: int) -> Tensor:
    """The indices that :func:`first_per_class` chooses, then cut to a long tail.

    Of class c of C the first ``n * imbalance ** (-c / (C - 1))`` are kept, n being those of the first class.

    Raises:
        ValueError: fewer than two classes, or an imbalance that leaves none of the last.
    """
    chosen = first_per_class(labels, limit)
    if imbalance == 1:
        return chosen
    labels = labels[chosen]
    counts = labels.clamp_min(0).bincount()
    shares = float(imbalance) ** -torch.linspace(0, 1, len(counts), dtype=torch.float64)
    kept = (counts[0] * shares + 1e-9).floor()
    if labels.min() < 0 or len(counts) < 2 or kept[-1] < 1:
        raise ValueError(
            f"imbalance must leave an image of each of several classes, got {imbalance} for {len(counts)} "
            f"class(es), the first of {int(counts[0])} images"
        )
    return chosen[_earlier(labels) < kept[labels]]


def _earlier(labels: Tensor) -> Tensor:
    """For each label how many of the same come before."""
    earlier = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        earlier[members] = torch.arange(int(members.sum()))
    return earlier
