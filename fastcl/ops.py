"""The ops as torch sees them: schemas, fake kernels, autograd. Backends are called from here only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fastcl import chunked, cpu, reference
from fastcl.numerics import compute_dtype, unit_rows
from fastcl.one_positive import OnePositive
from fastcl.problem import Mochi, Needs, PairGradients, Problem, input_gradients, prepare

_MODULES: dict[str, ModuleType] = {"reference": reference, "chunked": chunked, "cpu": cpu}

_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? key_bias, Tensor? key_scale, "
    "Tensor? positive_query, Tensor? positive_key, Tensor? positive_table, "
    "Tensor? exclude_query, Tensor? exclude_key, bool normalize, bool columns, bool symmetric"
)
_library = Library("fastcl", "DEF")
_library.define(
    f"stats_forward({_PROBLEM}, bool weighted_keys, str backend) -> "
    "(Tensor rows, Tensor row_state, Tensor columns, Tensor column_state, Tensor weighted)"
)
_library.define(
    f"stats_backward({_PROBLEM}, Tensor grad_rows, Tensor grad_columns, Tensor row_state, "
    "Tensor column_state, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# the whole loss: its kernels are registered by the extension, per device
_library.define(
    "one_positive(Tensor query, Tensor positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
    "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool mean, int needs) -> "
    "(Tensor loss, Tensor grad_query, Tensor grad_positive, Tensor grad_negatives, Tensor grad_scale)"
)
_library.define(
    "topk(Tensor query, Tensor key, int k, Tensor? exclude_query, Tensor? exclude_key, "
    "bool normalize, str backend) -> (Tensor values, Tensor indices)"
)
_library.define(
    "mochi(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor first, Tensor second, "
    "Tensor alpha, Tensor partner, Tensor beta, int n_hard, str backend) -> "
    "(Tensor losses, Tensor grad_query, Tensor grad_positive, Tensor grad_scale)"
)
_library.define(
    "enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids) -> ()"
)

_PROBLEM_FIELDS = len(Problem._fields)
_PROBLEM_TENSORS = _PROBLEM_FIELDS - 3


def stats(problem: Problem, backend: str, weighted_keys: bool = False) -> tuple[Tensor, Tensor]:
    """Row statistics (5, N) and column statistics (5, M or 0), differentiable."""
    if backend == "reference":
        return reference.stats(problem)
    rows, _, columns, _, _ = torch.ops.fastcl.stats_forward(*problem, weighted_keys, backend)
    return rows, columns


def one_positive(args: OnePositive) -> Tensor:
    """The 'mean' or 'sum' loss, differentiable, by one op on the inputs' device."""
    needs = 0
    if torch.is_grad_enabled():
        for bit, x in enumerate(args[:4]):
            needs |= (x is not None and x.requires_grad) << bit
    call = torch.ops.fastcl.one_positive.default
    if needs and not torch.compiler.is_compiling():
        call = _OnePositiveFunction.apply  # where the dispatcher would arrive, without the way there
    loss: Tensor = call(*args[:-1], args.reduction == "mean", needs)[0]
    return loss


