"""How the ops are differentiated: what is saved for the backward pass, and the gradients from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastcl.backends import reference
from fastcl.losses.families.many_positives import MANY_POSITIVES_INPUTS, MANY_POSITIVES_TENSORS, ManyPositives
from fastcl.losses.families.mochi import MOCHI_INPUTS, Mochi
from fastcl.losses.families.one_positive import ONE_POSITIVE_INPUTS, ONE_POSITIVE_TENSORS, PAIRED, OnePositive
from fastcl.ops.schema import library
from fastcl.similarity.fields import LSE_NEG, STATISTICS, unpack
from fastcl.similarity.numerics import reduce, without_autocast
from fastcl.similarity.problem import (
    PROBLEM_FIELDS,
    PROBLEM_INPUTS,
    PROBLEM_TENSORS,
    Needs,
    PairGradients,
    Problem,
    input_gradients,
    prepare,
)
from fastcl.similarity.transforms import refuse_tangents

_OF_KEYS = ("key", "exclude_key", "within_key")  # tensors of a problem that may be a queue's


def save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, (weighted_keys, backend) = Problem(*inputs[:PROBLEM_FIELDS]), inputs[PROBLEM_FIELDS:]
    _, row_state, _, column_state, weighted = output
    ctx.mark_non_differentiable(row_state, column_state, weighted)
    frozen = _OF_KEYS if weighted_keys else ()  # the backward pass needs neither them nor their values then
    ctx.frozen = [(name, _Frozen(getattr(problem, name))) for name in frozen]
    named = zip(Problem._fields[:PROBLEM_TENSORS], problem[:PROBLEM_TENSORS], strict=True)
    tensors = [None if name in frozen else x for name, x in named]
    more = (*problem.positive_more, *problem.exclude_more)
    ctx.save_for_backward(*tensors, *more, row_state, column_state, weighted)
    ctx.more = len(problem.positive_more)
    ctx.flags, ctx.backend, ctx.weighted_keys = problem[PROBLEM_TENSORS + 2 :], backend, weighted_keys


def _saved_problem(ctx: Any) -> tuple[Problem, tuple[Tensor, Tensor, Tensor]]:
    """The problem of :func:`save_stats`, and the row state, the column state and the weighted keys."""
    *tensors, row_state, column_state, weighted = ctx.saved_tensors
    more = tensors[PROBLEM_TENSORS:]
    fields = (*tensors[:PROBLEM_TENSORS], more[: ctx.more], more[ctx.more :], *ctx.flags)
    return Problem._make(fields), (row_state, column_state, weighted)


def stats_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    problem, (row_state, column_state, weighted) = _saved_problem(ctx)
    needs = Needs(*ctx.needs_input_grad[:PROBLEM_INPUTS])
    unused = (None,) * (len(ctx.needs_input_grad) - PROBLEM_INPUTS)
    grad_rows = _zeros(row_state) if grads[0] is None else grads[0]
    grad_columns = _zeros(column_state) if grads[2] is None else grads[2]
    if torch.is_grad_enabled():
        problem = problem._replace(**{name: frozen.get() for name, frozen in ctx.frozen})
        return (*_second_order_stats(problem, needs, grad_rows, grad_columns), *unused)
    grad_rows = first_order(grad_rows, problem[:PROBLEM_INPUTS])
    if ctx.weighted_keys:
        query_only = problem._replace(key=problem.query, symmetric=True)
        pairs = PairGradients(weighted * grad_rows[LSE_NEG, :, None], None, None)
        return (*input_gradients(query_only, prepare(query_only), pairs, needs), *unused)
    outputs = torch.ops.fastcl.stats_backward(
        *problem, grad_rows, grad_columns, row_state, column_state, needs, ctx.backend
    )
    if problem.symmetric:
        needs = needs._replace(key=False)
    return (*(x if needed else None for x, needed in zip(outputs, needs, strict=True)), *unused)


def _zeros(state: Tensor) -> Tensor:
    """The gradient of statistics that no loss asked for, from the state of the same rows."""
    return state.new_zeros(STATISTICS, state.shape[1])


def _second_order_stats(
    problem: Problem, needs: Needs, grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients as a differentiable function of inputs and incoming gradients, dense."""
    inputs = distinct_nodes(problem[:PROBLEM_INPUTS])
    rows, columns = reference.stats(Problem(*inputs, *problem[PROBLEM_INPUTS:]))
    if not problem.columns:
        return differentiable_grad((rows,), (grad_rows,), inputs, needs)
    return differentiable_grad((rows, columns), (grad_rows, grad_columns), inputs, needs)


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


