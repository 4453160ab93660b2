"""An objective beside its paper's formula in plain PyTorch: values, gradients, graphs, transforms."""

from functools import partial
from typing import NamedTuple

import torch
from grids import HERE, every_backend

from fastcl import testing


class Objective(NamedTuple):
    """What all objectives share is tested of ``function(*tensors of shapes, its scalar if ``scaled``)``."""

    function: object
    shapes: tuple
    scaled: bool  # the next argument is a temperature, or what stands for one
    signature: str | None  # of the public name: what users rely on; further options may follow, by keyword
    any_count: bool  # whether all tensors may have more rows
    out_of_range: float  # a scalar, as a tensor, that gives NaN


OBJECTIVES = {}


def objective(name, function, *shapes, scaled=True, signature=None, any_count=True, out_of_range=0.0):
    """Register an objective, beside its own tests, for those of what all share."""
    assert name not in OBJECTIVES, name
    OBJECTIVES[name] = Objective(function, shapes, scaled, signature, any_count, out_of_range)


def by_row(x, values):
    """One of the values for each row of x, again and again, on its device."""
    count = x.shape[0]
    return values.to(x.device).repeat(1 + count // len(values), *[1] * (values.dim() - 1))[:count]


def rows(*shapes, seed=0, scale=1.0):
    """Independent float64 tensors of the given shapes."""
    source = testing.generator(seed)
    return [scale * torch.randn(shape, generator=source, dtype=testing.WIDEST) for shape in shapes]


def check(function, formula, inputs, dtype=None, *, logit=10.0, unit=None, each=HERE):
    """``function(*inputs)`` and all gradients are the formula's: in float64, or within the error budget.

    ``logit`` is the size of the largest logit: one ulp of it moves every probability by as much.
    ``each``: contexts by name, in each of which the function is computed.
    """
    inputs = [x.to(dtype or testing.WIDEST) if x.is_floating_point() else x for x in inputs]
    (exact,), exact_grads = testing.value_and_grads(formula, [x.double() for x in inputs])
    plain = None if inputs[0].dtype == torch.float64 else testing.value_and_grads(formula, inputs)
    for context in each.values():
        with context():
            got = testing.value_and_grads(function, inputs)
        _compare(inputs, got, (exact, exact_grads), plain, logit, unit)


def _compare(inputs, results, formula, plain, logit, unit):
    ((got,), got_grads), (exact, exact_grads) = results, formula
    if plain is None:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
        for grad, exact_grad in zip(got_grads, exact_grads, strict=True):
            torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-11)
        return
    (plain,), plain_grads = plain
    assert got.dtype == torch.float32
    testing.assert_within_budget(got, exact, plain, unit=logit, name="value")
    for i, (x, grad) in enumerate(zip(inputs, got_grads, strict=True)):
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
        size = unit or logit * max(1.0, logit) / (len(x) if x.dim() else 1)
        testing.assert_within_budget(grad, exact_grads[i], plain_grads[i], unit=size, name=f"gradient {i}")


def check_reductions(function, formula, inputs):
    """The formula in every reduction, on every backend."""
    for reduction in ("none", "mean", "sum"):
        reduced = (partial(f, reduction=reduction) for f in (function, formula))
        check(*reduced, inputs, each=every_backend())


def check_kinds(function, formula, **sizes):
    """The formula of pairs of every kind in narrow dtypes, on every backend; ``sizes`` of :func:`check`."""
    for kind in ("random", "peaked", "collapsed"):
        case = testing.make_case(kind, (65, 3, 40), seed=3)
        for dtype in (torch.float32, torch.bfloat16):
            check(function, formula, [case.query, case.positive], dtype, each=every_backend(), **sizes)


def check_compiled(function, inputs):
    """A full graph gives what the call itself gives."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (got,), got_grads = testing.value_and_grads(compiled, inputs)
    (eager,), eager_grads = testing.value_and_grads(function, inputs)
    torch.testing.assert_close(got, eager, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got_grads, eager_grads, rtol=1e-9, atol=1e-11)


def check_derivatives(function, formula, inputs):
    """Forward mode, ``torch.func.grad`` and second derivatives are the formula's."""
    tangents = tuple(x.cos() for x in inputs)

    def by_all(f):
        numbers = tuple(range(len(inputs)))
        value, tangent = torch.func.jvp(f, tuple(inputs), tangents)
        grads = torch.func.grad(lambda *x: f(*x).sum(), argnums=numbers)(*inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True)
        penalty = sum((g * t).sum() for g, t in zip(first, tangents, strict=True))
        second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
        return value, tangent, *grads, *second

    torch.testing.assert_close(by_all(function), by_all(formula), rtol=1e-8, atol=1e-10)


def check_finite(function, inputs):
    """Neither the value nor a gradient holds NaN or infinity."""
    outputs, grads = testing.value_and_grads(function, inputs)
    for x in (*outputs, *grads):
        assert x.isfinite().all(), x
    return outputs[0]
