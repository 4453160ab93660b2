"""Frozen keys: the forward pass that also accumulates what the query's gradient is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.device.layout import NEG_TOTAL, NEGATIVE_STATE
from fastcl.kernels.device.tile import (
    LOG2E,
    finite,
    included,
    load_rows,
    logits,
    products,
    pulled,
    split_of,
    store_rows,
)


@triton.jit
def attend(
    own,
    other,
    scale,  # () float32
    partials,  # [splits, 2, N]: max, sum of the negatives
    weighted,  # [splits, N, D]: sum_j exp2(l_ij - max_i) factor_j y_j
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial state and weighted keys of a block of rows over one of the splits of the keys."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    scale2 = tl.load(scale) * LOG2E
    own_tile = None
    if BLOCK_K == BLOCK_D:
        own_tile = load_rows(own, rows, 0, D, BLOCK_D, DOT)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pull = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, end = split_of(other.count, BLOCK_N)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        other_tile = load_rows(other, others, 0, D, BLOCK_D, DOT)
        dots = products(own, other, rows, others, own_tile, other_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION)
        values = included(own, other, rows, others, logits(own, other, rows, others, dots, scale2))
        new_maximum = tl.maximum(maximum, tl.max(values, 1))
        shift = finite(new_maximum)
        weights = tl.exp2(values - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        maximum = new_maximum
        pull = pulled(pull * rescale[:, None], weights, other, others, other_tile, 1.0, DOT, PRECISION)
    inside = rows < own.count
    target = partials + split.to(tl.int64) * NEGATIVE_STATE * own.count + rows
    tl.store(target, maximum, mask=inside)
    tl.store(target + NEG_TOTAL * own.count, total, mask=inside)
    store_rows(weighted, pull, rows, own.count, D, BLOCK_D)


@triton.jit
def joined(partials, weighted, shift, rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The splits' weighted keys against one maximum ``shift`` per row: [B, BLOCK_D]."""
    components = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < count) & (components < D)
    total = tl.zeros((rows.shape[0], BLOCK_D), tl.float32)
    maxima = partials.data + rows
    parts = weighted + rows.to(tl.int64)[:, None] * D + components
    for _ in range(partials.slots):
        maximum = tl.load(maxima, mask=rows < count, other=0.0)
        total += tl.load(parts, mask=inside, other=0.0) * tl.exp2(maximum - shift)[:, None]
        maxima += NEGATIVE_STATE * count
        parts += tl.cast(count, tl.int64) * D
    return total


@triton.jit
def merge_weighted(
    partials,
    weighted,  # [splits, N, D]
    state,  # [fields, N], merged
    result,  # [N, D]: sum_j p_ij factor_j y_j
    count,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits' weighted keys under the merged state."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shift = finite(tl.load(state + rows, mask=rows < count, other=0.0))
    total = tl.load(state + NEG_TOTAL * count + rows, mask=rows < count, other=1.0)
    pull = joined(partials, weighted, shift, rows, count, D, BLOCK_D)
    pull *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    components = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < count) & (components < D)
    tl.store(result + rows.to(tl.int64)[:, None] * D + components, pull, mask=inside)
