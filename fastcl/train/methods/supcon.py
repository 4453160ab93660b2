"""SupCon, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Method, Rows, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Value
from fastcl.train.settings import ContrastiveSettings

_DEFAULT = Optimization("sgd", lr=0.5, warmup_epochs=10)

_RECIPE: Recipe = {
    "digits": {},
    "small": {"temperature": 0.1, "optimizer": "sgd", "lr": 0.125, "weight_decay": 1e-4},
    "large": {
        **{"temperature": 0.1, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6},
        **{"epochs": 350, "batch_size": 2048, "warmup_epochs": 10},
        **{"crop_min": 0.08, "jitter": 0.8, "blur": True},
    },
}


@register(
    "supcon",
    "views of one class find each other among the batch (Khosla et al. 2020, arXiv 2004.11362)",
    settings=ContrastiveSettings,
    recipe=_RECIPE,
)
class SupCon(Method):
    """SupCon: views of the same class must find each other among all views of the batch.

    Khosla et al. 2020, https://arxiv.org/abs/2004.11362. With several processes the batch is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss; a number, or a schedule of it.
        optimization: the optimizer and its schedules.
    """

    needs_labels = True
    temperature: float

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 128,
        temperature: Value = 0.1,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = projection_head(features, dim, batch_norm=False)
        self.schedule(temperature=temperature)

    def embed(self, views: Sequence[Any]) -> Rows:
        return tuple(self.rows(nn.Sequential(self.encoder, self.projector), views))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        features = torch.stack(embedded, dim=1)
        return fastcl.sup_con(features, batch.labels, temperature=self.temperature, group=self.group)
