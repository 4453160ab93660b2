"""Similarity statistics over all ranks, by gathering shards or by passing them on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import gathered_stats, row_counts
from fastcl.distributed.ring import Ring, ring_stats
from fastcl.similarity.fields import Measured
from fastcl.similarity.numerics import compute_dtype
from fastcl.similarity.problem import Problem


def group_stats(
    problem: Problem,
    group: dist.ProcessGroup,
    ring: bool,
    *,
    labelled: bool = False,
    global_ids: bool = False,
) -> Measured:
    """Statistics of this rank's queries over all ranks' keys and, if asked, of its keys over all queries.

    Args:
        problem: this rank's rows. Its ids count this rank's samples from 0.
        group: the ranks.
        ring: pass shards around instead of gathering them.
        labelled: the positive-ids are labels, which mean the same on every rank.
        global_ids: all ids mean the same on every rank.
    """
    dtype = compute_dtype(problem.query.dtype)  # gradients are summed over ranks, and should round once
    size, rank = dist.get_world_size(group), dist.get_rank(group)

    def unique(ids: Tensor | None) -> Tensor | None:
        return ids if ids is None or global_ids else ids * size + rank

    problem = problem._replace(
        query=problem.query.to(dtype),
        key=problem.key.to(dtype),
        positive_query=problem.positive_query if labelled else unique(problem.positive_query),
        positive_key=problem.positive_key if labelled else unique(problem.positive_key),
        exclude_query=unique(problem.exclude_query),
        exclude_key=unique(problem.exclude_key),
        symmetric=False,
    )
    counts = row_counts(problem.key, group)
    if ring:
        return ring_stats(problem, Ring(group, rank, counts))
    return gathered_stats(problem, group, counts)
