"""Cross-entropy between two softmaxes over the same keys: the views', and the mean of the teachers'.

A view's row is ``view * n_rows + row``, a teacher's ``teacher * n_rows + row``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastcl.kernels.device.gradient import store_tile, tile_weights
from fastcl.kernels.device.layout import (
    DISTANCE,
    LOSS_SLOPE,
    SOFT_PARTIAL,
    TARGET_MAX,
    TARGET_TOTAL,
    VIEW_MAX,
    VIEW_TOTAL,
)
from fastcl.kernels.device.tile import (
    LN2,
    LOG2E,
    dots_of,
    finite,
    included,
    load_rows,
    load_vector,
    logits,
    products,
    pulled,
    split_of,
    store_rows,
    stored_products,
)


class Softmaxes(NamedTuple):
    """Softmaxes of rows over keys, as one side of the matrix sees them."""

    own: Any  # Side
    other: Any  # Side
    matrix: Any  # stored products, or None
    scale: Any  # () float32
    own_weights: Any  # (2, count): maximum and 1 / sum, of views also the loss's slope; None for keys
    other_weights: Any
    count: Any  # how many softmaxes a row has


@triton.jit
def joined_softmaxes(
    a_max, a_total, a_target_max, a_target_total, a_distance, max, total, target_max, target_total, distance
):
    """What is known of rows' two softmaxes over disjoint keys, joined.

    The distance is ``sum_j exp2(target_j - target_max) (max - logit_j)``.
    """
    new_max, new_target_max = tl.maximum(a_max, max), tl.maximum(a_target_max, target_max)
    shift, target_shift = finite(new_max), finite(new_target_max)
    a_decay, decay = tl.exp2(a_target_max - target_shift), tl.exp2(target_max - target_shift)
    new_total = a_total * tl.exp2(a_max - shift) + total * tl.exp2(max - shift)
    new_distance = (a_distance + (shift - finite(a_max)) * a_target_total) * a_decay
    new_distance += (distance + (shift - finite(max)) * target_total) * decay
    return new_max, new_total, new_target_max, a_target_total * a_decay + target_total * decay, new_distance


@triton.jit
def soft_cross_entropy(
    view,  # Softmaxes
    target,  # Softmaxes
    n_rows,
    partials,  # [splits, 5, V * T * N]: max and sum of both softmaxes, their distance
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TARGET_D: tl.constexpr,
    TARGET_BLOCK_D: tl.constexpr,
    TARGET_BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    TARGET_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both softmaxes of a block of rows, for one view and one teacher, over one of the splits of the keys."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    pair = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    view_rows, target_rows = pair // target.count * n_rows + rows, pair % target.count * n_rows + rows
    scale2, target_scale2 = tl.load(view.scale) * LOG2E, tl.load(target.scale) * LOG2E
    own_tile, target_tile = None, None
    if view.matrix is None and BLOCK_K == BLOCK_D:
        own_tile = load_rows(view.own, view_rows, 0, D, BLOCK_D, DOT)
    if target.matrix is None and TARGET_BLOCK_K == TARGET_BLOCK_D:
        target_tile = load_rows(target.own, target_rows, 0, TARGET_D, TARGET_BLOCK_D, TARGET_DOT)
    max_view = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_view = tl.zeros((BLOCK_M,), tl.float32)
    max_target, total_target, distance = max_view, total_view, total_view
    start, end = split_of(view.other.count, BLOCK_N)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        dots = dots_of(
            target.own,
            target.other,
            target.matrix,
            target_rows,
            others,
            target_tile,
            TARGET_D,
            TARGET_BLOCK_D,
            TARGET_BLOCK_K,
            TARGET_DOT,
            PRECISION,
        )
        targets = logits(target.own, target.other, target_rows, others, dots, target_scale2)
        targets = included(target.own, target.other, target_rows, others, targets)
        tile_target = tl.max(targets, 1)
        targets = tl.exp2(targets - finite(tile_target)[:, None])
        dots = dots_of(
            view.own,
            view.other,
            view.matrix,
            view_rows,
            others,
            own_tile,
            D,
            BLOCK_D,
            BLOCK_K,
            DOT,
            PRECISION,
        )
        values = logits(view.own, view.other, view_rows, others, dots, scale2)
        values = included(view.own, view.other, view_rows, others, values)
        tile_max = tl.max(values, 1)
        below = finite(tile_max)[:, None] - values
        tile_distance = tl.sum(tl.where(values == float("-inf"), 0.0, below * targets), 1)
        max_view, total_view, max_target, total_target, distance = joined_softmaxes(
            max_view,
            total_view,
            max_target,
            total_target,
            distance,
            tile_max,
            tl.sum(tl.exp2(-below), 1),
            tile_target,
            tl.sum(targets, 1),
            tile_distance,
        )
    count = view.count * target.count * n_rows
    inside = rows < n_rows
    result = partials + (tl.program_id(1).to(tl.int64) * SOFT_PARTIAL * count + pair * n_rows) + rows
    tl.store(result + VIEW_MAX * count, max_view, mask=inside)
    tl.store(result + VIEW_TOTAL * count, total_view, mask=inside)
    tl.store(result + TARGET_MAX * count, max_target, mask=inside)
    tl.store(result + TARGET_TOTAL * count, total_target, mask=inside)
    tl.store(result + DISTANCE * count, distance, mask=inside)


@triton.jit
def soft_losses(
    partials,  # of soft_cross_entropy
    splits,
    losses,  # [V, N]
    state,  # [2 (V + T), N]: maximum and sum of each view's softmax, then of each teacher's
    n_rows,
    teachers,
    BLOCK: tl.constexpr,
):
    """Losses and state of a view from all partials, and with the first view the teachers' state."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    view, views = tl.program_id(1), tl.num_programs(1)
    inside = rows < n_rows
    count = views * teachers * n_rows
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    loss = tl.zeros((BLOCK,), tl.float32)
    max_view, total_view = nothing, loss
    for teacher in range(teachers):
        max_view, max_target = nothing, nothing
        total_view = tl.zeros((BLOCK,), tl.float32)
        total_target, distance = total_view, total_view
        source = partials + (view * teachers + teacher) * n_rows + rows
        for _ in range(splits):
            max_view, total_view, max_target, total_target, distance = joined_softmaxes(
                max_view,
                total_view,
                max_target,
                total_target,
                distance,
                tl.load(source + VIEW_MAX * count, mask=inside, other=float("-inf")),
                tl.load(source + VIEW_TOTAL * count, mask=inside, other=0.0),
                tl.load(source + TARGET_MAX * count, mask=inside, other=float("-inf")),
                tl.load(source + TARGET_TOTAL * count, mask=inside, other=0.0),
                tl.load(source + DISTANCE * count, mask=inside, other=0.0),
            )
            source += SOFT_PARTIAL * tl.cast(count, tl.int64)
        loss += distance / tl.where(total_target == 0.0, 1.0, total_target)
        target = state + 2 * (views + teacher) * n_rows + rows
        if view == 0:
            tl.store(target, max_target, mask=inside)
            tl.store(target + n_rows, total_target, mask=inside)
    loss = loss / teachers + tl.log2(tl.where(total_view == 0.0, 1.0, total_view))
    tl.store(losses + view * n_rows + rows, loss * LN2, mask=inside)
    target = state + 2 * view * n_rows + rows
    tl.store(target, max_view, mask=inside)
    tl.store(target + n_rows, total_view, mask=inside)


