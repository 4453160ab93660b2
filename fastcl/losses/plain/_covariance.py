"""Covariances of components: what decorrelating losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    """Rows of ``x`` (N, D) without their mean."""
    return x - x.mean(dim=0)


def off_diagonal_square_sum(x: Tensor, y: Tensor) -> Tensor:
    """``sum over a != b of (x^T y)[a, b]^2`` for (N, D) ``x`` and ``y``, shape ().

    Of few, wide rows (2N <= D) by ``|x^T y|^2 = <x x^T, y y^T>``, which needs N x N instead of D x D. The
    diagonal is then subtracted, and may be almost all of it where one component outweighs the others:
    hence in float64.
    """
    count, width = x.shape
    if 2 * count <= width:
        wide_x = x.double()
        wide_y = wide_x if y is x else y.double()
        gram_x = wide_x @ wide_x.T
        gram_y = gram_x if y is x else wide_y @ wide_y.T
        diagonal = (wide_x * wide_y).sum(dim=0)
        return ((gram_x * gram_y).sum() - diagonal.square().sum()).to(x.dtype)
    on_diagonal = torch.eye(width, dtype=torch.bool, device=x.device)
    return (x.T @ y).masked_fill(on_diagonal, 0.0).square().sum()
