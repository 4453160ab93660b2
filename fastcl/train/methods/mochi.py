"""MoCHi, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment
from fastcl.train.methods.moco import RECIPE as MOCO
from fastcl.train.methods.moco import MoCo, MoCoSettings
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True, kw_only=True)
class MoCHiSettings(MoCoSettings):
    """MoCHi's own."""

    n_hard: Annotated[PositiveInt, "The queue's most similar keys that are mixed from."]
    n_mix: Annotated[NonNegativeInt, "Mixtures of two of them, per query."]
    n_query_mix: Annotated[NonNegativeInt, "Mixtures of one of them with the query, per query."]
    mix_from_epoch: Annotated[NonNegativeInt, "Plain MoCo before this epoch."]


_MOCHI = {"n_hard": 1024, "n_mix": 512, "n_query_mix": 256, "mix_from_epoch": 10}
_RECIPE: Recipe = {
    "digits": {
        **MOCO["digits"],
        "n_hard": 64,
        "n_mix": 32,
        "n_query_mix": 16,
        "mix_from_epoch": 5,
    },
    "small": {**MOCO["small"], **_MOCHI},
    "large": {**MOCO["large"], **_MOCHI},
}


@register(
    "mochi",
    "MoCo v2 with mixed hard negatives (Kalantidis et al. 2020, arXiv 2010.01028)",
    settings=MoCHiSettings,
    recipe=_RECIPE,
)
class MoCHi(MoCo):
    """MoCHi: MoCo v2 with negatives mixed from each query's hardest ones.

    Kalantidis et al. 2020, https://arxiv.org/abs/2010.01028.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: as :class:`MoCo`'s.
        n_hard: how many of the queue's most similar keys are mixed from.
        n_mix: mixtures of two of them, per query.
        n_query_mix: mixtures of one of them with the query, per query.
        mix_from_epoch: plain MoCo before this epoch.
        **moco: the other arguments of :class:`MoCo`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        n_hard: int = 1024,
        n_mix: int = 512,
        n_query_mix: int = 256,
        mix_from_epoch: int = 10,
        **moco: Any,
    ) -> None:
        super().__init__(encoder, features, augment, **moco)
        self.n_hard = n_hard
        self.n_mix = n_mix
        self.n_query_mix = n_query_mix
        self.mix_from_epoch = mix_from_epoch

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        if self.current_epoch < self.mix_from_epoch:
            return super().contrast(query, key)
        return fastcl.mochi_loss(
            query,
            key,
            self.queue,
            temperature=self.temperature,
            n_hard=self.n_hard,
            n_mix=self.n_mix,
            n_query_mix=self.n_query_mix,
        )
