"""Images cut into patches."""

from __future__ import annotations

import torch
from torch import Tensor

_GAP = 64 / 75  # side of a jigsaw's patch as a share of its cell's, so that edges do not continue


def patches(images: Tensor, side: int, stride: int) -> Tensor:
    """The patches of images (N, C, H, W), ``stride`` pixels apart: (N, rows, columns, C, side, side)."""
    return images.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)


def jigsaw(images: Tensor, grid: int) -> Tensor:
    """A patch of each of ``grid`` x ``grid`` cells, in each image's own order: (N, cells, C, side, side).

    Raises:
        ValueError: fewer pixels than cells.
    """
    cell = min(images.shape[2:]) // grid
    if cell < 1:
        raise ValueError(f"grid must be at most the images' side, got {grid} for {tuple(images.shape[2:])}")
    cells = patches(images, cell, cell)[:, :grid, :grid].flatten(1, 2)
    side = max(1, round(cell * _GAP))
    y, x = torch.randint(cell - side + 1, (2,), device="cpu").tolist()
    order = torch.rand(cells.shape[:2], device=images.device).argsort(dim=1)
    rows = torch.arange(len(images), device=images.device)[:, None]
    return cells[rows, order, :, y : y + side, x : x + side]
