"""How good the pairs of views of a batch are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl


@torch.no_grad()
def measure_pairs(
    query: Tensor, key: Tensor, negatives: Tensor | None = None, *, across: bool = False
) -> dict[str, Tensor]:
    """How good the pairs (query_i, key_i) of a batch are.

    Args:
        query: (N, D) embeddings, any floating dtype.
        key: (N, D), same dtype.
        negatives: (M, D) unit rows; None: the other rows of ``query`` and ``key``.
        across: without ``negatives``, they are the other rows of ``key`` only.

    Returns:
        ``contrastive_top1``, the share of queries nearer to their key than to any negative;
        ``alignment``, the pairs' mean squared distance, and ``uniformity``, the log of the mean of
        ``exp(-2 distance^2)`` over the queries (Wang and Isola 2020, https://arxiv.org/abs/2005.10242);
        ``center``, the length of the queries' mean, and ``residual``, their mean distance from it: near 1
        and 0 of collapsed queries (Zhang et al. 2022, https://arxiv.org/abs/2203.16262). All of unit rows.
    """
    query, key = (nn.functional.normalize(x.float(), dim=1) for x in (query, key))
    ids = torch.arange(len(query), device=query.device)
    others = fastcl.similarity_stats(query, query, scale=4.0, rule=fastcl.PairRule(exclude=(ids, ids)))
    if negatives is None:
        rivals, rival_ids = (key, ids) if across else (torch.cat([query, key]), ids.repeat(2))
        rule = fastcl.PairRule(exclude=(ids, rival_ids))
        hardest = fastcl.similarity_stats(query, rivals, rule=rule).max_neg
    else:
        hardest = fastcl.similarity_stats(query, negatives.to(query.dtype)).max_neg
    similarity = (query * key).sum(dim=1)
    count = torch.tensor(float(len(query) * max(1, len(query) - 1)), device=query.device)
    center = query.mean(dim=0)
    return {
        "contrastive_top1": (similarity > hardest).float().mean(),
        "alignment": (2 - 2 * similarity).mean(),
        "uniformity": others.lse_neg.logsumexp(dim=0) - count.log() - 4,
        "center": center.norm(),
        "residual": (query - center).norm(dim=1).mean(),
    }
