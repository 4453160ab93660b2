"""DrLIM's loss of pairs: similar ones near, different ones at least a margin apart.

Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.similarity.checks import check_pair, check_reduction, scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import INTEGER_DTYPES, compute_dtype, reduce, without_autocast
from fastcl.similarity.transforms import is_readable


def pair_margin_loss(
    x1: Tensor,
    x2: Tensor,
    different: Tensor,
    *,
    margin: float | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """``d^2 / 2`` of a similar pair, ``max(0, margin - d)^2 / 2`` of a different one; raw rows.

    Hadsell et al. 2006, https://doi.org/10.1109/CVPR.2006.100 (DrLIM); the first contrastive loss, of Chopra
    et al. 2005. A pair at distance d = 0 has no direction to part in: its gradient is zero.

    Args:
        x1: (N, D), one of each pair; float64, float32, float16 or bfloat16.
        x2: (N, D), the other, same dtype.
        different: (N,), bool or integers 0 and 1: whether the pair is one of different samples.
        margin: a number from 0 on, or a tensor of one element, which then receives its gradient.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        The loss, () or (N,) with 'none'; float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes or devices that do not fit; a margin that is negative or not finite; an unknown
            reduction; on the CPU, values of ``different`` other than 0 and 1.
        TypeError: rows that are not floating, or differ in dtype outside autocast; ``different`` neither
            bool nor integer.
    """
    check_reduction(reduction)
    x1, x2 = check_pair("x1", x1, "x2", x2)
    different = _checked_pairs(different, x1)
    bound = scalar("margin", margin, x1)
    if not isinstance(margin, Tensor) and margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    dtype = compute_dtype(x1.dtype)
    with without_autocast(x1.device):
        difference = anchored(x1).to(dtype) - anchored(x2).to(dtype)
        equal = (difference == 0).all(dim=1)
        parted = difference.masked_fill(equal[:, None], 1.0)
        # in float64: squares of float32 components may be beyond float32's range
        distance = torch.linalg.vector_norm(parted, dim=1, dtype=torch.float64).masked_fill(equal, 0.0)
        missing = (bound.to(torch.float64) - distance).to(dtype).relu()
        squared = torch.where(different, missing.square(), difference.square().sum(dim=1))
        return reduce(squared / 2, reduction)


def _checked_pairs(different: Tensor, rows: Tensor) -> Tensor:
    if not isinstance(different, Tensor) or different.dtype not in (torch.bool, *INTEGER_DTYPES):
        got = different.dtype if isinstance(different, Tensor) else type(different).__name__
        raise TypeError(f"different must be a tensor of bool or integers, got {got}")
    if different.shape != rows.shape[:1]:
        raise ValueError(
            f"different must have one value per pair: expected ({rows.shape[0]},) for rows of shape "
            f"{tuple(rows.shape)}, got {tuple(different.shape)}"
        )
    if different.device != rows.device:
        raise ValueError(f"different must be on {rows.device} like its rows, got {different.device}")
    flags = different != 0
    if is_readable(different) and not torch.equal(different, flags.to(different.dtype)):
        raise ValueError("different must hold zeros and ones only")
    return flags
