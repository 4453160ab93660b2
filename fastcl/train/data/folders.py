"""Trees of image files: train/ and test/ with a folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from fastcl.train.data.downloads import DOWNLOADS
from fastcl.train.data.images import FileImages, MemoryImages, Problem, Unreadable, read_image
from fastcl.train.data.photos import normalize, photo_augmentation
from fastcl.train.data.sources import Source, first_per_class, in_memory
from fastcl.train.encoders import SMALL_IMAGE
from fastcl.train.settings import Settings


def image_folder(settings: Settings, folder: Path) -> Source:
    """train/ and test/ with a folder of images per class; small images are read into memory."""
    train, test = (tree(folder, part) for part in ("train", "test"))
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"data must have the same classes in train/ and test/, {different[0]!r} is not in both"
        )
    if len(train.classes) < 2:
        raise ValueError(
            f"data must have at least 2 classes, {folder / 'train'} has only {train.classes[0]!r}"
        )
    files = [_limited(part, settings.limit) for part in (train, test)]
    size = settings.image_size or first_size(train)
    unreadable = Unreadable(settings.max_unreadable)
    if size <= SMALL_IMAGE:
        images = [_read_all(*part, size, unreadable) for part in files]
        return replace(in_memory(settings, *images), unreadable=unreadable)
    size = settings.image_size or 224
    crops = partial(_two_crops, crop=v2.RandomResizedCrop(size, (settings.crop_min, 1.0), antialias=True))
    centre = v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    reading = partial(FileImages, workers=settings.workers, limit=settings.max_unreadable)
    augment = photo_augmentation(None, crop_min=settings.crop_min, jitter=settings.jitter, blur=settings.blur)
    return Source(
        reading(*files[0], crops),
        reading(*files[0], centre),
        reading(*files[1], centre),
        augment,
        normalize,
        3,
        size,
        unreadable,
    )


def _two_crops(image: object, *, crop: v2.Transform) -> tuple[Tensor, Tensor]:
    return v2.functional.pil_to_tensor(crop(image)), v2.functional.pil_to_tensor(crop(image))


def tree(folder: Path, part: str) -> ImageFolder:
    """The files of ``part``, 'train' or 'test', and their classes.

    Raises:
        ValueError: no such folder, or one without folders of images.
    """
    if not folder.is_dir():
        names = ", ".join(map(repr, ("digits", *DOWNLOADS)))
        raise ValueError(f"data must be {names} or a folder, got {str(folder)!r}: there is no such folder")
    if not (folder / part).is_dir():
        raise ValueError(f"data must have train/ and test/ inside, {folder} has no {part}/")
    try:
        return ImageFolder(str(folder / part))
    except FileNotFoundError as error:
        raise ValueError(
            f"data must have a folder of images per class: {str(error).splitlines()[0]}"
        ) from error


def _limited(files: ImageFolder, limit: int | None) -> tuple[list[Path], Tensor]:
    labels = torch.tensor(files.targets)
    chosen = first_per_class(labels, limit)
    return [Path(files.samples[index][0]) for index in chosen], labels[chosen]


def first_size(files: ImageFolder) -> int:
    """The shorter side of the first image that can be read."""
    for path, _ in files.samples:
        image = read_image(Path(path))
        if not isinstance(image, Problem):
            return min(image.size)
    raise ValueError(f"data must hold images, none in {files.root} can be read")


def _read_all(paths: Sequence[Path], labels: Tensor, size: int, unreadable: Unreadable) -> MemoryImages:
    """All files as squares of ``size`` pixels, without those that cannot be read."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    readable = torch.ones(len(paths), dtype=torch.bool)
    with ThreadPoolExecutor() as pool:
        reads = pool.map(partial(read_image, size=size), paths, chunksize=256)
        for index, image in enumerate(tqdm(reads, "reading", len(paths), unit=" images", disable=None)):
            if isinstance(image, Problem):
                unreadable.report([image])
                readable[index] = False
            else:
                images[index] = v2.functional.pil_to_tensor(image)
    return MemoryImages(images[readable], labels[readable])
