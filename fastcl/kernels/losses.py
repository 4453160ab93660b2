"""The losses with one positive per row, value and gradients in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastcl.kernels import launch, stats, tiles
from fastcl.kernels.device import one_positive as device
from fastcl.kernels.device.layout import NEGATIVE_WEIGHTS
from fastcl.kernels.device.one_positive import Chain, Direction
from fastcl.kernels.device.tile import Partials, Side
from fastcl.kernels.launch import UnitRows
from fastcl.losses.families.one_positive import BATCH, NEGATIVES, PAIRS, VIEWS, OnePositive
from fastcl.similarity.fields import OF_NEGATIVES
from fastcl.similarity.problem import PairGradients

_BLOCK = 64


class _Wanted(NamedTuple):
    """Where gradients go; None where none is wanted."""

    query: Tensor | None  # (N, D) float32
    positive: Tensor | None  # (N, D) float32
    negatives: Tensor | None  # (M, D) float32
    scale: bool

    def any(self) -> bool:
        return self.scale or any(target is not None for target in self[:3])


class RowLosses(NamedTuple):
    """What the losses kernel leaves for the gradients."""

    rows: Tensor  # (N,) losses
    slopes: Tensor  # (N,): minus the gradients of the positive logits
    largest: Tensor  # [programs]: of the weights
    scale: Tensor  # ()
    factor: float  # of the reduction


def one_positive(args: OnePositive, needs: int) -> tuple[Tensor, ...]:
    """Loss and, for an incoming gradient of 1, those of query, positive, negatives and scale, as bits ask."""
    scale = args.scale.float()
    targets = [
        scale.new_empty(x.shape) if x is not None and needs >> bit & 1 else None
        for bit, x in enumerate(args[:3])
    ]
    query, positive, negatives = targets
    wanted = _Wanted(query, positive, negatives, scale=bool(needs >> 3 & 1))
    run = {VIEWS: _views, BATCH: _batch, PAIRS: _batch, NEGATIVES: _negatives}[args.layout]
    loss, of_scale = run(args, scale, wanted)
    grads = (scale.new_empty(0) if target is None else target for target in targets)
    grad_scale = scale.new_empty(0) if of_scale is None else of_scale.sum()
    return loss.rows.sum() * loss.factor, *grads, grad_scale.to(args.scale.dtype)


def _views(args: OnePositive, scale: Tensor, wanted: _Wanted) -> tuple[RowLosses, Tensor | None]:
    n = args.query.shape[0]
    rows = launch.unit_rows(args.query, args.positive)
    side = rows.side(period=max(n, 1))
    triangle = not _wide(side) and launch.column_partials_fit(side, side)
    partials, of_columns = _statistics(side, side, scale, columns=triangle, triangle=triangle)
    weights = scale.new_empty(NEGATIVE_WEIGHTS, 2 * n)
    first = Direction(partials, of_columns, 0, 2 * n, weights)
    query, positive = rows.part(slice(0, n)), rows.part(slice(n, 2 * n))
    loss = find_losses(query, positive, scale, (first, first._replace(offset=n)), 1.0, _factor(args, 2 * n))
    if not wanted.any():
        return loss, None
    chain = chain_of(loss, rows, n, wanted.query, wanted.positive, n)
    parts = _wide_parts(side, side, loss, weights, weights, True, False)
    sums = _loss_gradient(side, side, side, chain, weights, weights, loss, parts.query, wanted.scale)
    return loss, None if sums is None else 0.5 * sums  # each pair was seen from both sides


def _batch(args: OnePositive, scale: Tensor, wanted: _Wanted) -> tuple[RowLosses, Tensor | None]:
    n = args.query.shape[0]
    query_rows, positive_rows = _query_and_positive(args)
    query, positive = (rows.side(period=max(n, 1)) for rows in (query_rows, positive_rows))
    columns = args.layout == PAIRS
    one_pass = columns and (_wide(query) or launch.column_partials_fit(query, positive))
    partials, of_columns = _statistics(query, positive, scale, columns=one_pass)
    query_weights, positive_weights = scale.new_empty(NEGATIVE_WEIGHTS, n), None
    directions = [Direction(partials, None, 0, n, query_weights)]
    if columns:
        if of_columns is None:
            of_columns, _ = launch.row_statistics(positive, query, scale)
        positive_weights = torch.empty_like(query_weights)
        directions.append(Direction(of_columns, None, 0, n, positive_weights))
    loss = find_losses(query_rows, positive_rows, scale, directions, 1.0 / len(directions), _factor(args, n))
    want_query, want_positive = wanted.query is not None or wanted.scale, wanted.positive is not None
    parts = _wide_parts(query, positive, loss, query_weights, positive_weights, want_query, want_positive)
    weights, sums = (query_weights, positive_weights), None
    if want_query:
        chain = chain_of(loss, query_rows, 0, wanted.query)
        sums = _loss_gradient(query, positive, positive, chain, *weights, loss, parts.query, wanted.scale)
    if want_positive:
        chain = chain_of(loss, positive_rows, 0, wanted.positive)
        _loss_gradient(positive, query, query, chain, *weights[::-1], loss, parts.key)
    return loss, sums


def _negatives(args: OnePositive, scale: Tensor, wanted: _Wanted) -> tuple[RowLosses, Tensor | None]:
    assert args.negatives is not None
    n = args.query.shape[0]
    query_rows, positive_rows = _query_and_positive(args)
    ready = launch.unit_rows if args.normalize_negatives else launch.given_rows
    negative_rows = ready(args.negatives)
    query_ids, negative_ids = (
        None if ids is None else ids.contiguous() for ids in (args.query_ids, args.negative_ids)
    )
    query, positive = query_rows.side(exclude=query_ids), positive_rows.side()
    negatives = negative_rows.side(exclude=negative_ids)
    want_query, want_negatives = wanted.query is not None or wanted.scale, wanted.negatives is not None
    weighted = None
    if want_query and not want_negatives:
        partials, weighted = stats.attend(query, negatives, scale)
    else:
        partials, _ = _statistics(query, negatives, scale)
    weights = scale.new_empty(NEGATIVE_WEIGHTS, n)
    direction = Direction(partials, None, 0, n, weights)
    loss = find_losses(query_rows, positive_rows, scale, (direction,), 1.0, _factor(args, n))
    parts, sums = PairGradients(None, None, None), None
    if weighted is None:
        parts = _wide_parts(query, negatives, loss, weights, None, want_query, want_negatives)
    if want_query:
        chain = chain_of(loss, query_rows, 0, wanted.query)
        if weighted is None:
            sums = _loss_gradient(
                query, negatives, positive, chain, weights, None, loss, parts.query, wanted.scale
            )
        else:
            sums = pulled_gradient(query, positive, chain, weights, partials, weighted, wanted.scale)
    if wanted.positive is not None:
        pulled_gradient(positive, query, chain_of(loss, positive_rows, 0, wanted.positive))
    if want_negatives:
        chain = chain_of(loss, negative_rows, 0, wanted.negatives)
        chain = chain._replace(slopes=None)
        _loss_gradient(negatives, query, None, chain, None, weights, loss, parts.key)
    return loss, sums


def _wide(side: Side) -> bool:
    """Whether the library multiplies the rows."""
    return bool(side.rows.shape[1] > tiles.MAX_WIDTH)


def _statistics(
    own: Side, other: Side, scale: Tensor, columns: bool = False, triangle: bool = False
) -> tuple[Partials, Partials | None]:
    """As :func:`launch.row_statistics`, for rows of any width."""
    if not _wide(own):
        return launch.row_statistics(own, other, scale, columns=columns, triangle=triangle)
    _, row_state, _, column_state = stats.wide_statistics(own, other, scale, columns)
    of_columns = launch.as_partials(column_state[None, OF_NEGATIVES]) if columns else None
    return launch.as_partials(row_state[None, OF_NEGATIVES]), of_columns


def _wide_parts(
    query: Side,
    key: Side,
    loss: RowLosses,
    query_weights: Tensor,
    key_weights: Tensor | None,
    want_query: bool,
    want_key: bool,
) -> PairGradients:
    """The negatives' part of both sides' gradients, where the library multiplies the rows."""
    if not _wide(query) or not (want_query or want_key):
        return PairGradients(None, None, None)
    unit = torch.ones_like(loss.scale)
    if query.rows.dtype == torch.float16 and loss.largest.numel():
        unit = launch.power_of_two_over(loss.largest.amax())
    return stats.wide_gradients(
        query, key, loss.scale, query_weights, key_weights, unit, want_query, want_key
    )


def _factor(args: OnePositive, rows: int) -> float:
    """What the sum of the rows' losses is multiplied by."""
    if args.reduction == "sum":
        return 1.0
    return 1.0 / rows if rows else float("nan")


