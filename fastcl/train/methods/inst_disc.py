"""Inst-Disc, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.instances import Instances, InstancesSettings, WithMemory
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import NonNegativeFloat
from fastcl.train.schedules import Value

_DEFAULT = Optimization("sgd", lr=0.03)


@dataclass(frozen=True, kw_only=True)
class InstDiscSettings(InstancesSettings):
    """Inst-Disc's own."""

    proximal: Annotated[NonNegativeFloat, "Weight of an image's squared distance from its own row."] = 0.0


_INST_DISC = {"loss": "nce", "noise": 4096, "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4}
_RECIPE: Recipe = {
    "digits": {"loss": "nce", "noise": 512},
    "small": {**_INST_DISC, "temperature": 0.1, "warmup_epochs": 0},
    "large": {
        **{**_INST_DISC, "temperature": 0.07, "warmup_epochs": 0},
        **{"epochs": 200, "batch_size": 256},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False},
    },
}


@register(
    "inst-disc",
    "an image finds its own row in a memory of all images (Wu et al. 2018, arXiv 1805.01978)",
    settings=InstDiscSettings,
    recipe=_RECIPE,
)
class InstDisc(WithMemory):
    """Inst-Disc: every image is a class of its own, and finds its row in a memory of all images.

    Wu et al. 2018, https://arxiv.org/abs/1805.01978. With several processes the memory is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view. Each view
            finds the row; the first one moves it.
        samples: how many training images there are.
        dim: width of the projection and of the memory's rows.
        temperature: of the loss; a number, or a schedule of it.
        loss: 'nce' (noise-contrastive estimation) or 'softmax'.
        noise: rows drawn as negatives per step; 0 with 'softmax': all.
        bank_momentum: share of the old row in its update.
        proximal: weight of the squared distance between an image's projection and its row.
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: an unknown loss; 'nce' without noise.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        samples: int,
        dim: int = 128,
        temperature: Value = 0.07,
        loss: str = "nce",
        noise: int = 4096,
        bank_momentum: float = 0.5,
        proximal: float = 0.0,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = nn.Linear(features, dim)
        self.instances = Instances(samples, dim, loss=loss, noise=noise, momentum=bank_momentum)
        self.proximal = proximal
        self.schedule(temperature=temperature)

    def embed(self, views: Sequence[Any]) -> Rows:
        return tuple(self.rows(nn.Sequential(self.encoder, self.projector), views))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        assert batch.indices is not None
        own = self.instances.bank.keys[batch.indices]
        each = []
        for z in embedded:
            found = self.instances(z, batch.indices, self.temperature)
            apart = (nn.functional.normalize(z) - own).square().sum(1).mean()
            each.append(found + self.proximal * apart)
        return torch.stack(each).mean()
