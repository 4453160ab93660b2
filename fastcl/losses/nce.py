"""Noise-contrastive estimation: each key is told apart from noise by itself.

Gutmann and Hyvarinen 2010; Wu et al. 2018, https://arxiv.org/abs/1805.01978.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastcl.similarity.checks import (
    check_matrix,
    check_number,
    check_pair,
    check_reduction,
    check_same,
    check_same_count,
    in_one_dtype,
    inverse_scalar,
)
from fastcl.similarity.logistic import similarity_logistic
from fastcl.similarity.numerics import product, reduce, row_dot, softplus, unit_rows, without_autocast


def nce_loss(
    query: Tensor,
    positive_key: Tensor,
    noise_keys: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    log_z: float = 0.0,
    log_noise: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """NCE: ``softplus(-d_pos) + sum_noise softplus(d)``, ``d = l - log_z - log m - log_noise``.

    Inst-Disc (Wu et al. 2018, https://arxiv.org/abs/1805.01978), CMC (Tian et al. 2020,
    https://arxiv.org/abs/1906.05849), CRD (Tian et al. 2020, https://arxiv.org/abs/1910.10699).

    Args:
        query: (N, D), any floating dtype.
        positive_key: (N, D), same dtype.
        noise_keys: (m, D), or (N, m, D): each row's own.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        log_z: the logarithm of the normalizing constant.
        log_noise: the logarithm of the noise's density: minus that of the data's size for Inst-Disc, CMC and
            CRD. None: plain logistic regression, ``d = l - log_z``.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        The loss, () or (N,) with 'none'.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`.
    """
    check_reduction(reduction)
    query, positive_key = check_pair("query", query, "positive_key", positive_key)
    check_matrix("noise_keys", noise_keys, (2, 3))
    check_same("noise_keys", noise_keys, "query", query)
    if noise_keys.dtype != query.dtype:
        query, positive_key, noise_keys = in_one_dtype(query, positive_key, noise_keys)
    own = noise_keys.dim() == 3
    if own:
        check_same_count("noise_keys", noise_keys, "query", query)
    scale = inverse_scalar("temperature", temperature, query)
    shift = -check_number("log_z", log_z)
    count = noise_keys.shape[-2]
    if log_noise is not None and count:
        shift -= math.log(count) + check_number("log_noise", log_noise)
    with without_autocast(query.device):
        x, y = unit_rows(query, normalize), unit_rows(positive_key, normalize)
        of_positive = softplus(-(row_dot(x, y) * scale.to(x.dtype) + shift))
        if own:
            noise = unit_rows(noise_keys, normalize)
            logits = product(noise, x[:, :, None]).squeeze(2) * scale.to(x.dtype) + shift
            of_noise = softplus(logits).sum(dim=1)
        else:
            of_noise, _ = similarity_logistic(query, noise_keys, scale=scale, bias=shift, normalize=normalize)
        return reduce(of_positive + of_noise, reduction)


class NCELoss(nn.Module):
    """:func:`fastcl.nce_loss` as a module.

    Args:
        temperature: a finite non-zero number.
        log_z: the logarithm of the normalizing constant.
        log_noise: the logarithm of the noise's density, or None.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        log_z: float = 0.0,
        log_noise: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.log_z = log_z
        self.log_noise = log_noise
        self.normalize = normalize
        self.reduction = reduction

    def forward(self, query: Tensor, positive_key: Tensor, noise_keys: Tensor) -> Tensor:
        """The loss of (N, D) queries and keys against noise, as :func:`fastcl.nce_loss`."""
        return nce_loss(
            query,
            positive_key,
            noise_keys,
            self.temperature,
            log_z=self.log_z,
            log_noise=self.log_noise,
            normalize=self.normalize,
            reduction=self.reduction,
        )
