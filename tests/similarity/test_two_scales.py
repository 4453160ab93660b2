"""Log-sum-exps of the same similarities at two scales: in one pass, or in two where a backend has none."""

import pytest
import torch
from grids import every_backend
from objective_checks import check, check_compiled, check_derivatives, check_finite, rows
from torch.library import opcheck

import fastcl
from fastcl import PairRule, testing
from fastcl.backends import choice
from fastcl.ops import calls
from fastcl.similarity.problem import Problem
from fastcl.similarity.stats import lse_at_two_scales

FACTORS = ((2.0, 1.0), (1.0, 2.0), (1.0, 0.25), (0.5, -0.5), (3.0, 0.0), (-1.0, 0.5))
in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def ids_of(x):
    """Each sample has two rows, in turn: neither is a negative of the other."""
    return torch.arange(x.shape[0], device=x.device) // 2


def both(factors, x, scale):
    rule = PairRule(exclude=(ids_of(x),) * 2)
    return torch.stack(lse_at_two_scales(x, scale, factors, rule))


def formula(factors, x, scale):
    same = ids_of(x)[:, None] == ids_of(x)
    logits = [(scale.to(x) * factor * x @ x.T).masked_fill(same, -torch.inf) for factor in factors]
    return torch.stack([pairs.logsumexp(dim=1) for pairs in logits])


def functions(factors):
    return (lambda *inputs: both(factors, *inputs)), (lambda *inputs: formula(factors, *inputs))


def inputs_of(count, width, dtype=testing.WIDEST):
    unit = torch.nn.functional.normalize(rows((count, width))[0], dim=1)
    return [unit.to(dtype), torch.tensor(4.0, dtype=testing.WIDEST)]


@in_float64
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (66, 5), (600, 20)], ids=str)
def test_is_the_formula(factors, shape):
    check(*functions(factors), inputs_of(*shape), each=every_backend())


@pytest.mark.parametrize("factors", FACTORS[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_within_the_budget(factors, dtype):
    x, scale = inputs_of(600, 40)
    check(*functions(factors), [x.to(dtype), scale.float()], dtype, each=every_backend())


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_rows_without_negatives(backend, factors):
    x, scale = inputs_of(2, 3)
    assert (both(factors, x, scale) == -torch.inf).all()
    x.requires_grad_()
    found = both(factors, x, scale)
    (grad,) = torch.autograd.grad(found.masked_fill(found == -torch.inf, 0.0).sum(), x)
    assert (grad == 0).all()
    assert both(factors, x[:0], scale).shape == (2, 0)


def test_equal_rows_at_a_large_scale(backend):
    check_finite(lambda x: both((2.0, 1.0), x, torch.tensor(1e4)), [torch.ones(300, 4) / 2])


@in_float64
def test_graphs_and_derivatives():
    inputs = inputs_of(10, 4)
    check_compiled(functions((2.0, 1.0))[0], inputs)
    check_derivatives(*functions((2.0, 1.0)), inputs)


@pytest.mark.parametrize("name", [name for name, x in choice.BACKENDS.items() if x.two_scales])
@pytest.mark.parametrize("rows_too", [False, True])
def test_the_op(rows_too, name):
    if choice.BACKENDS[name].missing():
        pytest.skip("it is not built")
    x, key = rows((6, 4), (7, 4))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    key = x if rows_too else key.requires_grad_()
    ids = tuple(torch.arange(count) // 2 for count in (len(x), len(key)))
    ids = ids[:1] * 2 if rows_too else ids
    problem = Problem(
        x,
        key,
        scale,
        exclude_query=ids[0],
        exclude_key=ids[1],
        columns=not rows_too,
        symmetric=rows_too,
        second_scale=0.5,
    )
    if name == "cpu":
        opcheck(torch.ops.fastcl.stats_forward.default, (*problem, False, name))
    rows_, columns = (
        None if found is None else torch.stack([found.lse_neg, found.lse_pos])
        for found in calls.statistics(problem, columns=True, backend=name)
    )
    logits = (scale * x @ key.T).masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    for found, pairs in ((rows_, logits), (columns, logits.T)):
        exact = torch.stack([pairs.logsumexp(1), (0.5 * pairs).logsumexp(1)])
        torch.testing.assert_close(found, exact)
        for got, want in zip(
            *(torch.autograd.grad(y.cos().sum(), (x, scale), retain_graph=True) for y in (found, exact)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_a_backend_without_them_refuses_them():
    x, scale = inputs_of(4, 3)
    problem = Problem(x, x, scale, symmetric=True, second_scale=0.5)
    with pytest.raises(NotImplementedError, match="'chunked' has no statistics at two scales"):
        torch.ops.fastcl.stats_forward(*problem, False, "chunked")


def test_which_backends_have_them():
    assert {name for name, x in choice.BACKENDS.items() if x.two_scales} == {"cpu", "reference"}


def test_one_pass_is_what_the_loss_takes(monkeypatch):
    passes = []
    forward = calls.statistics
    monkeypatch.setattr(calls, "statistics", lambda *args: passes.append(args) or forward(*args))
    with fastcl.use_backend("reference"):
        fastcl.hard_negative_loss(*rows((6, 4), (6, 4)))
    assert len(passes) == 1
