"""Other fused contrastive losses for GPUs, called as fastcl's: each where its package is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.packages import LossFunction

_CLIP_TEMPERATURE = 0.07  # memeff's is a number


@cache
def _memeff() -> Any:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=_CLIP_TEMPERATURE, stable=False)


def _memeff_clip(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """It gives the scale no gradient."""
    loss: Tensor = _memeff()(first, second)
    return loss + 0 * scale


def _inf_cl_clip(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    both: Tensor = cal_flash_loss(first, second, scale=scale) + cal_flash_loss(second, first, scale=scale)
    return both.mean() / 2


def _cut_cross_entropy(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
    """Without its filter of small gradients, which makes them inexact."""
    from cut_cross_entropy import linear_cross_entropy

    query, key = F.normalize(query, dim=1) / temperature, F.normalize(key, dim=1)
    own = torch.arange(len(query), device=query.device)
    loss: Tensor = linear_cross_entropy(query, key, own, filter_eps=None)
    return loss


def _siglip_kernel(first: Tensor, second: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    loss: Tensor = fused_siglip_loss(first, second, scale.log(), bias)
    return loss


# of each loss, by the name of their package
RIVALS: dict[str, dict[str, LossFunction]] = {
    "clip_loss": {"memeff": _memeff_clip, "inf-cl": _inf_cl_clip},
    "info_nce": {"cut-cross-entropy": _cut_cross_entropy},
    "siglip_loss": {"siglip-kernel": _siglip_kernel},
}
