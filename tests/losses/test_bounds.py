"""The bounds of mutual information are their formulas, and stay finite where exponentials do not."""

import math

import pytest
import torch
from objective_checks import check, check_compiled, check_derivatives, check_finite, objective, rows

import fastcl
from fastcl import testing

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
for _name in ("info_nce_bound", "nwj_bound", "donsker_varadhan_bound"):
    objective(_name, getattr(fastcl, _name), (6, 4), (6, 4), scaled=False, signature="f, g")


def _info_nce(critic, others):
    return math.log(len(critic)) - (critic.logsumexp(1) - critic.diagonal()).mean()


def _nwj(critic, others):
    return critic.diagonal().mean() - (critic[others] - 1).exp().mean()


def _donsker_varadhan(critic, others):
    return critic.diagonal().mean() - critic[others].exp().mean().log()


FORMULAS = {
    "info_nce_bound": _info_nce,
    "nwj_bound": _nwj,
    "donsker_varadhan_bound": _donsker_varadhan,
}
every_bound = pytest.mark.parametrize("name", FORMULAS)


def formula(name):
    def call(f, g):
        critic = f @ g.T
        return FORMULAS[name](critic, ~torch.eye(len(f), dtype=torch.bool))

    return call


@in_float64
@every_bound
@pytest.mark.parametrize("count", [2, 9])
def test_is_the_formula(backend, name, count):
    check(getattr(fastcl, name), formula(name), rows((count, 5), (count, 5)))


@every_bound
@pytest.mark.parametrize("kind", ["random", "peaked", "collapsed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_within_the_budget(backend, name, kind, dtype):
    case = testing.make_case(kind, (65, 3, 8), seed=3)
    inputs = [case.query / 2, case.positive / 2]
    critic = (inputs[0] @ inputs[1].T).abs().max().item()
    check(getattr(fastcl, name), formula(name), inputs, dtype, logit=critic)


@every_bound
def test_one_row(backend, name):
    f, g = rows((1, 4), (1, 4))
    value = check_finite(getattr(fastcl, name), [f, g])
    torch.testing.assert_close(value, (f * g).sum() if name != "info_nce_bound" else torch.zeros_like(value))


@pytest.mark.parametrize("name", ["info_nce_bound", "donsker_varadhan_bound"])
def test_large_critics_do_not_overflow(backend, name):
    f, g = (x.float() for x in rows((6, 4), (6, 4), scale=30.0))
    value = check_finite(getattr(fastcl, name), [f, g])
    critic = f.double() @ g.double().T
    others = critic[~torch.eye(6, dtype=torch.bool)]
    exact = {
        "info_nce_bound": math.log(6) - (critic.logsumexp(1) - critic.diagonal()).mean(),
        "donsker_varadhan_bound": critic.diagonal().mean() - others.logsumexp(0) + math.log(30),
    }
    torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-3)


@in_float64
@every_bound
def test_derivatives_of_strided_rows(name):
    inputs = [x.T for x in rows((4, 6), (4, 6))]
    check(getattr(fastcl, name), formula(name), inputs)
    check_derivatives(getattr(fastcl, name), formula(name), inputs)


@every_bound
def test_compiles(name):
    check_compiled(getattr(fastcl, name), rows((6, 4), (6, 4)))


@every_bound
def test_refuses_rows_that_do_not_fit(name):
    with pytest.raises(ValueError, match="g and f must have the same number of samples"):
        getattr(fastcl, name)(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(TypeError, match="f must be float64"):
        getattr(fastcl, name)(torch.ones(3, 2).long(), torch.ones(3, 2))
