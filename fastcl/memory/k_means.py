"""Spherical k-means: the prototypes of clusters, by the most similar key of each row.

Dhillon and Modha 2001, https://doi.org/10.1023/A:1007612920971; for contrastive learning Li et al. 2021,
https://arxiv.org/abs/2005.04966.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import check_group, gather_rows, row_counts
from fastcl.similarity.checks import check_matrix
from fastcl.similarity.numerics import unit_rows
from fastcl.similarity.topk import similarity_topk


@torch.no_grad()
def k_means(
    features: Tensor,
    k: int,
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Spherical k-means: unit prototypes, and for each row the one with the largest cosine.

    It starts from k distinct rows. A cluster that loses all its rows takes the worst-served one, that of the
    smallest cosine. The (N, k) cosines are never stored. Dhillon and Modha 2001,
    https://doi.org/10.1023/A:1007612920971; as in PCL, Li et al. 2021, https://arxiv.org/abs/2005.04966.

    Args:
        features: (N, D), any floating dtype; normalized inside.
        k: how many clusters, 1 to N.
        steps: how often prototypes are moved, at least 0.
        generator: the source of the first rows; torch's own for its device without one.
        group: ``features`` are this rank's rows; the prototypes are those of all ranks' rows, the same on
            every rank, and rank 0's generator counts.

    Returns:
        prototypes (k, D), float64 for float64 features, else float32, and assigned (N,) int64. Neither
        carries a gradient.

    Raises:
        ValueError: k below 1 or above the number of rows; steps below 0; features that are not (N, D).
        TypeError: features that are not floating; k or steps that are not integers.
    """
    check_group(group, ring=False)
    check_matrix("features", features)
    rows = _Rows(unit_rows(features.detach()), group)
    for name, value, low in (("k", k, 1), ("steps", steps, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if k > rows.total:
        raise ValueError(f"k must be at most the number of rows, {rows.total}, got {k}")
    prototypes = rows.at(rows.draw(k, generator))
    for _ in range(steps):
        similarity, assigned = _nearest(rows.own, prototypes)
        sums, empty = rows.cluster_sums(assigned, k)
        place = (empty.cumsum(0) - 1).clamp_min(0)  # the n-th empty cluster takes the n-th worst row
        replacements = rows.at(rows.worst(similarity, k)[place])
        prototypes = unit_rows(torch.where(empty[:, None], replacements, sums))
    return prototypes, _nearest(rows.own, prototypes)[1]


def _nearest(rows: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    similarity, assigned = similarity_topk(rows, prototypes, 1)
    return similarity[:, 0], assigned[:, 0]


class _Rows:
    """The unit rows of all ranks, numbered in rank order, of which each rank holds its own."""

    def __init__(self, own: Tensor, group: dist.ProcessGroup | None) -> None:
        self.own = own
        self.group = group
        self.counts = [own.shape[0]] if group is None else row_counts(own, group)
        rank = 0 if group is None else dist.get_rank(group)
        self.total, self.offset = sum(self.counts), sum(self.counts[:rank])

    def draw(self, k: int, generator: torch.Generator | None) -> Tensor:
        """The numbers of k distinct rows, the same on every rank."""
        device = self.own.device if generator is None else generator.device
        numbers = torch.randperm(self.total, generator=generator, device=device)[:k].to(self.own.device)
        return self._everywhere(numbers)[0]

    def at(self, numbers: Tensor) -> Tensor:
        """The rows (k, D) with these numbers."""
        if self.group is None:
            return self.own[numbers]
        here = numbers - self.offset
        mine = (here >= 0) & (here < self.own.shape[0])
        padded = torch.cat([self.own, self.own.new_zeros(1, self.own.shape[1])])
        found = padded[torch.where(mine, here, self.own.shape[0])]
        dist.all_reduce(found, group=self.group)
        return found

    def worst(self, similarity: Tensor, k: int) -> Tensor:
        """The numbers of the k rows of smallest similarity, ascending, ties to the lower number."""
        kept = min(k, self.own.shape[0])
        values, order = similarity.sort(stable=True)
        padding = (0, k - kept)
        values = torch.nn.functional.pad(values[:kept], padding, value=torch.inf)
        numbers = torch.nn.functional.pad(order[:kept] + self.offset, padding)
        order = self._everywhere(values).flatten().sort(stable=True).indices
        return self._everywhere(numbers).flatten()[order[:k]]

    def cluster_sums(self, assigned: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The sum (k, D) of each cluster's rows, and which clusters (k,) have none."""
        counts = torch.zeros(k, dtype=torch.int64, device=assigned.device)
        counts = counts.index_add(0, assigned, torch.ones_like(assigned))
        order = assigned.argsort(stable=True)  # a sum in the order of rows: the same in every run
        sums = torch.segment_reduce(self.own[order], "sum", lengths=counts, unsafe=True, initial=0)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
            dist.all_reduce(counts, group=self.group)
        return sums, counts == 0

    def _everywhere(self, x: Tensor) -> Tensor:
        """Every rank's ``x``, stacked."""
        if self.group is None:
            return x[None]
        return gather_rows(x[None], [1] * len(self.counts), self.group)
