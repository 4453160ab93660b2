"""The native CPU backend: hands prepared rows and outputs to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.backends import native, reference
from fastcl.backends.base import Backend, Request
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import OnePositive
from fastcl.similarity.fields import STATE, STATISTICS
from fastcl.similarity.numerics import LOG2E, compute_dtype, unit_rows
from fastcl.similarity.problem import (
    Needs,
    PairGradients,
    Prepared,
    Problem,
    TopK,
    input_gradients,
    prepare,
    wanted_pairs,
)

_native = torch.ops.fastcl_native


def unsupported_reasons(request: Request) -> list[str]:
    """What keeps the kernels from serving ``request``."""
    reasons = []
    if request.device.type != "cpu":
        reasons.append(f"inputs are on {request.device}, it takes CPU tensors")
    if request.dense_mask:
        reasons.append("a dense mask is served by 'chunked' only")
    return reasons


def stats_forward(problem: Problem, weighted_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.stats_forward`."""
    prepared = prepare(problem)
    n, m = problem.query.shape[0], problem.key.shape[0] if problem.columns else 0
    new = prepared.query.new_empty
    outputs = (
        new(STATISTICS, n),
        new(STATE, n),
        new(STATISTICS, m),
        new(STATE, m),
        new(problem.query.shape if weighted_keys else 0),
    )
    _native.stats_forward(*_native_problem(problem, prepared), *outputs)
    return outputs


def stats_backward(
    problem: Problem,
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.stats_backward`."""
    prepared = prepare(problem)
    shapes = (prepared.query.shape, prepared.key.shape, prepared.key.shape[:1])
    wanted = wanted_pairs(problem, needs)
    sums = [prepared.query.new_empty(s if want else (0,)) for s, want in zip(shapes, wanted, strict=True)]
    scale_sum = torch.empty((int(needs.scale),), dtype=torch.float64)
    _native.stats_backward(
        *_native_problem(problem, prepared),
        grad_rows.contiguous(),
        row_state.contiguous(),
        grad_columns.contiguous(),
        column_state.contiguous(),
        *sums,
        scale_sum,
    )
    query, key, bias = (x if want else None for x, want in zip(sums, wanted, strict=True))
    pairs = PairGradients(query, key, bias, scale_sum if needs.scale else None)
    return input_gradients(problem, prepared, pairs, needs)


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.topk`."""
    query, key = (_row_contiguous(unit_rows(x, args.normalize)) for x in (args.query, args.key))
    values = query.new_empty(query.shape[0], args.k)
    indices = torch.empty(values.shape, dtype=torch.int64)
    exclude = (_contiguous(ids) for ids in (args.exclude_query, args.exclude_key))
    _native.topk(query, key, *exclude, values, indices)
    return values, indices


def mochi(args: Mochi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.mochi`."""
    query, positive, keys = (_row_contiguous(x) for x in (args.query, args.positive, args.keys))
    dtype = compute_dtype(query.dtype)
    shapes = (query.shape[:1], query.shape, query.shape, query.shape[:1])
    losses, grad_query, grad_positive, grad_scale = (query.new_empty(s, dtype=dtype) for s in shapes)
    draws = (x.contiguous() for x in (args.first, args.second, args.alpha, args.partner, args.beta))
    outputs = (losses, grad_query, grad_positive, grad_scale)
    _native.mochi(query, positive, keys, args.scale, *draws, args.n_hard, *outputs)
    return outputs


def _row_contiguous(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous; rows may be any distance apart."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _native_problem(problem: Problem, prepared: Prepared) -> tuple[Tensor | float | bool | None, ...]:
    query, key = prepared.query, prepared.key
    query_factor = key_factor = None
    key_scale = None if problem.key_scale is None else problem.key_scale.to(key.dtype)
    if problem.query.dtype == problem.key.dtype == torch.bfloat16:
        # as they are, so that products of bfloat16 are exact
        query, query_factor = problem.query, prepared.query_inverse
        key, key_factor = problem.key, prepared.key_inverse
    if key_scale is not None:
        key_factor = key_scale if key_factor is None else key_factor.squeeze(1) * key_scale
    bias2 = None if problem.key_bias is None else problem.key_bias.to(prepared.key.dtype) * LOG2E
    ids = (problem.exclude_query, problem.exclude_key, problem.positive_query, problem.positive_key)
    return (
        _row_contiguous(query),
        _contiguous(query_factor),
        _row_contiguous(key),
        _contiguous(key_factor),
        float(problem.scale),
        _contiguous(bias2),
        *(_contiguous(x) for x in ids),
        problem.symmetric,
        problem.precision,
        problem.columns,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


BACKEND = Backend(
    "cpu",
    missing=native.missing_reason,
    unsupported_reasons=unsupported_reasons,
    whole_losses=(OnePositive, ManyPositives),
    stats_forward=stats_forward,
    stats_backward=stats_backward,
    topk=topk,
    mochi=mochi,
    enqueue=reference.enqueue,
)
