"""CLIP, the whole method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.registry import register
from fastcl.train.methods.sides import TwoSided
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import Temperature
from fastcl.train.settings import GlyphSettings

_DEFAULT = Optimization("adamw", lr=5e-4, weight_decay=0.2)
_LARGEST_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class CLIPSettings(GlyphSettings):
    """CLIP's own."""

    temperature: Annotated[Temperature, "Temperature of the loss, at the start; it is learned."]


@register(
    "clip",
    "images and their texts find each other among the batch (Radford et al. 2021, arXiv 2103.00020)",
    settings=CLIPSettings,
    recipe={
        "glyphs": {"temperature": 0.07, "epochs": 11, "batch_size": 512, "lr": 3e-3, "weight_decay": 0.2}
    },
)
class CLIP(TwoSided):
    """CLIP: each image must find its text among those of the batch, each text its image.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020. With several processes the batch is that of all.
    Batches are ((images, texts),), or anything else with two sides.

    Args:
        encoder: one per side, each to features (N, features of that side); what is kept after training.
        features: widths of the encoders' outputs.
        augment: per side, a batch of it to one of random views of it.
        dim: width of the projections, linear, on which the loss is computed.
        temperature: of the loss, at the start; it is learned, and at least 0.01.
        optimization: the optimizer and its schedules.
    """

    def __init__(
        self,
        encoder: nn.ModuleList,
        features: Sequence[int],
        augment: Sequence[Augment],
        *,
        dim: int = 512,
        temperature: float = 0.07,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projectors = nn.ModuleList(nn.Linear(width, dim, bias=False) for width in features)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def evaluated(self) -> nn.ModuleList:
        """Per side, its encoder and projection."""
        assert isinstance(self.encoder, nn.ModuleList)
        return nn.ModuleList(map(nn.Sequential, self.encoder, self.projectors))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        images, texts = embedded
        return fastcl.clip_loss(images, texts, self.log_scale.exp(), group=self.group)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log_scale.clamp_(max=math.log(_LARGEST_SCALE))
