"""The training methods: each one a LightningModule that holds the method and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import fastcl


class SimCLR(LightningModule):
    """SimCLR: two random views of each image must find each other among all views of the batch.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to a batch of random views of them.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss.
        lr: first learning rate of AdamW, annealed to zero over the training.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Callable[[Tensor], Tensor],
        *,
        dim: int = 64,
        temperature: float = 0.3,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, dim)
        )
        self.augment = augment
        self.temperature = temperature
        self.lr = lr
        self.weight_decay = weight_decay

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (images,) = batch
        views = torch.cat([self.augment(images), self.augment(images)])
        z1, z2 = self.projector(self.encoder(views)).chunk(2)
        loss = fastcl.nt_xent(z1, z2, self.temperature)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
