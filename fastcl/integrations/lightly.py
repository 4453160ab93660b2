"""lightly's NTXentLoss, DCLLoss and DCLWLoss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import ids_of_rows
from fastcl.integrations._peer import in_dtype_of, peer
from fastcl.integrations.vision import ensure_torchvision
from fastcl.losses.info_nce import info_nce
from fastcl.losses.nt_xent import nt_xent
from fastcl.similarity.numerics import row_dot, unit_rows
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats

with peer("lightly>=1.6,<1.7"):
    ensure_torchvision()
    from lightly import loss as original


class NTXentLoss(original.NTXentLoss):
    """``lightly.loss.NTXentLoss``: SimCLR's loss, with a memory bank MoCo's."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss, (), of two views (N, D); over ranks with ``gather_distributed`` this rank's mean."""
        if self.memory_bank.size[0]:
            query, positive = nn.functional.normalize(out0), nn.functional.normalize(out1)
            positive, bank = self.memory_bank(positive, update=query.requires_grad)
            loss = info_nce(query, positive, bank.T.to(query.device), self.temperature, normalize=False)
        else:
            group = _ranks(self)
            reduction = "mean" if group is None else "none"
            loss = nt_xent(out0, out1, self.temperature, reduction=reduction, group=group).mean()
        return in_dtype_of(out0, loss)


class DCLLoss(original.DCLLoss):
    """``lightly.loss.DCLLoss``: the decoupled loss, with any weights of the positives."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss, (), of two views (N, D); over ranks with ``gather_distributed`` this rank's mean."""
        group = _ranks(self)
        x, y = unit_rows(out0), unit_rows(out1)
        rows, ids = torch.cat([x, y]), ids_of_rows(len(x), group, x.device).repeat(2)
        others = PairRule(exclude=(ids, ids))
        lse = similarity_stats(rows, rows, scale=1 / self.temperature, rule=others, group=group).lse_neg
        positive = row_dot(x, y) / self.temperature
        if self.weight_fn:
            positive = positive * (self.weight_fn(x, y) + self.weight_fn(y, x)) / 2
        return in_dtype_of(out0, lse.mean() - positive.mean())


class DCLWLoss(DCLLoss, original.DCLWLoss):
    """``lightly.loss.DCLWLoss``: the decoupled loss, positives weighted by their similarity."""


def _ranks(loss: NTXentLoss | DCLLoss) -> dist.ProcessGroup | None:
    spread = loss.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if spread else None
