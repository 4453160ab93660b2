"""The ops as torch sees them: schemas, fake kernels, autograd. Backends are called from here only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fastcl import chunked, cpu, cuda, gradients, reference
from fastcl.numerics import compute_dtype, matmul_precision_level, without_autocast
from fastcl.one_positive import OnePositive
from fastcl.problem import Mochi, Needs, Problem, TopK
from fastcl.sup_con import SupCon
from fastcl.transforms import refuse_tangents

_MODULES: dict[str, ModuleType] = {"reference": reference, "chunked": chunked, "cpu": cpu, "cuda": cuda}


def _module(backend: str) -> ModuleType:
    """The backend's functions; Triton is imported by the first call that needs it."""
    if backend not in _MODULES:
        _MODULES[backend] = importlib.import_module("fastcl.kernels")
    return _MODULES[backend]


_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? key_bias, Tensor? key_scale, "
    "Tensor? positive_query, Tensor? positive_key, Tensor? positive_table, "
    "Tensor? exclude_query, Tensor? exclude_key, bool normalize, bool columns, bool symmetric, int precision"
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
# the whole loss: the extension registers the kernels of the first, per device; the second is Triton's
_ONE_POSITIVE = ("one_positive", "one_positive_triton")
for _name in _ONE_POSITIVE:
    _library.define(
        f"{_name}(Tensor query, Tensor positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
        "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool mean, "
        "int precision, int needs) -> "
        "(Tensor loss, Tensor grad_query, Tensor grad_positive, Tensor grad_negatives, Tensor grad_scale)"
    )
# no backend's but the extension's, per device
_library.define(
    "sup_con(Tensor query, Tensor? key, Tensor scale, Tensor query_labels, Tensor? key_labels, "
    "bool normalize, bool log_of_mean, bool mean, int precision, int needs)"
    " -> (Tensor loss, Tensor grad_query, Tensor grad_key, Tensor grad_scale)"
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
    "enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids, "
    "str backend) -> ()"
)

# the incoming gradient, in the backward pass of a compiled graph
_library.define("first_order(Tensor grad, Tensor[] inputs) -> Tensor")

_PROBLEM_FIELDS = len(Problem._fields)


def stats(problem: Problem, backend: str, weighted_keys: bool = False) -> tuple[Tensor, Tensor]:
    """Row statistics (5, N) and column statistics (5, M or 0), differentiable."""
    if backend == "reference":
        return reference.stats(problem)
    rows, _, columns, _, _ = torch.ops.fastcl.stats_forward(*problem, weighted_keys, backend)
    return rows, columns


def one_positive(args: OnePositive, backend: str) -> Tensor:
    """The 'mean' or 'sum' loss, differentiable, by one op."""
    name = _ONE_POSITIVE[backend == "triton"]
    return _whole_loss(name, args[:4], *args[:-1], args.reduction == "mean", matmul_precision_level())


def sup_con(args: SupCon) -> Tensor:
    """As :func:`one_positive`."""
    flags = (args.normalize, args.variant == "in", args.reduction == "mean")
    return _whole_loss("sup_con", args[:3], *args[:5], *flags, matmul_precision_level())


def _whole_loss(name: str, differentiable: tuple[Tensor | None, ...], *arguments: Any) -> Tensor:
    needs = _needs(differentiable) if torch.is_grad_enabled() else 0
    call = getattr(torch.ops.fastcl, name).default
    if needs and not torch.compiler.is_compiling():
        call = _WHOLE_LOSS_FUNCTIONS[name].apply  # where the dispatcher would arrive, without the way there
    loss: Tensor = call(*arguments, needs)[0]
    return loss


def _needs(differentiable: tuple[Tensor | None, ...]) -> int:
    needs = 0
    for bit, x in enumerate(differentiable):
        needs |= (x is not None and x.requires_grad) << bit
    return needs


def topk(args: TopK, backend: str) -> tuple[Tensor, Tensor]:
    """Values (N, k) and indices (N, k); no gradient."""
    if backend == "reference":
        return reference.topk(args)
    values, indices = torch.ops.fastcl.topk(*args, backend)
    return values, indices