def topk(
    query: Tensor,
    key: Tensor,
    k: int,
    exclude_query: Tensor | None,
    exclude_key: Tensor | None,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values (N, k) and indices (N, k); no gradient."""
    values, indices = torch.ops.fastcl.topk(query, key, k, exclude_query, exclude_key, normalize, backend)
    return values, indices


def mochi(args: Mochi, backend: str) -> Tensor:
    """MoCHi's losses (N,), differentiable in query, positive and scale."""
    if backend == "reference":
        return reference.mochi(args)
    losses: Tensor = torch.ops.fastcl.mochi(*args, backend)[0]
    return losses


def enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    """Normalize ``new_keys`` (N, D) and write them to ``keys`` (size, D) from ``pointer`` on, in place."""
    torch.ops.fastcl.enqueue(keys, ids, pointer, new_keys, new_ids)


def _filled(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _stats_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, (weighted_keys, backend) = Problem(*args[:_PROBLEM_FIELDS]), args[_PROBLEM_FIELDS:]
    with torch.autocast(problem.query.device.type, enabled=False):
        outputs: tuple[Tensor, ...] = _MODULES[backend].stats_forward(problem, weighted_keys)
        return outputs


def _stats_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem(*args[:_PROBLEM_FIELDS]), args[_PROBLEM_FIELDS:]
    *tensors, needs, backend = rest
    with torch.autocast(problem.query.device.type, enabled=False):
        return _filled(problem.query, *_MODULES[backend].stats_backward(problem, *tensors, Needs(*needs)))


def _topk(*args: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = args
    with torch.autocast(arguments[0].device.type, enabled=False):
        values, indices = _MODULES[backend].topk(*arguments)
        return values, indices


def _mochi(*args: Any) -> tuple[Tensor, ...]:
    with torch.autocast(args[0].device.type, enabled=False):
        outputs: tuple[Tensor, ...] = _MODULES[args[-1]].mochi(Mochi(*args[:-1]))
        return outputs


def _enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    size, count = keys.shape[0], new_keys.shape[0]
    skipped = max(0, count - size)  # would be overwritten at once
    unit = unit_rows(new_keys[skipped:]).to(keys.dtype)
    rows = (torch.arange(skipped, count, device=keys.device) + pointer) % size
    keys.index_copy_(0, rows, unit)
    if ids is not None and new_ids is not None:
        ids.index_copy_(0, rows, new_ids[skipped:])
    pointer.add_(count).remainder_(size)


def _fake_stats_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, (weighted_keys, _) = Problem(*args[:_PROBLEM_FIELDS]), args[_PROBLEM_FIELDS:]
    n, m = problem.query.shape[0], problem.key.shape[0] if problem.columns else 0
    new, dtype = problem.query.new_empty, compute_dtype(problem.query.dtype)
    weighted = problem.query.shape if weighted_keys else (0,)
    return tuple(new(shape, dtype=dtype) for shape in ((5, n), (4, n), (5, m), (4, m), weighted))


def _fake_stats_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, needs = Problem(*args[:_PROBLEM_FIELDS]), Needs(*args[-2])
    wanted = [
        problem.query if needs.query else None,
        problem.key if needs.key and not problem.symmetric else None,
        problem.scale if needs.scale else None,
        problem.key_bias if needs.key_bias else None,
        problem.key_scale if needs.key_scale else None,
    ]
    return _filled(problem.query, *(None if x is None else x.new_empty(x.shape) for x in wanted))


def _fake_one_positive(*args: Any) -> tuple[Tensor, ...]:
    query, needs = args[0], args[-1]
    dtype = compute_dtype(query.dtype)
    grads = (
        query.new_empty(x.shape if x is not None and needs >> bit & 1 else (0,), dtype=dtype)
        for bit, x in enumerate(args[:3])
    )
    return (query.new_empty((), dtype=dtype), *grads, args[3].new_empty(() if needs >> 3 & 1 else (0,)))


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
    ("topk", _topk, _fake_topk),
    ("mochi", _mochi, _fake_mochi),
    ("enqueue", _enqueue, _fake_enqueue),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    register_fake(f"fastcl::{_name}", _fake)
register_fake("fastcl::one_positive", _fake_one_positive)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, (weighted_keys, backend) = Problem(*inputs[:_PROBLEM_FIELDS]), inputs[_PROBLEM_FIELDS:]
    _, row_state, _, column_state, weighted = output
    ctx.mark_non_differentiable(row_state, column_state, weighted)
    tensors = list(problem[:_PROBLEM_TENSORS])
    ctx.frozen = tuple(_Frozen(x if weighted_keys else None) for x in (problem.key, problem.exclude_key))
    if weighted_keys:
        tensors[1] = tensors[-1] = None
    ctx.save_for_backward(*tensors, row_state, column_state, weighted)
    ctx.flags, ctx.backend, ctx.weighted_keys = problem[_PROBLEM_TENSORS:], backend, weighted_keys


def _stats_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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


class _Frozen:
    """A tensor kept for second derivatives only, so that it may be overwritten before a first backward.

    MoCo enqueues between the loss and its backward, which needs nothing of the queue any more.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = tensor
        self._version = -1 if tensor is None else tensor._version

    def get(self) -> Tensor | None:
        if self._tensor is not None and self._tensor._version != self._version:
            raise RuntimeError("the keys were modified in place since the loss: no second derivatives")
        return self._tensor


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


def _save_one_positive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, negatives, scale, query_ids, negative_ids = inputs[:6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.frozen = None
    if negatives is not None and not negatives.requires_grad:
        ctx.frozen = _Frozen(negatives), _Frozen(negative_ids)
        negatives = None
    ctx.save_for_backward(query, positive, negatives, scale, query_ids, *output[1:])
    ctx.flags = inputs[6:]


def _one_positive_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, positive, negatives, scale, query_ids, *unit_grads = ctx.saved_tensors
    inputs, needs, called_for = (query, positive, negatives, scale), ctx.needs_input_grad, ctx.flags[-1]
    grads: list[Tensor | None] = [None] * len(needs)
    if torch.is_grad_enabled():
        grads[:4] = _second_order_one_positive(ctx, inputs, query_ids, grad_loss)
        return tuple(grads)
    for i, grad in enumerate(unit_grads):
        if not needs[i]:
            continue
        if not called_for >> i & 1:
            raise RuntimeError(
                "fastcl::one_positive was called without need of a gradient that is now wanted"
            )
        grads[i] = (grad_loss * grad).to(inputs[i].dtype)
    return tuple(grads)


def _second_order_one_positive(
    ctx: Any, inputs: Sequence[Tensor | None], query_ids: Tensor | None, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """As :func:`_second_order_stats`."""
    views, negative_ids = _views(inputs), None
    query, positive, negatives, scale = views
    if ctx.frozen is not None:
        negatives, negative_ids = (frozen.get() for frozen in ctx.frozen)
    *flags, mean, _ = ctx.flags
    reduction = "mean" if mean else "sum"
    args = OnePositive._make(
        [query, positive, negatives, scale, query_ids, negative_ids, *flags, reduction]
    ).in_compute_dtype()
    problem = args.problem()
    rows, columns = reference.stats(problem)
    loss = args.loss(rows[0], columns[0] if problem.columns else None)
    return _differentiable_grad((loss,), (grad_loss,), views, ctx.needs_input_grad[:4])


def _save_mochi(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args = Mochi(*inputs[:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*args[:3], *args[4:9], *output[1:])
    ctx.keys, ctx.n_hard = _Frozen(args.keys), args.n_hard


def _mochi_gradient(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    inputs, draws, unit_grads = tensors[:3], tensors[3:8], tensors[8:]
    needs = ctx.needs_input_grad[:3]
    unused = (None,) * (len(Mochi._fields) - 3 + 1)
    if torch.is_grad_enabled():
        views = _views(inputs)
        losses = reference.mochi(Mochi._make([*views, ctx.keys.get(), *draws, ctx.n_hard]))
        return (*_differentiable_grad((losses,), (grad_losses,), views, needs), *unused)
    grad_query, grad_positive, grad_scale = unit_grads
    column = grad_losses[:, None]
    return (
        (grad_query * column).to(inputs[0].dtype) if needs[0] else None,
        (grad_positive * column).to(inputs[1].dtype) if needs[1] else None,
        (grad_scale * grad_losses).sum(dtype=inputs[2].dtype) if needs[2] else None,
        *unused,
    )


def _register_autograd(name: str, save: Callable[..., None], gradient: Callable[..., Any]) -> Any:
    """As torch.library.register_autograd, at a third of its cost per call: it matters for small batches."""
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
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return gradient(ctx, *grads)

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            outputs = Function.apply(*args)  # type: ignore[no-untyped-call]
            return outputs
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
            return outputs

    _library.impl(name, kernel, "Autograd")
    return Function


_register_autograd("stats_forward", _save_stats, _stats_gradient)
_OnePositiveFunction = _register_autograd("one_positive", _save_one_positive, _one_positive_gradient)
_register_autograd("mochi", _save_mochi, _mochi_gradient)
