"""The ops: their schemas, what they call in a backend, and their fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fastcl.backends.registry import BACKENDS
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import OnePositive
from fastcl.similarity.fields import STATE, STATISTICS
from fastcl.similarity.numerics import compute_dtype, without_autocast
from fastcl.similarity.problem import (
    PROBLEM_FIELDS,
    LogisticNeeds,
    Needs,
    Problem,
    SoftTargetNeeds,
    SoftTargets,
    TopK,
)

_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? key_bias, Tensor? key_scale, "
    "Tensor? positive_query, Tensor? positive_key, Tensor? exclude_query, Tensor? exclude_key, "
    "Tensor? within_query, Tensor? within_key, Tensor? exclude_keys, "
    "Tensor[] positive_more, Tensor[] exclude_more, "
    "bool normalize, bool columns, bool symmetric, int precision, float second_scale"
)
library = Library("fastcl", "DEF")
library.define(
    f"stats_forward({_PROBLEM}, bool weighted_keys, str backend) -> "
    "(Tensor rows, Tensor row_state, Tensor columns, Tensor column_state, Tensor weighted)"
)
library.define(
    f"stats_backward({_PROBLEM}, Tensor grad_rows, Tensor grad_columns, Tensor row_state, "
    "Tensor column_state, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"logistic({_PROBLEM}, Tensor bias, str backend) -> Tensor")
library.define(
    f"logistic_backward({_PROBLEM}, Tensor bias, Tensor grad, bool[] needs, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"logistic_total({_PROBLEM}, Tensor bias, bool mean, str backend, int needs) -> "
    "(Tensor total, Tensor grad_query, Tensor grad_key, Tensor grad_scale, Tensor grad_bias)"
)
_SOFT_TARGETS = (
    "Tensor query, Tensor key, Tensor scale, Tensor target_query, Tensor target_key, Tensor target_scale, "
    "Tensor? target_bias, Tensor? within_query, Tensor? within_key, Tensor? exclude_keys, "
    "Tensor[] exclude, bool normalize, int precision"
)
library.define(
    f"soft_cross_entropy({_SOFT_TARGETS}, int kept, str backend) -> "
    "(Tensor losses, Tensor state, Tensor kept_logits)"
)
library.define(
    f"soft_cross_entropy_backward({_SOFT_TARGETS}, Tensor grad, Tensor state, Tensor kept_logits, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "sinkhorn(Tensor query, Tensor key, Tensor scale, int steps, bool normalize, int precision, "
    "str backend) -> Tensor"
)
# the whole loss: the extension registers the kernels of the first, per device; a backend has the second's
for _name, _of_backend in (("one_positive", ""), ("one_positive_by", "str backend, ")):
    library.define(
        f"{_name}(Tensor query, Tensor? positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
        "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool decoupled, "
        f"bool mean, int precision, {_of_backend}int needs) -> "
        "(Tensor loss, Tensor grad_query, Tensor grad_positive, Tensor grad_negatives, Tensor grad_scale)"
    )
# no backend's but the extension's, per device
library.define(
    "sup_con(Tensor query, Tensor? key, Tensor scale, Tensor query_labels, Tensor? key_labels, "
    "Tensor? positive_mask, bool normalize, bool log_of_mean, bool mean, int precision, int needs)"
    " -> (Tensor loss, Tensor grad_query, Tensor grad_key, Tensor grad_scale)"
)
library.define(
    "topk(Tensor query, Tensor key, int k, Tensor[] exclude, Tensor[] only, Tensor? within_query, "
    "Tensor? within_key, Tensor? exclude_keys, Tensor? below, bool largest, bool normalize, str backend) -> "
    "(Tensor values, Tensor indices)"
)
library.define(
    "mochi(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor first, Tensor second, "
    "Tensor alpha, Tensor partner, Tensor beta, int n_hard, str backend) -> "
    "(Tensor losses, Tensor grad_query, Tensor grad_positive, Tensor grad_scale)"
)
library.define(
    "enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids, "
    "str backend) -> ()"
)

# the incoming gradient, in the backward pass of a compiled graph
library.define("first_order(Tensor grad, Tensor[] inputs) -> Tensor")


_WRITTEN = 3  # first arguments of enqueue


def _filled(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _stats_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, (weighted_keys, backend) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    if problem.second_scale and not BACKENDS[backend].two_scales:
        raise NotImplementedError(f"backend {backend!r} has no statistics at two scales")
    with without_autocast(problem.query.device):
        return BACKENDS[backend].stats_forward(problem, weighted_keys)


def _stats_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    grad_rows, grad_columns, row_state, column_state, needs, backend = rest
    with without_autocast(problem.query.device):
        grads = BACKENDS[backend].stats_backward(
            problem, grad_rows, grad_columns, row_state, column_state, Needs(*needs)
        )
        return _filled(problem.query, *grads)


def _logistic(*args: Any) -> Tensor:
    problem, (bias, backend) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    with without_autocast(problem.query.device):
        return BACKENDS[backend].logistic(problem, bias)


def _logistic_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, (bias, grad, needs, backend) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    with without_autocast(problem.query.device):
        grads = BACKENDS[backend].logistic_backward(problem, bias, grad, LogisticNeeds(*needs))
        return _filled(problem.query, *grads)


def _logistic_total(*args: Any) -> tuple[Tensor, ...]:
    problem, (bias, mean, backend, needs) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    function = BACKENDS[backend].logistic_total
    assert function is not None
    with without_autocast(problem.query.device):
        return function(problem, bias, mean, needs)


def _soft_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    *arguments, kept, backend = args
    with without_autocast(args[0].device):
        return BACKENDS[backend].soft_cross_entropy(SoftTargets._make(arguments), kept)


def _soft_cross_entropy_backward(*args: Any) -> tuple[Tensor, ...]:
    *arguments, grad, state, kept, needs, backend = args
    backward = BACKENDS[backend].soft_cross_entropy_backward
    with without_autocast(args[0].device):
        grads = backward(SoftTargets._make(arguments), grad, state, kept, SoftTargetNeeds(*needs))
        return _filled(args[0], *grads)


def _sinkhorn(*args: Any) -> Tensor:
    *arguments, backend = args
    function = BACKENDS[backend].sinkhorn
    assert function is not None
    with without_autocast(args[0].device):
        return function(*arguments)


def _one_positive_by(*args: Any) -> tuple[Tensor, ...]:
    *arguments, mean, _, backend, needs = args
    function = BACKENDS[backend].one_positive
    assert function is not None
    with without_autocast(args[0].device):
        return function(OnePositive._make([*arguments, "mean" if mean else "sum"]), needs)


def _topk(*args: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = args
    with without_autocast(arguments[0].device):
        return BACKENDS[backend].topk(TopK(*arguments))


def _mochi(*args: Any) -> tuple[Tensor, ...]:
    with without_autocast(args[0].device):
        return BACKENDS[args[-1]].mochi(Mochi(*args[:-1]))


def _enqueue(*args: Any) -> None:
    *arguments, backend = args
    BACKENDS[backend].enqueue(*arguments)
    for x in arguments[:_WRITTEN]:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)  # a kernel's writing does not


def _first_order(grad: Tensor, inputs: list[Tensor]) -> Tensor:
    return grad.clone()  # an op returns no input


def _fake_first_order(grad: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.empty_like(grad)


def _fake_stats_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, (weighted_keys, _) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    n, m = problem.query.shape[0], problem.key.shape[0] if problem.columns else 0
    new, dtype = problem.query.new_empty, compute_dtype(problem.query.dtype)
    weighted = problem.query.shape if weighted_keys else (0,)
    shapes = ((STATISTICS, n), (STATE, n), (STATISTICS, m), (STATE, m), weighted)
    return tuple(new(shape, dtype=dtype) for shape in shapes)


def _fake_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, needs = Problem(*args[:PROBLEM_FIELDS]), Needs(*args[-2])
    wanted = [
        problem.query if needs.query else None,
        problem.key if needs.key and not problem.symmetric else None,
        problem.scale if needs.scale else None,
        problem.key_bias if needs.key_bias else None,
        problem.key_scale if needs.key_scale else None,
    ]
    return _filled(problem.query, *(None if x is None else x.new_empty(x.shape) for x in wanted))


def _fake_logistic(*args: Any) -> Tensor:
    query: Tensor = args[0]
    return query.new_empty((2, query.shape[0]), dtype=compute_dtype(query.dtype))


def _fake_logistic_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, (bias, _, needs, _) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    inputs = (problem.query, problem.key, problem.scale, bias)
    wanted = (x.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True))
    return _filled(problem.query, *wanted)


def _fake_logistic_total(*args: Any) -> tuple[Tensor, ...]:
    problem, (bias, _, _, needs) = Problem(*args[:PROBLEM_FIELDS]), args[PROBLEM_FIELDS:]
    dtype = compute_dtype(problem.query.dtype)
    wanted = (
        x.new_empty(
            x.shape if needs >> bit & 1 else (0,), dtype=torch.float64 if x is problem.scale else dtype
        )
        for bit, x in enumerate((problem.query, problem.key, problem.scale, bias))
    )
    return (problem.query.new_empty((), dtype=dtype), *wanted)


def _fake_soft_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    *arguments, kept, _ = args
    query, target_query = args[0], SoftTargets._make(arguments).target_query
    views, rows, _ = query.shape
    shapes = ((views, rows), (2 * (views + target_query.shape[0]), rows), (kept,))
    return tuple(query.new_empty(shape, dtype=compute_dtype(query.dtype)) for shape in shapes)


def _fake_soft_cross_entropy_backward(*args: Any) -> tuple[Tensor, ...]:
    needs = args[-2]
    wanted = (x.new_empty(x.shape) if need else None for x, need in zip(args, needs, strict=False))
    return _filled(args[0], *wanted)


def _fake_sinkhorn(query: Tensor, key: Tensor, *args: Any) -> Tensor:
    return query.new_empty(key.shape[0], dtype=compute_dtype(query.dtype))


def _fake_one_positive(*args: Any) -> tuple[Tensor, ...]:
    return _fake_whole_loss(args[:3], args[3], args[-1])


def _fake_sup_con(*args: Any) -> tuple[Tensor, ...]:
    return _fake_whole_loss(args[:2], args[2], args[-1])


def _fake_whole_loss(inputs: tuple[Tensor | None, ...], scale: Tensor, needs: int) -> tuple[Tensor, ...]:
    query = inputs[0]
    assert query is not None
    dtype = compute_dtype(query.dtype)
    grads = (
        query.new_empty(x.shape if x is not None and needs >> bit & 1 else (0,), dtype=dtype)
        for bit, x in enumerate(inputs)
    )
    grad_scale = scale.new_empty(() if needs >> len(inputs) & 1 else (0,))
    return (query.new_empty((), dtype=dtype), *grads, grad_scale)


def _fake_topk(query: Tensor, key: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    dtype = compute_dtype(query.dtype)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _fake_mochi(query: Tensor, *args: Any) -> tuple[Tensor, ...]:
    shapes = (query.shape[:1], query.shape, query.shape, query.shape[:1])
    return tuple(query.new_empty(shape, dtype=compute_dtype(query.dtype)) for shape in shapes)


def _fake_enqueue(*args: Any) -> None:
    return None


for _name, _kernel, _fake in (
    ("stats_forward", _stats_forward, _fake_stats_forward),
    ("stats_backward", _stats_backward, _fake_stats_backward),
    ("logistic", _logistic, _fake_logistic),
    ("logistic_backward", _logistic_backward, _fake_logistic_backward),
    ("logistic_total", _logistic_total, _fake_logistic_total),
    ("soft_cross_entropy", _soft_cross_entropy, _fake_soft_cross_entropy),
    ("soft_cross_entropy_backward", _soft_cross_entropy_backward, _fake_soft_cross_entropy_backward),
    ("sinkhorn", _sinkhorn, _fake_sinkhorn),
    ("one_positive_by", _one_positive_by, _fake_one_positive),
    ("topk", _topk, _fake_topk),
    ("mochi", _mochi, _fake_mochi),
    ("enqueue", _enqueue, _fake_enqueue),
    ("first_order", _first_order, _fake_first_order),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    register_fake(f"fastcl::{_name}", _fake)
register_fake("fastcl::one_positive", _fake_one_positive)
register_fake("fastcl::sup_con", _fake_sup_con)
