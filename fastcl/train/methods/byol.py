"""BYOL, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import Siamese, SlowCopySettings, perceptron
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Cosine, Value

_DEFAULT = Optimization("lars", lr=3.2, weight_decay=1.5e-6, warmup_epochs=10)
_MOMENTUM = Cosine(0.996, 1.0)


@dataclass(frozen=True, kw_only=True)
class BYOLSettings(SlowCopySettings):
    """BYOL's own."""

    final_norm: Annotated[
        bool, "Normalize the projections over the batch, as SimSiam does: short runs learn faster."
    ] = False


_RECIPE: Recipe = {
    "digits": {"hidden": 256, "momentum": 0.99},
    "small": {
        **{"dim": 256, "hidden": 1024, "momentum": 0.99},
        **{"optimizer": "lars", "lr": 1.0, "weight_decay": 1.5e-6},
    },
    "large": {
        **{"dim": 256, "hidden": 4096, "momentum": 0.99},
        **{"optimizer": "lars", "lr": 0.45, "weight_decay": 1e-6},
        **{"epochs": 300, "batch_size": 4096, "warmup_epochs": 10},
        **{"crop_min": 0.08, "jitter": 0.4, "blur": True},
    },
}


@register(
    "byol",
    "each view predicts a slow copy's projection of the other (Grill et al. 2020, arXiv 2006.07733)",
    settings=BYOLSettings,
    recipe=_RECIPE,
)
class BYOL(Siamese):
    """BYOL: the prediction of each view meets the other view's projection by a slow copy; no negatives.

    Grill et al. 2020, https://arxiv.org/abs/2006.07733. Unlike there, both views are augmented alike.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of projection and prediction.
        hidden: width of the heads' hidden layers.
        momentum: of the slow copy; a number, or a schedule of it.
        final_norm: batch-normalize the projections, without scale and shift, which the paper does not: no
            mean is then common to all of them.
        optimization: the optimizer and its schedules.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 256,
        hidden: int = 4096,
        momentum: Value = _MOMENTUM,
        final_norm: bool = False,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(
            encoder,
            augment,
            projector=perceptron(features, hidden, dim, final_norm=final_norm),
            predictor=perceptron(dim, hidden, dim),
            momentum=momentum,
            optimization=optimization,
        )

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        return 4 + 4 * fastcl.negative_cosine(online, target)  # twice the pair's: both ways are summed
