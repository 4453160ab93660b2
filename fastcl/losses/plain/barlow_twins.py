"""Barlow Twins: the cross-correlation of two views' components is the identity.

Zbontar et al. 2021, https://arxiv.org/abs/2103.03230.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcl.losses.plain._covariance import centred, off_diagonal_square_sum
from fastcl.similarity.checks import check_pair, scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, without_autocast

_EPS = 1e-5


def barlow_twins_loss(z1: Tensor, z2: Tensor, *, off_diagonal: float | Tensor = 5e-3) -> Tensor:
    """``sum_a (1 - C_aa)^2 + off_diagonal * sum_{a != b} C_ab^2``, C the components' cross-correlation.

    Components are standardized over the batch as batch normalization does it: biased variance, eps 1e-5.
    Zbontar et al. 2021, https://arxiv.org/abs/2103.03230.

    Args:
        z1: (N, D), one view of each sample; float64, float32, float16 or bfloat16.
        z2: (N, D), the other view, same dtype.
        off_diagonal: the weight of different components' correlation: a finite number, or a tensor of one
            element, which then receives its gradient.

    Returns:
        The loss, (); float64 for float64 inputs, else float32; of no rows NaN. Takes N x N memory where
        2N <= D, else D x D.

    Raises:
        ValueError: shapes or devices that do not fit; a weight that is not finite.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    z1, z2 = check_pair("z1", z1, "z2", z2)
    dtype = compute_dtype(z1.dtype)
    weight = scalar("off_diagonal", off_diagonal, z1).to(dtype)
    with without_autocast(z1.device):
        x, y = (_standardized(anchored(z).to(dtype)) for z in (z1, z2))
        correlation = (x * y).mean(dim=0)
        apart = off_diagonal_square_sum(x * x.new_full((), x.shape[0]).reciprocal(), y)
        return (1 - correlation).square().sum() + weight * apart


class BarlowTwinsLoss(nn.Module):
    """:func:`fastcl.barlow_twins_loss` as a module.

    Args:
        off_diagonal: the weight of different components' correlation.
    """

    def __init__(self, off_diagonal: float | Tensor = 5e-3) -> None:
        super().__init__()
        self.off_diagonal = off_diagonal

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of z1 (N, D) and z2 (N, D), as :func:`fastcl.barlow_twins_loss`."""
        return barlow_twins_loss(z1, z2, off_diagonal=self.off_diagonal)


def _standardized(z: Tensor) -> Tensor:
    x = centred(z)
    return x * (x.square().mean(dim=0) + _EPS).rsqrt()
