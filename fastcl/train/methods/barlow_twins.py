"""Barlow Twins, the whole method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import Siamese, SiameseSettings, perceptron
from fastcl.train.optimizers import Optimization

_DEFAULT = Optimization("lars", lr=1.6, weight_decay=1.5e-6, warmup_epochs=10)

_RECIPE: Recipe = {
    "digits": {"dim": 128, "hidden": 128},
    "small": {
        **{"dim": 2048, "hidden": 2048},
        **{"optimizer": "lars", "lr": 0.2, "weight_decay": 1e-4},
    },
    "large": {
        **{"dim": 8192, "hidden": 8192},
        **{"optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6},
        **{"epochs": 1000, "batch_size": 2048, "warmup_epochs": 10},
        **{"crop_min": 0.08, "jitter": 0.4, "blur": True},
    },
}


@register(
    "barlow-twins",
    "the views' components correlate with themselves only (Zbontar et al. 2021, arXiv 2103.03230)",
    settings=SiameseSettings,
    recipe=_RECIPE,
)
class BarlowTwins(Siamese):
    """Barlow Twins: the cross-correlation of the two views' components is to be the identity.

    Zbontar et al. 2021, https://arxiv.org/abs/2103.03230. With several processes the batch is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of projection and prediction.
        hidden: width of the heads' hidden layers.
        optimization: the optimizer and its schedules.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 8192,
        hidden: int = 8192,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        projector = perceptron(features, hidden, hidden, dim)
        super().__init__(encoder, augment, projector=projector, optimization=optimization)

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        return fastcl.barlow_twins_loss(self.of_all_ranks(target), self.of_all_ranks(online))
