"""Trees of image files: train/ and test/ or val/ with a folder per class, or any tree without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from fastcl.train.data.downloads import DOWNLOADS
from fastcl.train.data.images import FileImages, MemoryImages, Problem, Unreadable, read_image
from fastcl.train.data.photos import normalize, photo_augmentation
from fastcl.train.data.sources import Source, crops, first_per_class, in_memory, long_tailed
from fastcl.train.encoders import SMALL_IMAGE
from fastcl.train.settings import Settings


@dataclass(frozen=True)
class Tree:
    """Image files and their labels, all -1 where ``classes`` is empty."""

    paths: Sequence[Path]
    labels: Tensor
    classes: tuple[str, ...]

    def at(self, chosen: Tensor) -> Tree:
        """The files at these places."""
        return Tree([self.paths[index] for index in chosen], self.labels[chosen], self.classes)


def image_folder(settings: Settings, folder: Path) -> Source:
    """The images of a tree; small ones are read into memory."""
    train, test = _parts(folder)
    train = train.at(long_tailed(train.labels, settings.limit, settings.imbalance))
    test = None if test is None else test.at(first_per_class(test.labels, settings.limit))
    size = settings.image_size or _first_size(train)
    unreadable = Unreadable(settings.max_unreadable)
    if size <= SMALL_IMAGE:
        images = _read_all(train, size, unreadable)
        tested = None if test is None else _read_all(test, size, unreadable)
        return replace(in_memory(settings, images, tested, train.classes), unreadable=unreadable)
    size = settings.image_size or 224
    views = [v2.RandomResizedCrop(side, part, antialias=True) for side, part in crops(settings, size)]
    centre = v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    reading = partial(FileImages, workers=settings.workers, limit=settings.max_unreadable)
    augment = photo_augmentation(None, crop=(1.0, 1.0), jitter=settings.jitter, blur=settings.blur)
    return Source(
        reading(train.paths, train.labels, partial(_crops, views=views)),
        reading(train.paths, train.labels, centre),
        None if test is None else reading(test.paths, test.labels, centre),
        train.classes,
        [augment] * len(views),
        normalize,
        3,
        size,
        unreadable,
    )


def size_of_images(folder: Path) -> int:
    """The shorter side of the first image for training in ``folder`` that can be read."""
    return _first_size(_parts(folder)[0])


def _crops(image: object, *, views: Sequence[v2.Transform]) -> list[Tensor]:
    return [v2.functional.pil_to_tensor(view(image)) for view in views]


def _parts(folder: Path) -> tuple[Tree, Tree | None]:
    """What to train on and, if there is such a part, what to evaluate on.

    Raises:
        ValueError: no such folder, no images in it, or parts that do not go together.
    """
    if not os.path.isdir(folder):
        names = ", ".join(map(repr, ("digits", *DOWNLOADS)))
        raise ValueError(f"data must be {names} or a folder, got {str(folder)!r}: there is no such folder")
    part = next((part for part in ("test", "val") if (folder / part).is_dir()), None)
    if not _has_classes(folder / "train"):
        if part is not None:
            raise ValueError(f"data must have a folder of images per class in {folder / 'train'}")
        return _unlabelled(folder), None
    train = _labelled(folder / "train")
    if part is None:
        return train, None
    test = _labelled(folder / part)
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"data must have the same classes in train/ and {part}/, {different[0]!r} is not in both"
        )
    if len(train.classes) < 2:
        raise ValueError(
            f"data must have at least 2 classes, {folder / 'train'} has only {train.classes[0]!r}"
        )
    return train, test


def _has_classes(part: Path) -> bool:
    return part.is_dir() and any(_images(inner) for inner in part.iterdir() if inner.is_dir())


def _images(folder: Path) -> list[Path]:
    """All image files below ``folder``, in order; a folder that links lead to again counts once."""
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        found += [Path(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return sorted(found)


def _unlabelled(folder: Path) -> Tree:
    paths = _images(folder)
    if not paths:
        raise ValueError(f"data must be a tree of images, {folder} holds none")
    return Tree(paths, torch.full((len(paths),), -1), ())


def _labelled(part: Path) -> Tree:
    files = {folder.name: _images(folder) for folder in sorted(part.iterdir()) if folder.is_dir()}
    empty = next((part / name for name, images in files.items() if not images), None if files else part)
    if empty is not None:
        raise ValueError(f"data must have a folder of images per class, {empty} holds none")
    labels = [label for label, images in enumerate(files.values()) for _ in images]
    return Tree([path for images in files.values() for path in images], torch.tensor(labels), tuple(files))


def _first_size(files: Tree) -> int:
    for path in files.paths:
        image = read_image(path)
        if not isinstance(image, Problem):
            return min(image.size)
    raise ValueError(f"data must hold images, none of those like {files.paths[0]} can be read")


def _read_all(files: Tree, size: int, unreadable: Unreadable) -> MemoryImages:
    """All files as squares of ``size`` pixels, without those that cannot be read."""
    count = len(files.paths)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    readable = torch.ones(count, dtype=torch.bool)
    with ThreadPoolExecutor() as pool:
        reads = pool.map(partial(read_image, size=size), files.paths, chunksize=256)
        for index, image in enumerate(tqdm(reads, "reading", count, unit=" images", disable=None)):
            if isinstance(image, Problem):
                unreadable.report([image])
                readable[index] = False
            else:
                images[index] = v2.functional.pil_to_tensor(image)
    return MemoryImages(images[readable], files.labels[readable])
