"""Similarity statistics over all ranks, by gathering shards or by passing them on."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import gathered_stats, row_counts, unique_ids
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
    counts: Sequence[int] | None = None,
    backend: str = "auto",
) -> Measured:
    """Statistics of this rank's queries over all ranks' keys and, if asked, of its keys over all queries.

    Args:
        problem: this rank's rows. Its ids count this rank's samples from 0.
        group: the ranks.
        ring: pass shards around instead of gathering them.
        labelled: the positive-ids are labels, which mean the same on every rank.
        global_ids: all ids mean the same on every rank.
        counts: how many keys each rank has, where that is known already.
        backend: 'auto', or a name.
    """

    def unique(ids: Tensor | None) -> Tensor | None:
        return ids if ids is None or global_ids else unique_ids(ids, group)

    dtype = compute_dtype(problem.query.dtype)
    problem = problem._replace(
        query=problem.query.to(dtype),
        key=problem.key.to(dtype),
        positive_query=problem.positive_query if labelled else unique(problem.positive_query),
        positive_key=problem.positive_key if labelled else unique(problem.positive_key),
        exclude_query=unique(problem.exclude_query),
        exclude_key=unique(problem.exclude_key),
        symmetric=False,
    )
    counts = row_counts(problem.key, group) if counts is None else counts
    if ring:
        return ring_stats(problem, Ring(group, dist.get_rank(group), list(counts)), backend)
    return gathered_stats(problem, group, counts, backend)
