"""Gradients of rows: weights formed tile by tile from the saved states, times the other side's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.device.layout import NEG_SLOPE, POS_SHIFT, POS_SLOPE, SUM_SLOPE
from fastcl.kernels.device.tile import (
    LOG2E,
    included,
    load_rows,
    load_vector,
    logits,
    products,
    pulled,
    split_by_label,
    split_of,
    store_rows,
    stored_products,
)


@triton.jit
def side_weights(side, weights, indices, negatives, positives, axis: tl.constexpr):
    """The logits' gradients through one side's statistics.

    ``weights``: packed :class:`Weights`, without labels those of the negatives.
    """
    maximum = tl.expand_dims(load_vector(weights, indices, side), axis)
    slope = tl.expand_dims(load_vector(weights + NEG_SLOPE * side.count, indices, side), axis)
    result = tl.exp2(negatives - maximum) * slope
    if side.positive is not None:
        maximum = tl.expand_dims(load_vector(weights + POS_SHIFT * side.count, indices, side), axis)
        slope = tl.expand_dims(load_vector(weights + POS_SLOPE * side.count, indices, side), axis)
        result += tl.exp2(positives - maximum) * slope
        constant = tl.expand_dims(load_vector(weights + SUM_SLOPE * side.count, indices, side), axis)
        result += tl.where(positives == float("-inf"), 0.0, constant)
    return result


@triton.jit
def tile_weights(own, other, own_weights, other_weights, rows, others, dots, scale2):
    """The logits' gradients of a tile, [BM, BN]."""
    values = logits(own, other, rows, others, dots, scale2, own_weights is None)
    values = included(own, other, rows, others, values)
    positives = values
    if own.positive is not None:
        values, positives = split_by_label(own, other, rows, others, values)
    if own_weights is None:
        result = side_weights(other, other_weights, others, values, positives, 0)
    else:
        result = side_weights(own, own_weights, rows, values, positives, 1)
        if other_weights is not None:
            result += side_weights(other, other_weights, others, values, positives, 0)
    return result


@triton.jit
def accumulate(
    own,
    other,
    own_weights,
    other_weights,
    rows,
    scale2,
    unit,  # a power of two that keeps the weights in the range of the products' dtype
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr = tile_weights,
):
    """``sum_j dl_ij factor_j y_j`` [BM, BLOCK_D] and ``sum_j dl_ij`` [BM] over this program's split."""
    own_tile = None
    if BLOCK_K == BLOCK_D:
        own_tile = load_rows(own, rows, 0, D, BLOCK_D, DOT)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    start, end = split_of(other.count, BLOCK_N)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        other_tile = load_rows(other, others, 0, D, BLOCK_D, DOT)
        dots = products(own, other, rows, others, own_tile, other_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION)
        weights = WEIGHTS(own, other, own_weights, other_weights, rows, others, dots, scale2)
        row_sum += tl.sum(weights, 1)
        total = pulled(total, weights, other, others, other_tile, unit, DOT, PRECISION)
    return total / unit, row_sum


@triton.jit
def gradient(
    own,
    other,
    scale,  # () float32
    own_weights,  # Weights of the rows or None, or what else WEIGHTS takes
    other_weights,  # of the columns or None
    unit,  # () float32
    row_gradient,  # [splits, N, D]
    row_sums,  # [splits, N] or None
    WEIGHTS: tl.constexpr,  # the function that forms the logits' gradients of a tile
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial row gradients through own and other statistics: dq, dk and the symmetric form in one."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    total, row_sum = accumulate(
        own,
        other,
        own_weights,
        other_weights,
        rows,
        tl.load(scale) * LOG2E,
        tl.load(unit),
        D,
        BLOCK_D,
        BLOCK_K,
        BLOCK_M,
        BLOCK_N,
        DOT,
        PRECISION,
        WEIGHTS,
    )
    store_rows(row_gradient, total, rows, own.count, D, BLOCK_D)
    if row_sums is not None:
        tl.store(row_sums + split.to(tl.int64) * own.count + rows, row_sum, mask=rows < own.count)


@triton.jit
def logit_gradient(
    own,
    other,
    scale,  # () float32
    matrix,  # stored products
    own_weights,  # as of gradient
    other_weights,
    unit,  # () float32
    result,  # [N, M] in the dtype of the products
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The logits' gradients of stored products, for a library to multiply."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    others = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = stored_products(matrix, own, other, rows, others)
    weights = WEIGHTS(own, other, own_weights, other_weights, rows, others, dots, tl.load(scale) * LOG2E)
    store_tile(result, weights * tl.load(unit), own, other, rows, others)


@triton.jit
def store_tile(result, values, own, other, rows, others):
    """A tile [BM, BN] of an (N, M) matrix, in its dtype."""
    inside = (rows[:, None] < own.count) & (others[None, :] < other.count)
    target = result + rows.to(tl.int64)[:, None] * other.count + others[None, :]
    tl.store(target, values.to(result.dtype.element_ty), mask=inside)
