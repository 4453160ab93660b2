"""MoCo v2, the whole method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import fastcl
from fastcl.train.batchnorm import encode_shuffled, split_batch_norm
from fastcl.train.checkpoints import entries
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Augment, Batch, Method, Rows, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import ClosedUnitInterval, PositiveInt
from fastcl.train.schedules import Value
from fastcl.train.settings import ContrastiveSettings, RunSettings

_DEFAULT = Optimization("sgd", lr=0.03)


@dataclass(frozen=True, kw_only=True)
class MoCoSettings(ContrastiveSettings):
    """MoCo's own."""

    queue_size: Annotated[PositiveInt, "Keys in the queue."]
    momentum: Annotated[ClosedUnitInterval, "Momentum of the key encoder, at the start."]
    momentum_end: Annotated[ClosedUnitInterval | None, "At the end; null: constant."] = None
    bn_splits: Annotated[PositiveInt, "Parts of the batch for batch normalization in a single process."] = 8


_MOCO_V2 = {"temperature": 0.2, "optimizer": "sgd", "weight_decay": 1e-4, "momentum": 0.999}
RECIPE: Recipe = {
    "digits": {"queue_size": 1024, "momentum": 0.99},
    "small": {**_MOCO_V2, "lr": 0.03, "queue_size": 4096, "momentum": 0.99, "warmup_epochs": 0},
    "large": {
        **_MOCO_V2,
        **{"lr": 0.03, "queue_size": 65536, "epochs": 200, "batch_size": 256, "warmup_epochs": 0},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": True},
    },
}


@register(
    "moco",
    "MoCo v2: a view finds its key among a queue of earlier keys (He et al. 2020, arXiv 1911.05722)",
    settings=MoCoSettings,
    recipe=RECIPE,
)
class MoCo(Method):
    """MoCo v2: a view must find the key of its other view among a queue of earlier keys.

    He et al. 2020, https://arxiv.org/abs/1911.05722; v2: Chen et al. 2020, https://arxiv.org/abs/2003.04297.
    Keys come from a slowly following copy of the encoder. Its batch normalization must not tell which
    key belongs to which query: keys are shuffled over the processes; a single process normalizes in
    ``bn_splits`` parts instead, as so many devices would.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view, of which the
            second gives the keys.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss; a number, or a schedule of it.
        queue_size: how many keys the queue holds.
        momentum: of the key encoder; a number, or a schedule of it.
        bn_splits: parts of the batch for batch normalization; 1: the encoder's own.
        optimization: the optimizer and its schedule.
    """

    synchronizes_batch_norm = False  # keys are shuffled instead
    temperature: float
    momentum: float

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 128,
        temperature: Value = 0.2,
        queue_size: int = 65536,
        momentum: Value = 0.999,
        bn_splits: int = 8,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        if bn_splits > 1:
            split_batch_norm(encoder, bn_splits)
        self.projector = projection_head(features, dim, batch_norm=False)
        self.key_encoder = deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = fastcl.NegativeQueue(queue_size, dim)
        self.schedule(temperature=temperature, momentum=momentum)

    @classmethod
    def own_options(cls, settings: RunSettings) -> dict[str, Any]:
        own = super().own_options(settings)
        if settings.processes > 1:
            own["bn_splits"] = 1  # keys are shuffled over the processes instead
        for name, size in (("batch_size", settings.batch_size), ("encode_chunk", settings.encode_chunk)):
            if size is not None and size % own["bn_splits"] != 0:
                raise ValueError(f"{name} must be a multiple of bn_splits = {own['bn_splits']}, got {size}")
        return own

    @property
    def query_encoder(self) -> nn.Sequential:
        """Encoder and projector, which the key encoder follows."""
        return nn.Sequential(self.encoder, self.projector)

    def embed(self, views: Sequence[Any]) -> Rows:
        """The queries: of every view but the second, the key's."""
        return tuple(self.rows(self.query_encoder, [view for i, view in enumerate(views) if i != 1]))

    @torch.no_grad()
    def targets(self, views: Sequence[Any]) -> Rows:
        fastcl.momentum_update_(self.key_encoder, self.query_encoder, self.momentum)
        return (encode_shuffled(self.key_encoder, views[1], seed=self.global_step),)

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        """Of this rank's queries: the queue is the same on every rank."""
        return torch.stack([self.contrast(query, targets[0]) for query in embedded]).mean()

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss of (N, dim) queries and their keys."""
        return fastcl.info_nce(query, key, self.queue, self.temperature)

    def pairs(self, embedded: Rows, targets: Rows) -> dict[str, Tensor]:
        return measure_pairs(embedded[0], targets[0], self.queue.keys)

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        self.queue.enqueue(targets[0], group=self.group)

    def load_moco(self, state: Mapping[str, Tensor]) -> None:
        """Take encoders, heads and queue; without a key encoder in the checkpoint it is the query's."""
        super().load_moco(state)
        self.projector.load_state_dict(entries(state, "encoder_q.fc."))
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        if encoder := entries(state, "encoder_k.", without="fc."):
            self.key_encoder[0].load_state_dict(encoder)
            self.key_encoder[1].load_state_dict(entries(state, "encoder_k.fc."))
        if "queue" in state:
            self.queue.load_moco_state_dict(state)
