"""The decoupled loss is the paper's formula: values, gradients, edges, errors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from objective_checks import (
    check,
    check_compiled,
    check_derivatives,
    check_finite,
    check_kinds,
    check_reductions,
    objective,
    rows,
)

import fastcl
from fastcl import testing

OPTIONS = (
    {},
    {"within_views": False},
    {"sigma": 0.5},
    {"sigma": 0.3, "within_views": False},
)
objective(
    "decoupled_loss",
    fastcl.decoupled_loss,
    *((6, 4), (6, 4)),
    signature="z1, z2, temperature=0.1, *, within_views=True, sigma=None",
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def formula(z1, z2, temperature=0.1, *, within_views=True, sigma=None, reduction="mean"):
    """DCL eq. 6 and 7: -w s(i, i) / t + log of the sum of exp(s / t), the positive not among them."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    count = len(z1)
    other = ~torch.eye(count, dtype=torch.bool)
    positive = (z1 * z2).sum(1) / temperature
    if sigma is not None:
        positive = positive * (2 - count * ((z1 * z2).sum(1) / sigma).softmax(0)).detach()
    cross = (z1 @ z2.T / temperature).masked_fill(~other, -torch.inf)
    if within_views:
        first, second = ((z @ z.T / temperature).masked_fill(~other, -torch.inf) for z in (z1, z2))
        denominators = torch.cat([torch.cat([first, cross], 1), torch.cat([cross.T, second], 1)])
        losses = denominators.logsumexp(1) - positive.repeat(2)
    else:
        losses = cross.logsumexp(1) - positive
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


@in_float64
@every_option
def test_is_the_formula(options):
    inputs = [*rows((9, 5), (9, 5)), torch.tensor(0.3, dtype=torch.float64)]
    check_reductions(partial(fastcl.decoupled_loss, **options), partial(formula, **options), inputs)


@every_option
def test_is_within_the_budget(options):
    check_kinds(partial(fastcl.decoupled_loss, **options), partial(formula, **options))


@every_option
def test_one_row_has_no_negatives(backend, options):
    value = check_finite(lambda *x: fastcl.decoupled_loss(*x, **options), rows((1, 4), (1, 4)))
    assert value == 0


@every_option
def test_equal_and_zero_rows(backend, options):
    for z in (torch.ones(5, 3), torch.zeros(5, 3)):
        check_finite(lambda *x: fastcl.decoupled_loss(*x, **options), [z, z])


def test_nan_is_not_hidden(backend):
    z1, z2 = torch.randn(2, 4, 3)
    z2[1, 0] = torch.nan
    assert fastcl.decoupled_loss(z1, z2).isnan()


@in_float64
@every_option
def test_strided_rows_and_derivatives(options):
    inputs = [x.T for x in rows((4, 6), (4, 6))]

    def function(*x):
        return fastcl.decoupled_loss(*x, 0.5, **options)

    check(function, lambda *x: formula(*x, 0.5, **options), inputs)
    check_derivatives(function, lambda *x: formula(*x, 0.5, **options), inputs)


@every_option
def test_compiles(options):
    check_compiled(lambda *x: fastcl.decoupled_loss(*x, **options), rows((6, 4), (6, 4)))


@every_option
def test_module_is_the_function(options):
    z1, z2 = torch.randn(2, 6, 4)
    module = fastcl.DecoupledLoss(0.2, **options, reduction="sum")
    assert module(z1, z2) == fastcl.decoupled_loss(z1, z2, 0.2, **options, reduction="sum")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must not be zero"),
        ({"sigma": 0.0}, "sigma must not be zero"),
        ({"sigma": torch.nan}, "sigma must be finite"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"ring": True}, "ring=True"),
        ({"z2": torch.ones(2, 3)}, "z2 and z1 must have the same number of samples"),
        ({"z2": torch.ones(4, 2)}, "z2 and z1 must have the same number of components"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fastcl.decoupled_loss(torch.ones(4, 3), **{"z2": torch.ones(4, 3), **options})