def mochi(args: Mochi, backend: str) -> Tensor:
    """MoCHi's losses (N,), differentiable in query, positive and scale."""
    if backend == "reference":
        return reference.mochi(args)
    losses: Tensor = torch.ops.fastcl.mochi(*args, backend)[0]
    return losses


def enqueue(
    keys: Tensor,
    ids: Tensor | None,
    pointer: Tensor,
    new_keys: Tensor,
    new_ids: Tensor | None,
    backend: str,
) -> None:
    """Normalize ``new_keys`` (N, D) and write them to ``keys`` (size, D) from ``pointer`` on, in place."""
    torch.ops.fastcl.enqueue(keys, ids, pointer, new_keys, new_ids, backend)


def _filled(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _stats_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, (weighted_keys, backend) = Problem(*args[:_PROBLEM_FIELDS]), args[_PROBLEM_FIELDS:]
    with without_autocast(problem.query.device):
        outputs: tuple[Tensor, ...] = _module(backend).stats_forward(problem, weighted_keys)
        return outputs


def _stats_backward(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem(*args[:_PROBLEM_FIELDS]), args[_PROBLEM_FIELDS:]
    *tensors, needs, backend = rest
    with without_autocast(problem.query.device):
        return _filled(problem.query, *_module(backend).stats_backward(problem, *tensors, Needs(*needs)))


def _one_positive_triton(*args: Any) -> tuple[Tensor, ...]:
    *fields, mean, _, needs = args
    with without_autocast(args[0].device):
        arguments = OnePositive._make([*fields, "mean" if mean else "sum"])
        outputs: tuple[Tensor, ...] = _module("triton").one_positive(arguments, needs)
        return outputs


def _topk(*args: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = args
    with without_autocast(arguments[0].device):
        values, indices = _module(backend).topk(TopK(*arguments))
        return values, indices


def _mochi(*args: Any) -> tuple[Tensor, ...]:
    with without_autocast(args[0].device):
        outputs: tuple[Tensor, ...] = _module(args[-1]).mochi(Mochi(*args[:-1]))
        return outputs


def _enqueue(*args: Any) -> None:
    *arguments, backend = args
    # a backend without one of its own has nothing to gain from it
    getattr(_module(backend), "enqueue", chunked.enqueue)(*arguments)


def _first_order(grad: Tensor, inputs: list[Tensor]) -> Tensor:
    return grad.clone()  # an op returns no input


def _fake_first_order(grad: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.empty_like(grad)


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
    ("one_positive_triton", _one_positive_triton, _fake_one_positive),
    ("topk", _topk, _fake_topk),
    ("mochi", _mochi, _fake_mochi),
    ("enqueue", _enqueue, _fake_enqueue),
    ("first_order", _first_order, _fake_first_order),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    register_fake(f"fastcl::{_name}", _fake)
register_fake("fastcl::one_positive", _fake_one_positive)
register_fake("fastcl::sup_con", _fake_sup_con)


def _register_autograd(
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
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
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

    _library.impl(name, kernel, "Autograd")
    return Function


def _adapted_stats(args: tuple[Any, ...]) -> tuple[Any, ...]:
    *arguments, weighted_keys, backend = args
    return *arguments, weighted_keys and not _needs(args[1:5]), backend


def _adapted_one_positive(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return *args[:-1], args[-1] | _needs(args[:4])


def _adapted_sup_con(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return *args[:-1], args[-1] | _needs(args[:3])


_register_autograd("stats_forward", gradients.save_stats, gradients.stats_gradient, _adapted_stats)
_WHOLE_LOSS_FUNCTIONS = {
    name: _register_autograd(name, save, gradient, adapted)
    for name, save, gradient, adapted in (
        *(
            (name, gradients.save_one_positive, gradients.one_positive_gradient, _adapted_one_positive)
            for name in _ONE_POSITIVE
        ),
        ("sup_con", gradients.save_sup_con, gradients.sup_con_gradient, _adapted_sup_con),
    )
}
_register_autograd("mochi", gradients.save_mochi, gradients.mochi_gradient)
