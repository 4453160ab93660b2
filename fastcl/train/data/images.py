"""Images and their labels, -1 for none, one batch at a time: in memory, or read by worker processes."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Problem(NamedTuple):
    """A file that could not be read, and why."""

    path: Path
    reason: str


class Read(NamedTuple):
    """What the datasets hand to the loader."""

    images: Tensor | Sequence[Tensor] | None  # None: nothing could be read
    labels: Tensor
    indices: Tensor
    problems: Sequence[Problem] = ()


class TooManyUnreadableError(ValueError):
    """More image files than a run puts up with could not be read."""


@dataclass(eq=False)
class Unreadable:
    """The files of a run that could not be read: each is named once, and above ``limit`` the run ends."""

    limit: int
    paths: set[Path] = field(default_factory=set)

    def report(self, problems: Sequence[Problem]) -> None:
        """Name new ones on stderr.

        Raises:
            TooManyUnreadableError: these are more than ``limit``.
        """
        for path, reason in problems:
            if path in self.paths:
                continue
            self.paths.add(path)
            if len(self.paths) > self.limit:
                raise TooManyUnreadableError(
                    f"{len(self.paths)} images could not be read, max_unreadable is {self.limit}; "
                    f"the last: {path}: {reason}"
                )
            print(f"skipped {path}: {reason}", file=sys.stderr, flush=True)


class MemoryImages(Dataset[Read]):
    """Images (N, C, H, W), uint8 or float in [0, 1], and their labels (N,), int64."""

    workers = 0

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Read:
        """The batch of ``indices``, in one piece."""
        return Read(self.images[indices], self.labels[indices], torch.tensor(indices))

    def collate(self, batch: Read) -> Read:
        """Nothing is left to do."""
        return batch


class FileImages(Dataset[object]):
    """Image files, decoded and brought to one size by worker processes.

    Args:
        paths: of the images.
        labels: (N,) int64.
        transform: an RGB image to a uint8 tensor (3, H, W), or to several of them.
        workers: how many processes.
        limit: how many unreadable files in a row to pass over.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        transform: Callable[[Image.Image], object],
        *,
        workers: int,
        limit: int,
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform
        self.workers = workers
        self.limit = limit

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[object, Tensor, int, list[Problem]]:
        """The transformed image, or that of the next file that can be read; None after too many."""
        problems: list[Problem] = []
        while len(problems) <= self.limit:
            image = read_image(self.paths[index])
            if not isinstance(image, Problem):
                return self.transform(image), self.labels[index], index, problems
            problems.append(image)
            index = (index + 1) % len(self)
        return None, self.labels[index], index, problems

    def collate(self, samples: list[tuple[object, Tensor, int, list[Problem]]]) -> Read:
        """The samples as one batch."""
        images, labels, indices, found = zip(*samples, strict=True)
        problems = [problem for of_sample in found for problem in of_sample]
        batch = None if any(image is None for image in images) else default_collate(list(images))
        return Read(batch, torch.stack(labels), torch.tensor(indices), problems)


Images = MemoryImages | FileImages


def read_image(path: Path, size: int | None = None) -> Image.Image | Problem:
    """An RGB image, cropped and scaled to a square if ``size`` is given; or why it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return Problem(path, "not a regular file")
        with Image.open(path) as file:
            image = file.convert("RGB")
    except _READ_ERRORS as error:
        return Problem(path, " ".join(str(error).split()).removesuffix(f" {str(path)!r}"))
    return image if size is None or image.size == (size, size) else ImageOps.fit(image, (size, size))


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, H, W) as (N, 3, H, W), without a copy."""
    return images[:, None].expand(-1, 3, -1, -1)
