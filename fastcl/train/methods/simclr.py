"""SimCLR, the whole method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Batch, Method, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization

_DEFAULT = Optimization("lars", lr=4.8, weight_decay=1e-6, warmup_epochs=10)

_RECIPE: Recipe = {
    "digits": {},
    "small": {"temperature": 0.5, "optimizer": "lars", "lr": 1.0, "weight_decay": 1e-6},
    "large": {
        **{"temperature": 0.1, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6},
        **{"epochs": 100, "batch_size": 4096, "warmup_epochs": 10},
        **{"crop_min": 0.08, "jitter": 0.8, "blur": True},
    },
}


@register(
    "simclr", "two views of an image find each other among the batch (Chen et al. 2020)", recipe=_RECIPE
)
class SimCLR(Method):
    """SimCLR: two random views of each image must find each other among all views of the batch.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709. With several processes the batch is that of all.

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
        self.projector = projection_head(features, dim, batch_norm=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2, *_ = batch
        z1, z2 = self.projector(self.encoder(torch.cat([view1, view2]))).chunk(2)
        with self.timed("loss"):
            loss = fastcl.nt_xent(z1, z2, self.temperature, group=self.group)
        self.record(loss, lambda: measure_pairs(z1, z2), batch_idx)
        return loss
