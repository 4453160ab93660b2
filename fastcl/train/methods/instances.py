"""What the methods with a memory of all training samples share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastcl
from fastcl.similarity.checks import check_choice
from fastcl.train.evaluate.features import gather, summed
from fastcl.train.methods.base import Batch, Method, Rows
from fastcl.train.ranges import ClosedUnitInterval, NonNegativeInt
from fastcl.train.settings import ContrastiveSettings


@dataclass(frozen=True, kw_only=True)
class InstancesSettings(ContrastiveSettings):
    """The options of methods with a memory of all training images."""

    loss: Annotated[str, "'nce': each negative by itself; 'softmax': the image's own row among all."]
    noise: Annotated[NonNegativeInt, "Rows of the memory drawn as negatives per step; 0, softmax only: all."]
    bank_momentum: Annotated[ClosedUnitInterval, "Share of the old row in a row's update."] = 0.5


class Instances(nn.Module):
    """A memory of one row per training sample, in which a sample's row is told from others.

    The negatives are drawn once for all queries. NCE's constant Z is what the first batch's negatives say.

    Args:
        samples: how many.
        dim: width of their rows.
        loss: 'nce' or 'softmax'.
        noise: rows drawn as negatives per call; with 'softmax' 0, or as many as there are: all.
        momentum: share of the old row in its update.

    Attributes:
        bank: the memory.

    Raises:
        ValueError: an unknown loss; 'nce' without noise.
    """

    log_z: Tensor

    def __init__(self, samples: int, dim: int, *, loss: str, noise: int, momentum: float) -> None:
        super().__init__()
        check_choice("loss", loss, ("nce", "softmax"))
        if loss == "nce" and not noise:
            raise ValueError("noise must be at least 1 for loss 'nce', got 0")
        self.bank = fastcl.MemoryBank(samples, dim, momentum=momentum)
        self.estimates = loss == "nce"
        self.noise = 0 if loss == "softmax" and noise >= samples else noise
        if self.estimates:
            self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(self, query: Tensor, indices: Tensor, temperature: float) -> Tensor:
        """The loss, (), of (N, dim) queries of the samples at ``indices`` (N,)."""
        if not self.noise:
            keys = self.bank.keys.to(query, copy=True)  # the memory moves before the backward pass
            return fastcl.prototype_nce(query, keys, indices, temperature)
        drawn = torch.randint(self.bank.size, (self.noise,), device=query.device)
        own, others = self.bank.keys[indices].to(query), self.bank.keys[drawn].to(query)
        query = nn.functional.normalize(query)
        if self.estimates:
            log_z = self._log_z(query, others, temperature)
            log_noise = -math.log(self.bank.size)
            return fastcl.nce_loss(query, own, others, temperature, log_z=log_z, log_noise=log_noise)
        logits = (query * own).sum(1, keepdim=True) / temperature
        rule = fastcl.PairRule(exclude=(indices, drawn))
        stats = fastcl.similarity_stats(query, others, scale=1 / temperature, rule=rule)
        return stats.join(positives=logits).any_positive().mean()

    @torch.no_grad()
    def _log_z(self, query: Tensor, others: Tensor, temperature: float) -> float:
        known = self.log_z.item()
        if math.isnan(known):
            logits = fastcl.similarity_stats(query, others, scale=1 / temperature).lse_neg
            mean = (logits - math.log(len(others))).exp().mean()
            summed(mean)
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            self.log_z.copy_((mean / ranks * self.bank.size).log())
            known = self.log_z.item()
        return known

    def update(self, rows: Tensor, indices: Tensor) -> None:
        """Move the samples' rows in the memory towards these (N, dim), on all ranks those of all."""
        self.bank.update(gather(indices), gather(rows.detach()))


class WithMemory(Method):
    """A method whose samples find their rows in a memory, which the first of a sample's projections moves."""

    needs_indices = True
    data_arguments = ("samples",)
    temperature: float
    instances: Instances

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        assert batch.indices is not None
        self.instances.update(embedded[0], batch.indices)
