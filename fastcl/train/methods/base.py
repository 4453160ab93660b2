"""What the methods share: two views of each image, the optimizer, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from fastcl.train.checkpoints import entries
from fastcl.train.optimizers import Optimization
from fastcl.train.settings import Settings

Batch = Sequence[Any]
_MEASURED_EVERY = 10  # steps


class Method(LightningModule):
    """The base of the methods. Batches are (images, labels), or (images,) where labels are not needed.

    ``images`` is (N, C, H, W), or a pair of those: two crops of each image, made while loading.

    Args:
        encoder: images to features (N, F); what is kept after training.
        augment: a batch of images to a batch of random views of them; called once per view.
        temperature: of the loss.
        optimization: the optimizer and its schedule.

    Attributes:
        synchronizes_batch_norm: whether batch normalization is over all processes, where that can be done.
    """

    synchronizes_batch_norm = True

    def __init__(
        self,
        encoder: nn.Module,
        augment: Callable[[Tensor], Tensor],
        *,
        temperature: float,
        optimization: Optimization,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.augment = augment
        self.temperature = temperature
        self.optimization = optimization

    @classmethod
    def own_options(cls, settings: Settings) -> dict[str, Any]:
        """The options in ``settings`` that not every method has, as arguments of the constructor.

        Raises:
            ValueError: they do not go together with the others.
        """
        shared = {option.name for option in fields(Settings)}
        return {name: value for name, value in asdict(settings).items() if name not in shared}

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, or None in a single process."""
        return dist.group.WORLD if dist.is_initialized() else None

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """(images, labels) to (first views, second views, labels), on the device."""
        images, *labels = batch
        first, second = images if isinstance(images, list | tuple) else (images, images)
        return [self.augment(first), self.augment(second), *labels]

    def timed(self, part: str) -> AbstractContextManager[object]:
        """The time spent inside is the trainer's profiler's, as ``part``."""
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]
        return profiler.profile(part)

    def record(self, loss: Tensor, pairs: Callable[[], Mapping[str, Tensor]], batch_idx: int) -> None:
        """Log the loss, and in every tenth step what ``pairs`` measures."""
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        if batch_idx % _MEASURED_EVERY == 0:
            self.log_dict(dict(pairs()), on_step=False, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        epochs = self.trainer.max_epochs or 1
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self.optimization.configure(self, epochs, max(1, steps // epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def load_moco(self, state: Mapping[str, Tensor]) -> None:
        """Take the encoder from :func:`fastcl.train.checkpoints.read_moco`'s state."""
        self.encoder.load_state_dict(entries(state, "encoder_q.", without="fc."))


def projection_head(features: int, dim: int, *, batch_norm: bool) -> nn.Sequential:
    """Two layers from ``features`` to ``dim``, the hidden one as wide as the features."""
    norm = [nn.BatchNorm1d(features)] if batch_norm else []
    return nn.Sequential(nn.Linear(features, features), *norm, nn.ReLU(), nn.Linear(features, dim))
