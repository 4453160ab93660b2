"""The hard-negative loss: ``softplus(log Ng - l_pos)``, Ng the debiased, reweighted sum over negatives.

Robinson et al. 2021, https://arxiv.org/abs/2010.04592.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import ids_of_rows, reduce, row_counts
from fastcl.losses._scope import check_scope
from fastcl.similarity.checks import check_number, check_pair, inverse_scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, log_count, row_dot, softplus, unit_rows
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import lse_at_two_scales, similarity_stats


def hard_negative_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """NT-Xent with its negatives weighted by hardness and corrected for false ones, HCL.

    Robinson et al. 2021, https://arxiv.org/abs/2010.04592; with ``beta=0`` the debiased loss, Chuang et
    al. 2020, https://arxiv.org/abs/2007.00224. For a row with n negatives of logits l,
    ``Ng = max((sum(exp((1 + beta) l)) / mean(exp(beta l)) - tau_plus * n * exp(l_pos)) / (1 - tau_plus),
    n * exp(-1 / temperature))``, formed as a logarithm.

    Args:
        z1: (N, D) embeddings of the first views, any floating dtype; normalized inside.
        z2: (N, D) embeddings of the second views, same dtype. A row's negatives are both views of all
            other samples.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        beta: how much a negative's similarity adds to its weight; a finite number.
        tau_plus: the probability that a negative is of the row's own class, at least 0 and below 1.
        reduction: 'mean', 'sum' or 'none'. A row without negatives contributes 0.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (2N,) with 'none' (first all of z1, then all of z2); float64 for float64 inputs,
        else float32.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`; beta or tau_plus out of their range.
    """
    check_scope(reduction, group, ring)
    z1, z2 = check_pair("z1", z1, "z2", z2)
    beta, tau_plus = check_number("beta", beta), check_number("tau_plus", tau_plus, 0.0, 1.0)
    scale = inverse_scalar("temperature", temperature, z1)
    dtype = compute_dtype(z1.dtype)  # rows enter twice, and their gradients should round once
    z1, z2 = anchored(z1).to(dtype), anchored(z2).to(dtype)
    samples = z1.shape[0] if group is None else sum(row_counts(z1, group))
    z = unit_rows(torch.cat([z1, z2]))
    positive = (row_dot(*z.chunk(2)) * scale.to(dtype)).repeat(2)
    log_n = log_count(2 * samples - 2, z)
    ids = ids_of_rows(z1.shape[0], group, z.device).repeat(2)
    rule = PairRule(exclude=(ids, ids))
    if beta == 0:
        lse = similarity_stats(z, z, scale=scale, rule=rule, group=group, ring=ring).lse_neg
        lse_weights = log_n
    else:
        lse, lse_weights = lse_at_two_scales(z, scale, (1 + beta, beta), rule, group, ring)
    empty = lse == -torch.inf
    excess = (lse - lse_weights).masked_fill(empty, 0.0) - positive
    excess = torch.maximum(_debiased(excess, tau_plus), -scale.to(dtype) - positive)
    losses = softplus(excess + log_n).masked_fill(empty, 0.0)
    return reduce(losses, reduction, group)


class HardNegativeLoss(nn.Module):
    """:func:`fastcl.hard_negative_loss` as a module. Robinson et al. 2021, https://arxiv.org/abs/2010.04592.

    Args:
        temperature: as :func:`fastcl.hard_negative_loss` takes it.
        beta: how much a negative's similarity adds to its weight.
        tau_plus: the probability that a negative is of the row's own class.
        reduction: 'mean', 'sum' or 'none'.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.tau_plus = tau_plus
        self.reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of z1 (N, D) and z2 (N, D), as :func:`fastcl.hard_negative_loss`."""
        return hard_negative_loss(
            z1,
            z2,
            self.temperature,
            beta=self.beta,
            tau_plus=self.tau_plus,
            reduction=self.reduction,
        )


def _debiased(excess: Tensor, tau_plus: float) -> Tensor:
    """``log((exp(excess) - tau_plus) / (1 - tau_plus))``; -inf with zero gradient where that is negative."""
    if tau_plus == 0:
        return excess
    surplus = excess - math.log(tau_plus)
    nothing = surplus <= 0  # NaN is not
    left = (-torch.expm1(-surplus.masked_fill(nothing, 1.0))).log()
    return (excess + left - math.log1p(-tau_plus)).masked_fill(nothing, -torch.inf)
