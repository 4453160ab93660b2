"""Sums over pairs that are no statistics: their derivatives, and how the package calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl.backends import reference
from fastcl.backends.base import Request
from fastcl.backends.choice import choose
from fastcl.ops.autograd import (
    differentiable_grad,
    distinct_nodes,
    first_order,
    needs_of,
    register_autograd,
    whole_loss_gradient,
)
from fastcl.similarity.numerics import reduce
from fastcl.similarity.problem import (
    PROBLEM_FIELDS,
    PROBLEM_TENSORS,
    SOFT_TARGET_FIELDS,
    SOFT_TARGET_INPUTS,
    SOFT_TARGET_TENSORS,
    LogisticNeeds,
    Problem,
    SoftTargetNeeds,
    SoftTargets,
)

_LOGISTIC_INPUTS = 3  # of the problem; and the bias


def save_logistic(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bias, ctx.backend = inputs[PROBLEM_FIELDS:]
    _save(ctx, Problem(*inputs[:PROBLEM_FIELDS]), bias)


def _save(ctx: Any, problem: Problem, bias: Tensor, *more: Tensor) -> None:
    sets = (*problem.positive_more, *problem.exclude_more)
    ctx.save_for_backward(*problem[:PROBLEM_TENSORS], *sets, bias, *more)
    ctx.sets = len(problem.positive_more), len(sets)
    ctx.problem_flags = problem[PROBLEM_TENSORS + 2 :]


def _saved(ctx: Any) -> tuple[Problem, tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """The problem; its inputs with the bias, as LogisticNeeds orders them; and what else was saved."""
    positives, sets = ctx.sets
    saved = ctx.saved_tensors  # read once: hooks unpack each tensor at every reading
    tensors, more = saved[:PROBLEM_TENSORS], saved[PROBLEM_TENSORS:]
    problem = Problem._make((*tensors, more[:positives], more[positives:sets], *ctx.problem_flags))
    return problem, (problem.query, problem.key, problem.scale, more[sets]), more[sets + 1 :]


def _needs(ctx: Any) -> LogisticNeeds:
    return LogisticNeeds._make(_logistic_inputs(ctx.needs_input_grad))


def _logistic_inputs(args: Sequence[Any]) -> tuple[Any, ...]:
    """What may need a gradient of an op's arguments, as LogisticNeeds orders them."""
    return (*args[:_LOGISTIC_INPUTS], args[PROBLEM_FIELDS])


