"""SupCon, the whole method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Batch, Method, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization

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


@register("supcon", "views of one class find each other among the batch (Khosla et al. 2020)", recipe=_RECIPE)
class SupCon(Method):
    """SupCon: views of the same class must find each other among all views of the batch.

    Khosla et al. 2020, https://arxiv.org/abs/2004.11362. With several processes the batch is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to a batch of random views of them; called once per view.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss.
        optimization: the optimizer and its schedule.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Callable[[Tensor], Tensor],
        *,
        dim: int = 128,
        temperature: float = 0.1,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, temperature=temperature, optimization=optimization)
        self.projector = projection_head(features, dim, batch_norm=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2, labels = batch
        z1, z2 = self.projector(self.encoder(torch.cat([view1, view2]))).chunk(2)
        with self.timed("loss"):
            loss = fastcl.sup_con(
                torch.stack([z1, z2], dim=1), labels, temperature=self.temperature, group=self.group
            )
        self.record(loss, lambda: measure_pairs(z1, z2), batch_idx)
        return loss
