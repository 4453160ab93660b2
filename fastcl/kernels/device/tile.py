"""The shared tile: a block of rows of one side against a block of the other's, its logits and its pairs.

Logits are in log2 units throughout. Both sides have the same form, so that every kernel serves rows
and columns by swapping its arguments. Kernels ask a field whether it is None, never a tuple that may
hold None: Triton 3.6 cannot compare those.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Stored(NamedTuple):
    """A matrix of products that a library has formed."""

    data: Any
    own_stride: Any
    other_stride: Any


class Partials(NamedTuple):
    """Partial statistics of one side's rows: max and sum of the negatives first."""

    data: Any  # (slots, per_slot, count) float32
    slots: Any
    per_slot: Any
    width: Any = None  # rows per slot, where slot s holds only what later blocks of rows need


class Side(NamedTuple):
    """One side of a similarity matrix; what a kernel is not given is None and costs nothing.

    Two rows are excluded from each other iff their exclude-ids are equal; with ``period`` the id of
    a row is its index modulo it.
    """

    rows: Any  # (count, D), last dimension contiguous
    factor: Any  # (count,) float32: multiplies the row's logits
    bias: Any  # (count,) float32: is added to them, in log2 units
    exclude: Any  # (count,) int64
    positive: Any  # (count,) int64
    period: Any
    count: Any
    stride: Any  # elements from row to row


