"""SigLIP, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.clip import CLIP, CLIPSettings
from fastcl.train.methods.registry import register

_BIAS = -10.0


@register(
    "siglip",
    "each image and text are told to be a pair or not (Zhai et al. 2023, arXiv 2303.15343)",
    settings=CLIPSettings,
    recipe={"glyphs": {"temperature": 0.1}},
)
class SigLIP(CLIP):
    """SigLIP: of each image and each text of the batch it must be told whether they are a pair.

    Zhai et al. 2023, https://arxiv.org/abs/2303.15343. With several processes the batch is that of all.

    Args:
        encoder: one per side, each to features (N, features of that side); what is kept after training.
        features: widths of the encoders' outputs.
        augment: per side, a batch of it to one of random views of it.
        temperature: of the loss, at the start; it is learned, and at least 0.01. The bias, too, from -10 on.
        **clip: the other arguments of :class:`CLIP`.
    """

    def __init__(
        self,
        encoder: nn.ModuleList,
        features: Sequence[int],
        augment: Sequence[Augment],
        *,
        temperature: float = 0.1,
        **clip: Any,
    ) -> None:
        super().__init__(encoder, features, augment, temperature=temperature, **clip)
        self.bias = nn.Parameter(torch.tensor(_BIAS))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        images, texts = embedded
        return fastcl.siglip_loss(images, texts, self.log_scale.exp(), self.bias, group=self.group)
