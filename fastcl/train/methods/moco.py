"""MoCo v2, the whole method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn

import fastcl
from fastcl.train.batchnorm import encode_shuffled, split_batch_norm
from fastcl.train.checkpoints import entries
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Batch, Method, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.settings import Settings

_DEFAULT = Optimization("sgd", lr=0.03)


@dataclass(frozen=True, kw_only=True)
class MoCoSettings(Settings):
    """MoCo's own."""

    queue_size: Annotated[PositiveInt, "Keys in the queue."]
    momentum: Annotated[ClosedUnitInterval, "Momentum of the key encoder."]
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
    "MoCo v2: a view finds its key among a queue of earlier keys (He et al. 2020)",
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
        augment: a batch of images to a batch of random views of them; called once per view.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss.
        queue_size: how many keys the queue holds.
        momentum: of the key encoder.
        bn_splits: parts of the batch for batch normalization; 1: the encoder's own.
        optimization: the optimizer and its schedule.
    """

    synchronizes_batch_norm = False  # keys are shuffled instead

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Callable[[Tensor], Tensor],
        *,
        dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 65536,
        momentum: float = 0.999,
        bn_splits: int = 8,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, temperature=temperature, optimization=optimization)
        if bn_splits > 1:
            split_batch_norm(encoder, bn_splits)
        self.projector = projection_head(features, dim, batch_norm=False)
        self.key_encoder = deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = fastcl.NegativeQueue(queue_size, dim)
        self.momentum = momentum

    @classmethod
    def own_options(cls, settings: Settings) -> dict[str, Any]:
        own = super().own_options(settings)
        if settings.devices > 1:
            own["bn_splits"] = 1  # keys are shuffled over the processes instead
        if settings.batch_size % own["bn_splits"] != 0:
            raise ValueError(
                f"batch_size must be a multiple of bn_splits = {own['bn_splits']}, got {settings.batch_size}"
            )
        return own

    @property
    def query_encoder(self) -> nn.Sequential:
        """Encoder and projector, which the key encoder follows."""
        return nn.Sequential(self.encoder, self.projector)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2, *_ = batch
        query = self.projector(self.encoder(view1))
        fastcl.momentum_update_(self.key_encoder, self.query_encoder, self.momentum)
        key = encode_shuffled(self.key_encoder, view2, seed=self.global_step)
        with self.timed("loss"):
            loss = self.loss(query, key)
        self.record(loss, lambda: measure_pairs(query, key, self.queue.keys), batch_idx)
        self.queue.enqueue(key, group=self.group)
        return loss

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Of this rank's queries: the queue is the same on every rank."""
        return fastcl.info_nce(query, key, self.queue, self.temperature)

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
