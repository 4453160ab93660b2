"""Uniformity: ``log mean_{i<j} exp(-t |x_i - x_j|^2)``, how evenly rows spread.

Wang and Isola 2020, https://arxiv.org/abs/2005.10242.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import check_group, gather_rows, row_counts
from fastcl.similarity.checks import check_matrix, scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, log_count, masked_logsumexp, row_dot
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats


def uniformity(x: Tensor, t: float | Tensor = 2.0, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The logarithm of the mean Gaussian potential of all pairs of rows, used as they are.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242. The (N, N) distances are never stored.

    Args:
        x: (N, D), any floating dtype; unit rows in the paper.
        t: the potential is ``exp(-t |x_i - x_j|^2)``: a finite number, or a tensor of one element, which
            then receives its gradient.
        group: over the pairs of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.

    Returns:
        (), float64 for float64 inputs, else float32; 0 where there is no pair.

    Raises:
        ValueError: x that is not (N, D), t that is not finite or not one element.
        TypeError: x that is not floating; a ``group`` that is none.
    """
    check_group(group, ring=False)
    check_matrix("x", x)
    rate = scalar("t", t, x)
    dtype = compute_dtype(x.dtype)
    rows = keys = anchored(x).to(dtype)
    count, offset = x.shape[0], 0
    if group is not None:
        counts = row_counts(rows, group)
        keys, offset = gather_rows(rows, counts, group), sum(counts[: dist.get_rank(group)])
    total = keys.shape[0]
    # distances stay, and the squares that they are the difference of become small
    centre = keys.detach().sum(dim=0) / max(total, 1)
    rows, keys = rows - centre, keys - centre
    weight = rate.to(dtype)
    numbers = torch.arange(total, device=x.device)
    lse = similarity_stats(
        rows,
        keys,
        scale=2 * rate,
        rule=PairRule(exclude=(numbers[offset : offset + count], numbers)),
        key_bias=-weight * row_dot(keys, keys),
    ).lse_neg
    lse = _log_total(lse - weight * row_dot(rows, rows))
    if group is not None:
        lse = _log_total(gather_rows(lse[None], [1] * dist.get_world_size(group), group))
    return (lse - log_count(total * (total - 1), lse)).masked_fill(lse == -torch.inf, 0.0)


def _log_total(exponents: Tensor) -> Tensor:
    """``log(sum(exp(exponents)))``; -inf with zero gradient where all are -inf."""
    return masked_logsumexp(exponents[None], exponents[None] != -torch.inf)[0]
