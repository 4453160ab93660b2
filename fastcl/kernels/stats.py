"""Similarity statistics and their gradients.

Up to 256 components the kernels form the products themselves; wider rows are multiplied by the
library, a chunk of rows at a time, and the same kernels work on what it stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.kernels import launch, tiles
from fastcl.kernels.device.gradient import tile_weights
from fastcl.kernels.device.layout import NEGATIVE_WEIGHTS, Weights
from fastcl.kernels.device.tile import Partials, Side, Stored
from fastcl.kernels.launch import UnitRows
from fastcl.similarity.fields import (
    LSES,
    MAXIMA,
    NEG_MAX,
    NEGATIVE_STATE,
    OF_NEGATIVES,
    POS_SUM,
    POSITIVE_SUMS,
    RUNNING,
    STATE,
    STATISTICS,
    TOTALS,
    nothing_seen,
)
from fastcl.similarity.problem import Needs, PairGradients, Prepared, Problem, input_gradients, wanted_pairs

_CHUNK_ELEMENTS = 1 << 25


class Sides:
    """Both sides of a problem as the kernels take them."""

    def __init__(self, problem: Problem) -> None:
        ready = launch.unit_rows if problem.normalize else launch.given_rows
        self.query_rows = ready(problem.query)
        self.key_rows = self.query_rows if problem.symmetric else ready(problem.key)
        key_factor = self.key_rows.factor
        if problem.key_scale is not None:
            key_scale = problem.key_scale.float()
            key_factor = key_scale.contiguous() if key_factor is None else key_factor * key_scale
        query_ids, key_ids = (
            [None if ids is None else ids.contiguous() for ids in side]
            for side in (
                (problem.exclude_query, problem.positive_query),
                (problem.exclude_key, problem.positive_key),
            )
        )
        self.query = self.query_rows.side(exclude=query_ids[0], positive=query_ids[1])
        self.key = self.key_rows.side(
            factor=key_factor, bias=launch.bias2(problem.key_bias), exclude=key_ids[0], positive=key_ids[1]
        )
        self.scale = problem.scale.float()
        self.wide = problem.query.shape[1] > tiles.MAX_WIDTH

    def prepared(self) -> Prepared:
        """What the chain rule to the inputs needs."""

        def column(rows: UnitRows) -> Tensor | None:
            return None if rows.inverse is None else rows.inverse[:, None]

        query = self.query_rows.unit()
        key = query if self.key_rows is self.query_rows else self.key_rows.unit()
        return Prepared(query, key, column(self.query_rows), column(self.key_rows))


_SLOPES = [i for i, name in enumerate(Weights._fields) if name.endswith("_slope")]


@launch.at_its_precision
def stats_forward(problem: Problem, weighted_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.stats_forward`."""
    sides = Sides(problem)
    query, key, scale = sides.query, sides.key, sides.scale
    columns, column_state = scale.new_empty(STATISTICS, 0), scale.new_empty(STATE, 0)
    weighted = scale.new_empty(0)
    if weighted_keys:
        partials, parts = attend(query, key, scale)
        rows, row_state = launch.merge(partials)
        return rows, row_state, columns, column_state, launch.merge_weighted(partials, parts, row_state)
    if sides.wide:
        return *wide_statistics(query, key, scale, problem.columns), weighted
    one_pass = query.positive is None and launch.column_partials_fit(query, key)
    triangle = problem.symmetric and one_pass
    partials, of_columns = launch.row_statistics(
        query, key, scale, columns=triangle or (problem.columns and one_pass), triangle=triangle
    )
    if triangle:
        return *launch.merge(partials, of_columns), columns, column_state, weighted
    if problem.columns:
        if of_columns is None:
            of_columns, _ = launch.row_statistics(key, query, scale)
        columns, column_state = launch.merge(of_columns)
    return *launch.merge(partials), columns, column_state, weighted


