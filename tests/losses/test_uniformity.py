"""Alignment and uniformity are the paper's formulas, on rows as they are."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from objective_checks import check, check_compiled, check_derivatives, check_finite, objective, rows
from processes import on_every_rank
from test_distributed import own_rows

import fastcl
from fastcl import testing

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
objective("alignment", fastcl.alignment, (6, 4), (6, 4), scaled=False, signature="x, y")
objective("uniformity", fastcl.uniformity, (6, 4), signature="x, t=2.0", out_of_range=torch.nan)


def uniformity_formula(x, t=2.0):
    """Section 4.1.2: the logarithm of the mean over pairs of exp(-t |x - y|^2)."""
    first, second = torch.triu_indices(len(x), len(x), 1)
    return (-t * (x[first] - x[second]).square().sum(1)).exp().mean().log()


def alignment_formula(x, y, reduction="mean"):
    losses = (x - y).norm(dim=1) ** 2
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


@in_float64
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_uniformity_is_the_formula(backend, unit, count):
    (x,) = rows((count, 5))
    x = F.normalize(x, dim=1) if unit else 0.7 * x + 3
    check(fastcl.uniformity, uniformity_formula, [x, torch.tensor(1.7, dtype=torch.float64)])


@pytest.mark.parametrize("kind", ["random", "peaked", "collapsed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_uniformity_is_within_the_budget(backend, kind, dtype, shift):
    x = F.normalize(testing.make_case(kind, (65, 3, 40), seed=3).query, dim=1) + shift
    check(fastcl.uniformity, uniformity_formula, [x], dtype, logit=4.0)


def test_of_no_pairs_it_is_zero(backend):
    for count in (0, 1):
        assert check_finite(fastcl.uniformity, rows((count, 4))) == 0


def test_of_equal_rows_it_is_zero_wherever_they_are(backend):
    for x in (torch.zeros(5, 3), torch.full((5, 3), 1e3)):
        torch.testing.assert_close(check_finite(fastcl.uniformity, [x]), torch.zeros(()), atol=1e-5, rtol=0)


def test_nan_is_not_hidden(backend):
    x = torch.randn(4, 3)
    x[1, 1] = torch.nan
    assert fastcl.uniformity(x).isnan()


@in_float64
def test_derivatives_of_strided_rows():
    inputs = [x.T for x in rows((4, 6))]
    check(fastcl.uniformity, uniformity_formula, inputs)
    check_derivatives(fastcl.uniformity, uniformity_formula, inputs)
    pairs = [x.T for x in rows((4, 6), (4, 6))]
    check_derivatives(fastcl.alignment, lambda x, y: (x - y).square().sum(1).mean(), pairs)


def test_compiles():
    check_compiled(fastcl.uniformity, rows((6, 4)))
    check_compiled(fastcl.alignment, rows((6, 4), (6, 4)))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_alignment_is_the_formula(dtype, reduction):
    def function(x, y):
        return fastcl.alignment(x, y, reduction=reduction)

    check(function, lambda x, y: alignment_formula(x, y, reduction), rows((9, 4), (9, 4)), dtype)


def test_alignment_of_equal_rows_has_no_gradient():
    (x,) = rows((5, 3))
    assert check_finite(fastcl.alignment, [x, x]) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.uniformity(torch.ones(3)), ValueError, "x must have 2 dimensions"),
        (lambda: fastcl.uniformity(torch.ones(3, 2), torch.inf), ValueError, "t must be finite"),
        (lambda: fastcl.uniformity(torch.ones(3, 2), torch.ones(2)), ValueError, "t must be a number"),
        (lambda: fastcl.uniformity(torch.ones(3, 2).long()), TypeError, "x must be float64"),
        (lambda: fastcl.uniformity(torch.ones(3, 2), group=1), TypeError, "group must be a ProcessGroup"),
        (lambda: fastcl.alignment(torch.ones(3, 2), torch.ones(2, 2)), ValueError, "y and x must have"),
        (lambda: fastcl.alignment(*torch.ones(2, 3, 2), reduction="max"), ValueError, "reduction must be"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


COUNTS = (5, 0, 3)
OVER_RANKS = {
    "uniformity": lambda x, y, **given: fastcl.uniformity(x, **given),
    "decoupled": lambda x, y, **given: fastcl.decoupled_loss(x, y, sigma=0.5, **given),
    "decoupled across": lambda x, y, **given: fastcl.decoupled_loss(x, y, within_views=False, **given),
    "hard negative": lambda x, y, **given: fastcl.hard_negative_loss(x, y, **given),
    "in batch": lambda x, y, **given: fastcl.info_nce(x, y, x.detach().sin(), in_batch=True, **given),
    "as they are": lambda x, y, **given: fastcl.info_nce(x, y, x.detach().sin(), normalize=False, **given),
}


def _check_each_is_one_process(group):
    own = own_rows(COUNTS, group.rank())
    for name, loss in OVER_RANKS.items():
        (value,), grads = testing.value_and_grads(loss, rows((8, 4), (8, 4)))
        for options in ({}, {"ring": True}) if name != "uniformity" else ({},):
            call = partial(loss, group=group, **options)
            (got,), got_grads = testing.value_and_grads(call, [x[own] for x in rows((8, 4), (8, 4))])
            said = f"{name} {options} rank {group.rank()}"
            torch.testing.assert_close(got, value, msg=said)
            for a, b in zip(got_grads, grads, strict=True):
                torch.testing.assert_close(a / group.size(), b[own], msg=said)


@in_float64
def test_on_ranks_each_is_one_process(tmp_path):
    on_every_rank((_check_each_is_one_process,), len(COUNTS), tmp_path)
