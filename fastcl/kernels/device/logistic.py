"""Sums of softplus over pairs, and their gradients: of the negatives' logits, and of minus the positives'."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.device.layout import OF_POSITIVES
from fastcl.kernels.device.tile import (
    LN2,
    LOG2E,
    dots_of,
    included,
    load_rows,
    load_vector,
    log2_of_1_plus,
    logits,
    same_label,
    split_of,
)


@triton.jit
def signed_logits(own, other, own_rows, other_rows, dots, scale2):
    """Of negatives their logits, of positives minus theirs, -inf for pairs that take no part: [BM, BN]."""
    values = logits(own, other, own_rows, other_rows, dots, scale2)
    if own.positive is not None:
        values = tl.where(same_label(own, other, own_rows, other_rows), -values, values)
    return included(own, other, own_rows, other_rows, values)


@triton.jit
def logistic(
    own,
    other,
    scale,  # () float32
    matrix,  # stored products, or None
    sums,  # [splits, 2, N]: of the negatives, of the positives
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of softplus of a block of rows over one of the splits of the other side."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale2 = tl.load(scale) * LOG2E
    own_tile = None
    if matrix is None and BLOCK_K == BLOCK_D:
        own_tile = load_rows(own, rows, 0, D, BLOCK_D, DOT)
    negatives = tl.zeros((BLOCK_M,), tl.float32)
    positives = negatives
    start, end = split_of(other.count, BLOCK_N)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        dots = dots_of(own, other, matrix, rows, others, own_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION)
        values = signed_logits(own, other, rows, others, dots, scale2)
        values = tl.where(values > 0.0, values, 0.0) + log2_of_1_plus(tl.exp2(-tl.abs(values)))
        if own.positive is not None:
            same = same_label(own, other, rows, others)
            positives += tl.sum(tl.where(same, values, 0.0), 1)
            values = tl.where(same, 0.0, values)
        negatives += tl.sum(values, 1)
    target = sums + tl.program_id(1).to(tl.int64) * 2 * own.count + rows
    tl.store(target, negatives * LN2, mask=rows < own.count)
    tl.store(target + OF_POSITIVES * own.count, positives * LN2, mask=rows < own.count)


@triton.jit
def logistic_weights(own, other, own_grad, other_grad, rows, others, dots, scale2):
    """The logits' gradients of a tile, [BM, BN], from those (2, count) of one side's sums."""
    values = signed_logits(own, other, rows, others, dots, scale2)
    if own_grad is None:
        factor = tl.expand_dims(load_vector(other_grad, others, other), 0)
        of_positives = -tl.expand_dims(load_vector(other_grad + OF_POSITIVES * other.count, others, other), 0)
    else:
        factor = tl.expand_dims(load_vector(own_grad, rows, own), 1)
        of_positives = -tl.expand_dims(load_vector(own_grad + OF_POSITIVES * own.count, rows, own), 1)
    if own.positive is not None:
        factor = tl.where(same_label(own, other, rows, others), of_positives, factor)
    decay = tl.exp2(-tl.abs(values))
    return factor * (tl.where(values > 0.0, 1.0, decay) / (1.0 + decay))
