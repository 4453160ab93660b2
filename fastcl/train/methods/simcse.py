"""SimCSE, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.registry import register
from fastcl.train.methods.sides import TwoSided
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import Temperature
from fastcl.train.settings import DefinitionSettings

_DEFAULT = Optimization("adamw", lr=3e-5, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class SimCSESettings(DefinitionSettings):
    """SimCSE's own."""

    temperature: Annotated[Temperature, "Temperature of the loss."] = 0.05


@register(
    "simcse",
    "a text finds itself under other dropout, or its pair, in the batch (Gao et al. 2021, arXiv 2104.08821)",
    settings=SimCSESettings,
    recipe={"definitions": {}},
)
class SimCSE(TwoSided):
    """SimCSE: each text must find itself among the batch, encoded once more with other dropout.

    Gao et al. 2021, https://arxiv.org/abs/2104.08821. Supervised, batches ((texts, others),) are pairs of
    texts that mean the same. With several processes the batch is that of all.

    Args:
        encoder: texts to features (N, features), with dropout; what is kept after training.
        features: width of the encoder's output.
        augment: per side, a batch of texts to one of views of them; :class:`torch.nn.Identity`, but for
            dropout.
        dim: width of the projection, linear, on which the loss is computed.
        temperature: of the loss.
        optimization: the optimizer and its schedules.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 768,
        temperature: float = 0.05,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = nn.Linear(features, dim, bias=False)
        self.temperature = temperature

    @property
    def evaluated(self) -> nn.ModuleList:
        """Encoder and projection, the same for both sides."""
        return nn.ModuleList([nn.Sequential(self.encoder, self.projector) for _ in range(2)])

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        query, key = embedded
        return fastcl.info_nce(query, key, temperature=self.temperature, group=self.group)
