"""The image sources: labelled images, split into train and test, and the views drawn of them."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, FashionMNIST, ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from fastcl.train.augment import augment_digits, normalize, photo_augmentation
from fastcl.train.encoders import SMALL_IMAGE
from fastcl.train.images import FileImages, Images, MemoryImages, Problem, Unreadable, read_image
from fastcl.train.settings import Settings

DOWNLOADS = {"cifar10": CIFAR10, "fashion-mnist": FashionMNIST}


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


def kind(data: str) -> str:
    """'digits', 'small' (up to 64 pixels) or 'large': which recipe ``data`` is trained with.

    Raises:
        ValueError: no such source.
    """
    if data == "digits":
        return "digits"
    if data in DOWNLOADS or _is_idx(Path(data)):
        return "small"
    return "small" if _first_size(_tree(Path(data), "train")) <= SMALL_IMAGE else "large"


def load(settings: Settings) -> Source:
    """The source that ``settings.data`` names.

    Raises:
        ValueError: no such source, no network to download it, one class only, unreadable images.
    """
    if settings.data == "digits":
        return _digits(settings)
    if settings.data in DOWNLOADS:
        return _in_memory(settings, *(_download(settings, train=train) for train in (True, False)))
    folder = Path(settings.data)
    if _is_idx(folder):
        return _in_memory(settings, *(_read_idx(folder, part) for part in ("train", "t10k")))
    return _image_folder(settings, folder)


def _digits(settings: Settings) -> Source:
    """scikit-learn's 1797 real handwritten digits, 8x8 pixels, a fifth of them for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    classes = torch.from_numpy(labels)
    train, test = (
        MemoryImages(images[part], classes[part])
        for part in train_test_split(
            torch.arange(len(images)), test_size=0.2, stratify=labels, random_state=0, shuffle=True
        )
    )
    source = _in_memory(settings, train, test)
    return replace(source, augment=augment_digits, normalize=lambda images: images)


def _in_memory(settings: Settings, train: MemoryImages, test: MemoryImages) -> Source:
    train, test = (
        MemoryImages(part.images[chosen], part.labels[chosen])
        for part in (train, test)
        for chosen in (_first_per_class(part.labels, settings.limit),)
    )
    channels, size = train.images.shape[1], settings.image_size or train.images.shape[-1]
    augment = photo_augmentation(size, crop_min=settings.crop_min, jitter=settings.jitter, blur=settings.blur)
    unreadable = Unreadable(settings.max_unreadable)
    return Source(train, train, test, augment, normalize, channels, size, unreadable)


def _image_folder(settings: Settings, folder: Path) -> Source:
    """train/ and test/ with a folder of images per class; small images are read into memory."""
    train, test = (_tree(folder, part) for part in ("train", "test"))
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
    size = settings.image_size or _first_size(train)
    unreadable = Unreadable(settings.max_unreadable)
    if size <= SMALL_IMAGE:
        images = [_read_all(*part, size, unreadable) for part in files]
        return replace(_in_memory(settings, *images), unreadable=unreadable)
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


def _tree(folder: Path, part: str) -> ImageFolder:
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


def _limited(tree: ImageFolder, limit: int | None) -> tuple[list[Path], Tensor]:
    labels = torch.tensor(tree.targets)
    chosen = _first_per_class(labels, limit)
    return [Path(tree.samples[index][0]) for index in chosen], labels[chosen]


def _first_per_class(labels: Tensor, limit: int | None) -> Tensor:
    """The indices of ``limit`` images, the first of each class in turn; of all without a limit."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    earlier = torch.empty_like(labels)  # how many of the same class come before
    for label in labels.unique():
        members = labels == label
        earlier[members] = torch.arange(int(members.sum()))
    return earlier.argsort(stable=True)[:limit].sort().values


def _first_size(tree: ImageFolder) -> int:
    """The shorter side of the first image that can be read."""
    for path, _ in tree.samples:
        image = read_image(Path(path))
        if not isinstance(image, Problem):
            return min(image.size)
    raise ValueError(f"data must hold images, none in {tree.root} can be read")


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


def _download(settings: Settings, *, train: bool) -> MemoryImages:
    try:
        dataset = DOWNLOADS[settings.data](str(settings.download_dir), train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{settings.data} is not in {settings.download_dir}/ and cannot be downloaded: {reason}"
        ) from error
    images = torch.as_tensor(dataset.data)  # CIFAR-10: [N, H, W, C]; Fashion-MNIST: [N, H, W]
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else _grey_to_rgb(images)
    return MemoryImages(images.contiguous() if train else images, torch.as_tensor(dataset.targets))


def _grey_to_rgb(images: Tensor) -> Tensor:
    return images[:, None].expand(-1, 3, -1, -1)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _is_idx(folder: Path) -> bool:
    return _idx_path(folder, "train-images-idx3-ubyte") is not None


def _read_idx(folder: Path, part: str) -> MemoryImages:
    """The images and labels of MNIST's IDX files, plain or gzipped."""
    images = _read_idx_file(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx_file(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} must have one label per image, got {len(labels)} for {len(images)} in {part}"
        )
    return MemoryImages(_grey_to_rgb(images), labels.long())


def _read_idx_file(folder: Path, name: str, dimensions: int) -> Tensor:
    path = _idx_path(folder, name)
    if path is None:
        raise ValueError(f"data must hold {name} or {name}.gz, {folder} does not")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    header = 4 * (1 + dimensions)  # type and dimensions, then the lengths, big-endian
    lengths = np.frombuffer(content[4:header], ">i4").tolist()
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + int(np.prod(lengths)):
        raise ValueError(f"{path} is not a whole IDX file of bytes in {dimensions} dimension(s)")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(lengths).copy())