@triton.jit
def less_target(
    view,
    target,
    n_rows,
    rows,
    others,
    dots,
    TARGET_D: tl.constexpr,
    TARGET_BLOCK_D: tl.constexpr,
    TARGET_BLOCK_K: tl.constexpr,
    TARGET_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The views' logits' gradients of a tile of products, [BM, BN]: p - q, times the losses' gradients."""
    result = softmax_tile(view, rows, others, dots)
    for teacher in range(target.count):
        own_rows, other_rows = rows, others
        if target.own_weights is None:
            other_rows = others % n_rows + teacher * n_rows
        else:
            own_rows = rows % n_rows + teacher * n_rows
        own_tile = None
        if target.matrix is None and TARGET_BLOCK_K == TARGET_BLOCK_D:
            own_tile = load_rows(target.own, own_rows, 0, TARGET_D, TARGET_BLOCK_D, TARGET_DOT)
        dots = dots_of(
            target.own,
            target.other,
            target.matrix,
            own_rows,
            other_rows,
            own_tile,
            TARGET_D,
            TARGET_BLOCK_D,
            TARGET_BLOCK_K,
            TARGET_DOT,
            PRECISION,
        )
        result -= softmax_tile(target, own_rows, other_rows, dots)
    if view.own_weights is None:
        slopes = view.other_weights + LOSS_SLOPE * view.other.count
        result *= tl.expand_dims(load_vector(slopes, others, view.other), 0)
    else:
        slopes = view.own_weights + LOSS_SLOPE * view.own.count
        result *= tl.expand_dims(load_vector(slopes, rows, view.own), 1)
    return result


@triton.jit
def softmax_tile(softmaxes, rows, others, dots):
    """Softmaxes of a tile of products, as their weights say."""
    return tile_weights(
        softmaxes.own,
        softmaxes.other,
        softmaxes.own_weights,
        softmaxes.other_weights,
        rows,
        others,
        dots,
        tl.load(softmaxes.scale) * LOG2E,
    )


@triton.jit
def soft_gradient(
    view,  # Softmaxes
    target,  # Softmaxes
    n_rows,
    unit,  # () float32
    row_gradient,  # [splits, count, D]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TARGET_D: tl.constexpr,
    TARGET_BLOCK_D: tl.constexpr,
    TARGET_BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    TARGET_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial gradients of a block of the views' rows, or of the keys'."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_tile = None
    if BLOCK_K == BLOCK_D:
        own_tile = load_rows(view.own, rows, 0, D, BLOCK_D, DOT)
    one = tl.load(unit)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, end = split_of(view.other.count, BLOCK_N)
    for tile in range(start, end):
        others = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        other_tile = load_rows(view.other, others, 0, D, BLOCK_D, DOT)
        dots = products(
            view.own, view.other, rows, others, own_tile, other_tile, D, BLOCK_D, BLOCK_K, DOT, PRECISION
        )
        weights = less_target(
            view,
            target,
            n_rows,
            rows,
            others,
            dots,
            TARGET_D,
            TARGET_BLOCK_D,
            TARGET_BLOCK_K,
            TARGET_DOT,
            PRECISION,
        )
        total = pulled(total, weights, view.other, others, other_tile, one, DOT, PRECISION)
    store_rows(row_gradient, total / one, rows, view.own.count, D, BLOCK_D)


@triton.jit
def soft_logit_gradient(
    view,  # Softmaxes with stored products
    target,  # Softmaxes
    n_rows,
    unit,  # () float32
    result,  # [V * N, M] in the dtype of the products
    TARGET_D: tl.constexpr,
    TARGET_BLOCK_D: tl.constexpr,
    TARGET_BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TARGET_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The views' logits' gradients of stored products, for a library to multiply."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    others = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = stored_products(view.matrix, view.own, view.other, rows, others)
    weights = less_target(
        view,
        target,
        n_rows,
        rows,
        others,
        dots,
        TARGET_D,
        TARGET_BLOCK_D,
        TARGET_BLOCK_K,
        TARGET_DOT,
        PRECISION,
    )
    store_tile(result, weights * tl.load(unit), view.own, view.other, rows, others)