@triton.jit
def load_rows(side, indices, start, D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Components [start, start + BLOCK) of rows, zeros outside, in the dtype of the products."""
    components = start + tl.arange(0, BLOCK)
    offsets = indices.to(tl.int64)[:, None] * side.stride + components[None, :]
    inside = indices[:, None] < side.count
    if D == 0 or D % BLOCK != 0:
        inside &= components[None, :] < D
    return tl.load(side.rows + offsets, mask=inside, other=0.0).to(DOT)  # [B, BLOCK]


@triton.jit
def store_rows(target, values, rows, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [B, BLOCK] to this program's split of a (splits, count, D) tensor."""
    components = tl.arange(0, BLOCK)[None, :]
    offsets = (tl.program_id(1).to(tl.int64) * count + rows)[:, None] * D + components
    tl.store(target + offsets, values, mask=(rows[:, None] < count) & (components < D))


@triton.jit
def split_of(count, BLOCK: tl.constexpr, first=0):
    """First and end of this program's share of the tiles of ``count`` rows, from tile ``first`` on."""
    tiles = tl.cdiv(count, BLOCK)
    share = tl.cdiv(tiles - first, tl.num_programs(1))
    start = first + tl.program_id(1) * share
    return start, tl.minimum(start + share, tiles)


@triton.jit
def load_vector(pointer, indices, side):
    """One value per row, 0 outside."""
    return tl.load(pointer + indices, mask=indices < side.count, other=0)


@triton.jit
def products(
    own,
    other,
    own_rows,
    other_rows,
    own_tile,
    other_tile,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<x_i, y_j>, [BM, BN]: of the tiles held, or in steps of BLOCK_K components where that is smaller."""
    if BLOCK_K == BLOCK_D:
        result = tl.dot(own_tile, tl.trans(other_tile), input_precision=PRECISION)
    else:
        result = tl.zeros((own_rows.shape[0], other_rows.shape[0]), tl.float32)
        for start in range(0, D, BLOCK_K):
            a = load_rows(own, own_rows, start, D, BLOCK_K, DOT)
            b = load_rows(other, other_rows, start, D, BLOCK_K, DOT)
            result = tl.dot(a, tl.trans(b), result, input_precision=PRECISION)
    return result


@triton.jit
def stored_products(matrix, own, other, own_rows, other_rows):
    """The same, read from a matrix with strides (own, other): [BM, BN]."""
    offsets = own_rows.to(tl.int64)[:, None] * matrix.own_stride
    offsets += other_rows.to(tl.int64)[None, :] * matrix.other_stride
    inside = (own_rows[:, None] < own.count) & (other_rows[None, :] < other.count)
    return tl.load(matrix.data + offsets, mask=inside, other=0.0)


@triton.jit
def dots_of(
    own,
    other,
    matrix,
    own_rows,
    other_rows,
    own_tile,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a tile, read from ``matrix`` or, where that is None, formed: [BM, BN]."""
    if matrix is not None:
        result = stored_products(matrix, own, other, own_rows, other_rows)
    else:
        other_tile = None
        if BLOCK_K == BLOCK_D:
            other_tile = load_rows(other, other_rows, 0, D, BLOCK_D, DOT)
        result = products(
            own, other, own_rows, other_rows, own_tile, other_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION
        )
    return result


@triton.jit
def times_factor(values, side, indices, scale, axis: tl.constexpr):
    """A tile times a side's factor and a scale."""
    if side.factor is None:
        result = values * scale
    else:
        result = values * tl.expand_dims(load_vector(side.factor, indices, side) * scale, axis)
    return result


@triton.jit
def logits(own, other, own_rows, other_rows, dots, scale2, OF_OTHER: tl.constexpr = False):
    """Log2-unit logits of a tile of products, [BM, BN].

    ``OF_OTHER``: rounded as a pass over the other side's rows has rounded them.
    """
    if OF_OTHER:
        result = times_factor(times_factor(dots, other, other_rows, scale2, 0), own, own_rows, 1.0, 1)
    else:
        result = times_factor(times_factor(dots, own, own_rows, scale2, 1), other, other_rows, 1.0, 0)
    if own.bias is not None:
        result += load_vector(own.bias, own_rows, own)[:, None]
    if other.bias is not None:
        result += load_vector(other.bias, other_rows, other)[None, :]
    return result


@triton.jit
def included(own, other, own_rows, other_rows, values):
    """``values`` with -inf for the pairs that take no part: excluded ones, and those outside."""
    outside = (own_rows[:, None] >= own.count) | (other_rows[None, :] >= other.count)
    values = tl.where(outside, float("-inf"), values)
    if own.exclude is not None:
        own_ids = load_vector(own.exclude, own_rows, own)
        other_ids = load_vector(other.exclude, other_rows, other)
        values = tl.where(own_ids[:, None] == other_ids[None, :], float("-inf"), values)
    elif own.period is not None:
        same = (own_rows % own.period)[:, None] == (other_rows % other.period)[None, :]
        values = tl.where(same, float("-inf"), values)
    return values


@triton.jit
def same_label(own, other, own_rows, other_rows):
    """Which pairs of a tile have equal positive-ids."""
    own_ids = load_vector(own.positive, own_rows, own)
    other_ids = load_vector(other.positive, other_rows, other)
    return own_ids[:, None] == other_ids[None, :]


@triton.jit
def split_by_label(own, other, own_rows, other_rows, values):
    """``values`` for the negatives and for the positives, -inf elsewhere."""
    same = same_label(own, other, own_rows, other_rows)
    return tl.where(same, float("-inf"), values), tl.where(same, values, float("-inf"))


@triton.jit
def pulled(total, weights, other, other_rows, other_tile, unit, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` [BM, BLOCK_D] and ``sum_j weights_ij factor_j y_j`` of a tile, ``unit`` times."""
    factor = unit
    if other.factor is not None:
        factor = unit * load_vector(other.factor, other_rows, other)[None, :]
    return tl.dot((weights * factor).to(DOT), other_tile, total, input_precision=PRECISION)


@triton.jit
def finite(maximum):
    """``maximum``, 0 where it is -inf: what exponents may be taken against."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def log2_of_1_plus(x):
    """``log2(1 + x)`` for x from 0 to 1, as accurate as x: the series of the inverse hyperbolic tangent."""
    quotient = x / (2.0 + x)
    square = quotient * quotient
    series = square * 0.0
    for term in tl.static_range(7):  # each at most a ninth of the one before
        series = series * square + 2.0 * LOG2E / (13 - 2 * term)
    return quotient * series


@triton.jit
def join(maximum, total, values, axis: tl.constexpr):
    """Running (max, sum of exp2) along an axis, with a tile of values added."""
    new_maximum = tl.maximum(maximum, tl.max(values, axis))
    shift = finite(new_maximum)
    added = tl.sum(tl.exp2(values - tl.expand_dims(shift, axis)), axis)
    return new_maximum, total * tl.exp2(maximum - shift) + added
