"""How the ops are differentiated: what is saved for the backward pass, and the gradients from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import reference
from fastcl.numerics import reduce
from fastcl.one_positive import OnePositive
from fastcl.problem import PROBLEM_TENSORS, Mochi, Needs, PairGradients, Problem, input_gradients, prepare
from fastcl.sup_con import SupCon

_PROBLEM_FIELDS = len(Problem._fields)


def save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, (weighted_keys, backend) = Problem(*inputs[:_PROBLEM_FIELDS]), inputs[_PROBLEM_FIELDS:]
    _, row_state, _, column_state, weighted = output
    ctx.mark_non_differentiable(row_state, column_state, weighted)
    tensors = list(problem[:PROBLEM_TENSORS])
    ctx.frozen = tuple(_Frozen(x if weighted_keys else None) for x in (problem.key, problem.exclude_key))
    if weighted_keys:
        tensors[1] = tensors[-1] = None
    ctx.save_for_backward(*tensors, row_state, column_state, weighted)
    ctx.flags, ctx.backend, ctx.weighted_keys = problem[PROBLEM_TENSORS:], backend, weighted_keys


def stats_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, row_state, column_state, weighted = ctx.saved_tensors
    problem = Problem(*tensors, *ctx.flags)
    needs = Needs(*ctx.needs_input_grad[:5])
    unused = (None,) * (_PROBLEM_FIELDS - 5 + 2)
    grad_rows = row_state.new_zeros(5, row_state.shape[1]) if grads[0] is None else grads[0]
    grad_columns = column_state.new_zeros(5, column_state.shape[1]) if grads[2] is None else grads[2]
    if torch.is_grad_enabled():
        if ctx.weighted_keys:
            key, exclude_key = (frozen.get() for frozen in ctx.frozen)
            problem = problem._replace(key=key, exclude_key=exclude_key)
        return (*_second_order_stats(problem, needs, grad_rows, grad_columns), *unused)
    grad_rows = _first_order(grad_rows, problem[:5])
    if ctx.weighted_keys:
        query_only = problem._replace(key=problem.query, symmetric=True)
        pairs = PairGradients(weighted * grad_rows[0, :, None], None, None)
        return (*input_gradients(query_only, prepare(query_only), pairs, needs), *unused)
    outputs = torch.ops.fastcl.stats_backward(
        *problem, grad_rows, grad_columns, row_state, column_state, needs, ctx.backend
    )
    if problem.symmetric:
        needs = needs._replace(key=False)
    return (*(x if needed else None for x, needed in zip(outputs, needs, strict=True)), *unused)


def _second_order_stats(
    problem: Problem, needs: Needs, grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients as a differentiable function of inputs and incoming gradients, dense."""
    inputs = _views(problem[:5])
    rows, columns = reference.stats(Problem._make([*inputs, *problem[5:]]))
    if not problem.columns:
        return _differentiable_grad((rows,), (grad_rows,), inputs, needs)
    return _differentiable_grad((rows, columns), (grad_rows, grad_columns), inputs, needs)


def _version(tensor: Tensor | None) -> int:
    """Counts what was written in place; what was made under inference mode is not counted."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


class _Frozen:
    """A tensor kept for second derivatives only, so that it may be overwritten before a first backward.

    MoCo enqueues between the loss and its backward, which needs nothing of the queue any more.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = tensor
        self._version = _version(tensor)

    def get(self) -> Tensor | None:
        if _version(self._tensor) != self._version:
            raise RuntimeError("the keys were modified in place since the loss: no second derivatives")
        return self._tensor


