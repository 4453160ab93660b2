"""HCSC, the whole method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.clusters import Clustering, cluster, hierarchy
from fastcl.train.evaluate.features import Features
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.pcl import PCL, PCLSettings
from fastcl.train.methods.pcl import RECIPE as PCL_RECIPE
from fastcl.train.methods.registry import Recipe, register

_RECIPE: Recipe = {
    "digits": {**PCL_RECIPE["digits"], "clusters": (40, 20, 10)},
    "small": {**PCL_RECIPE["small"], "clusters": (500, 250, 100)},
    "large": {**PCL_RECIPE["large"], "clusters": (3000, 2000, 1000)},
}


@register(
    "hcsc",
    "MoCo v2 and PCL, negatives selected by a hierarchy of clusters (Guo et al. 2022, arXiv 2202.00455)",
    settings=PCLSettings,
    recipe=_RECIPE,
)
class HCSC(PCL):
    """HCSC: a view finds its key and its prototypes among negatives that seem to be of other clusters.

    Guo et al. 2022, https://arxiv.org/abs/2202.00455. Clusters are of the key encoder's features of all
    training images, then of the prototypes below. A key is kept as a negative with the probability
    that it is not of the query's cluster; a prototype, not of the cluster above the query's.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: as :class:`MoCo`'s.
        clusters: numbers of clusters, fewer from level to level.
        **pcl: the other arguments of :class:`PCL`.

    Raises:
        ValueError: as :class:`PCL`; numbers that do not fall.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        clusters: Sequence[int] = (3000, 2000, 1000),
        **pcl: Any,
    ) -> None:
        if any(below <= above for below, above in pairwise(clusters)):
            raise ValueError(f"clusters must be fewer from level to level, got {clusters}")
        super().__init__(encoder, features, augment, clusters=clusters, **pcl)

    def clustered(self, features: Iterator[Features]) -> list[Clustering]:
        (bottom,) = cluster(features, self.clusters[:1], self.samples, group=self.group)
        return hierarchy(bottom, self.clusters[1:])

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        if not self.clusterings:
            return super().loss(embedded, targets, batch)
        (key,) = targets
        queries = [nn.functional.normalize(query) for query in embedded]
        each = [
            self._of_instances(query, key, batch, level) + self._of_prototypes(query, batch, level, above)
            for query in queries
            for level, above in zip(self.clusterings, [*self.clusterings[1:], None], strict=True)
        ]
        return torch.stack(each).mean()

    def _of_instances(self, query: Tensor, key: Tensor, batch: Batch, level: Clustering) -> Tensor:
        negatives = self.queue.keys.to(query)
        own = (query * nn.functional.normalize(key)).sum(1, keepdim=True) / self.temperature
        dropped = self._dropped(negatives, level, level.assigned[batch.indices])
        rule = fastcl.PairRule(exclude=dropped)
        stats = fastcl.similarity_stats(query, negatives, scale=1 / self.temperature, rule=rule)
        return stats.join(positives=own).any_positive().mean()

    def _of_prototypes(
        self, query: Tensor, batch: Batch, level: Clustering, above: Clustering | None
    ) -> Tensor:
        assigned, prototypes = level.assigned[batch.indices], level.prototypes.to(query)
        scale = 1 / (self.temperature * level.temperature)
        own = (query * prototypes[assigned]).sum(1, keepdim=True) * scale[assigned, None]
        dropped = torch.zeros(len(query), len(prototypes), dtype=torch.bool, device=query.device)
        if above is not None:
            dropped = self._dropped(prototypes, above, above.assigned[batch.indices])
        rule = fastcl.PairRule(exclude=dropped.scatter(1, assigned[:, None], True))
        stats = fastcl.similarity_stats(query, prototypes, key_scale=scale, rule=rule)
        return stats.join(positives=own).any_positive().mean()

    def _dropped(self, negatives: Tensor, level: Clustering, assigned: Tensor) -> Tensor:
        """Which of (M, D) negatives are no negatives of each query, (N, M) bool, by chance."""
        logits = negatives.to(level.prototypes) @ level.prototypes.T / (self.temperature * level.temperature)
        of_cluster = logits.softmax(1)[:, assigned].T
        return torch.rand(of_cluster.shape, device=of_cluster.device) < of_cluster
