"""MoCHi's synthetic negatives, mixed in registers: one more partial result of the pass over the queue."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastcl.kernels.device.tile import LOG2E, finite


class Mix(NamedTuple):
    """One kind of synthetic negative: ``weight * first + (1 - weight) * second`` of a query's hard keys."""

    first: Any  # (N, count) int64 ranks; None: the query itself
    second: Any  # (N, count) int64 ranks
    weight: Any  # (N, count) float32
    count: Any


@triton.jit
def hard_rows(keys, hard, ranks, row, inside, n_hard, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The keys at ``ranks`` of a query's list: [B, BLOCK_D] float32."""
    index = tl.load(hard + row.to(tl.int64) * n_hard + ranks, mask=inside, other=0)
    components = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (components < D)
    return tl.load(keys + index[:, None] * stride + components, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def mix_rows(
    mix,
    keys,
    hard,
    query,
    row,
    scale2,
    maximum,
    total,
    pull,
    n_hard,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running (max, sum) and weighted sum of a query's synthetic negatives of one kind, joined."""
    for start in range(0, mix.count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < mix.count
        offsets = row.to(tl.int64) * mix.count + columns
        weight = tl.load(mix.weight + offsets, mask=inside, other=0.0)[:, None]
        second = tl.load(mix.second + offsets, mask=inside, other=0)
        mixed = (1.0 - weight) * hard_rows(keys, hard, second, row, inside, n_hard, stride, D, BLOCK_D)
        if mix.first is None:
            mixed += weight * query[None, :]
        else:
            first = tl.load(mix.first + offsets, mask=inside, other=0)
            mixed += weight * hard_rows(keys, hard, first, row, inside, n_hard, stride, D, BLOCK_D)
        squared = tl.sum(mixed * mixed, 1)
        inverse = tl.where(squared == 0.0, 0.0, tl.rsqrt(tl.where(squared == 0.0, 1.0, squared)))
        logits = tl.sum(mixed * query[None, :], 1) * inverse * scale2
        logits = tl.where(inside, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        shift = finite(new_maximum)
        exponentials, rescale = tl.exp2(logits - shift), tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(exponentials, 0)
        pull = pull * rescale + tl.sum(mixed * (exponentials * inverse)[:, None], 0)
        maximum = new_maximum
    return maximum, total, pull


@triton.jit
def synthesize(
    query,
    factor,  # (N,) float32
    keys,
    hard,  # (N, n_hard) int64
    scale,  # () float32
    of_keys,  # Mix
    with_query,  # Mix
    partials,  # [2, N]
    weighted,  # [N, D]
    n_rows,
    n_hard,
    query_stride,
    key_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial state and weighted sum of one query's synthetic negatives."""
    row = tl.program_id(0)
    components = tl.arange(0, BLOCK_D)
    unit = tl.load(query + row.to(tl.int64) * query_stride + components, mask=components < D, other=0.0)
    unit = unit.to(tl.float32) * tl.load(factor + row)
    scale2 = tl.load(scale) * LOG2E
    maximum, total = float("-inf"), 0.0
    pull = tl.zeros((BLOCK_D,), tl.float32)
    maximum, total, pull = mix_rows(
        of_keys, keys, hard, unit, row, scale2, maximum, total, pull, n_hard, key_stride, D, BLOCK_D, BLOCK
    )
    maximum, total, pull = mix_rows(
        with_query, keys, hard, unit, row, scale2, maximum, total, pull, n_hard, key_stride, D, BLOCK_D, BLOCK
    )
    tl.store(partials + row, maximum)
    tl.store(partials + n_rows + row, total)
    tl.store(weighted + row.to(tl.int64) * D + components, pull, mask=components < D)
