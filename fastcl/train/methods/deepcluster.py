"""DeepCluster, the whole method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.clusters import check_counts, cluster
from fastcl.train.evaluate.features import Features, joined, summed
from fastcl.train.methods.base import Augment, Batch, Method, Rows
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import Several
from fastcl.train.settings import Settings

_DEFAULT = Optimization("sgd", lr=0.05, weight_decay=1e-5)


@dataclass(frozen=True, kw_only=True)
class DeepClusterSettings(Settings):
    """DeepCluster's own."""

    clusters: Annotated[Several, "Clusters, which are the classes of an epoch."]


_RECIPE: Recipe = {
    "digits": {"clusters": 40},
    "small": {"clusters": 500, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-5, "warmup_epochs": 0},
    "large": {
        **{"clusters": 10000, "dim": 256, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-5},
        **{"epochs": 500, "batch_size": 256, "warmup_epochs": 0},
        **{"crop_min": 0.08, "jitter": 0.0, "blur": False},
    },
}


@register(
    "deepcluster",
    "each epoch clusters the features and learns to tell the cluster (Caron et al. 2018, arXiv 1807.05520)",
    settings=DeepClusterSettings,
    recipe=_RECIPE,
)
class DeepCluster(Method):
    """DeepCluster: before each epoch all features are clustered, and the cluster is an image's label.

    Caron et al. 2018, https://arxiv.org/abs/1807.05520. Features are whitened, and clustered by spherical
    k-means; an image counts by the inverse of its cluster's size, over the batch of all processes; every
    epoch begins with a new classifier, whose learning rate does not fall.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        samples: how many training images there are.
        dim: width that features are reduced to before they are clustered, at most their own.
        clusters: how many.
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: a single cluster, or more than images.
    """

    needs_indices = True
    steady_part = "head"
    data_arguments = ("samples",)

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        samples: int,
        dim: int = 256,
        clusters: int = 10000,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        check_counts([clusters], samples)
        super().__init__(encoder, augment, optimization=optimization)
        self.head = nn.Linear(features, clusters)
        self.dim = dim
        self.samples = samples

    def begin_epoch(self, features: Iterator[Features]) -> None:
        own = joined(features)
        whitened = [own._replace(values=whiten(own.values, self.dim))]
        clusters = self.head.out_features
        (found,) = cluster(whitened, [clusters], self.samples, group=self.group)
        self.assigned, self.sizes = found.assigned, found.assigned.bincount(minlength=clusters)
        optimizer: Any = self.optimizers()
        for parameter in self.head.parameters():
            optimizer.state.pop(parameter, None)
        generator = torch.Generator(self.device).manual_seed(self.current_epoch)  # alike on all ranks
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def embed(self, views: Sequence[Any]) -> Rows:
        return tuple(self.rows(self.encoder, views))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        rows = torch.cat(embedded)
        assigned = self.assigned[batch.indices].repeat(len(embedded))
        each = fastcl.prototype_nce(
            *(rows, self.head.weight, assigned, 1.0),
            bias=self.head.bias,
            normalize=False,
            reduction="none",
        )
        weight = 1 / self.sizes[assigned]
        total, weights = (fastcl.reduce(x, "sum", self.group) for x in (weight * each, weight))
        return total / weights


def whiten(own: Tensor, dim: int) -> Tensor:
    """This rank's rows (N, D) as up to ``dim`` uncorrelated components of variance 1 over all ranks' rows."""
    count = own.new_tensor(float(len(own)))
    mean = own.sum(dim=0)
    summed(count, mean)
    centred = own - mean / count
    covariance = centred.T @ centred / count
    summed(covariance)
    variances, directions = torch.linalg.eigh(covariance)
    kept = slice(max(0, own.shape[1] - dim), None)
    deviations = variances[kept].clamp_min(1e-6 * float(variances[-1])).sqrt()
    whitened: Tensor = centred @ directions[:, kept] / deviations
    return whitened
