"""A queue of keys: enqueue, the most similar keys, and MoCHi's loss."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcl.kernels import launch, losses, stats, tiles
from fastcl.kernels.device import mochi as device_mochi
from fastcl.kernels.device import rows as device_rows
from fastcl.kernels.device import topk as device_topk
from fastcl.kernels.device.layout import NEGATIVE_WEIGHTS
from fastcl.kernels.device.mochi import Mix
from fastcl.kernels.device.one_positive import Direction
from fastcl.kernels.device.tile import Side
from fastcl.losses.families.mochi import Mochi
from fastcl.similarity.problem import TopK

_RANKS = 1 << 24  # similarities ranked at a time
_KEYS = 1 << 16


def enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    """As :func:`fastcl.backends.chunked.enqueue`, in one launch."""
    new_keys = launch.row_contiguous(new_keys)
    count, width = new_keys.shape
    block_d = tiles.block_width(width)
    block = max(1, 4096 // block_d)
    launch.launch(
        device_rows.enqueue,
        (triton.cdiv(count, block),),
        keys,
        ids,
        pointer,
        new_keys,
        None if new_ids is None else new_ids.contiguous(),
        keys.shape[0],
        count,
        new_keys.stride(0),
        D=width,
        BLOCK_D=block_d,
        BLOCK=block,
    )


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.topk`: kernels rank, the library's selection picks."""
    ready = launch.unit_rows if args.normalize else launch.given_rows
    query_ids, key_ids = (
        None if ids is None else ids.contiguous() for ids in (args.simple_exclude() or (None, None))
    )
    query, key = ready(args.query).side(exclude=query_ids), ready(args.key).side(exclude=key_ids)
    return _select(query, key, args.k)


def _select(query: Side, key: Side, k: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(query.count, k, dtype=torch.float32, device=query.rows.device)
    indices = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    step = max(1, _RANKS // max(1, min(_KEYS, key.count)))
    for start in range(0, query.count, step):
        rows = slice(start, min(query.count, start + step))
        ranks = _best_ranks(launch.part(query, rows), key, k)
        high = (ranks >> 32).to(torch.int32)
        values[rows] = (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
        indices[rows] = 0xFFFFFFFF - (ranks & 0xFFFFFFFF)
    return values, indices.masked_fill_(values == -torch.inf, -1)


def _best_ranks(query: Side, key: Side, k: int) -> Tensor:
    nothing = -0x7F800001 << 32  # the rank of -inf: below every key's
    best = torch.full((query.count, k), nothing, dtype=torch.int64, device=query.rows.device)
    for start in range(0, key.count, _KEYS):
        keys = launch.part(key, slice(start, min(key.count, start + _KEYS)))
        ranks = torch.empty(query.count, keys.count, dtype=torch.int64, device=best.device)
        walk = launch.plan("statistics", query, keys)
        matrix = launch.stored(query, keys) if query.rows.shape[1] > tiles.MAX_WIDTH else None
        arguments = (query, keys, matrix, ranks, start)
        launch.launch(device_topk.rank, launch.tile_grid(walk, query, keys), *arguments, **walk.options)
        best = torch.cat([best, ranks], dim=1).topk(k, dim=1).values
    return best


def mochi(args: Mochi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.mochi`."""
    n, scale = args.query.shape[0], args.scale.float()
    rows = launch.unit_rows(args.query, args.positive)
    query, positive = rows.part(slice(0, n)), rows.part(slice(n, 2 * n))
    keys = launch.given_rows(args.keys)
    _, hard = _select(query.side(), keys.side(), args.n_hard)
    partials, weighted = stats.attend(query.side(), keys.side(), scale, spare=1)
    _synthesize(args, query, keys.rows, hard, scale, partials.data[-1], weighted[-1])
    weights = scale.new_empty(NEGATIVE_WEIGHTS, n)
    direction = Direction(partials, None, 0, n, weights)
    loss = losses.find_losses(query, positive, scale, (direction,), 1.0, 1.0)
    grad_query, grad_positive = (scale.new_empty(args.query.shape) for _ in range(2))
    chain = losses.chain_of(loss, query, 0, grad_query)
    grad_scale = losses.pulled_gradient(
        query.side(), positive.side(), chain, weights, partials, weighted, of_scale=True
    )
    losses.pulled_gradient(positive.side(), query.side(), losses.chain_of(loss, positive, 0, grad_positive))
    assert grad_scale is not None
    return loss.rows, grad_query, grad_positive, grad_scale


def _synthesize(
    args: Mochi,
    query: launch.UnitRows,
    keys: Tensor,
    hard: Tensor,
    scale: Tensor,
    partials: Tensor,
    weighted: Tensor,
) -> None:
    n, width = query.rows.shape
    block_d = tiles.block_width(width)
    launch.launch(
        device_mochi.synthesize,
        (n,),
        query.rows,
        query.factor,
        keys,
        hard,
        scale,
        Mix(args.first.contiguous(), args.second.contiguous(), args.alpha.contiguous(), args.alpha.shape[1]),
        Mix(None, args.partner.contiguous(), args.beta.contiguous(), args.beta.shape[1]),
        partials,
        weighted,
        n,
        args.n_hard,
        query.rows.stride(0),
        keys.stride(0),
        D=width,
        BLOCK_D=block_d,
        BLOCK=max(1, 4096 // block_d),
    )
