"""SwAV, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.prototypical import Prototypical, PrototypicalSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import perceptron
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import NonNegativeInt, PositiveInt
from fastcl.train.schedules import Value

_DEFAULT = Optimization("lars", lr=4.8, weight_decay=1e-6, warmup_epochs=10)


@dataclass(frozen=True, kw_only=True)
class SwAVSettings(PrototypicalSettings):
    """SwAV's own."""

    sinkhorn_steps: Annotated[PositiveInt, "Rounds of Sinkhorn's iteration, which balances the targets."] = 3
    queue_size: Annotated[
        NonNegativeInt, "Earlier crops that are balanced with the batch's, for small batches; 0: none."
    ] = 0
    queue_from_epoch: Annotated[NonNegativeInt, "Epochs before the queue is used."] = 15


_SWAV = {"temperature": 0.1, "target_temperature": 0.05, "optimizer": "lars", "weight_decay": 1e-6}
_RECIPE: Recipe = {
    "digits": {"hidden": 128, "prototypes": 64, "temperature": 0.1, "target_temperature": 0.05},
    "small": {**_SWAV, "hidden": 512, "prototypes": 500, "lr": 0.6, "small_crops": 4, "crop_min": 0.14},
    "large": {
        **{**_SWAV, "hidden": 2048, "prototypes": 3000, "lr": 0.3},
        **{"epochs": 200, "batch_size": 4096, "warmup_epochs": 10},
        **{"small_crops": 6, "crop_min": 0.14, "jitter": 0.8, "blur": True},
    },
}


@register(
    "swav",
    "crops predict the others' balanced assignment to prototypes (Caron et al. 2020, arXiv 2006.09882)",
    settings=SwAVSettings,
    recipe=_RECIPE,
)
class SwAV(Prototypical):
    """SwAV: each crop predicts the assignment of the others to prototypes, which all are equally used.

    Caron et al. 2020, https://arxiv.org/abs/2006.09882. With several processes the assignments are balanced
    over the batch of all, and over one queue.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random crops of them; or one function per crop, of which the
            first two give the assignments.
        dim: width of projection and prototypes.
        hidden: width of the projector's hidden layer.
        prototypes: how many.
        target_temperature: of the assignment; a number, or a schedule of it.
        sinkhorn_steps: rounds that balance the assignments.
        queue_size: earlier projections of each of the first two crops that are balanced with the batch's,
            once there are as many; 0: none.
        queue_from_epoch: epochs before they are.
        optimization: the optimizer and its schedules.
        **prototypical: the other arguments of :class:`Prototypical`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 128,
        hidden: int = 2048,
        prototypes: int = 3000,
        target_temperature: Value = 0.05,
        sinkhorn_steps: int = 3,
        queue_size: int = 0,
        queue_from_epoch: int = 15,
        optimization: Optimization = _DEFAULT,
        **prototypical: Any,
    ) -> None:
        super().__init__(
            encoder,
            augment,
            projector=perceptron(features, hidden, dim),
            prototypes=prototypes,
            dim=dim,
            target_temperature=target_temperature,
            optimization=optimization,
            **prototypical,
        )
        self.sinkhorn_steps = sinkhorn_steps
        self.queue_from_epoch = queue_from_epoch
        count = 2 if queue_size else 0
        self.queues = nn.ModuleList(fastcl.NegativeQueue(queue_size, dim) for _ in range(count))

    def biases(self, targets: Rows) -> list[Tensor]:
        rows = zip(targets, self._earlier(len(targets[0])), strict=True)
        return [self.balance(torch.cat(both), steps=self.sinkhorn_steps) for both in rows]

    def _earlier(self, batch_size: int) -> list[Tensor]:
        """This rank's share of the rows in each queue, none before they are used."""
        rank, ranks = (0, 1) if self.group is None else (dist.get_rank(), dist.get_world_size())
        seen = self.global_step * batch_size * ranks
        queues = [queue for queue in self.queues if isinstance(queue, fastcl.NegativeQueue)]
        used = self.current_epoch >= self.queue_from_epoch and all(seen >= queue.size for queue in queues)
        if not queues or not used:
            return [self.prototypes.new_empty(0, self.prototypes.shape[1])] * 2
        return [queue.keys[rank::ranks] for queue in queues]

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        for queue, rows in zip(self.queues, embedded, strict=False):
            queue.enqueue(rows.detach(), group=self.group)  # type: ignore[operator]
