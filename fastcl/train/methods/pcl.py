"""PCL, the whole method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.clusters import Clustering, check_counts, cluster
from fastcl.train.evaluate.features import Features
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.moco import RECIPE as MOCO
from fastcl.train.methods.moco import MoCo, MoCoSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.ranges import NonNegativeInt, PositiveInts


@dataclass(frozen=True, kw_only=True)
class PCLSettings(MoCoSettings):
    """PCL's own, and HCSC's."""

    clusters: Annotated[PositiveInts, "Numbers of clusters, one clustering or level for each."]
    cluster_from_epoch: Annotated[NonNegativeInt, "Plain MoCo before this epoch."]


RECIPE: Recipe = {
    "digits": {**MOCO["digits"], "clusters": (20, 40), "cluster_from_epoch": 5},
    "small": {**MOCO["small"], "clusters": (250, 500, 1000), "cluster_from_epoch": 20},
    "large": {
        **MOCO["large"],
        "queue_size": 16384,
        "clusters": (25000, 50000, 100000),
        "cluster_from_epoch": 20,
    },
}


@register(
    "pcl",
    "MoCo v2, and a view finds the prototypes of its clusters (Li et al. 2021, arXiv 2005.04966)",
    settings=PCLSettings,
    recipe=RECIPE,
)
class PCL(MoCo):
    """PCL: MoCo v2, and a view must find the prototype of its image's cluster in each of several clusterings.

    Li et al. 2021, https://arxiv.org/abs/2005.04966. Clusters are of the key encoder's features of all
    training images, made before each epoch. All prototypes are in the denominator.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: as :class:`MoCo`'s.
        samples: how many training images there are.
        clusters: numbers of clusters, one clustering for each.
        cluster_from_epoch: plain MoCo before this epoch.
        **moco: the other arguments of :class:`MoCo`.

    Raises:
        ValueError: a single cluster, or more than images.
    """

    needs_indices = True
    data_arguments = ("samples",)

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        samples: int,
        clusters: Sequence[int] = (25000, 50000, 100000),
        cluster_from_epoch: int = 20,
        **moco: Any,
    ) -> None:
        check_counts(clusters, samples)
        super().__init__(encoder, features, augment, **moco)
        self.samples = samples
        self.clusters = clusters
        self.cluster_from_epoch = cluster_from_epoch
        self.clusterings: list[Clustering] = []

    @property
    def observed(self) -> nn.Module:
        return self.key_encoder

    def begin_epoch(self, features: Iterator[Features]) -> None:
        if self.current_epoch >= self.cluster_from_epoch:
            self.clusterings = self.clustered(features)

    def clustered(self, features: Iterator[Features]) -> list[Clustering]:
        """The clusterings of an epoch."""
        return cluster(features, self.clusters, self.samples, group=self.group)

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        of_instances = super().loss(embedded, targets, batch)
        if not self.clusterings:
            return of_instances
        of_prototypes = [
            fastcl.prototype_nce(
                query,
                level.prototypes.to(query),
                level.assigned[batch.indices],
                self.temperature * level.temperature,
            )
            for query in embedded
            for level in self.clusterings
        ]
        return of_instances + torch.stack(of_prototypes).mean()
