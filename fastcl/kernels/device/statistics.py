"""Statistics of rows (and columns) in one pass over the tiles, then merged."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.device.layout import (
    NEG_MAX,
    NEG_TOTAL,
    NEGATIVE_STATE,
    PARTIAL_COUNT,
    PARTIAL_SUM,
    POS_MAX,
    RUNNING,
)
from fastcl.kernels.device.tile import (
    LN2,
    LOG2E,
    dots_of,
    finite,
    included,
    join,
    load_rows,
    logits,
    split_by_label,
    split_of,
)


@triton.jit
def statistics(
    own,
    other,
    scale,  # () float32
    matrix,  # stored products, or None
    partials,  # [splits, fields, N]: max, sum of the negatives; of the positives; their logits' sum; count
    column_partials,  # [row blocks, 2, M] or None: max, sum of the negatives
    TRIANGLE: tl.constexpr,  # columns only right of the diagonal block, rows only from it on
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial statistics of a block of own rows over one of the splits of the other side."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    scale2 = tl.load(scale) * LOG2E
    own_tile = None
    if matrix is None and BLOCK_K == BLOCK_D:
        own_tile = load_rows(own, rows, 0, D, BLOCK_D, DOT)
    max_neg = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_neg = tl.zeros((BLOCK_M,), tl.float32)
    max_pos, sum_pos, pos_sum, pos_count = max_neg, sum_neg, sum_neg, sum_neg
    start, end = split_of(other.count, BLOCK_N, block * BLOCK_M // BLOCK_N if TRIANGLE else 0)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        dots = dots_of(own, other, matrix, rows, others, own_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION)
        values = included(own, other, rows, others, logits(own, other, rows, others, dots, scale2))
        if own.positive is not None:
            values, positives = split_by_label(own, other, rows, others, values)
            max_pos, sum_pos = join(max_pos, sum_pos, positives, 1)
            taken = positives != float("-inf")
            pos_sum += tl.sum(tl.where(taken, positives, 0.0), 1)
            pos_count += tl.sum(taken.to(tl.float32), 1)
        max_neg, sum_neg = join(max_neg, sum_neg, values, 1)
        if column_partials is not None:
            empty = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            column_max, column_sum = join(empty, tl.zeros((BLOCK_N,), tl.float32), values, 0)
            target = column_partials + block.to(tl.int64) * NEGATIVE_STATE * other.count + others
            inside = others < other.count
            if TRIANGLE:
                inside &= others >= (block + 1) * BLOCK_M
            tl.store(target, column_max, mask=inside)
            tl.store(target + NEG_TOTAL * other.count, column_sum, mask=inside)
    fields = RUNNING if own.positive is not None else NEGATIVE_STATE
    target = partials + split.to(tl.int64) * fields * own.count
    if own.positive is None:
        store_fields(target, (max_neg, sum_neg), rows, own.count)
    else:
        found = (max_neg, sum_neg, max_pos, sum_pos, pos_sum * LN2, pos_count)
        store_fields(target, found, rows, own.count)


@triton.jit
def merged(partials, field, rows, count, SLOTS: tl.constexpr):
    """(max, sum) of rows over all partials that hold something of them."""
    maximum = tl.full(rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    for first in range(0, partials.slots, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        inside = (slots[:, None] < partials.slots) & (rows[None, :] < count)
        if partials.width is not None:
            inside &= slots[:, None] < (rows // partials.width)[None, :]
        source = partials.data + (slots.to(tl.int64)[:, None] * partials.per_slot + field) * count
        maxima = tl.load(source + rows[None, :], mask=inside, other=float("-inf"))  # [SLOTS, BLOCK]
        totals = tl.load(source + rows[None, :] + count, mask=inside, other=0.0)
        maximum, total = combine(maximum, total, maxima, totals)
    return maximum, total


@triton.jit
def combine(maximum, total, maxima, totals):
    """(max, sum) with those of slots [SLOTS, BLOCK] joined."""
    new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
    shift = finite(new_maximum)
    added = tl.sum(totals * tl.exp2(maxima - shift[None, :]), 0)
    return new_maximum, total * tl.exp2(maximum - shift) + added


@triton.jit
def negatives_state(partials, triangle, rows, count, SLOTS: tl.constexpr):
    """(max, sum) of rows' negatives from all that was found of them; ``triangle`` may be None."""
    maximum, total = merged(partials, NEG_MAX, rows, count, SLOTS)
    if triangle is not None:
        other_maximum, other_total = merged(triangle, NEG_MAX, rows, count, SLOTS)
        maximum, total = combine(maximum, total, other_maximum[None, :], other_total[None, :])
    return tl.where(total != total, total, maximum), total


@triton.jit
def log_sum(maximum, total):
    """Natural log of ``total * 2**maximum``; -inf where the total is zero."""
    return (maximum + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2


@triton.jit
def merge(
    partials,
    triangle,
    state,  # [fields, N]
    statistics,  # [fields, N]
    count,
    POSITIVES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """State (max, sum; log2 units) and statistics (natural units) of rows from all their partials."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    maximum, total = negatives_state(partials, triangle, rows, count, SLOTS)
    pos_sum = tl.zeros((BLOCK,), tl.float32)
    pos_count = pos_sum
    max_pos, sum_pos = tl.full((BLOCK,), float("-inf"), tl.float32), pos_sum
    if POSITIVES:
        max_pos, sum_pos = merged(partials, POS_MAX, rows, count, SLOTS)
        source = partials.data + PARTIAL_SUM * count + rows
        for _ in range(partials.slots):
            pos_sum += tl.load(source, mask=inside, other=0.0)
            pos_count += tl.load(source + (PARTIAL_COUNT - PARTIAL_SUM) * count, mask=inside, other=0.0)
            source += partials.per_slot * count
    store_fields(state, (maximum, total, max_pos, sum_pos), rows, count)
    lse_neg, lse_pos = log_sum(maximum, total), log_sum(max_pos, sum_pos)
    store_fields(statistics, (lse_neg, lse_pos, pos_sum, pos_count, maximum * LN2), rows, count)


@triton.jit
def store_fields(target, values, rows, count):
    """Values of rows as a packed tensor's fields, in their order."""
    for field in tl.static_range(len(values)):
        tl.store(target + field * count + rows, values[field], mask=rows < count)
