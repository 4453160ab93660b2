"""Sums over pairs that are no statistics: their derivatives, and how the package calls them."""

from __future__ import annotations

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
)
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
    problem, (bias, backend) = Problem(*inputs[:PROBLEM_FIELDS]), inputs[PROBLEM_FIELDS:]
    ctx.save_for_backward(bias, *problem[:PROBLEM_TENSORS], *problem.positive_more, *problem.exclude_more)
    ctx.more, ctx.flags, ctx.backend = len(problem.positive_more), problem[PROBLEM_TENSORS + 2 :], backend


def logistic_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bias, *tensors = ctx.saved_tensors
    more = tensors[PROBLEM_TENSORS:]
    problem = Problem._make((*tensors[:PROBLEM_TENSORS], more[: ctx.more], more[ctx.more :], *ctx.flags))
    wanted = ctx.needs_input_grad
    needs = LogisticNeeds._make((*wanted[:_LOGISTIC_INPUTS], wanted[PROBLEM_FIELDS]))
    inputs = (*problem[:_LOGISTIC_INPUTS], bias)
    grads: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        *first, bias = nodes = distinct_nodes(inputs)
        sums = reference.logistic(Problem(*first, *problem[_LOGISTIC_INPUTS:]), bias)
        grads = differentiable_grad((sums,), (grad,), nodes, needs)
    else:
        grad = first_order(grad, inputs)
        outputs = torch.ops.fastcl.logistic_backward(*problem, bias, grad, needs, ctx.backend)
        grads = tuple(x if needed else None for x, needed in zip(outputs, needs, strict=True))
    unused = (None,) * (PROBLEM_FIELDS - _LOGISTIC_INPUTS)
    return (*grads[:_LOGISTIC_INPUTS], *unused, grads[-1], None)


def logistic(problem: Problem, bias: Tensor, backend: str = "auto") -> Tensor:
    """Sums (2, N) of softplus over negatives and positives, differentiable."""
    chosen = choose(Request.of(problem.query, simple_rule=problem.has_simple_rule()), backend)
    if chosen.name == reference.BACKEND.name:
        return reference.logistic(problem, bias)
    sums: Tensor = torch.ops.fastcl.logistic(*problem, bias, chosen.name)
    return sums


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