def _in_places(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the places of an op's arguments."""
    *first, bias = grads
    unused = len(ctx.needs_input_grad) - PROBLEM_FIELDS - 1
    return (*first, *(None,) * (PROBLEM_FIELDS - _LOGISTIC_INPUTS), bias, *(None,) * unused)


def _dense_sums(problem: Problem, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """The sums by the dense formula, to be differentiated again, and the nodes of the inputs."""
    *first, bias = nodes = distinct_nodes(inputs)
    return reference.logistic(Problem(*first, *problem[_LOGISTIC_INPUTS:]), bias), nodes


def logistic_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    problem, inputs, _ = _saved(ctx)
    needs = _needs(ctx)
    if torch.is_grad_enabled():
        sums, nodes = _dense_sums(problem, inputs)
        return _in_places(ctx, differentiable_grad((sums,), (grad,), nodes, needs))
    grad = first_order(grad, inputs)
    outputs = torch.ops.fastcl.logistic_backward(*problem, inputs[-1], grad, needs, ctx.backend)
    return _in_places(ctx, [x if needed else None for x, needed in zip(outputs, needs, strict=True)])


def save_logistic_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    bias, *ctx.flags = inputs[PROBLEM_FIELDS:]
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, Problem(*inputs[:PROBLEM_FIELDS]), bias, *output[1:])


def logistic_total_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    problem, inputs, unit_grads = _saved(ctx)
    needs, (mean, *_) = _needs(ctx), ctx.flags
    if torch.is_grad_enabled():
        sums, nodes = _dense_sums(problem, inputs)
        total = reduce(sums.sum(0), "mean" if mean else "sum")
        return _in_places(ctx, differentiable_grad((total,), (grad,), nodes, needs))
    return _in_places(ctx, whole_loss_gradient(inputs, needs, ctx.flags[-1], unit_grads, grad))


def logistic(problem: Problem, bias: Tensor, backend: str = "auto") -> Tensor:
    """Sums (2, N) of softplus over negatives and positives, differentiable."""
    chosen = choose(Request.of_problem(problem), backend)
    if chosen.name == reference.BACKEND.name:
        return reference.logistic(problem, bias)
    sums: Tensor = torch.ops.fastcl.logistic(*problem, bias, chosen.name)
    return sums


def logistic_total(problem: Problem, bias: Tensor, reduction: str) -> Tensor:
    """The 'mean' or 'sum' over the rows of both of :func:`logistic`'s sums, differentiable."""
    chosen = choose(Request.of_problem(problem))
    arguments = (*problem, bias, reduction == "mean", chosen.name)
    needs = needs_of(_logistic_inputs(arguments)) if torch.is_grad_enabled() else 0
    if chosen.logistic_total is None or not needs:  # the sums alone need no weights
        return reduce(logistic(problem, bias, chosen.name).sum(0), reduction)
    total: Tensor = torch.ops.fastcl.logistic_total(*arguments, needs)[0]
    return total


def save_soft_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, saved = SoftTargets._make(inputs[:SOFT_TARGET_FIELDS]), output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*saved, *args[:SOFT_TARGET_TENSORS], *args.exclude)
    ctx.flags, ctx.backend = args[SOFT_TARGET_TENSORS + 1 :], inputs[-1]


def soft_cross_entropy_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    state, kept, *tensors = ctx.saved_tensors
    args = SoftTargets._make((*tensors[:SOFT_TARGET_TENSORS], tensors[SOFT_TARGET_TENSORS:], *ctx.flags))
    needs = SoftTargetNeeds._make(ctx.needs_input_grad[:SOFT_TARGET_INPUTS])
    inputs = args[:SOFT_TARGET_INPUTS]
    grads: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        nodes = distinct_nodes(inputs)
        losses = reference.soft_cross_entropy(SoftTargets._make((*nodes, *args[SOFT_TARGET_INPUTS:])))
        grads = differentiable_grad((losses,), (grad,), nodes, needs)
    else:
        grad = first_order(grad, inputs)
        outputs = torch.ops.fastcl.soft_cross_entropy_backward(*args, grad, state, kept, needs, ctx.backend)
        grads = tuple(x if needed else None for x, needed in zip(outputs, needs, strict=True))
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - SOFT_TARGET_INPUTS))


def soft_cross_entropy(args: SoftTargets, backend: str = "auto") -> Tensor:
    """Losses (V, N), differentiable in query, key and scale."""
    chosen = choose(Request.of(args.query, simple_rule=args.simple_exclude() is not None), backend)
    if chosen.name == reference.BACKEND.name:
        return reference.soft_cross_entropy(args)
    differentiated = torch.is_grad_enabled() and needs_of(args[:SOFT_TARGET_INPUTS])
    # a graph would be of these sizes only
    kept = chosen.logits_to_keep(args) if differentiated and not torch.compiler.is_compiling() else 0
    losses: Tensor = torch.ops.fastcl.soft_cross_entropy(*args, kept, chosen.name)[0]
    return losses


register_autograd("soft_cross_entropy", save_soft_cross_entropy, soft_cross_entropy_gradient)
register_autograd("logistic", save_logistic, logistic_gradient)
register_autograd(
    "logistic_total",
    save_logistic_total,
    logistic_total_gradient,
    lambda args: (*args[:-1], args[-1] | needs_of(_logistic_inputs(args))),
)
