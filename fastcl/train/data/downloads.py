"""Images that torchvision downloads."""

from __future__ import annotations

import torch
from torchvision.datasets import CIFAR10, FashionMNIST

from fastcl.train.data.images import MemoryImages, grey_to_rgb
from fastcl.train.settings import Settings

DOWNLOADS = {"cifar10": CIFAR10, "fashion-mnist": FashionMNIST}


def download(settings: Settings, *, train: bool) -> tuple[MemoryImages, list[str]]:
    """The training or the test images of ``settings.data``, and the names of their classes.

    Raises:
        ValueError: they are not there and cannot be downloaded.
    """
    try:
        dataset = DOWNLOADS[settings.data](str(settings.download_dir), train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{settings.data} is not in {settings.download_dir}/ and cannot be downloaded: {reason}"
        ) from error
    images = torch.as_tensor(dataset.data)  # CIFAR-10: [N, H, W, C]; Fashion-MNIST: [N, H, W]
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else grey_to_rgb(images)
    labels = torch.as_tensor(dataset.targets)
    return MemoryImages(images.contiguous() if train else images, labels), list(dataset.classes)
