"""Losses with one positive per row: from partial statistics to the loss, from there to gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastcl.kernels.device.attend import joined
from fastcl.kernels.device.gradient import accumulate
from fastcl.kernels.device.layout import NEG_SLOPE
from fastcl.kernels.device.rows import NORM_EPS, power_of_two_below
from fastcl.kernels.device.statistics import log_sum, negatives_state
from fastcl.kernels.device.tile import LN2, LOG2E, finite, load_rows, load_vector, log2_of_1_plus


class Direction(NamedTuple):
    """Rows of one side that look for their positive: row i of the loss is row ``offset + i`` of it."""

    partials: Any
    triangle: Any
    offset: Any
    count: Any
    weights: Any  # [2, count] float32, written: max and slope of the negatives


@triton.jit
def direction_loss(direction, rows, n_rows, positive_logit, share, SLOTS: tl.constexpr):
    """Losses, slopes and weights of rows in one direction, [B]; writes the direction's weights."""
    own = rows + direction.offset
    maximum, total = negatives_state(direction.partials, direction.triangle, own, direction.count, SLOTS)
    margin = log_sum(maximum, total) - positive_logit
    decay = tl.exp2(-tl.abs(margin) * LOG2E)
    loss = tl.where(margin > 0.0, margin, 0.0) + log2_of_1_plus(decay) * LN2
    slope = share * tl.where(margin > 0.0, 1.0, decay) / (1.0 + decay)
    weight = slope / tl.where(total == 0.0, float("inf"), total)
    tl.store(direction.weights + own, finite(maximum), mask=rows < n_rows)
    tl.store(direction.weights + NEG_SLOPE * direction.count + own, weight, mask=rows < n_rows)
    return share * loss, slope, weight


@triton.jit
def losses(
    query,
    positive,
    scale,  # () float32
    first,  # Direction
    second,  # Direction
    share,  # weight of each direction in a row's loss
    row_losses,  # [N]
    slopes,  # [N]: minus the gradient of the rows' positive logits
    largest,  # [programs]: of the weights
    n_rows,
    BOTH: tl.constexpr,  # whether there is a second direction
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Positive logits, merged statistics, losses, and the weights of all negatives' gradients."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    logit = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK_D):
        a = load_rows(query, rows, start, D, BLOCK_D, tl.float32)
        b = load_rows(positive, rows, start, D, BLOCK_D, tl.float32)
        logit += tl.sum(a * b, 1)
    logit *= tl.load(scale)
    if query.factor is not None:
        logit *= load_vector(query.factor, rows, query)
    if positive.factor is not None:
        logit *= load_vector(positive.factor, rows, positive)
    loss, slope, weight = direction_loss(first, rows, n_rows, logit, share, SLOTS)
    if BOTH:
        other_loss, other_slope, other_weight = direction_loss(second, rows, n_rows, logit, share, SLOTS)
        loss, slope, weight = loss + other_loss, slope + other_slope, tl.maximum(weight, other_weight)
    tl.store(slopes + rows, slope, mask=inside)
    tl.store(row_losses + rows, loss, mask=inside)
    tl.store(largest + tl.program_id(0), tl.max(tl.where(inside, weight, 0.0), 0))


@triton.jit
def weight_unit(largest, n_programs, BLOCK: tl.constexpr):
    """The power of two that brings the largest weight to [1, 2)."""
    most = 0.0
    for start in range(0, n_programs, BLOCK):
        indices = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.max(tl.load(largest + indices, mask=indices < n_programs, other=0.0), 0))
    return 1.0 / power_of_two_below(most)


