"""The decoupled loss: ``LSE(negatives) - w * l_pos``, the positive left out of the denominator.

Yeh et al. 2022, https://arxiv.org/abs/2110.06848.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import gather_rows, ids_of_rows, reduce, row_counts
from fastcl.losses._scope import check_scope, loss_of
from fastcl.losses.families.one_positive import BATCH, VIEWS, OnePositive
from fastcl.similarity.checks import check_pair, inverse_scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, row_dot, unit_rows
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats


def decoupled_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    within_views: bool = True,
    sigma: float | Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """Decoupled contrastive loss, DCL: NT-Xent without the positive in the denominator.

    Yeh et al. 2022, https://arxiv.org/abs/2110.06848. With ``sigma`` the positives are weighted, DCLW.
    With ``within_views=False`` it is the loss of GraphCL, You et al. 2020,
    https://arxiv.org/abs/2010.13902.

    Args:
        z1: (N, D) embeddings of the first views, any floating dtype; normalized inside.
        z2: (N, D) embeddings of the second views, same dtype.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        within_views: rows of both views, whose negatives are both views of all other samples; False:
            rows of z1, whose negatives are the other samples' rows of z2.
        sigma: the temperature of the positives' weights ``2 - N * softmax(<z1_i, z2_i> / sigma)`` over
            samples, which are constants; a finite non-zero number, or a tensor of one element; None: all 1.
        reduction: 'mean', 'sum' or 'none'. A row without negatives contributes 0.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or, with 'none', (2N,) (first all of z1, then all of z2), or (N,) without
        ``within_views``; float64 for float64 inputs, else float32.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`.
    """
    check_scope(reduction, group, ring)
    z1, z2 = check_pair("z1", z1, "z2", z2)
    scale = inverse_scalar("temperature", temperature, z1)
    if sigma is None:
        layout = VIEWS if within_views else BATCH
        args = OnePositive(z1, z2, None, scale, layout=layout, decoupled=True, reduction=reduction)
        return loss_of(args, group, ring)
    dtype = compute_dtype(z1.dtype)  # rows enter twice, and their gradients should round once
    z1, z2 = anchored(z1).to(dtype), anchored(z2).to(dtype)
    cosines = row_dot(unit_rows(z1), unit_rows(z2))
    inverse = inverse_scalar("sigma", sigma, z1).detach().to(dtype)
    positive = cosines * scale.to(dtype) * _weights(cosines.detach() * inverse, group)
    query, key = z1, z2
    ids = ids_of_rows(z1.shape[0], group, z1.device)
    if within_views:
        query = key = torch.cat([z1, z2])
        ids, positive = ids.repeat(2), positive.repeat(2)
    rule = PairRule(exclude=(ids, ids))
    lse_neg = similarity_stats(
        query, key, scale=scale, rule=rule, normalize=True, group=group, ring=ring
    ).lse_neg
    losses = (lse_neg - positive).masked_fill(lse_neg == -torch.inf, 0.0)
    return reduce(losses, reduction, group)


class DecoupledLoss(nn.Module):
    """:func:`fastcl.decoupled_loss` as a module. Yeh et al. 2022, https://arxiv.org/abs/2110.06848.

    Args:
        temperature: as :func:`fastcl.decoupled_loss` takes it.
        within_views: whether both views' rows meet each other.
        sigma: the temperature of the positives' weights, or None.
        reduction: 'mean', 'sum' or 'none'.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        within_views: bool = True,
        sigma: float | Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.within_views = within_views
        self.sigma = sigma
        self.reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of z1 (N, D) and z2 (N, D), as :func:`fastcl.decoupled_loss`."""
        return decoupled_loss(
            z1,
            z2,
            self.temperature,
            within_views=self.within_views,
            sigma=self.sigma,
            reduction=self.reduction,
        )


def _weights(scaled: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``2 - N * softmax(scaled)`` over the samples of all ranks."""
    if group is None:
        return 2 - scaled.shape[0] * scaled.softmax(dim=0)
    samples = sum(row_counts(scaled[:, None], group))
    lse = gather_rows(scaled.logsumexp(dim=0)[None], [1] * dist.get_world_size(group), group).logsumexp(dim=0)
    return 2 - samples * (scaled - lse).exp()
