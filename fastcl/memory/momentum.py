"""The momentum update of MoCo's key encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def momentum_update_(key_module: nn.Module, query_module: nn.Module, m: float = 0.999) -> None:
    """``key = m * key + (1 - m) * query``, in place, for all parameters in a few fused calls.

    Floating buffers (running statistics) are averaged the same way, other buffers (counters) copied.
    He et al. 2020, https://arxiv.org/abs/1911.05722.

    Args:
        key_module: the slow copy; updated.
        query_module: the trained one, with the same parameters and buffers.
        m: the momentum, 0 to 1.

    Raises:
        ValueError: m outside 0 to 1, or modules whose parameters or buffers differ in name or shape.
    """
    if not 0.0 <= m <= 1.0:
        raise ValueError(f"m must be between 0 and 1, got {m}")
    key_tensors, query_tensors = (
        {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for module in (key_module, query_module)
    )
    different = sorted(
        name
        for name in key_tensors.keys() | query_tensors.keys()
        if name not in key_tensors
        or name not in query_tensors
        or key_tensors[name].shape != query_tensors[name].shape
    )
    if different:
        raise ValueError(f"key_module and query_module differ in {', '.join(different[:5])}")
    averaged: list[tuple[Tensor, Tensor]] = []
    for name, key in key_tensors.items():
        if key.is_floating_point():
            averaged.append((key, query_tensors[name]))
        else:
            key.copy_(query_tensors[name])
    if averaged:
        keys, queries = (list(side) for side in zip(*averaged, strict=True))
        torch._foreach_lerp_(keys, queries, 1.0 - m)
