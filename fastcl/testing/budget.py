"""The error budget: how far from float64 a result may be.

A result is right when its error against float64 is at most twice plain PyTorch's own error in the
same dtype, plus a floor of a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcl.similarity.numerics import compute_dtype

BUDGET_ULPS = 4.0


def value_and_grads(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``function`` returns for fresh leaves of ``inputs``, and their gradients.

    Outputs that are not 0-d are weighted by 1, 1.5, 2, 1, ... before they are summed: weights that
    every dtype holds exactly. Outputs without gradient are left out of the sum.
    """
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    returned = function(*leaves)
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    live = [output for output in outputs if output.requires_grad]
    weights = [1 + 0.5 * (torch.arange(x.numel(), device=x.device) % 3).reshape(x.shape).to(x) for x in live]
    grads = torch.autograd.grad(live, leaves, weights, allow_unused=True, materialize_grads=True)
    return tuple(output.detach() for output in outputs), grads


def assert_within_budget(
    got: Tensor,
    exact: Tensor,
    baseline: Tensor,
    *,
    unit: float = 1.0,
    ulps: float = BUDGET_ULPS,
    name: str = "result",
) -> None:
    """Assert that ``got`` is as near to ``exact`` as plain PyTorch is, within twice its error.

    Checked for the largest element error and for the L2 norm of the error. Where ``exact`` is not
    finite, or too large for the dtype, ``got`` must be the same. The floor is ``ulps`` units in the
    last place of the largest element, and of ``unit`` in the dtype sums are formed in: almost nothing
    of a sum may be left.

    Args:
        got: the result under test.
        exact: the same in float64.
        baseline: plain PyTorch's result in the dtype under test.
        unit: the size of the terms that cancel: the largest logit for a loss, or the size a
            gradient has when nothing cancels.
        ulps: the floor.
        name: what the message calls the result.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    rounded = exact.to(got.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(got[~finite], rounded[~finite], equal_nan=True)
    wanted = exact.double().masked_fill(~finite, 0.0)
    error = (got.double() - wanted).masked_fill(~finite, 0.0)
    assert error.isfinite().all(), f"{name}: not finite where the exact result is: {got}"
    base_error = (baseline.double() - wanted).masked_fill(~finite | ~baseline.isfinite(), 0.0)

    dtype = torch.finfo(got.dtype)
    floor = dtype.smallest_normal * dtype.eps + ulps * torch.finfo(compute_dtype(got.dtype)).eps * unit
    rows = wanted.numel() // wanted.shape[-1] if wanted.dim() > 1 else wanted.numel()
    norms = (
        ("largest element", torch.inf, floor + ulps * dtype.eps * wanted.abs().max().item()),
        ("L2 norm", 2, rows**0.5 * floor + ulps * dtype.eps * wanted.norm().item()),
    )
    for norm_name, order, norm_floor in norms:
        measured, theirs = (torch.linalg.vector_norm(e, order).item() for e in (error, base_error))
        assert measured <= 2 * theirs + norm_floor, (
            f"{name}: {norm_name} of the error is {measured:.3g}, PyTorch's {theirs:.3g}, "
            f"floor {norm_floor:.3g}, largest value {wanted.abs().max().item():.3g}"
        )
