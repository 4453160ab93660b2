"""Packages from PyPI that fastcl is compared with, and plain PyTorch compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

LossFunction = Callable[..., Tensor]


def compiled(function: LossFunction) -> LossFunction:
    """The function under ``torch.compile``, for one shape and as one graph.

    Forgets what was compiled before, or after eight shapes it would run uncompiled without a word.
    """
    torch.compiler.reset()
    compiled_function: LossFunction = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled_function


def pypi_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, *, temperature: float
) -> Tensor:
    """``info-nce-pytorch``."""
    import info_nce as package

    loss: Tensor = package.info_nce(query, positive_key, negative_keys, temperature=temperature)
    return loss


def pypi_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """``pytorch-metric-learning``'s NTXentLoss; it compares pairs of pairs, O(N^3) memory."""
    samples = torch.arange(len(z1), device=z1.device).repeat(2)
    loss: Tensor = _metric_learning("NTXentLoss", temperature)(torch.cat([z1, z2]), samples)
    return loss


def pypi_sup_con(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``pytorch-metric-learning``'s SupConLoss."""
    views = features.shape[1]
    loss: Tensor = _metric_learning("SupConLoss", temperature)(
        features.flatten(0, 1), labels.repeat_interleave(views)
    )
    return loss


@cache
def _metric_learning(name: str, temperature: float) -> Any:
    from pytorch_metric_learning import losses

    return getattr(losses, name)(temperature=temperature)