def _query_and_positive(args: OnePositive) -> tuple[UnitRows, UnitRows]:
    assert args.positive is not None
    if not args.normalize:
        return launch.given_rows(args.query), launch.given_rows(args.positive)
    n = args.query.shape[0]
    rows = launch.unit_rows(args.query, args.positive)
    return rows.part(slice(0, n)), rows.part(slice(n, 2 * n))


def find_losses(
    query: UnitRows,
    positive: UnitRows,
    scale: Tensor,
    directions: Sequence[Direction],
    share: float,
    factor: float,
) -> RowLosses:
    n, width = query.rows.shape
    programs = triton.cdiv(n, _BLOCK)
    losses, slopes = scale.new_empty(2, n).unbind(0)
    largest = scale.new_empty(programs)
    first, second = (*directions, None)[:2]
    launch.launch(
        device.losses,
        (programs,),
        query.side(),
        positive.side(),
        scale,
        first,
        second,
        share,
        losses,
        slopes,
        largest,
        n,
        BOTH=second is not None,
        D=width,
        BLOCK_D=min(64, tiles.block_width(width)),
        BLOCK=_BLOCK,
        SLOTS=16,
    )
    return RowLosses(losses, slopes, largest, scale, factor)


def chain_of(
    loss: RowLosses,
    rows: UnitRows,
    shift: int,
    first: Tensor | None,
    second: Tensor | None = None,
    n_first: int | None = None,
) -> Chain:
    count = rows.rows.shape[0] if n_first is None else n_first
    n = loss.slopes.shape[0]
    return Chain(loss.scale, rows.inverse, loss.slopes, n, shift, loss.factor, first, count, second, None)


