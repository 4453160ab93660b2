"""KCL, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.moco import RECIPE as MOCO
from fastcl.train.methods.moco import MoCo, MoCoSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.ranges import NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class KCLSettings(MoCoSettings):
    """KCL's own."""

    n_positives: Annotated[
        NonNegativeInt, "Keys of its class that are an image's positives, besides its own."
    ] = 6


RECIPE: Recipe = {
    "digits": MOCO["digits"],
    "small": {**MOCO["small"], "temperature": 0.07},
    "large": {**MOCO["large"], "temperature": 0.07},
}


@register(
    "kcl",
    "MoCo v2 with k positives of an image's class, for long tails (Kang et al. 2021, ICLR)",
    settings=KCLSettings,
    recipe=RECIPE,
)
class KCL(MoCo):
    """KCL: MoCo v2 with labels, where keys of an image's class are positives too, as many for every class.

    Kang et al. 2021, https://openreview.net/forum?id=OqtLIabPTit. The keys are the batch's and the queue's.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: as :class:`MoCo`'s.
        dim: width of the projection, on which the loss is computed.
        queue_size: how many keys the queue holds.
        n_positives: keys of its class that are an image's positives, drawn anew in each step.
        **moco: the other arguments of :class:`MoCo`.
    """

    needs_labels = True

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 128,
        queue_size: int = 65536,
        n_positives: int = 6,
        **moco: Any,
    ) -> None:
        super().__init__(encoder, features, augment, dim=dim, queue_size=queue_size, **moco)
        self.queue = fastcl.NegativeQueue(queue_size, dim, with_ids=True)  # the labels of its keys
        self.n_positives = n_positives

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        assert batch.labels is not None
        keys = self.keys(targets[0])
        each = [
            fastcl.weighted_info_nce(query, keys, *self.positives(batch.labels), self.temperature)
            for query in embedded
        ]
        return torch.stack(each).mean()

    def keys(self, own: Tensor) -> Tensor:
        """What queries are compared with, (M, dim): the batch's keys (N, dim), then the queue's."""
        return torch.cat([own, self.queue.keys.to(own)])

    def positives(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For each query its own key and drawn ones of its class, -1 where there are fewer; their weights."""
        assert self.queue.ids is not None
        own = torch.arange(len(labels), device=labels.device)[:, None]
        alike = labels[:, None] == torch.cat([labels, self.queue.ids])
        alike.scatter_(1, own, False)
        chance = torch.rand(alike.shape, device=labels.device).masked_fill(~alike, -1.0)
        drawn = chance.topk(min(self.n_positives, chance.shape[1]), dim=1)
        found = torch.cat([own, drawn.indices.masked_fill(drawn.values < 0, -1)], dim=1)
        return found, (found >= 0).double() / (found >= 0).sum(1, keepdim=True)

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        self.queue.enqueue(targets[0], batch.labels, group=self.group)
