"""DINO, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.similarity.checks import check_choice
from fastcl.train.evaluate.features import summed
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.prototypical import Prototypical, PrototypicalSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import SlowCopySettings
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import ClosedUnitInterval
from fastcl.train.schedules import Cosine, Value

_DEFAULT = Optimization("adamw", lr=2e-3, weight_decay=Cosine(0.04, 0.4), warmup_epochs=10)
_MOMENTUM = Cosine(0.996, 1.0)
_SINKHORN_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class DINOSettings(PrototypicalSettings, SlowCopySettings):
    """DINO's own."""

    balance: Annotated[
        str, "What keeps the teacher from one prototype for all: 'centre' or 'sinkhorn', as in SwAV."
    ] = "centre"
    centre_momentum: Annotated[ClosedUnitInterval, "Momentum of the centre."] = 0.9


_DINO = {"temperature": 0.1, "target_temperature": 0.04, "optimizer": "adamw"}
_RECIPE: Recipe = {
    "digits": {
        "hidden": 128,
        "prototypes": 256,
        "momentum": 0.99,
        "temperature": 0.1,
        "target_temperature": 0.04,
    },
    "small": {
        **{**_DINO, "dim": 256, "hidden": 512, "prototypes": 4096, "momentum": 0.99},
        **{"lr": 5e-4, "weight_decay": 0.04, "weight_decay_end": 0.4},
        **{"small_crops": 4, "small_crop_max": 0.4, "crop_min": 0.4},
    },
    "large": {
        **{**_DINO, "arch": "vit_small", "dim": 256, "hidden": 2048, "prototypes": 65536, "momentum": 0.996},
        **{"lr": 5e-4, "weight_decay": 0.04, "weight_decay_end": 0.4},
        **{"epochs": 100, "batch_size": 1024, "warmup_epochs": 10},
        **{"small_crops": 8, "small_crop_max": 0.4, "crop_min": 0.4, "jitter": 0.4, "blur": True},
    },
}


@register(
    "dino",
    "crops predict a centred teacher's assignment to prototypes (Caron et al. 2021, arXiv 2104.14294)",
    settings=DINOSettings,
    recipe=_RECIPE,
)
class DINO(Prototypical):
    """DINO: each crop predicts a slow copy's assignment of the others, sharpened and centred.

    Caron et al. 2021, https://arxiv.org/abs/2104.14294. With several processes the centre, or Sinkhorn's
    balance, is over the batch of all. Gradients are not clipped.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random crops of them; or one function per crop, of which the
            first two are the teacher's.
        dim: width of projection and prototypes.
        hidden: width of the projector's hidden layers.
        prototypes: how many.
        target_temperature: of the teacher; a number, or a schedule of it.
        momentum: of the slow copy; a number, or a schedule of it.
        balance: 'centre', or 'sinkhorn' for SwAV's.
        centre_momentum: of the centre, the mean of the teacher's logits.
        optimization: the optimizer and its schedules.
        **prototypical: the other arguments of :class:`Prototypical`.

    Attributes:
        centre: (prototypes,).

    Raises:
        ValueError: an unknown balance.
    """

    centre: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 256,
        hidden: int = 2048,
        prototypes: int = 65536,
        target_temperature: Value = 0.04,
        momentum: Value = _MOMENTUM,
        balance: str = "centre",
        centre_momentum: float = 0.9,
        optimization: Optimization = _DEFAULT,
        **prototypical: Any,
    ) -> None:
        check_choice("balance", balance, ("centre", "sinkhorn"))
        first, second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        super().__init__(
            encoder,
            augment,
            projector=nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(hidden, dim)),
            prototypes=prototypes,
            dim=dim,
            target_temperature=target_temperature,
            momentum=momentum,
            optimization=optimization,
            **prototypical,
        )
        self.is_centred = balance == "centre"
        self.centre_momentum = centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    def biases(self, targets: Rows) -> list[Tensor]:
        if not self.is_centred:
            return [self.balance(rows, steps=_SINKHORN_STEPS) for rows in targets]
        return [-self.centre / self.target_temperature] * len(targets)

    @torch.no_grad()
    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        if not self.is_centred:
            return
        rows, prototypes = (
            nn.functional.normalize(x.to(self.centre.dtype), dim=-1)
            for x in (torch.stack(targets), self.target_prototypes)
        )
        mean = rows.mean(dim=(0, 1))
        summed(mean)
        logits = prototypes @ mean / (1 if self.group is None else dist.get_world_size())
        self.centre.lerp_(logits, 1 - self.centre_momentum)
