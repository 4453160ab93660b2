"""Alignment: ``mean |x - y|^2``, how near positive pairs are.

Wang and Isola 2020, https://arxiv.org/abs/2005.10242.
"""

from __future__ import annotations

from torch import Tensor

from fastcl.similarity.checks import check_pair, check_reduction
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, reduce, row_dot


def alignment(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    """The squared distance of positive pairs, rows used as they are.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242.

    Args:
        x: (N, D), any floating dtype.
        y: (N, D), same dtype; ``y[i]`` is the positive of ``x[i]``.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        (), or (N,) with 'none'; float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes or devices that differ, an unknown reduction.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    check_reduction(reduction)
    x, y = check_pair("x", x, "y", y)
    dtype = compute_dtype(x.dtype)
    difference = anchored(x).to(dtype) - anchored(y).to(dtype)
    return reduce(row_dot(difference, difference), reduction)
