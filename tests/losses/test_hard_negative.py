"""The hard-negative loss is the paper's formula: values, gradients, the floor, edges, errors."""

import math
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

OPTIONS = ({}, {"beta": 0.0}, {"beta": 2.0, "tau_plus": 0.02}, {"tau_plus": 0.0}, {"tau_plus": 0.9})
objective(
    "hard_negative_loss",
    fastcl.hard_negative_loss,
    *((6, 4), (6, 4)),
    signature="z1, z2, temperature=0.5, *, beta=1.0, tau_plus=0.1",
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def formula(z1, z2, temperature=0.5, *, beta=1.0, tau_plus=0.1, reduction="mean"):
    """HCL, figure 1: log(1 + Ng / exp(l_pos)) with the estimate of Ng and its floor."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    samples = torch.arange(len(z1)).repeat(2)
    other = samples[:, None] != samples
    count = 2 * len(z1) - 2
    similar = (z @ z.T / temperature).exp() * other
    positive = ((z[: len(z1)] * z[len(z1) :]).sum(1) / temperature).exp().repeat(2)
    weights = torch.where(other, similar, 1.0) ** beta * other
    reweighted = (weights * similar).sum(1) / (weights.sum(1) / count)
    negative = (reweighted - tau_plus * count * positive) / (1 - tau_plus)
    floor = torch.as_tensor(-1 / temperature).exp() * count
    losses = -(positive / (positive + torch.maximum(negative, floor.to(negative)))).log()
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


@in_float64
@every_option
def test_is_the_formula(options):
    inputs = [*rows((9, 5), (9, 5)), torch.tensor(0.3, dtype=torch.float64)]
    check_reductions(partial(fastcl.hard_negative_loss, **options), partial(formula, **options), inputs)


@every_option
def test_is_within_the_budget(options):
    left = 1 - options.get("tau_plus", 0.1)  # of the sum, by which the correction multiplies its error
    check_kinds(
        partial(fastcl.hard_negative_loss, **options),
        partial(formula, **options),
        logit=2 * (1 + options.get("beta", 1.0)) / left,
    )


def test_floor_holds_where_the_correction_is_too_large(backend):
    z = F.normalize(torch.eye(4, dtype=testing.WIDEST)).requires_grad_()
    loss = fastcl.hard_negative_loss(z, z.detach(), 0.1, tau_plus=0.5, reduction="none")
    exact = math.log1p(6 * math.exp(-10) / math.exp(10))
    torch.testing.assert_close(loss, torch.full((8,), exact, dtype=loss.dtype))
    loss.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_no_exponential_overflows(backend, temperature):
    z1, z2 = (x.float() for x in rows((8, 4), (8, 4)))
    loss = check_finite(lambda *x: fastcl.hard_negative_loss(*x, temperature, beta=2.0), [z1, z2])
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    samples = torch.arange(8).repeat(2)
    logits = (z @ z.T / temperature).masked_fill(samples[:, None] == samples, -torch.inf)
    positive = ((z[:8] * z[8:]).sum(1) / temperature).repeat(2)
    reweighted = (3 * logits).logsumexp(1) - (2 * logits).logsumexp(1) + math.log(14)
    correction = positive + math.log(0.1 * 14)
    larger = reweighted > correction
    left = torch.where(larger, (-torch.expm1(correction - reweighted)).log(), -torch.inf)
    log_negative = (reweighted + left - math.log(0.9)).maximum(torch.tensor(math.log(14) - 1 / temperature))
    torch.testing.assert_close(
        loss.double(), torch.logaddexp(log_negative - positive, torch.zeros(())).mean(), rtol=1e-4, atol=1e-4
    )


@every_option
def test_one_row_has_no_negatives(backend, options):
    assert check_finite(lambda *x: fastcl.hard_negative_loss(*x, **options), rows((1, 4), (1, 4))) == 0


@every_option
def test_equal_and_zero_rows(backend, options):
    for z in (torch.ones(5, 3), torch.zeros(5, 3)):
        check_finite(lambda *x: fastcl.hard_negative_loss(*x, **options), [z, z])


@every_option
def test_nan_is_not_hidden(backend, options):
    z1, z2 = torch.randn(2, 4, 3)
    z2[1, 0] = torch.nan
    assert fastcl.hard_negative_loss(z1, z2, **options, reduction="none").isnan().all()


@in_float64
@every_option
def test_strided_rows_and_derivatives(options):
    inputs = [x.T for x in rows((4, 6), (4, 6))]

    def function(*x):
        return fastcl.hard_negative_loss(*x, **options)

    check(function, lambda *x: formula(*x, **options), inputs)
    check_derivatives(function, lambda *x: formula(*x, **options), inputs)


@every_option
def test_compiles(options):
    check_compiled(lambda *x: fastcl.hard_negative_loss(*x, **options), rows((6, 4), (6, 4)))


def test_module_is_the_function():
    z1, z2 = torch.randn(2, 6, 4)
    options = {"beta": 0.5, "tau_plus": 0.05, "reduction": "none"}
    module = fastcl.HardNegativeLoss(0.2, **options)
    assert torch.equal(module(z1, z2), fastcl.hard_negative_loss(z1, z2, 0.2, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must not be zero"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"tau_plus": 1.0}, "tau_plus must be at least 0 and below 1, got 1.0"),
        ({"tau_plus": -0.1}, "tau_plus must be at least 0 and below 1, got -0.1"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"z2": torch.ones(2, 3)}, "z2 and z1 must have the same number of samples"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fastcl.hard_negative_loss(torch.ones(4, 3), **{"z2": torch.ones(4, 3), **options})
