"""What a compiled graph must be told, or it would drop second derivatives without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def anchored(x: Tensor) -> Tensor:
    """``x``; in a graph, with a backward pass of which ``x`` is an input.

    Then torch refuses to differentiate the pass; one that sees only what was made of ``x`` it would take
    for constant.
    """
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x
    anchor: Tensor = _Anchor.apply(x)  # type: ignore[no-untyped-call]
    return anchor


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        anchored_grad: Tensor = torch.ops.fastcl.first_order(grad, [*ctx.saved_tensors])
        return anchored_grad
