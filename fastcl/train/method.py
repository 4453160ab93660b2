"""What the methods share: two views of each image, the optimizer, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import fastcl
from fastcl.train.checkpoints import entries
from fastcl.train.optimizers import Optimization

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
    """

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


@torch.no_grad()
def measure_pairs(query: Tensor, key: Tensor, negatives: Tensor | None = None) -> dict[str, Tensor]:
    """How good the pairs (query_i, key_i) of a batch are.

    Args:
        query: (N, D) embeddings, any floating dtype.
        key: (N, D), same dtype.
        negatives: (M, D) unit rows; None: the other rows of ``query`` and ``key``.

    Returns:
        ``contrastive_top1``, the share of queries nearer to their key than to any negative;
        ``alignment``, the pairs' mean squared distance, and ``uniformity``, the log of the mean of
        ``exp(-2 distance^2)`` over the queries (Wang and Isola 2020, https://arxiv.org/abs/2005.10242).
    """
    query, key = (nn.functional.normalize(x.float(), dim=1) for x in (query, key))
    ids = torch.arange(len(query), device=query.device)
    others = fastcl.similarity_stats(query, query, scale=4.0, rule=fastcl.PairRule(exclude=(ids, ids)))
    if negatives is None:
        both, both_ids = torch.cat([query, key]), ids.repeat(2)
        rule = fastcl.PairRule(exclude=(ids, both_ids))
        hardest = fastcl.similarity_stats(query, both, rule=rule).max_neg
    else:
        hardest = fastcl.similarity_stats(query, negatives.to(query.dtype)).max_neg
    similarity = (query * key).sum(dim=1)
    count = torch.tensor(float(len(query) * max(1, len(query) - 1)), device=query.device)
    return {
        "contrastive_top1": (similarity > hardest).float().mean(),
        "alignment": (2 - 2 * similarity).mean(),
        "uniformity": others.lse_neg.logsumexp(dim=0) - count.log() - 4,
    }
