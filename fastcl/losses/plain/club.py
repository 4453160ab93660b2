"""CLUB: an upper bound of mutual information, to be made small.

Cheng et al. 2020, https://arxiv.org/abs/2006.12013.
"""

from __future__ import annotations

from torch import Tensor

from fastcl.losses.plain._covariance import centred
from fastcl.similarity.checks import check_pair, in_one_dtype
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, without_autocast


def club_bound(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """``mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)]`` for Gaussian q(. | x_i), in closed form.

    O(N * D): the mean over j is the squared distance to the mean of y, plus its variance.
    Cheng et al. 2020, https://arxiv.org/abs/2006.12013.

    Args:
        mean: (N, D), q's mean given x_i; float64, float32, float16 or bfloat16.
        log_variance: (N, D), the logarithm of q's variances, same dtype.
        y: (N, D), the samples, same dtype.

    Returns:
        The bound, (); float64 for float64 inputs, else float32; of no rows NaN.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    check_pair("mean", mean, "log_variance", log_variance)
    check_pair("mean", mean, "y", y)
    mean, log_variance, y = in_one_dtype(mean, log_variance, y)
    dtype = compute_dtype(y.dtype)
    with without_autocast(y.device):
        mean, log_variance, y = (anchored(x).to(dtype) for x in (mean, log_variance, y))
        apart = centred(y)
        # |y_j - mean_i|^2 averaged over j, less |y_i - mean_i|^2, without the squares that cancel
        excess = apart.square().mean(dim=0) + apart * (2 * (mean - y) + apart)
        return ((-log_variance).exp() * excess).sum(dim=1).mean() / 2
