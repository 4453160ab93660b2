"""What SwAV and DINO share: each crop predicts the soft assignment of the others to trained prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.siamese import Siamese, SiameseSettings
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import NonNegativeInt, Several, Temperature
from fastcl.train.schedules import Value
from fastcl.train.settings import ContrastiveSettings


@dataclass(frozen=True, kw_only=True)
class PrototypicalSettings(SiameseSettings, ContrastiveSettings):
    """The options of methods with trained prototypes."""

    prototypes: Annotated[Several, "Trained prototypes, to which crops are softly assigned."]
    target_temperature: Annotated[Temperature, "Temperature of the predicted assignments, at the start."]
    target_temperature_end: Annotated[Temperature | None, "At the end; null: constant."] = None
    frozen_epochs: Annotated[NonNegativeInt, "Epochs before the prototypes are trained."] = 1


class PrototypeHead(nn.Module):
    """A projector and the prototypes that its rows are compared with.

    Args:
        projector: features to projections (N, dim).
        count: how many prototypes.
        dim: their width.

    Attributes:
        prototypes: (count, dim), the parameter; normalized where it is used.
    """

    def __init__(self, projector: nn.Module, count: int, dim: int) -> None:
        super().__init__()
        self.projector = projector
        self.prototypes = nn.Parameter(nn.functional.normalize(torch.randn(count, dim)))

    def forward(self, features: Tensor) -> Tensor:
        """Projections (N, dim)."""
        projections: Tensor = self.projector(features)
        return projections


class Prototypical(Siamese):
    """Each crop predicts the soft assignment of each other of the first two crops to the prototypes.

    The assignment is the slow copy's or, without one, the network's own, as a constant.

    Args:
        encoder: images to features (N, F); what is kept after training.
        augment: a batch of images to one of random crops, called once for each of two; or one function per
            crop.
        projector: features to projections (N, dim).
        prototypes: how many.
        dim: their width.
        temperature: of the prediction; a number, or a schedule of it.
        target_temperature: of the assignment; a number, or a schedule of it.
        frozen_epochs: epochs before the prototypes are trained.
        momentum: of a slow copy of encoder, projector and prototypes; None: there is none.
        optimization: the optimizer and its schedules.
    """

    views_share_batch_norm = True
    temperature: float
    target_temperature: float

    def __init__(
        self,
        encoder: nn.Module,
        augment: Augment | Sequence[Augment],
        *,
        projector: nn.Module,
        prototypes: int,
        dim: int,
        temperature: Value = 0.1,
        target_temperature: Value,
        frozen_epochs: int = 1,
        momentum: Value | None = None,
        optimization: Optimization,
    ) -> None:
        head = PrototypeHead(projector, prototypes, dim)
        super().__init__(encoder, augment, projector=head, momentum=momentum, optimization=optimization)
        self.frozen_epochs = frozen_epochs
        self.schedule(temperature=temperature, target_temperature=target_temperature)

    @property
    def prototypes(self) -> Tensor:
        """(K, dim), trained."""
        return self.network.get_parameter("1.prototypes")

    @property
    def target_prototypes(self) -> Tensor:
        """(K, dim): the slow copy's or, without one, those that are trained."""
        return (self.network if self.slow_copy is None else self.slow_copy).get_parameter("1.prototypes")

    def biases(self, targets: Rows) -> Sequence[Tensor]:
        """(K,) for each of the two (N, dim) targets, added to its assignment's logits."""
        raise NotImplementedError

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        crops, targets = torch.stack(embedded), self._targets(embedded, targets)
        each = []
        for i, (target, bias) in enumerate(zip(targets, self.biases(targets), strict=True)):
            loss = fastcl.soft_cross_entropy(
                torch.cat([crops[:i], crops[i + 1 :]]),
                self.prototypes,
                target,
                self.target_prototypes,
                temperature=self.temperature,
                target_temperature=self.target_temperature,
                target_bias=bias,
                group=self.group,
            )
            each.append(loss)
        return torch.stack(each).mean()

    def balance(self, rows: Tensor, *, steps: int) -> Tensor:
        """(K,): the bias with which all ranks' rows use the prototypes about equally."""
        return fastcl.sinkhorn(
            rows.detach(),
            self.target_prototypes.detach(),
            temperature=self.target_temperature,
            steps=steps,
            group=self.group,
        )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.current_epoch < self.frozen_epochs:
            self.prototypes.grad = None