def _first_order(grad: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """``grad``; in a graph, of a backward pass of which ``inputs`` are inputs.

    Then torch refuses to differentiate the pass. It would take what does not depend on them for constant.
    """
    if type(grad) is Tensor:
        return grad
    traced: Tensor = torch.ops.fastcl.first_order(grad, [x for x in inputs if x is not None])
    return traced


def _views(inputs: Sequence[Tensor | None]) -> list[Any]:
    """Distinct graph nodes for the inputs, so that one tensor given twice gets each role's gradient."""
    return [None if x is None else x.view_as(x) for x in inputs]


def _differentiable_grad(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(
        next(found) if needed and x is not None else None for x, needed in zip(inputs, needs, strict=True)
    )


def save_one_positive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, negatives, scale, query_ids, negative_ids = inputs[:6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.frozen = None
    if negatives is not None and not negatives.requires_grad:
        ctx.frozen = _Frozen(negatives), _Frozen(negative_ids)
        negatives = None
    ctx.save_for_backward(query, positive, negatives, scale, query_ids, *output[1:])
    ctx.flags = inputs[6:]


def one_positive_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, positive, negatives, scale, query_ids, *unit_grads = ctx.saved_tensors
    inputs = (query, positive, negatives, scale)
    if torch.is_grad_enabled():
        return _padded(ctx, _second_order_one_positive(ctx, inputs, query_ids, grad_loss))
    return _padded(ctx, _whole_loss_gradient(ctx, inputs, unit_grads, grad_loss))


def _padded(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """With None for all arguments that have no gradient."""
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))


def _whole_loss_gradient(
    ctx: Any, inputs: Sequence[Tensor | None], unit_grads: Sequence[Tensor], grad_loss: Tensor
) -> list[Tensor | None]:
    """From the gradients for an incoming 1 that the op returned with the loss."""
    grads: list[Tensor | None] = [None] * len(inputs)
    grad_loss = _first_order(grad_loss, inputs)
    for i, (x, grad) in enumerate(zip(inputs, unit_grads, strict=True)):
        if x is None or not ctx.needs_input_grad[i]:
            continue
        if not ctx.flags[-1] >> i & 1:
            raise RuntimeError("a whole loss was called without need of a gradient that is now wanted")
        grads[i] = (grad_loss * grad).to(x.dtype)
    return grads


def _second_order_one_positive(
    ctx: Any, inputs: Sequence[Tensor | None], query_ids: Tensor | None, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """As :func:`_second_order_stats`."""
    views, negative_ids = _views(inputs), None
    query, positive, negatives, scale = views
    if ctx.frozen is not None:
        negatives, negative_ids = (frozen.get() for frozen in ctx.frozen)
    *flags, mean, _, _ = ctx.flags
    reduction = "mean" if mean else "sum"
    args = OnePositive._make(
        [query, positive, negatives, scale, query_ids, negative_ids, *flags, reduction]
    ).in_compute_dtype()
    problem = args.problem()
    rows, columns = reference.stats(problem)
    loss = args.loss(rows[0], columns[0] if problem.columns else None)
    return _differentiable_grad((loss,), (grad_loss,), views, ctx.needs_input_grad[:4])


def save_sup_con(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.flags = inputs[5:]


def sup_con_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, scale, query_labels, key_labels, *unit_grads = ctx.saved_tensors
    inputs = (query, key, scale)
    if not torch.is_grad_enabled():
        return _padded(ctx, _whole_loss_gradient(ctx, inputs, unit_grads, grad_loss))
    views = _views(inputs)
    query, key, scale = views
    normalize, log_of_mean, mean, _, _ = ctx.flags
    variant, reduction = "in" if log_of_mean else "out", "mean" if mean else "sum"
    args = SupCon(query, key, scale, query_labels, key_labels, normalize, variant, reduction, None)
    rows = reference.stats(args.problem())[0]
    loss = reduce(args.losses(*rows[:4]), reduction)
    return _padded(ctx, _differentiable_grad((loss,), (grad_loss,), views, ctx.needs_input_grad[:3]))


def save_mochi(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args = Mochi(*inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*args[:3], *args[4:9], *output[1:])
    ctx.keys, ctx.n_hard = _Frozen(args.keys), args.n_hard


def mochi_gradient(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    inputs, draws, unit_grads = tensors[:3], tensors[3:8], tensors[8:]
    needs = ctx.needs_input_grad[:3]
    unused = (None,) * (len(Mochi._fields) - 3 + 1)
    if torch.is_grad_enabled():
        views = _views(inputs)
        losses = reference.mochi(Mochi._make([*views, ctx.keys.get(), *draws, ctx.n_hard]))
        return (*_differentiable_grad((losses,), (grad_losses,), views, needs), *unused)
    grad_losses = _first_order(grad_losses, inputs)
    grad_query, grad_positive, grad_scale = unit_grads
    column = grad_losses[:, None]
    return (
        (grad_query * column).to(inputs[0].dtype) if needs[0] else None,
        (grad_positive * column).to(inputs[1].dtype) if needs[1] else None,
        (grad_scale * grad_losses).sum(dtype=inputs[2].dtype) if needs[2] else None,
        *unused,
    )
