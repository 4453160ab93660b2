"""Every loss three times: fastcl's, the paper's formula, plain PyTorch; and how they are compared."""

from functools import partial
from typing import NamedTuple

import formulas
import torch
from grids import HERE

from fastcl import testing


class Tested(NamedTuple):
    """Called as ``product(*inputs(case), factor, reduction=...)``, and ``formula`` and ``dense`` the same."""

    product: object
    formula: object
    dense: object
    inputs: object  # testing.Case -> float64 tensors
    factor: object  # temperature -> what the loss takes for it


def _tested(loss):
    calls = (loss.calling(f) for f in (loss.function, getattr(formulas, loss.name), loss.dense))
    return Tested(*calls, loss.inputs, loss.factor)


LOSSES = {name: _tested(loss) for name, loss in testing.LOSSES.items()}
MASKED = {name: _tested(loss) for name, loss in testing.MASKED.items()}  # by 'chunked' and 'reference' only


def scalar_like(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def check(loss, case, dtype, temperature, *, factor_dtype=None, reduction="mean", each=HERE):
    """The value and every gradient, the factor's with ``factor_dtype``, within the error budget.

    ``each``: contexts by name, in each of which the loss is computed.

    One ulp of the largest logit moves every probability by as much: that is the unit of the floor.
    """
    inputs = [x.to(dtype) for x in loss.inputs(case)]
    factor = loss.factor(temperature)
    units = [1 / temperature / x.double().norm(dim=-1).min().item() for x in inputs]
    if factor_dtype is not None:
        inputs.append(scalar_like(factor, factor_dtype))
        units.append(1 / temperature / factor)

    def call(function, *tensors):
        return function(*tensors, *(() if factor_dtype is not None else (factor,)), reduction=reduction)

    (exact,), exact_grads = testing.value_and_grads(partial(call, loss.formula), [x.double() for x in inputs])
    (dense,), dense_grads = testing.value_and_grads(partial(call, loss.dense), inputs)

    count = len(inputs[0])
    for i, x in enumerate(inputs):
        if reduction == "mean" and x.dim():
            units[i] /= count
        elif reduction != "mean" and not x.dim():
            units[i] *= count
        units[i] *= max(1.0, 1 / temperature)
    for name, context in each.items():
        with context():
            (got,), got_grads = testing.value_and_grads(partial(call, loss.product), inputs)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        unit = (count if reduction == "sum" else 1) / temperature
        testing.assert_within_budget(got, exact, dense, unit=unit, name=f"{name} value")
        for i, (x, unit) in enumerate(zip(inputs, units, strict=True)):
            assert (got_grads[i].dtype, got_grads[i].shape) == (x.dtype, x.shape)
            # a float64 factor's gradient is as accurate as the inputs let it be
            grad = got_grads[i].to(got.dtype) if x.dtype == torch.float64 else got_grads[i]
            testing.assert_within_budget(
                grad, exact_grads[i], dense_grads[i], unit=unit, name=f"{name} gradient {i}"
            )
