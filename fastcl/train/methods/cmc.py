"""CMC, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.train.data.photos import lightness_and_colour
from fastcl.train.methods.base import Augment, Batch, Method, Rows
from fastcl.train.methods.instances import Instances, InstancesSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Value

_DEFAULT = Optimization("sgd", lr=0.03)


@dataclass(frozen=True, kw_only=True)
class CMCSettings(InstancesSettings):
    """CMC's own."""


_CMC = {"loss": "nce", "noise": 16384, "temperature": 0.07, "optimizer": "sgd", "weight_decay": 1e-4}
_RECIPE: Recipe = {
    "digits": {"loss": "nce", "noise": 512},
    "small": {**_CMC, "noise": 4096, "lr": 0.03, "warmup_epochs": 0},
    "large": {
        **{**_CMC, "lr": 0.03, "epochs": 240, "batch_size": 128, "warmup_epochs": 0},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False},
    },
}


@register(
    "cmc",
    "an image's lightness and colours find each other in two memories (Tian et al. 2020, arXiv 1906.05849)",
    settings=CMCSettings,
    recipe=_RECIPE,
)
class CMC(Method):
    """CMC: the lightness of an image finds its colours in a memory of all images' colours, and the reverse.

    Tian et al. 2020, https://arxiv.org/abs/1906.05849. Each half, L or ab of CIE Lab, has a network of its
    own; what is evaluated is both networks' features. With several processes the memories are those of all.

    Args:
        encoder: images to features (N, features), of the lightness; the colours' is a copy of it.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        samples: how many training images there are.
        dim: width of the projections and of the memories' rows.
        temperature: of the loss; a number, or a schedule of it.
        loss: 'nce' (noise-contrastive estimation) or 'softmax'.
        noise: rows of a memory drawn as negatives per step; 0 with 'softmax': all.
        bank_momentum: share of the old row in its update, which is by the first view.
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: an unknown loss; 'nce' without noise.
    """

    needs_indices = True
    needs_colours = True
    data_arguments = ("samples",)
    temperature: float

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
        noise: int = 16384,
        bank_momentum: float = 0.5,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.colour_encoder = deepcopy(encoder)
        self.projectors = nn.ModuleList(nn.Linear(features, dim) for _ in range(2))
        self.memories = nn.ModuleList(
            Instances(samples, dim, loss=loss, noise=noise, momentum=bank_momentum) for _ in range(2)
        )
        self.schedule(temperature=temperature)

    @property
    def evaluated(self) -> nn.Module:
        return Halves(self.encoder, self.colour_encoder)

    def embed(self, views: Sequence[Any]) -> Rows:
        """Of lightness and colours of each view."""
        halves = Halves(*(nn.Sequential(*pair) for pair in zip(self._encoders, self.projectors, strict=True)))
        return tuple(z for both in self.rows(halves, views) for z in both.chunk(2, dim=1))

    @property
    def _encoders(self) -> tuple[nn.Module, nn.Module]:
        return self.encoder, self.colour_encoder

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        each = []
        for lightness, colours in zip(embedded[::2], embedded[1::2], strict=True):
            for z, memory in zip((colours, lightness), self.memories, strict=True):
                each.append(memory(z, batch.indices, self.temperature))
        return 2 * torch.stack(each).mean()  # both directions are summed

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        for memory, z in zip(self.memories, embedded, strict=False):
            memory.update(z, batch.indices)  # type: ignore[operator]


class Halves(nn.Module):
    """A network for the lightness of images and one for their colours: images to both outputs in one."""

    def __init__(self, of_lightness: nn.Module, of_colours: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList([of_lightness, of_colours])

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) to (N, 2 F)."""
        halves = lightness_and_colour(images)
        return torch.cat([network(x) for network, x in zip(self.networks, halves, strict=True)], dim=1)