def _loss_gradient(
    own: Side,
    other: Side,
    partner: Side | None,
    chain: Chain,
    own_weights: Tensor | None,
    other_weights: Tensor | None,
    loss: RowLosses,
    part: Tensor | None = None,
    of_scale: bool = False,
) -> Tensor | None:
    """``part``: the negatives' part where it is known already."""
    if part is not None:
        return pulled_gradient(own, partner, chain, weighted=part, of_scale=of_scale)
    walk = launch.plan("gradient", own, other, fill=True)
    blocks = walk.grid[0]
    rows = loss.scale.new_empty(own.count) if of_scale else None
    chain = chain._replace(of_scale=rows)
    largest = (loss.largest, loss.largest.shape[0])
    launch.launch(
        device.loss_gradient,
        (blocks, 1),
        own,
        other,
        partner,
        chain,
        own_weights,
        other_weights,
        *largest,
        **walk.options,
    )
    return rows


def pulled_gradient(
    own: Side,
    partner: Side | None,
    chain: Chain,
    weights: Tensor | None = None,
    partials: Partials | None = None,
    weighted: Tensor | None = None,
    of_scale: bool = False,
) -> Tensor | None:
    width = own.rows.shape[1]
    block_d = tiles.block_width(width)
    block = max(1, 4096 // block_d)
    programs = triton.cdiv(own.count, block)
    rows = chain.scale.new_empty(own.count) if of_scale else None
    launch.launch(
        device.pulled_gradient,
        (programs,),
        own,
        partner,
        chain._replace(of_scale=rows),
        weights,
        partials,
        weighted,
        D=width,
        BLOCK_D=block_d,
        BLOCK=block,
    )
    return rows