def first_order(grad: Tensor, inputs: Sequence[Any]) -> Tensor:
    """``grad``; in a graph, of a backward pass of which ``inputs`` are inputs.

    Then torch refuses to differentiate the pass. It would take what does not depend on them for constant.
    """
    if type(grad) is Tensor:
        return grad
    traced: Tensor = torch.ops.fastcl.first_order(grad, [x for x in inputs if x is not None])
    return traced


def distinct_nodes(inputs: Sequence[Any]) -> list[Any]:
    """Distinct graph nodes for the inputs, so that one tensor given twice gets each role's gradient."""
    return [None if x is None else x.view_as(x) for x in inputs]


def differentiable_grad(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(
        next(found) if needed and x is not None else None for x, needed in zip(inputs, needs, strict=True)
    )


def save_one_positive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, negatives, scale, query_ids, negative_ids = inputs[:ONE_POSITIVE_TENSORS]
    ctx.mark_non_differentiable(*output[1:])
    ctx.frozen = None
    if negatives is not None and not negatives.requires_grad:
        ctx.frozen = _Frozen(negatives), _Frozen(negative_ids)
        negatives = None
        negative_ids = None
    ctx.save_for_backward(query, positive, negatives, scale, query_ids, negative_ids, *output[1:])
    ctx.flags = inputs[ONE_POSITIVE_TENSORS:]


def one_positive_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, positive, negatives, scale, query_ids, negative_ids, *unit_grads = ctx.saved_tensors
    inputs = (query, positive, negatives, scale)
    if torch.is_grad_enabled():
        return _padded(ctx, _second_order_one_positive(ctx, inputs, (query_ids, negative_ids), grad_loss))
    return _padded(ctx, _gradient_of_op(ctx, inputs, unit_grads, grad_loss))


def _padded(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """With None for all arguments that have no gradient."""
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))


def _gradient_of_op(
    ctx: Any, inputs: Sequence[Tensor | None], unit_grads: Sequence[Tensor], grad_loss: Tensor
) -> list[Tensor | None]:
    return whole_loss_gradient(inputs, ctx.needs_input_grad, ctx.flags[-1], unit_grads, grad_loss)


def whole_loss_gradient(
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    computed: int,
    unit_grads: Sequence[Tensor],
    grad_loss: Tensor,
) -> list[Tensor | None]:
    """From the gradients for an incoming 1 that the op returned with the loss, for the bits ``computed``."""
    grads: list[Tensor | None] = [None] * len(inputs)
    as_they_are = _is_one(grad_loss)
    grad_loss = first_order(grad_loss, inputs)
    for i, (x, grad) in enumerate(zip(inputs, unit_grads, strict=True)):
        if x is None or not wanted[i]:
            continue
        if not computed >> i & 1:
            raise RuntimeError("a whole loss was called without need of a gradient that is now wanted")
        grads[i] = (grad if as_they_are else grad_loss * grad).to(x.dtype)
    return grads


def _is_one(grad: Tensor) -> bool:
    """Whether an incoming gradient is plainly 1, that of ``loss.backward()``, where to look costs nothing."""
    if type(grad) is not Tensor or grad.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return False
    try:
        return grad.item() == 1
    except RuntimeError:  # under vmap it has no single value
        return False


def _second_order_one_positive(
    ctx: Any,
    inputs: Sequence[Tensor | None],
    ids: tuple[Tensor | None, Tensor | None],
    grad_loss: Tensor,
) -> tuple[Tensor | None, ...]:
    """As :func:`_second_order_stats`."""
    views, (query_ids, negative_ids) = distinct_nodes(inputs), ids
    query, positive, negatives, scale = views
    if ctx.frozen is not None:
        negatives, negative_ids = (frozen.get() for frozen in ctx.frozen)
    layout, normalize, normalize_negatives, decoupled, mean, *_ = ctx.flags
    args = OnePositive(
        query,
        positive,
        negatives,
        scale,
        query_ids,
        negative_ids,
        layout=layout,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        decoupled=decoupled,
        reduction="mean" if mean else "sum",
    )
    loss = _dense_loss(args.in_compute_dtype())
    return differentiable_grad((loss,), (grad_loss,), views, ctx.needs_input_grad[:ONE_POSITIVE_INPUTS])


def _dense_loss(args: OnePositive | ManyPositives) -> Tensor:
    if isinstance(args, OnePositive) and args.layout == PAIRED:
        return reduce(args.losses_of(args.paired_lse()), args.reduction)
    problem = args.problem()
    rows, columns = reference.stats(problem)
    losses = args.losses(unpack(rows), unpack(columns) if problem.columns else None)
    return reduce(losses, args.reduction)


def save_many_positives(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:MANY_POSITIVES_TENSORS], *output[1:])
    ctx.flags = inputs[MANY_POSITIVES_TENSORS:]


