"""SimSiam, the whole method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import Siamese, SiameseSettings, perceptron
from fastcl.train.optimizers import Optimization

_DEFAULT = Optimization("sgd", lr=0.05)

_RECIPE: Recipe = {
    "digits": {"dim": 128, "hidden": 32},
    "small": {
        **{"dim": 2048, "hidden": 512, "warmup_epochs": 0},
        **{"optimizer": "sgd", "lr": 0.03, "weight_decay": 5e-4},
    },
    "large": {
        **{"dim": 2048, "hidden": 512, "warmup_epochs": 0},
        **{"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4},
        **{"epochs": 100, "batch_size": 512},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": True},
    },
}


@register(
    "simsiam",
    "each view predicts the other's projection, a constant (Chen and He 2021, arXiv 2011.10566)",
    settings=SiameseSettings,
    recipe=_RECIPE,
)
class SimSiam(Siamese):
    """SimSiam: the prediction of each view meets the other's projection, a constant; no negatives.

    Chen and He 2021, https://arxiv.org/abs/2011.10566. The learning rate falls in the predictor, too.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of projection and prediction, and of the projector's hidden layers.
        hidden: width of the predictor's hidden layer.
        optimization: the optimizer and its schedules.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 2048,
        hidden: int = 512,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(
            encoder,
            augment,
            projector=perceptron(features, dim, dim, dim, final_norm=True),
            predictor=perceptron(dim, hidden, dim),
            optimization=optimization,
        )

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        return fastcl.negative_cosine(online, target)
