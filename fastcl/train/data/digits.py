"""scikit-learn's handwritten digits, the source that is always there, and views of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fastcl.train.data.images import MemoryImages
from fastcl.train.data.sources import Source, in_memory
from fastcl.train.settings import Settings

_PHOTOS = {"image_size": None, "crop_min": 1.0, "jitter": 0.0, "blur": False, "small_crops": 0}


def read_digits(settings: Settings) -> Source:
    """scikit-learn's 1797 real handwritten digits, 8x8 pixels, a fifth of them for testing.

    Raises:
        ValueError: options of other images' size and views.
    """
    for name, value in _PHOTOS.items():
        if (given := getattr(settings, name)) != value:
            raise ValueError(f"{name} must be {'null' if value is None else value} for digits, got {given}")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    classes = torch.from_numpy(labels)
    train, test = (
        MemoryImages(images[part], classes[part])
        for part in train_test_split(
            torch.arange(len(images)), test_size=0.2, stratify=labels, random_state=0, shuffle=True
        )
    )
    source = in_memory(settings, train, test, tuple(map(str, range(10))))
    return replace(source, augment=[augment_digits] * 2, normalize=lambda images: images)


def augment_digits(images: Tensor) -> Tensor:
    """Random views of small glyphs: warped, thinned or fattened, partly erased, noisy.

    Nothing is mirrored: a flipped 2 is no longer a 2.
    """
    uniform = partial(_uniform, images)
    views = warped(images, turn=25, shear=0.25, scale=0.2, shift=0.2).clamp(0, 1)
    gamma, contrast = uniform(-0.4, 0.4).exp(), uniform(0.6, 1.0)
    views = contrast[:, None, None, None] * views ** gamma[:, None, None, None]
    row, column = uniform(0, 7).round()[:, None, None], uniform(0, 7).round()[:, None, None]
    pixel = torch.arange(8, device=images.device)
    patch = ((pixel[:, None] - row).abs() <= 1) & ((pixel - column).abs() <= 1)  # [N, 8, 8]
    erased = patch & (uniform(0, 1) < 0.3)[:, None, None]
    return views.masked_fill(erased[:, None], 0) + 0.1 * torch.randn_like(views)


def warped(images: Tensor, *, turn: float, shear: float, scale: float, shift: float) -> Tensor:
    """Images (N, C, H, W), each turned, sheared, scaled and shifted at random.

    Args:
        images: float; beyond their edges they are 0.
        turn: at most, degrees either way.
        shear: at most.
        scale: of width and height each, at most, as the logarithm of a factor.
        shift: at most, in halves of a side.
    """
    uniform = partial(_uniform, images)
    angle = uniform(-math.radians(turn), math.radians(turn))
    sheared = uniform(-shear, shear)
    width, height = uniform(-scale, scale).exp(), uniform(-scale, scale).exp()
    shift_x, shift_y = uniform(-shift, shift), uniform(-shift, shift)
    cosine, sine = angle.cos(), angle.sin()
    warp = torch.stack(
        [
            torch.stack([cosine * width, cosine * sheared - sine * height, shift_x], dim=1),
            torch.stack([sine * width, sine * sheared + cosine * height, shift_y], dim=1),
        ],
        dim=1,
    )  # [N, 2, 3]
    grid = affine_grid(warp, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """A number per image."""
    return torch.empty(len(images), device=images.device).uniform_(low, high)
