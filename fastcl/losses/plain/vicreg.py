"""VICReg: views alike, every component varied, no two components correlated.

Bardes et al. 2022, https://arxiv.org/abs/2105.04906.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcl.losses.plain._covariance import centred, off_diagonal_square_sum
from fastcl.similarity.checks import check_pair, scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, without_autocast

_EPS = 1e-4


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float | Tensor = 25.0,
    variance: float | Tensor = 25.0,
    covariance: float | Tensor = 1.0,
) -> Tensor:
    """VICReg's loss as its authors released it; rows are not normalized.

    ``invariance * mean((z1 - z2)^2) + variance * 1/2 sum_views mean_d relu(1 - sqrt(var_d + 1e-4))
    + covariance * sum_views sum_{a != b} C_ab^2 / D``, with N - 1 in the variances and in C.
    Bardes et al. 2022, https://arxiv.org/abs/2105.04906.

    Args:
        z1: (N, D), one view of each sample; float64, float32, float16 or bfloat16.
        z2: (N, D), the other view, same dtype.
        invariance: the weight of the views' distance: a finite number, or a tensor of one element, which
            then receives its gradient.
        variance: the weight of the components' variance, likewise.
        covariance: the weight of their covariance, likewise.

    Returns:
        The loss, (); float64 for float64 inputs, else float32. A single row has no variance; the mean of
        no rows is NaN. Takes N x N memory where 2N <= D, else D x D.

    Raises:
        ValueError: shapes or devices that do not fit; a weight that is not finite.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    z1, z2 = check_pair("z1", z1, "z2", z2)
    named = (("invariance", invariance), ("variance", variance), ("covariance", covariance))
    dtype = compute_dtype(z1.dtype)
    of_distance, of_variance, of_covariance = (scalar(*weight, z1).to(dtype) for weight in named)
    with without_autocast(z1.device):
        views = [anchored(z).to(dtype) for z in (z1, z2)]
        distance = (views[0] - views[1]).square().mean()
        (hinge1, off1), (hinge2, off2) = map(_spread, views)
        return of_distance * distance + of_variance * (hinge1 + hinge2) / 2 + of_covariance * (off1 + off2)


class VICRegLoss(nn.Module):
    """:func:`fastcl.vicreg_loss` as a module.

    Args:
        invariance: the weight of the views' distance.
        variance: the weight of the components' variance.
        covariance: the weight of their covariance.
    """

    def __init__(
        self,
        invariance: float | Tensor = 25.0,
        variance: float | Tensor = 25.0,
        covariance: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of z1 (N, D) and z2 (N, D), as :func:`fastcl.vicreg_loss`."""
        return vicreg_loss(
            z1, z2, invariance=self.invariance, variance=self.variance, covariance=self.covariance
        )


def _spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """The variance's and the covariance's term of one view."""
    count, width = z.shape
    x = centred(z) * max(count - 1, 1) ** -0.5
    deviation = (x.square().sum(dim=0) + _EPS).sqrt()
    return (1 - deviation).relu().mean(), off_diagonal_square_sum(x, x) / width