def many_positives_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, scale, query_labels, key_labels, positive_mask, *unit_grads = ctx.saved_tensors
    inputs = (query, key, scale)
    if not torch.is_grad_enabled():
        return _padded(ctx, _gradient_of_op(ctx, inputs, unit_grads, grad_loss))
    views = distinct_nodes(inputs)
    query, key, scale = views
    normalize, log_of_mean, mean, *_ = ctx.flags
    args = ManyPositives(
        query,
        key,
        scale,
        query_labels,
        key_labels,
        positive_mask,
        normalize=normalize,
        variant="in" if log_of_mean else "out",
        reduction="mean" if mean else "sum",
    )
    loss = _dense_loss(args)
    needs = ctx.needs_input_grad[:MANY_POSITIVES_INPUTS]
    return _padded(ctx, differentiable_grad((loss,), (grad_loss,), views, needs))


def save_mochi(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args = Mochi(*inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    draws = (args.first, args.second, args.alpha, args.partner, args.beta)
    ctx.save_for_backward(args.query, args.positive, args.scale, *draws, *output[1:])
    ctx.keys, ctx.n_hard = _Frozen(args.keys), args.n_hard


def mochi_gradient(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, grad_query, grad_positive, grad_scale = ctx.saved_tensors
    inputs, draws = saved[:MOCHI_INPUTS], saved[MOCHI_INPUTS:]
    needs = ctx.needs_input_grad[:MOCHI_INPUTS]
    unused = (None,) * (len(ctx.needs_input_grad) - len(inputs))
    if torch.is_grad_enabled():
        views = distinct_nodes(inputs)
        losses = reference.mochi(Mochi._make([*views, ctx.keys.get(), *draws, ctx.n_hard]))
        return (*differentiable_grad((losses,), (grad_losses,), views, needs), *unused)
    grad_losses = first_order(grad_losses, inputs)
    column = grad_losses[:, None]
    return (
        (grad_query * column).to(inputs[0].dtype) if needs[0] else None,
        (grad_positive * column).to(inputs[1].dtype) if needs[1] else None,
        (grad_scale * grad_losses).sum(dtype=inputs[2].dtype) if needs[2] else None,
        *unused,
    )


def register_autograd(
    name: str,
    save: Callable[..., None],
    gradient: Callable[..., Any],
    adapted: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple,
) -> Any:
    """As torch.library.register_autograd, at a third of its cost per call: it matters for small batches.

    ``adapted``: the arguments for what needs a gradient now, which an exported graph did not know.
    """
    op = getattr(torch.ops.fastcl, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            with torch._C._AutoDispatchBelowAutograd():
                outputs: tuple[Tensor, ...] = op(*args)
            save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            given = next((grad for grad in grads if grad is not None), None)
            if given is None:
                return (None,) * len(ctx.needs_input_grad)
            if not torch.is_grad_enabled():
                return gradient(ctx, *grads)
            with without_autocast(given.device):  # to be differentiated again, by the dense formula
                return gradient(ctx, *grads)

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        refuse_tangents(name, args)
        outputs: tuple[Tensor, ...]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            outputs = Function.apply(*adapted(args))  # type: ignore[no-untyped-call]
            return outputs
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
            return outputs

    library.impl(name, kernel, "Autograd")
    return Function


def needs_of(differentiable: Sequence[Any]) -> int:
    """Which of the tensors require a gradient, as bits."""
    needs = 0
    for bit, x in enumerate(differentiable):
        needs |= (x is not None and x.requires_grad) << bit
    return needs


def _adapted_stats(args: tuple[Any, ...]) -> tuple[Any, ...]:
    *arguments, weighted_keys, backend = args
    return *arguments, weighted_keys and not needs_of(args[1:PROBLEM_INPUTS]), backend


def _adapted_whole_loss(inputs: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last argument says which of the first ``inputs`` need a gradient."""
    return *args[:-1], args[-1] | needs_of(args[:inputs])


register_autograd("stats_forward", save_stats, stats_gradient, _adapted_stats)
WHOLE_LOSS_FUNCTIONS = {
    name: register_autograd(name, save, gradient, partial(_adapted_whole_loss, inputs))
    for name, save, gradient, inputs in (
        ("one_positive", save_one_positive, one_positive_gradient, ONE_POSITIVE_INPUTS),
        ("one_positive_by", save_one_positive, one_positive_gradient, ONE_POSITIVE_INPUTS),
        ("sup_con", save_many_positives, many_positives_gradient, MANY_POSITIVES_INPUTS),
    )
}
register_autograd("mochi", save_mochi, mochi_gradient)
