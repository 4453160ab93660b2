"""TSC, the whole method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import fastcl
from fastcl.train.evaluate.features import Features, joined, summed
from fastcl.train.methods.base import Augment
from fastcl.train.methods.kcl import KCL, KCLSettings
from fastcl.train.methods.kcl import RECIPE as KCL_RECIPE
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.ranges import NonNegativeFloat, NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class TSCSettings(KCLSettings):
    """TSC's own."""

    centre_weight: Annotated[NonNegativeFloat, "Weight of the pull to the centre of an image's class."] = 1.0
    centres_from_epoch: Annotated[NonNegativeInt, "Plain KCL before this epoch."]


_RECIPE: Recipe = {
    "digits": {**KCL_RECIPE["digits"], "centres_from_epoch": 5},
    "small": {**KCL_RECIPE["small"], "centres_from_epoch": 50},
    "large": {**KCL_RECIPE["large"], "centres_from_epoch": 100, "epochs": 400},
}


@register(
    "tsc",
    "KCL, and each class has a point of the sphere to go to (Li et al. 2022, arXiv 2111.13998)",
    settings=TSCSettings,
    recipe=_RECIPE,
)
class TSC(KCL):
    """TSC: KCL, and images are pulled to fixed points of the sphere, far apart, one for each class.

    Li et al. 2022, https://arxiv.org/abs/2111.13998. Before each epoch the points are given to the classes
    whose mean features are nearest, all together.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: as :class:`MoCo`'s.
        classes: how many labels there are.
        dim: width of the projection, on which the loss is computed.
        centre_weight: of the pull to the point; a positive key's is 1 / (1 + its fellows).
        centres_from_epoch: plain KCL before this epoch.
        **kcl: the other arguments of :class:`KCL`.

    Attributes:
        points: (classes, dim), unit rows.
    """

    points: Tensor
    data_arguments = ("classes",)

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        classes: int,
        dim: int = 128,
        centre_weight: float = 1.0,
        centres_from_epoch: int = 100,
        **kcl: Any,
    ) -> None:
        super().__init__(encoder, features, augment, dim=dim, **kcl)
        self.centre_weight = centre_weight
        self.centres_from_epoch = centres_from_epoch
        self.register_buffer("points", spread(classes, dim))
        self.centres: Tensor | None = None

    @property
    def observed(self) -> nn.Module:
        return self.query_encoder

    def begin_epoch(self, features: Iterator[Features]) -> None:
        if self.current_epoch < self.centres_from_epoch:
            return
        own = joined(features)
        sums = torch.zeros_like(self.points)
        sums.index_add_(0, own.labels, nn.functional.normalize(own.values))
        summed(sums)
        similarity = nn.functional.normalize(sums) @ self.points.T
        _, chosen = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
        self.centres = self.points[torch.as_tensor(chosen, device=self.points.device)]

    def keys(self, own: Tensor) -> Tensor:
        keys = super().keys(own)
        return keys if self.centres is None else torch.cat([keys, self.centres.to(keys)])

    def positives(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        found, weights = super().positives(labels)
        if self.centres is None:
            return found, weights
        centre = len(labels) + self.queue.size + labels[:, None]
        return torch.cat([found, centre], 1), nn.functional.pad(weights, (0, 1), value=self.centre_weight)


def spread(count: int, dim: int, *, steps: int = 200) -> Tensor:
    """``count`` points of the unit sphere, (count, dim), that keep away from each other; always the same."""
    points = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), device="cpu")
    optimizer = torch.optim.Adam([points.requires_grad_()], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        fastcl.uniformity(nn.functional.normalize(points)).backward()
        optimizer.step()
    return nn.functional.normalize(points.detach())
