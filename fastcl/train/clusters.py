"""The clusters of all training features, which methods make anew before an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastcl
from fastcl.train.evaluate.features import Features, gathered, joined


class Clustering(NamedTuple):
    """Clusters of the training samples, the same on every rank.

    Attributes:
        prototypes: (k, D), unit rows.
        assigned: (samples,) int64, each sample's cluster.
        temperature: (k,), by how tight each cluster is (:func:`fastcl.concentration`); 1 on the average.
    """

    prototypes: Tensor
    assigned: Tensor
    temperature: Tensor


def cluster(
    parts: Iterable[Features], counts: Iterable[int], samples: int, *, group: dist.ProcessGroup | None
) -> list[Clustering]:
    """One clustering per number of clusters.

    Args:
        parts: this rank's share of the features (N, D), a batch at a time.
        counts: of clusters.
        samples: how many there are; a sample that has no features is in cluster 0.
        group: all ranks, or None.
    """
    own = joined(parts)
    found = [fastcl.k_means(own.values, k, group=group) for k in counts]
    everything = gathered(own)
    clusterings = []
    for prototypes, assigned in found:
        rows = gathered(own._replace(labels=assigned)).labels
        phi = fastcl.concentration(everything.values, rows, prototypes, temperature=1.0)
        table = rows.new_zeros(samples).index_copy(0, everything.indices, rows)
        clusterings.append(Clustering(prototypes, table, phi))
    return clusterings


def hierarchy(bottom: Clustering, counts: Iterable[int]) -> list[Clustering]:
    """``bottom``, then for each count clusters of the prototypes below."""
    levels = [bottom]
    for k in counts:
        below = levels[-1]
        prototypes, parents = fastcl.k_means(below.prototypes, k, generator=torch.Generator().manual_seed(0))
        phi = fastcl.concentration(below.prototypes, parents, prototypes, temperature=1.0)
        levels.append(Clustering(prototypes, parents[below.assigned], phi))
    return levels


def check_counts(counts: Iterable[int], samples: int) -> None:
    """Raise unless there are two clusters at least, of which each may have a sample.

    Raises:
        ValueError: there are not.
    """
    for k in counts:
        if k < 2:
            raise ValueError(f"clusters must be at least 2, got {k}")
        if k > samples:
            raise ValueError(f"clusters must be at most the number of training images, {samples}, got {k}")
