"""MoCo v3, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import Siamese, SlowCopySettings, perceptron
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Cosine, Value
from fastcl.train.settings import ContrastiveSettings

_DEFAULT = Optimization("lars", lr=4.8, weight_decay=1.5e-6, warmup_epochs=10)
_MOMENTUM = Cosine(0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class MoCoV3Settings(ContrastiveSettings, SlowCopySettings):
    """MoCo v3's own."""


_RECIPE: Recipe = {
    "digits": {"hidden": 256, "momentum": 0.99},
    "small": {
        **{"dim": 256, "hidden": 1024, "momentum": 0.99, "temperature": 0.2},
        **{"optimizer": "lars", "lr": 0.6, "weight_decay": 1.5e-6},
    },
    "large": {
        **{"dim": 256, "hidden": 4096, "momentum": 0.99, "temperature": 1.0},
        **{"optimizer": "lars", "lr": 0.3, "weight_decay": 1.5e-6},
        **{"epochs": 300, "batch_size": 4096, "warmup_epochs": 10},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": True},
    },
}


@register(
    "moco-v3",
    "each view's prediction finds its key in the batch of a slow copy's (Chen et al. 2021, arXiv 2104.02057)",
    settings=MoCoV3Settings,
    recipe=_RECIPE,
)
class MoCoV3(Siamese):
    """MoCo v3: the prediction of each view must find the slow copy's key of the other among the batch's.

    Chen et al. 2021, https://arxiv.org/abs/2104.02057. With several processes the keys are those of all.
    Of a vision transformer the patch embedding keeps its random initial weights.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of projection and prediction.
        hidden: width of the heads' hidden layers.
        temperature: of the loss; a number, or a schedule of it.
        momentum: of the slow copy; a number, or a schedule of it.
        optimization: the optimizer and its schedules.
    """

    temperature: float

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 256,
        hidden: int = 4096,
        temperature: Value = 1.0,
        momentum: Value = _MOMENTUM,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        patches: nn.Module | None = getattr(encoder, "patch_embed", None)
        depth = 1 if patches is None else 2
        super().__init__(
            encoder,
            augment,
            projector=perceptron(features, *[hidden] * depth, dim, final_norm=True),
            predictor=perceptron(dim, hidden, dim, final_norm=patches is not None),
            momentum=momentum,
            optimization=optimization,
        )
        if patches is not None:
            patches.requires_grad_(False)
        self.schedule(temperature=temperature)

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        loss = fastcl.info_nce(online, target, temperature=self.temperature, group=self.group)
        return 4 * self.temperature * loss  # twice the pair's: both ways are summed
