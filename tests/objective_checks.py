"""An objective beside its paper's formula in plain PyTorch: values, gradients, graphs, transforms."""

import torch
from grids import HERE

from fastcl import testing


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