@triton.jit
def to_inputs(
    total,  # [BM, BLOCK_D]: sum over the negatives of dl_ij y_j
    own,
    partner,  # the side whose row (i + shift) modulo its count is row i's positive
    chain,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the given rows' gradient: the positive's part added, through the normalization."""
    unit = load_rows(own, rows, 0, D, BLOCK_D, tl.float32)
    if own.factor is not None:
        unit *= load_vector(own.factor, rows, own)[:, None]
    if chain.slopes is not None:
        partners = (rows + chain.shift) % partner.count
        slope = tl.load(chain.slopes + rows % chain.n_rows, mask=rows < own.count, other=0.0)
        positive = load_rows(partner, partners, 0, D, BLOCK_D, tl.float32)
        if partner.factor is not None:
            positive *= load_vector(partner.factor, partners, partner)[:, None]
        total -= positive * slope[:, None]
    radial = tl.sum(total * unit, 1)
    if chain.of_scale is not None:
        tl.store(chain.of_scale + rows, radial * chain.factor, mask=rows < own.count)
    scale = tl.load(chain.scale)
    if own.factor is not None:
        inverse = load_vector(chain.inverse, rows, own)
        kept = tl.where(inverse >= 1.0 / NORM_EPS, 0.0, radial)
        total = (total - unit * kept[:, None]) * inverse[:, None]
    total *= scale * chain.factor
    components = tl.arange(0, BLOCK_D)[None, :]
    if chain.first is not None:
        target = chain.first + rows.to(tl.int64)[:, None] * D + components
        tl.store(target, total, mask=(rows[:, None] < chain.n_first) & (components < D))
    if chain.second is not None:
        target = chain.second + (rows - chain.n_first).to(tl.int64)[:, None] * D + components
        inside = (rows[:, None] >= chain.n_first) & (rows[:, None] < own.count)
        tl.store(target, total, mask=inside & (components < D))


class Chain(NamedTuple):
    """How row gradients reach the inputs."""

    scale: Any  # () float32
    inverse: Any  # (count,) float32: 1 / norm of the given rows, or None
    slopes: Any  # (n_rows,) of the positive logits; None for rows without a positive
    n_rows: Any
    shift: Any  # from a row to its positive
    factor: Any  # of the reduction
    first: Any  # gradient of the first rows, (n_first, D), or None
    n_first: Any
    second: Any  # of those after them, or None
    of_scale: Any  # (count,): the rows' parts of the scale's gradient, or None


@triton.jit
def loss_gradient(
    own,
    other,
    partner,
    chain,
    own_weights,  # (2, N) or None
    other_weights,  # (2, M) or None
    largest,
    n_largest,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The inputs' gradient for a block of own rows, whose negatives are all of the other side."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = 1.0
    if tl.float16 == DOT:
        unit = weight_unit(largest, n_largest, 1024)
    scale2 = tl.load(chain.scale) * LOG2E
    total, _ = accumulate(
        own,
        other,
        own_weights,
        other_weights,
        rows,
        scale2,
        unit,
        D,
        BLOCK_D,
        BLOCK_K,
        BLOCK_M,
        BLOCK_N,
        DOT,
        PRECISION,
    )
    to_inputs(total, own, partner, chain, rows, D, BLOCK_D)


@triton.jit
def pulled_gradient(
    own,
    partner,
    chain,
    weights,  # (2, N): max and slope of the negatives; None without partials
    partials,  # of attend
    weighted,  # [slots, N, D] of attend; without partials (N, D), the negatives' part itself; or None
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same where others have summed up the negatives' part, or where there is none."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if weights is not None:
        shift = load_vector(weights, rows, own)
        total = joined(partials, weighted, shift, rows, own.count, D, BLOCK_D)
        total *= load_vector(weights + NEG_SLOPE * own.count, rows, own)[:, None]
    elif weighted is not None:
        components = tl.arange(0, BLOCK_D)[None, :]
        inside = (rows[:, None] < own.count) & (components < D)
        total = tl.load(weighted + rows.to(tl.int64)[:, None] * D + components, mask=inside, other=0.0)
    else:
        total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    to_inputs(total, own, partner, chain, rows, D, BLOCK_D)
