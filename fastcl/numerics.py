"""Numerical helpers shared by the losses and the pure-torch backends."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
NORM_EPS = 1e-12

_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are accumulated in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_matmul_precision() -> str:
    """'highest', 'high' or 'medium', whichever of torch's two settings was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one was, and the older refuses from then on
        return {"tf32": "high", "bf16": "medium"}.get(torch.backends.cuda.matmul.fp32_precision, "highest")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def matmul_precision_level() -> int:
    """:func:`float32_matmul_precision` as the extension takes it; a compiled graph keeps what it found."""
    return _PRECISIONS[float32_matmul_precision()]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block without autocast; meta tensors know none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` without a cut-off, right in all derivatives; 0 with zero gradient at -inf."""
    positive = x > 0
    return torch.where(positive, x, 0.0) + torch.where(positive, -x, x).exp().log1p()


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp(a) + exp(b))``; -inf with zero gradient where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    a, b = a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
    swapped = a < b
    total = torch.where(swapped, b, a) + softplus(torch.where(swapped, a - b, b - a))
    return total.masked_fill(empty, -torch.inf)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Row-wise logsumexp over ``mask``; -inf with zero gradient where a row's mask is empty."""
    empty = ~mask.any(dim=1)
    kept = logits.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0.0)
    return kept.logsumexp(dim=1).masked_fill(empty, -torch.inf)


def inverse_norms(x: Tensor) -> Tensor:
    """``1 / max(norm, 1e-12)`` per row, shape (..., 1); 0 for a zero row, which so stays zero."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norms == 0
    inverse: Tensor = norms.masked_fill(zero, 1.0).clamp_min(NORM_EPS).reciprocal()
    return inverse.masked_fill(zero, 0.0)


def unit_rows(x: Tensor, normalize: bool = True) -> Tensor:
    """Rows of ``x`` in the compute dtype, divided by their L2 norm if asked."""
    x = x.to(compute_dtype(x.dtype))
    return x * inverse_norms(x) if normalize else x


def unit_rows_backward(grad_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of ``x`` from that of ``unit = x * inverse``, all (N, D) and (N, 1)."""
    radial = (grad_unit * unit).sum(dim=-1, keepdim=True)
    below_eps = inverse >= 1.0 / NORM_EPS
    return (grad_unit - unit * radial.masked_fill(below_eps, 0.0)) * inverse


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_d a[i, d] * b[i, d]``, shape (N,)."""
    return (a * b).sum(dim=-1)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Apply 'none', 'mean' or 'sum' to per-row losses."""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
