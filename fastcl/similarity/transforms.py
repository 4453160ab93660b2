"""Whether a call is differentiated forwards or by torch.func: then the dense formula serves it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode differentiation is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_readable(x: Tensor) -> bool:
    """Whether the values of ``x`` are at hand: on the CPU, and neither traced nor transformed."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not is_transformed()
    )


def refuse_tangents(name: str, arguments: tuple[object, ...]) -> None:
    """Raise rather than drop a tangent: no op has a forward-mode derivative.

    Raises:
        RuntimeError: one of the tensors is a dual number.
    """
    if forward_ad._current_level < 0:
        return
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"fastcl::{name} has no forward-mode derivative; the losses use dense formulas for it"
            )
