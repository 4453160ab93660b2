"""Numerical helpers shared by the losses and the pure-torch backends."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastcl.similarity.transforms import is_readable

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
NORM_EPS = 1e-12
_LONG_SUM, _BLOCK = 1024, 256
_MANY = 1 << 15  # components, from which on float64 is what takes the time

_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}

_NO_CONTEXT = contextlib.nullcontext()

_Function = TypeVar("_Function", bound=Callable[..., object])

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


def constant_when_compiled(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``, which imports the whole compiler to set one attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def matmul_precision_level() -> int:
    """:func:`float32_matmul_precision` as the extension takes it; a compiled graph keeps what it found."""
    return _PRECISIONS[float32_matmul_precision()]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block without autocast; meta tensors know none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NO_CONTEXT
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


def log_count(count: int, like: Tensor) -> Tensor:
    """``log(count)``, and 0 of nothing, 0-d beside ``like``; a graph takes it for no constant."""
    return (torch.ones((), dtype=like.dtype, device=like.device) * max(count, 1)).log()


def _squares_fit(x: Tensor) -> bool:
    """Whether the squares of the rows of many float32 components are known to stay in float32's range."""
    if x.dtype != torch.float32 or x.numel() < _MANY or not is_readable(x):
        return False
    low, high = torch.aminmax(torch.linalg.vector_norm(x.detach(), dim=-1))
    return low.item() > 1e-15 and high.item() < 1e18


def inverse_norms(x: Tensor, eps: float | Tensor = NORM_EPS) -> Tensor:
    """``1 / max(norm, eps)`` per row, shape (..., 1); 0 for a zero row, which so stays zero.

    Formed in float64: squares of float32 components may be beyond float32's range.
    """
    dtype = x.dtype if _squares_fit(x) else torch.float64
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    zero = norms == 0
    inverse: Tensor = norms.masked_fill(zero, 1.0).clamp_min(eps).reciprocal()
    return inverse.masked_fill(zero, 0.0).to(x.dtype)


def unit_rows(x: Tensor, normalize: bool = True) -> Tensor:
    """Rows of ``x`` in the compute dtype, divided by their L2 norm if asked; right in all derivatives."""
    x = x.to(compute_dtype(x.dtype))
    if not normalize:
        return x
    if x.dtype == torch.float32 and x.shape[-1]:
        # a power of two, on which a unit row does not depend, keeps products in the derivatives in range
        largest = x.detach().abs().amax(dim=-1, keepdim=True)
        power = torch.where(largest > 2.0**50, 2.0**-64, torch.where(largest < 2.0**-20, 2.0**40, 1.0))
        x = x * power
        return x * inverse_norms(x, power * NORM_EPS)
    return x * inverse_norms(x)


def unit_rows_backward(grad_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of ``x`` from that of ``unit = x * inverse``, all (N, D) and (N, 1)."""
    radial = (grad_unit * unit).sum(dim=-1, keepdim=True)
    below_eps = inverse >= 1.0 / NORM_EPS
    return (grad_unit - unit * radial.masked_fill(below_eps, 0.0)) * inverse


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_d a[i, d] * b[i, d]``, shape (N,)."""
    return (a * b).sum(dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, by blocks of the summed dimension where it is long: one chain of additions loses digits."""
    if a.shape[-1] <= _LONG_SUM:
        return a @ b
    blocks = zip(a.split(_BLOCK, -1), b.split(_BLOCK, -2), strict=True)
    return torch.stack([x @ y for x, y in blocks]).sum(0)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Apply 'none', 'mean' or 'sum' to per-row losses."""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
