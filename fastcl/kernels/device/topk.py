"""Top-k: similarities as integers whose order is that of the result, for a library to select from."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcl.kernels.device.tile import dots_of, included, load_rows, logits


@triton.jit
def rank(
    own,
    other,
    matrix,  # stored products, or None
    ranks,  # [N, M] int64
    first_index,  # of the other side's first row
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """High half: the similarity, order kept. Low half: falls with the index: ties go to the lower one."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    others = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own_tile = None
    if matrix is None and BLOCK_K == BLOCK_D:
        own_tile = load_rows(own, rows, 0, D, BLOCK_D, DOT)
    dots = dots_of(own, other, matrix, rows, others, own_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION)
    values = included(own, other, rows, others, logits(own, other, rows, others, dots, 1.0))
    values = tl.where(values == 0.0, 0.0, values)  # -0 ties with 0
    bits = values.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = 0xFFFFFFFF - (others.to(tl.int64) + first_index)
    inside = (rows[:, None] < own.count) & (others[None, :] < other.count)
    target = ranks + rows.to(tl.int64)[:, None] * other.count + others[None, :]
    tl.store(target, (ordered.to(tl.int64) << 32) | low[None, :], mask=inside)
