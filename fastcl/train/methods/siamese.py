"""What the Siamese methods share: a projector, and for some a predictor or a slow copy of the network."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.distributed.gather import gather_rows, row_counts
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Augment, Batch, Method, Rows
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import ClosedUnitInterval, PositiveInt
from fastcl.train.schedules import Value
from fastcl.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SiameseSettings(Settings):
    """The options of methods with wider heads than the features."""

    hidden: Annotated[PositiveInt, "Width of the hidden layers of projector and predictor."]


@dataclass(frozen=True, kw_only=True)
class SlowCopySettings(SiameseSettings):
    """The options of methods with a slow copy of the network."""

    momentum: Annotated[ClosedUnitInterval, "Momentum of the slow copy, at the start."]
    momentum_end: Annotated[ClosedUnitInterval | None, "At the end; null: constant."] = 1.0


class Siamese(Method):
    """Views of a sample are compared in pairs, each with one of the first two views.

    Without predictor and slow copy a pair is compared once, both sides with their gradient; otherwise each
    of the two sides' prediction with the other side's target, which is the slow copy's projection or,
    without one, the projection itself as a constant. The loss is the mean over the comparisons.

    Args:
        encoder: samples to features (N, F); what is kept after training.
        augment: samples to random views of them, called once for each of two views; or one function per
            view.
        projector: features to projections (N, D).
        predictor: projections to predictions (N, D), if any.
        momentum: of a slow copy of encoder and projector; None: there is none.
        optimization: the optimizer and its schedules.
    """

    views_share_batch_norm = False
    momentum: float

    def __init__(
        self,
        encoder: nn.Module,
        augment: Augment | Sequence[Augment],
        *,
        projector: nn.Module,
        predictor: nn.Module | None = None,
        momentum: Value | None = None,
        optimization: Optimization,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = projector
        self.predictor = predictor
        self.slow_copy: nn.Module | None = None
        if momentum is not None:
            self.slow_copy = deepcopy(self.network).requires_grad_(False)
            self.schedule(momentum=momentum)

    @property
    def network(self) -> nn.Sequential:
        """Encoder and projector, which the slow copy follows."""
        return nn.Sequential(self.encoder, self.projector)

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        """The loss of one pair of views, (): (N, D) rows, of which ``target``'s may be constants."""
        raise NotImplementedError

    def embed(self, views: Sequence[Any]) -> Rows:
        projections = self.rows(self.network, views)
        if self.predictor is None:
            return tuple(projections)
        predictions = [self.predictor(z) for z in projections]
        constants = () if self.slow_copy is not None else [z.detach() for z in projections[:2]]
        return (*predictions, *constants)

    @torch.no_grad()
    def targets(self, views: Sequence[Any]) -> Rows:
        if self.slow_copy is None:
            return ()
        fastcl.momentum_update_(self.slow_copy, self.network, self.momentum)
        if self.encode_chunk is None:
            return tuple(self.rows(self.slow_copy, views[:2]))
        chunks = zip(*(view.split(self.encode_chunk) for view in views[:2]), strict=True)
        parts = [self.rows(self.slow_copy, chunk) for chunk in chunks]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        online = embedded[: len(batch.views)]
        targets = self._targets(embedded, targets)
        both_ways = self.predictor is not None or self.slow_copy is not None
        losses = [
            self.compare(x, y)
            for i, x in enumerate(online)
            for j, y in enumerate(targets)
            if (i != j if both_ways else i > j)
        ]
        return torch.stack(losses).mean()

    def pairs(self, embedded: Rows, targets: Rows) -> dict[str, Tensor]:
        return measure_pairs(embedded[0], self._targets(embedded, targets)[1])

    def _targets(self, embedded: Rows, targets: Rows) -> Rows:
        if self.slow_copy is not None:
            return targets
        return embedded[:2] if self.predictor is None else embedded[-2:]

    def of_all_ranks(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, for a loss over the whole batch; differentiable."""
        group = self.group
        return rows if group is None else gather_rows(rows, row_counts(rows, group), group)


def perceptron(*widths: int, final_norm: bool = False) -> nn.Sequential:
    """Layers between ``widths``, batch-normalized and rectified but for the last.

    Args:
        *widths: of the input, the hidden layers and the output.
        final_norm: normalize the output too, without scale and shift.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not final_norm))
    if final_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
