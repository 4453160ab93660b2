"""CPC, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Augment, Batch, Method, Rows
from fastcl.train.methods.patches import patches
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import PositiveInt
from fastcl.train.settings import Settings

_DEFAULT = Optimization("adamw", lr=2e-4)


@dataclass(frozen=True, kw_only=True)
class CPCSettings(Settings):
    """CPC's own."""

    grid: Annotated[PositiveInt, "Patches in each direction; neighbours overlap by half."] = 7
    steps: Annotated[PositiveInt, "Rows of patches ahead that are predicted, fewer than there are."] = 5


_RECIPE: Recipe = {
    "digits": {"grid": 3, "steps": 2},
    "small": {"optimizer": "adamw", "lr": 2e-4, "weight_decay": 1e-4, "grid": 3, "steps": 2},
    "large": {
        **{"optimizer": "adamw", "lr": 2e-4, "weight_decay": 1e-4, "dim": 1024, "arch": "resnet101"},
        **{"epochs": 200, "batch_size": 128, "warmup_epochs": 0, "image_size": 256},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False},
    },
}


@register(
    "cpc",
    "rows of patches predict the rows below (van den Oord et al. 2018, arXiv 1807.03748)",
    settings=CPCSettings,
    recipe=_RECIPE,
)
class CPC(Method):
    """CPC: from the patches above, those below are predicted and found among all patches of the batch.

    Van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, section 3.2. A patch's context is that of a
    gated recurrent unit down its column; the paper's is of a PixelCNN. What is evaluated is the mean over an
    image's patches. With several processes the batch is that of all.

    Args:
        encoder: patches to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view, of which the
            first two count, each by itself.
        dim: width of the context and of what is predicted.
        grid: patches in each direction; neighbours overlap by half.
        steps: rows of patches ahead that are predicted.
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: not fewer steps than rows of patches.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 1024,
        grid: int = 7,
        steps: int = 5,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        if steps >= grid:
            raise ValueError(f"steps must be fewer than the {grid} rows of patches, got {steps}")
        super().__init__(encoder, augment, optimization=optimization)
        self.grid = grid
        self.projector = nn.Linear(features, dim)
        self.context = nn.GRU(dim, dim, batch_first=True)
        self.predictors = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(steps))

    @property
    def evaluated(self) -> nn.Module:
        return PatchMean(self.encoder, self.grid)

    def embed(self, views: Sequence[Any]) -> Rows:
        """Contexts and latents, both (columns of all images, rows, dim)."""
        features = encode_patches(self.encoder, torch.cat(list(views[:2])), self.grid)
        latents = self.projector(features).transpose(1, 2).flatten(0, 1)
        return self.context(latents)[0], latents

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        each = [
            fastcl.info_nce(*self._pairs(embedded, k), temperature=1.0, normalize=False, group=self.group)
            for k in range(1, len(self.predictors) + 1)
        ]
        return torch.stack(each).mean()

    def pairs(self, embedded: Rows, targets: Rows) -> dict[str, Tensor]:
        return measure_pairs(*self._pairs(embedded, 1))

    def _pairs(self, embedded: Rows, k: int) -> tuple[Tensor, Tensor]:
        """What is predicted of the patches ``k`` rows ahead, and those: both (N, dim)."""
        context, latents = embedded
        predicted: Tensor = self.predictors[k - 1](context[:, :-k])
        return predicted.flatten(0, 1), latents[:, k:].flatten(0, 1)


class PatchMean(nn.Module):
    """The mean of an encoder's features over an image's patches."""

    def __init__(self, encoder: nn.Module, grid: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to features (N, F)."""
        return encode_patches(self.encoder, images, self.grid).mean(dim=(1, 2))


def encode_patches(encoder: nn.Module, images: Tensor, grid: int) -> Tensor:
    """The features (N, grid, grid, F) of the patches of square images, of which neighbours overlap by half.

    Raises:
        ValueError: too few pixels.
    """
    stride = images.shape[2] // (grid + 1)
    if stride < 1:
        raise ValueError(f"grid must be below the images' side, got {grid} for {tuple(images.shape[2:])}")
    cut = patches(images, 2 * stride, stride)[:, :grid, :grid]
    features: Tensor = encoder(cut.flatten(0, 2)).unflatten(0, cut.shape[:3])
    return features
