"""Random views of photos, drawn for a whole batch on its device."""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
import torch
from kornia.color import rgb_to_lab
from torch import Tensor, nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


def normalize(images: Tensor) -> Tensor:
    """Images (N, 3, H, W), uint8 or float in [0, 1], as torchvision's networks take them."""
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (_MEAN, _STD))
    return (_as_float(images) - mean) / std


def lightness_and_colour(images: Tensor) -> tuple[Tensor, Tensor]:
    """The L and the ab channels of CIE Lab of normalized images (N, 3, H, W), about -1 to 1.

    Both (N, 3, H, W); the channels of the other half are 0, which a network without them could not tell.
    """
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (_MEAN, _STD))
    with torch.autocast(images.device.type, enabled=False):
        lab = rgb_to_lab((images.float() * std + mean).clamp(0, 1)) / 100
    lightness, colours = 2 * lab[:, :1] - 1, lab[:, 1:]
    zero = torch.zeros_like(lightness)
    return torch.cat([lightness, zero, zero], dim=1), torch.cat([zero, colours], dim=1)


def _as_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float() / 255


def photo_augmentation(
    size: int | None, *, crop: tuple[float, float], jitter: float, blur: bool
) -> Callable[[Tensor], Tensor]:
    """SimCLR's augmentation: crop, mirror, colour jitter, grey, blur. Its strengths differ by method.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A.

    Args:
        size: side of the views; None: the images are crops already.
        crop: smallest and largest share of the image's area in a crop.
        jitter: strength of the changes in brightness, contrast and saturation; hue is a quarter of it.
        blur: blur half of the images.

    Returns:
        A function of images (N, 3, H, W), uint8 or float in [0, 1], to normalized views (N, 3, size, size).
    """
    steps: list[nn.Module] = [
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(jitter, jitter, jitter, jitter / 4, p=0.8),
        K.RandomGrayscale(p=0.2),
    ]
    if size is not None:
        steps.insert(0, K.RandomResizedCrop((size, size), scale=crop, cropping_mode="resample"))
    if blur:
        kernel = max(3, (size or 224) // 10 // 2 * 2 + 1)  # a tenth of the image, odd
        steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    draw = nn.Sequential(*steps)

    def augment(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return normalize(draw(_as_float(images)))

    return augment
