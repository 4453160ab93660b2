"""InfoNCE with several weighted targets per row: ``sum_a w_ia (LSE_all - l_target)``.

i-Mix (Lee et al. 2021, https://arxiv.org/abs/2010.08887), KCL (Kang et al. 2021), TSC (Li et al. 2022,
https://arxiv.org/abs/2111.13998).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import gather_rows, reduce, row_counts
from fastcl.losses._scope import check_scope
from fastcl.similarity.checks import check_matrix, check_same, in_one_dtype, inverse_scalar
from fastcl.similarity.numerics import unit_rows, without_autocast
from fastcl.similarity.rules import PairRule, check_key_indices
from fastcl.similarity.stats import similarity_stats


def weighted_info_nce(
    query: Tensor,
    key: Tensor,
    targets: Tensor,
    weights: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy with several weighted targets per row: ``sum_a w_ia (LSE_i - l_i,target_ia)``.

    i-Mix, Lee et al. 2021, https://arxiv.org/abs/2010.08887. The targets' logits stay out of the streaming
    sum and join it one by one.

    Args:
        query: (N, D), any floating dtype.
        key: (M, D), same dtype.
        targets: (N, k) int64, rows of ``key``; a target named twice in a row has the sum of its weights;
            -1 is padding.
        weights: (N, k), any floating dtype; they need not sum to 1.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`;
            targets are rows of all ranks' keys in rank order.

    Returns:
        The loss, () or (N,) with 'none'.

    Raises:
        ValueError, TypeError: as :func:`fastcl.similarity_stats`; targets that are not (N, k) int64, on the
            CPU out of range; weights of another shape.
    """
    check_scope(reduction, group, False)
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    if key.dtype != query.dtype:
        query, key = in_one_dtype(query, key)
    check_matrix("weights", weights)
    scale = inverse_scalar("temperature", temperature, query)
    counts = [key.shape[0]] if group is None else row_counts(key, group)
    check_key_indices("targets", targets, query, sum(counts))
    if weights.shape != targets.shape:
        raise ValueError(
            f"weights must have the shape of targets, {tuple(targets.shape)}, got {tuple(weights.shape)}"
        )
    with without_autocast(query.device):
        x, y = unit_rows(query, normalize), unit_rows(key, normalize)
        y = y if group is None else gather_rows(y, counts, group)
        named = targets >= 0
        padded = torch.cat([y, y.new_zeros(1, y.shape[1])])  # where padding points to
        rows = targets.where(named, y.shape[0])
        own = padded.index_select(0, rows.flatten()).reshape(*rows.shape, y.shape[1])  # (N, k, D)
        logits = (own @ x[:, :, None]).squeeze(2) * scale.to(x.dtype)
        once = named & ~_named_before(targets)
        joined = logits.masked_fill(~once, -torch.inf)
        stats = similarity_stats(x, y, scale=scale, rule=PairRule(exclude_keys=targets)).join(
            negatives=joined
        )
        lse = stats.lse_neg.masked_fill(~named.any(dim=1), 0.0)
        losses = (weights.to(x.dtype) * (lse[:, None] - logits)).where(named, 0.0).sum(dim=1)
        return reduce(losses, reduction, group)


def _named_before(targets: Tensor) -> Tensor:
    """Whether an earlier column of the row holds the same."""
    same = targets[:, :, None] == targets[:, None, :]
    return same.tril(-1).any(dim=2)
