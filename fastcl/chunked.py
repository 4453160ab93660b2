"""Pure torch over row chunks: linear memory, any device, any rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcl.numerics import LN2, LOG2E, unit_rows
from fastcl.problem import (
    Needs,
    PairGradients,
    Prepared,
    Problem,
    input_gradients,
    prepare,
    wanted_pairs,
)
from fastcl.reference import pair_masks

_CHUNK_ELEMENTS = 1 << 21


def row_chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Slices of rows whose tiles hold about two million elements."""
    step = max(1, _CHUNK_ELEMENTS // max(1, n_columns))
    for start in range(0, n_rows, step):
        yield slice(start, min(n_rows, start + step))


def stats_forward(problem: Problem, weighted_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N), row state (4, N), the same per column, and sum_j p_ij y_j (N, D) if asked.

    A state holds max and sum of the negatives, then of the positives, in log2 units.
    """
    prepared = prepare(problem)
    n, m = problem.query.shape[0], problem.key.shape[0]
    new = prepared.query.new_empty
    rows, row_state = new(5, n), new(4, n)
    m_columns = m if problem.columns else 0
    columns, column_state = new(5, m_columns), _empty_state(prepared.query, m_columns)
    column_sums = torch.zeros_like(columns[:2])
    weighted = new(problem.query.shape if weighted_keys else (0,))
    for chunk in row_chunks(n, m):
        logits2 = _logits2(problem, prepared, chunk)
        negative, positive = pair_masks(problem, chunk)
        row_state[:, chunk] = _tile_state(logits2, negative, positive)
        rows[:, chunk] = _statistics(row_state[:, chunk], _positive_sums(logits2, positive))
        if weighted_keys:
            weighted[chunk] = _weights(logits2, negative, row_state[:2, chunk]) @ _scaled_keys(
                problem, prepared
            )
        if problem.columns:
            tile = _tile_state(logits2.T, negative.T, positive.T)
            column_state = torch.cat([_merge(column_state[:2], tile[:2]), _merge(column_state[2:], tile[2:])])
            column_sums += _positive_sums(logits2.T, positive.T)
    if problem.columns:
        columns = _statistics(column_state, column_sums)
    return rows, row_state, columns, column_state, weighted


def stats_backward(
    problem: Problem,
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, scale, key_bias and key_scale, from the saved row states."""
    prepared = prepare(problem)
    want_query, want_key, want_bias = wanted_pairs(problem, needs)
    query_sum = torch.zeros_like(prepared.query) if want_query else None
    key_sum = torch.zeros_like(prepared.key) if want_key else None
    bias_sum = prepared.key.new_zeros(problem.key.shape[0]) if want_bias else None
    for chunk in row_chunks(problem.query.shape[0], problem.key.shape[0]):
        logits2 = _logits2(problem, prepared, chunk)
        negative, positive = pair_masks(problem, chunk)
        dlogits = _logit_gradient(logits2, negative, positive, row_state[:, chunk], grad_rows[:, chunk])
        if problem.symmetric:
            other = _logit_gradient(logits2.T, negative.T, positive.T, row_state, grad_rows)
            dlogits = dlogits + other.T
        elif problem.columns:
            other = _logit_gradient(logits2.T, negative.T, positive.T, column_state, grad_columns)
            dlogits = dlogits + other.T
        if query_sum is not None:
            query_sum[chunk] = dlogits @ _scaled_keys(problem, prepared)
        if key_sum is not None:
            key_sum += dlogits.T @ prepared.query[chunk]
        if bias_sum is not None:
            bias_sum += dlogits.sum(dim=0)
    return input_gradients(problem, prepared, PairGradients(query_sum, key_sum, bias_sum), needs)


def topk(
    query: Tensor,
    key: Tensor,
    k: int,
    exclude_query: Tensor | None,
    exclude_key: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Streaming top-k: the best k so far are merged with each tile of keys by a stable sort."""
    query = unit_rows(query, normalize)
    values = query.new_full((query.shape[0], k), -torch.inf)
    indices = torch.full(values.shape, -1, dtype=torch.int64, device=query.device)
    width = max(1024, 2 * k)
    for keys in (slice(s, s + width) for s in range(0, key.shape[0], width)):
        tile_keys = unit_rows(key[keys], normalize)
        tile_indices = torch.arange(key.shape[0], device=query.device)[keys]
        for rows in row_chunks(query.shape[0], width):
            similarity = query[rows] @ tile_keys.T
            if exclude_query is not None and exclude_key is not None:
                excluded = exclude_query[rows, None] == exclude_key[None, keys]
                similarity = similarity.masked_fill(excluded, -torch.inf)
            candidates = torch.cat([values[rows], similarity], dim=1)
            positions = torch.cat([indices[rows], tile_indices.expand_as(similarity)], dim=1)
            best, order = candidates.sort(dim=1, descending=True, stable=True)
            values[rows] = best[:, :k]
            indices[rows] = positions.gather(1, order[:, :k])
    return values, indices.masked_fill(values == -torch.inf, -1)


def _logits2(problem: Problem, prepared: Prepared, chunk: slice) -> Tensor:
    logits = (prepared.query[chunk] * problem.scale.to(prepared.query.dtype)) @ prepared.key.T
    if problem.key_scale is not None:
        logits *= problem.key_scale.to(logits.dtype)
    if problem.key_bias is not None:
        logits += problem.key_bias.to(logits.dtype)
    return logits * LOG2E


def _scaled_keys(problem: Problem, prepared: Prepared) -> Tensor:
    if problem.key_scale is None:
        return prepared.key
    return prepared.key * problem.key_scale.to(prepared.key.dtype)[:, None]


def _empty_state(like: Tensor, count: int) -> Tensor:
    return like.new_tensor([-torch.inf, 0.0, -torch.inf, 0.0])[:, None].repeat(1, count)


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _max_sum(logits2: Tensor, mask: Tensor) -> Tensor:
    if logits2.shape[1] == 0:
        return _empty_state(logits2, logits2.shape[0])[:2]
    masked = logits2.masked_fill(~mask, -torch.inf)
    maximum = masked.amax(dim=1)
    return torch.stack([maximum, torch.exp2(masked - _finite(maximum)[:, None]).sum(dim=1)])


def _tile_state(logits2: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    return torch.cat([_max_sum(logits2, negative), _max_sum(logits2, positive)])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    maximum = torch.maximum(a[0], b[0])
    shift = _finite(maximum)
    return torch.stack([maximum, a[1] * torch.exp2(a[0] - shift) + b[1] * torch.exp2(b[0] - shift)])


def _positive_sums(logits2: Tensor, positive: Tensor) -> Tensor:
    total = logits2.masked_fill(~positive, 0.0).sum(dim=1) * LN2
    return torch.stack([total, positive.sum(dim=1).to(logits2.dtype)])


def _statistics(state: Tensor, positive_sums: Tensor) -> Tensor:
    lse_neg, lse_pos = (state[0::2] + state[1::2].log2()) * LN2
    return torch.stack([lse_neg, lse_pos, *positive_sums, state[0] * LN2])


def _weights(logits2: Tensor, mask: Tensor, state: Tensor) -> Tensor:
    """exp(l - lse) over the mask, 0 elsewhere; state is (2, rows)."""
    inverse = state[1].masked_fill(state[1] == 0, 1.0).reciprocal()
    shifted = (logits2 - _finite(state[0])[:, None]).masked_fill(~mask, -torch.inf)
    return torch.exp2(shifted) * inverse[:, None]


def _logit_gradient(
    logits2: Tensor, negative: Tensor, positive: Tensor, state: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of the logits through one side's statistics; grad is (5, rows)."""
    dlogits = _weights(logits2, negative, state[:2]) * grad[0, :, None]
    dlogits += _weights(logits2, positive, state[2:]) * grad[1, :, None]
    return dlogits + grad[2, :, None] * positive
