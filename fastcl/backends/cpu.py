"""The native CPU backend: hands prepared rows and outputs to the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.backends import native, reference
from fastcl.backends.base import Backend, Request
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import OnePositive
from fastcl.similarity.numerics import LOG2E, compute_dtype
from fastcl.similarity.problem import LogisticNeeds, Needs, Problem, SoftTargetNeeds, SoftTargets, TopK

_native = torch.ops.fastcl_native
_LANE_UNIT = 32  # as the extension pads rows of logits
_MAX_KEPT_BYTES = 32 << 20


def unsupported_reasons(request: Request) -> list[str]:
    """What keeps the kernels from serving ``request``."""
    reasons = []
    if request.device.type != "cpu":
        reasons.append(f"inputs are on {request.device}, it takes CPU tensors")
    return reasons


def stats_forward(problem: Problem, weighted_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.stats_forward`."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _native.stats_forward(
        *_native_problem(problem), weighted_keys
    )
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
    wanted = needs._replace(key=needs.key and not problem.symmetric)
    bits = sum(bit << i for i, bit in enumerate(wanted))
    grads = _native.stats_backward(
        *_native_problem(problem), grad_rows, row_state, grad_columns, column_state, bits
    )
    return tuple(
        grad.to(x.dtype) if x is not None and want else None
        for grad, x, want in zip(grads, problem.inputs(), wanted, strict=True)
    )


def logistic(problem: Problem, bias: Tensor) -> Tensor:
    """As :func:`fastcl.backends.chunked.logistic`."""
    sums: Tensor = _native.logistic(*_native_logistic(problem, bias))
    return sums


def logistic_backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs: LogisticNeeds
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.logistic_backward`."""
    bits = sum(bit << i for i, bit in enumerate(needs))
    grads = _native.logistic_backward(*_native_logistic(problem, bias), grad, bits)
    inputs = (problem.query, problem.key, problem.scale, bias)
    return tuple(
        grad.to(x.dtype) if want else None for grad, x, want in zip(grads, inputs, needs, strict=True)
    )


def logistic_total(problem: Problem, bias: Tensor, mean: bool, needs: int) -> tuple[Tensor, ...]:
    """Total and gradients in one walk over the tiles: a pair's weight needs no sum over its row."""
    outputs: tuple[Tensor, ...] = _native.logistic_total(*_native_logistic(problem, bias), mean, needs)
    return outputs


def logits_to_keep(args: SoftTargets) -> int:
    """All, if they are few: the backward pass forms none then; or none."""
    rows, keys = args.counts()
    softmaxes = args.query.shape[0] + args.target_query.shape[0]
    logits = softmaxes * (-(-rows // _LANE_UNIT) * _LANE_UNIT) * keys
    return logits if logits * compute_dtype(args.query.dtype).itemsize <= _MAX_KEPT_BYTES else 0


def soft_cross_entropy(args: SoftTargets, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.soft_cross_entropy`."""
    outputs: tuple[Tensor, Tensor, Tensor] = _native.soft_cross_entropy(*_native_soft_targets(args), kept)
    return outputs


def soft_cross_entropy_backward(
    args: SoftTargets, grad: Tensor, state: Tensor, kept: Tensor, needs: SoftTargetNeeds
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.soft_cross_entropy_backward`."""
    bits = sum(bit << i for i, bit in enumerate(needs))
    grads = _native.soft_cross_entropy_backward(*_native_soft_targets(args), grad, state, kept, bits)
    inputs = (args.query, args.key, args.scale)
    return tuple(
        grad.to(x.dtype) if want else None for grad, x, want in zip(grads, inputs, needs, strict=True)
    )


def sinkhorn(
    query: Tensor, key: Tensor, scale: Tensor, steps: int, normalize: bool, precision: int
) -> Tensor:
    """Potentials (K,) of the keys; the logits are formed once where they are few."""
    of_keys: Tensor = _native.sinkhorn(query, key, scale, steps, normalize, precision)
    return of_keys


def _native_soft_targets(args: SoftTargets) -> SoftTargets:
    bias = args.target_bias
    return args._replace(
        target_bias=None if bias is None else bias.to(compute_dtype(args.query.dtype)) * LOG2E
    )


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.topk`."""
    outputs: tuple[Tensor, Tensor] = _native.topk(*args)
    return outputs


def mochi(args: Mochi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.mochi`."""
    rows = (args.query, args.positive, args.keys)
    draws = (args.first, args.second, args.alpha, args.partner, args.beta)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _native.mochi(*rows, args.scale, *draws, args.n_hard)
    return outputs


def _given(*ids: Tensor | None) -> list[Tensor]:
    return [x for x in ids if x is not None]


def _native_logistic(problem: Problem, bias: Tensor) -> tuple[Any, ...]:
    query, key, scale, _, _, *rule, normalize, _, precision, _, _ = _native_problem(problem)
    return query, key, scale, bias, *rule, normalize, precision


def _native_problem(problem: Problem) -> tuple[Any, ...]:
    dtype = compute_dtype(problem.query.dtype)
    key_scale, bias = problem.key_scale, problem.key_bias
    return (
        problem.query,
        problem.key,
        problem.scale,
        None if key_scale is None else key_scale.to(dtype),
        None if bias is None else bias.to(dtype) * LOG2E,
        [*_given(problem.exclude_query, problem.exclude_key), *problem.exclude_more],
        [*_given(problem.positive_query, problem.positive_key), *problem.positive_more],
        problem.within_query,
        problem.within_key,
        problem.exclude_keys,
        problem.normalize,
        problem.symmetric,
        problem.precision,
        problem.columns,
        problem.second_scale,
    )


BACKEND = Backend(
    "cpu",
    summary=(
        "C++ for all four dtypes; on x86-64 generic, AVX2, AVX-512, AVX-512-BF16 or AMX, on "
        "arm64 NEON, chosen at run time"
    ),
    missing=native.missing_reason,
    unsupported_reasons=unsupported_reasons,
    whole_losses=(OnePositive, ManyPositives),
    every_form=True,
    two_scales=True,
    stats_forward=stats_forward,
    stats_backward=stats_backward,
    logistic=logistic,
    logistic_backward=logistic_backward,
    logistic_total=logistic_total,
    soft_cross_entropy=soft_cross_entropy,
    soft_cross_entropy_backward=soft_cross_entropy_backward,
    logits_to_keep=logits_to_keep,
    sinkhorn=sinkhorn,
    topk=topk,
    mochi=mochi,
    enqueue=reference.enqueue,
)
