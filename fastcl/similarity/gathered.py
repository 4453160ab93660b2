"""A call's keys over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import check_group, gather_rows, row_counts
from fastcl.similarity.rules import PairRule, PairSet


def all_ranks(key: Tensor, rule: PairRule, group: dist.ProcessGroup) -> tuple[Tensor, PairRule]:
    """All ranks' keys in rank order, differentiable, and the rule with their ids.

    Masks and ``exclude_keys`` are of this rank's rows and all ranks' keys already.
    """
    check_group(group, False)
    counts = row_counts(key, group)

    def gathered(pairs: PairSet) -> PairSet:
        if isinstance(pairs, Tensor):
            return pairs
        return pairs[0], gather_rows(pairs[1], counts, group)

    everywhere = PairRule(
        positive=[gathered(pairs) for pairs in rule.positive_sets],
        exclude=[gathered(pairs) for pairs in rule.exclude_sets],
        within=None if rule.within is None else gathered(rule.within),
        exclude_keys=rule.exclude_keys,
    )
    return gather_rows(key, counts, group), everywhere


def row_ids(count: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Ids (count,) int64 of this rank's rows, which no other rank's have.

    Args:
        count: how many rows this rank has.
        group: the ranks, or None.
    """
    ids = torch.arange(count)
    if group is None:
        return ids
    check_group(group, False)
    return ids * dist.get_world_size(group) + dist.get_rank(group)
