"""The Jensen-Shannon estimator between parts and wholes of Deep InfoMax.

Hjelm et al. 2019, https://arxiv.org/abs/1808.06670.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import check_group, group_sum, row_counts
from fastcl.similarity.checks import check_matrix, check_same, in_one_dtype
from fastcl.similarity.logistic import similarity_logistic
from fastcl.similarity.rules import PairRule, check_ids, check_range


def jsd_loss(
    local: Tensor,
    pooled: Tensor,
    owner: Tensor,
    *,
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean ``softplus(-l)`` over owned pairs plus mean ``softplus(l)`` over the others, l = <local, pooled>.

    Deep InfoMax (Hjelm et al. 2019, https://arxiv.org/abs/1808.06670), InfoGraph (Sun et al. 2020,
    https://arxiv.org/abs/1908.01000), MVGRL (Hassani and Khasahmadi 2020, https://arxiv.org/abs/2006.05582).

    Args:
        local: (N, D), the parts; any floating dtype.
        pooled: (M, D), the wholes; same dtype.
        owner: (N,) integers, the whole that each part belongs to.
        normalize: divide rows by their L2 norm first.
        group: the loss is that of all ranks' parts and wholes, each rank passing its own, as in
            :func:`fastcl.info_nce`; owners count all ranks' wholes in rank order.

    Returns:
        The loss, (); a mean over no pairs is 0.

    Raises:
        ValueError, TypeError: as :func:`fastcl.similarity_stats`; owners that are not integers, one per
            part, or on the CPU out of range.
    """
    check_matrix("local", local)
    check_matrix("pooled", pooled)
    check_same("pooled", pooled, "local", local)
    if local.dtype != pooled.dtype:
        local, pooled = in_one_dtype(local, pooled)
    owner = check_ids("owner", owner, local)
    check_group(group, False)
    count, wholes, offset = local.shape[0], pooled.shape[0], 0
    if group is not None:
        of_ranks = row_counts(pooled, group)
        offset = sum(of_ranks[: dist.get_rank(group)])
        count, wholes = sum(row_counts(local, group)), sum(of_ranks)
    check_range("owner", owner, wholes, "wholes")
    names = torch.arange(pooled.shape[0], device=owner.device) + offset
    rule = PairRule(positive=(owner, names))
    sums = similarity_logistic(local, pooled, rule=rule, normalize=normalize, group=group)
    total = torch.stack([of_pairs.sum() for of_pairs in sums])
    total = total if group is None else group_sum(total, group)
    negative, positive = total.unbind()
    mean: Tensor = positive / max(count, 1) + negative / max(count * (wholes - 1), 1)
    return mean