@launch.at_its_precision
def stats_backward(
    problem: Problem,
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.stats_backward`."""
    sides = Sides(problem)
    labelled = sides.query.positive is not None
    query_weights = _weights(grad_rows, row_state, labelled)
    key_weights = query_weights if problem.symmetric else None
    if problem.columns:
        key_weights = _weights(grad_columns, column_state, labelled)
    unit = _weight_unit(sides, (query_weights, key_weights))
    wanted = wanted_pairs(problem, needs)
    pairs = gradients(sides.query, sides.key, sides.scale, query_weights, key_weights, unit, *wanted)
    return input_gradients(problem, sides.prepared(), pairs, needs)


def gradients(
    query: Side,
    key: Side,
    scale: Tensor,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    unit: Tensor,
    want_query: bool,
    want_key: bool,
    want_bias: bool,
    weights: Any = tile_weights,
) -> PairGradients:
    """Pair gradients of rows of any width; ``weights`` as :func:`launch.row_gradient` takes it."""
    of_both = (query_weights, key_weights)
    if query.rows.shape[1] > tiles.MAX_WIDTH:
        wanted = (want_query, want_key, want_bias)
        return wide_gradients(query, key, scale, *of_both, unit, *wanted, weights=weights)
    query_sum = key_sum = bias_sum = None
    if want_query:
        query_sum, _ = launch.row_gradient(query, key, scale, *of_both, unit, weights=weights)
    if want_key or want_bias:
        key_sum, bias_sum = launch.row_gradient(key, query, scale, *of_both[::-1], unit, want_bias, weights)
    return PairGradients(query_sum, key_sum, bias_sum)


def _weights(grad: Tensor, state: Tensor, labelled: bool) -> Tensor:
    """The Weights of rows, packed; without labels those of the negatives only."""
    maximum, total = state[MAXIMA], state[TOTALS]
    slope = grad[LSES] / total.masked_fill(total == 0, torch.inf)
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = Weights(
        neg_max=finite[0], neg_slope=slope[0], pos_max=finite[1], pos_slope=slope[1], sum_slope=grad[POS_SUM]
    )
    return torch.stack(weights if labelled else weights[:NEGATIVE_WEIGHTS])


def _weight_unit(sides: Sides, weights: Iterable[Tensor | None]) -> Tensor:
    """A power of two that brings the largest weight near 1: float16 would lose small ones."""
    one = sides.scale.new_ones(())
    if sides.query.rows.dtype != torch.float16:
        return one
    slopes = [packed[[i for i in _SLOPES if i < len(packed)]] for packed in weights if packed is not None]
    largest = torch.cat([one[None] * 0, *(slope.abs().flatten() for slope in slopes)]).amax()
    if sides.key.factor is not None and sides.key.count:
        largest = largest * sides.key.factor.abs().amax()
    return launch.power_of_two_over(largest)


class _Chunk(NamedTuple):
    """The products of a chunk of queries with all keys."""

    rows: slice
    query: Side
    by_query: Stored
    by_key: Stored


def chunks(query: Side, key: Side) -> Iterator[_Chunk]:
    """Of rows that the library multiplies."""
    step = max(64, _CHUNK_ELEMENTS // max(1, key.count))
    for start in range(0, query.count, step):
        rows = slice(start, min(query.count, start + step))
        chunk = launch.part(query, rows)
        matrix = launch.stored(chunk, key)
        yield _Chunk(rows, chunk, matrix, Stored(matrix.data, 1, key.count))


def operand(side: Side) -> Tensor:
    """Rows with their factor, in their own dtype."""
    rows: Tensor = side.rows
    return rows if side.factor is None else (rows.float() * side.factor[:, None]).to(rows.dtype)


def attend(query: Side, key: Side, scale: Tensor, spare: int = 0) -> tuple[Partials, Tensor]:
    """Partial states and weighted keys (slots, N, D); ``spare`` slots are left to the caller."""
    if query.rows.shape[1] <= tiles.MAX_WIDTH:
        return launch.attend_keys(query, key, scale, spare)
    partials = scale.new_empty(1 + spare, NEGATIVE_STATE, query.count)
    weighted = scale.new_empty(1 + spare, *query.rows.shape)
    key_operand = operand(key)
    for chunk in chunks(query, key):
        found, _ = launch.row_statistics(chunk.query, key, scale, chunk.by_query)
        _, state = launch.merge(found)
        maximum = state[NEG_MAX].masked_fill(state[NEG_MAX] == -torch.inf, 0.0)
        weights = torch.stack([maximum, torch.ones_like(maximum)])
        exponentials = launch.logit_gradient(chunk.query, key, scale, chunk.by_query, weights)
        partials[0][:, chunk.rows] = state[OF_NEGATIVES]
        weighted[0][chunk.rows] = launch.matmul(exponentials, key_operand)
    return launch.as_partials(partials), weighted


def wide_statistics(
    query: Side, key: Side, scale: Tensor, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics and states of rows and of columns, where the library multiplies the rows."""
    rows, row_state = scale.new_empty(STATISTICS, query.count), scale.new_empty(STATE, query.count)
    fields = RUNNING if query.positive is not None else NEGATIVE_STATE
    running = nothing_seen(scale, key.count if columns else 0)[None, :fields]
    for chunk in chunks(query, key):
        partials, _ = launch.row_statistics(chunk.query, key, scale, chunk.by_query)
        rows[:, chunk.rows], row_state[:, chunk.rows] = launch.merge(partials)
        if columns:
            partials, _ = launch.row_statistics(key, chunk.query, scale, chunk.by_key)
            joined = launch.as_partials(torch.cat([running, partials.data]))
            statistics, state = launch.merge(joined)
            running = _as_partial(statistics, state, fields)
    return rows, row_state, *launch.merge(launch.as_partials(running))


def _as_partial(statistics: Tensor, state: Tensor, fields: int) -> Tensor:
    """A merge's result as one partial of another."""
    if fields == NEGATIVE_STATE:
        return state[None, OF_NEGATIVES]
    return torch.cat([state, statistics[POSITIVE_SUMS]])[None]


def wide_gradients(
    query: Side,
    key: Side,
    scale: Tensor,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    unit: Tensor,
    want_query: bool,
    want_key: bool,
    want_bias: bool = False,
    weights: Any = tile_weights,
) -> PairGradients:
    """Pair gradients of rows that the library multiplies; both sides' from one pass."""
    new = scale.new_zeros
    query_sum = new(query.rows.shape) if want_query else None
    key_sum = new(key.rows.shape) if want_key else None
    bias_sum = new(key.count) if want_bias else None
    query_operand, key_operand = operand(query), operand(key)
    for chunk in chunks(query, key):
        own = None if query_weights is None else query_weights[:, chunk.rows].contiguous()
        dlogits = launch.logit_gradient(
            chunk.query, key, scale, chunk.by_query, own, key_weights, unit, weights
        )
        if query_sum is not None:
            query_sum[chunk.rows] = launch.matmul(dlogits, key_operand) / unit
        if key_sum is not None:
            key_sum += launch.matmul(dlogits.T, query_operand[chunk.rows]) / unit
        if bias_sum is not None:
            bias_sum += dlogits.sum(dim=0, dtype=torch.float32) / unit
    return PairGradients(query_sum, key_sum, bias_sum)
