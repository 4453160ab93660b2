"""Work on single rows: normalization, and a queue's enqueue."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def norm(values):
    """L2 norms [B] of rows [B, BLOCK_D], scaled on the way so that no square leaves float32's range."""
    largest = tl.max(tl.abs(values), 1)
    shrink = power_of_two_below(largest)
    scaled = values / shrink[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, 1)) * shrink


@triton.jit
def power_of_two_below(values):
    """The largest power of two not above positive values; 1 for those that are zero, infinite or NaN."""
    bits = values.to(tl.int32, bitcast=True) & 0x7F800000
    power = bits.to(tl.float32, bitcast=True)
    return tl.where((bits == 0) | (bits == 0x7F800000), 1.0, power)


@triton.jit
def unit_rows(
    first,  # (N, D)
    second,  # (N2, D) or None: rows that follow the first's
    result,  # (N + N2, D): rows divided by a power of two, so that their norms lie in [1, 2)
    factor,  # (N + N2,) float32: what makes unit rows of them
    inverse,  # (N + N2,) float32: 1 / norm of the given rows, 0 for zero rows
    n_first,
    n_rows,
    first_stride,
    second_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows for products in their own dtype, which rounds nothing: the factor is applied in float32."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    components = tl.arange(0, BLOCK_D)
    inside = components[None, :] < D
    offsets = rows.to(tl.int64)[:, None] * first_stride + components[None, :]
    values = tl.load(first + offsets, mask=inside & (rows[:, None] < n_first), other=0.0).to(tl.float32)
    if second is not None:
        offsets = (rows - n_first).to(tl.int64)[:, None] * second_stride + components[None, :]
        others = inside & (rows[:, None] >= n_first) & (rows[:, None] < n_rows)
        values += tl.load(second + offsets, mask=others, other=0.0).to(tl.float32)
    norms = norm(values)
    power = power_of_two_below(norms)
    target = result + rows.to(tl.int64)[:, None] * D + components[None, :]
    values = values / power[:, None]
    tl.store(target, values.to(result.dtype.element_ty), mask=inside & (rows[:, None] < n_rows))
    inverses = tl.where(norms == 0.0, 0.0, 1.0 / tl.maximum(norms, NORM_EPS))
    tl.store(inverse + rows, inverses, mask=rows < n_rows)
    tl.store(factor + rows, inverses * power, mask=rows < n_rows)


@triton.jit
def enqueue(
    keys,  # (size, D)
    ids,  # (size,) int64 or None
    pointer,  # () int64: the row the next key goes to, in its low half
    new_keys,  # (N, D)
    new_ids,  # (N,) int64 or None
    size,
    n_rows,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize rows and write them from the pointer on, wrapping; the last program moves the pointer.

    Every program reads the pointer by adding 1 to its high half, which so counts who has read it.
    """
    seen = tl.atomic_add(pointer, 1 << 32)
    start = seen & 0xFFFFFFFF
    if seen >> 32 == tl.num_programs(0) - 1:
        tl.store(pointer, (start + n_rows) % size)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = (rows < n_rows) & (rows >= n_rows - size)  # earlier ones would be overwritten at once
    components = tl.arange(0, BLOCK_D)
    inside = kept[:, None] & (components[None, :] < D)
    source = new_keys + rows.to(tl.int64)[:, None] * stride + components[None, :]
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    norms = norm(values)
    values = values * tl.where(norms == 0.0, 0.0, 1.0 / tl.maximum(norms, NORM_EPS))[:, None]
    targets = (rows + start) % size
    tl.store(keys + targets[:, None] * D + components[None, :], values.to(keys.dtype.element_ty), mask=inside)
    if ids is not None:
        tl.store(ids + targets, tl.load(new_ids + rows, mask=kept, other=0), mask=kept)
