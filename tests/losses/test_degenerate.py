"""Empty, single, zero, equal and NaN inputs: defined results, no NaN that PyTorch would not give."""

import math

import pytest
import torch
from loss_table import LOSSES

import fastcl
from fastcl import testing

UNNORMALIZED = (LOSSES["clip_loss-unnormalized"], LOSSES["sup_con-unnormalized"])
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def run(loss, inputs, reduction="mean", temperature=0.1):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss.product(*leaves, loss.factor(temperature), reduction=reduction)
    value.sum().backward()
    return value.detach(), [x.grad for x in leaves]


@every_loss
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_no_rows(loss, dtype, backend):
    inputs = [x[:0].to(dtype) for x in loss.inputs(testing.make_case("random", (3, 3, 4)))]
    for reduction, expected in (("none", []), ("sum", 0.0)):
        value, grads = run(loss, inputs, reduction)
        assert value.tolist() == expected
        assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert run(loss, inputs, "mean")[0].isnan()


@every_loss
def test_one_row(loss, backend):
    """Without other rows to tell apart the loss is zero, as plain PyTorch's, unless negatives are given."""
    inputs = loss.inputs(testing.make_case("random", (1, 3, 4)))
    value, grads = run(loss, inputs)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(value, loss.formula(*inputs, loss.factor(0.1), reduction="mean"))


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_no_negatives(mode, backend):
    z = torch.randn(4, 3)
    negatives = torch.empty(0, 3) if mode == "unpaired" else torch.empty(4, 0, 3)
    query = z.clone().requires_grad_()
    loss = fastcl.info_nce(query, z.flip(0), negatives.requires_grad_(), negative_mode=mode, reduction="none")
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 4
    assert not query.grad.any()
    assert negatives.grad.shape == negatives.shape


@every_loss
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_zero_rows_stay_zero_and_get_no_gradient(loss, dtype, backend):
    inputs = [x.to(dtype) for x in loss.inputs(testing.make_case("random", (6, 6, 4)))]
    for x in inputs:
        x[2] = 0.0
    value, grads = run(loss, inputs, "none")
    assert value.isfinite().all()
    exact = loss.formula(*(x.double() for x in inputs), loss.factor(0.1), reduction="none")
    torch.testing.assert_close(value.double(), exact, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)
    assert all(g.isfinite().all() for g in grads)
    if loss not in UNNORMALIZED:
        assert not any(g[2].any() for g in grads)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_tiny_and_huge_rows(dtype, backend):
    """Norms are taken in float32: a float16 row may be as long or as short as float16 holds."""
    z = torch.randn(5, 4, generator=testing.generator(0))
    for factor in (1e-3, 1e3):
        long = (z * factor).to(dtype)
        value, (grad, _) = run(LOSSES["nt_xent"], [long, long.flip(0)])
        assert value.isfinite()
        assert grad.isfinite().all()
        exact = LOSSES["nt_xent"].formula(long.double(), long.double().flip(0), 0.1, reduction="mean")
        assert value.item() == pytest.approx(exact.item(), rel=1e-2 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_rows_without_positives_contribute_zero_and_are_counted(variant, backend):
    features = torch.randn(4, 3, dtype=testing.WIDEST, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    each = fastcl.sup_con(features, labels, variant=variant, reduction="none")
    assert each[2:].tolist() == [0.0, 0.0]
    assert (each[:2] > 0).all()
    mean = fastcl.sup_con(features, labels, variant=variant)
    assert mean.item() == pytest.approx(each.sum().item() / 4)
    nobody = fastcl.sup_con(features, torch.arange(4), variant=variant)
    nobody.backward()
    assert nobody.item() == 0.0
    assert not features.grad.any()


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_lone_row_has_neither_positives_nor_negatives(variant, reduction, backend):
    """Nor a gradient: the difference of two infinities is nowhere in it."""
    row = torch.randn(1, 3, dtype=testing.WIDEST, requires_grad=True)
    temperature = torch.tensor(0.5, requires_grad=True)
    options = {"variant": variant, "reduction": reduction}
    loss = fastcl.sup_con(row, torch.zeros(1, dtype=torch.int64), temperature=temperature, **options)
    loss.sum().backward()
    assert loss.sum() == 0
    assert not row.grad.any()
    assert temperature.grad == 0


@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_with_one_class_only(variant, backend):
    """No negatives at all: 'in' is the log of a mean of probabilities that sum to one."""
    features = torch.randn(5, 3, dtype=testing.WIDEST, requires_grad=True)
    loss = fastcl.sup_con(features, torch.zeros(5, dtype=torch.int64), variant=variant, reduction="none")
    loss.sum().backward()
    assert features.grad.isfinite().all()
    if variant == "in":
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(4)))
        assert features.grad.abs().max() < 1e-12
    else:
        assert (loss >= math.log(4)).all()


@every_loss
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_all_rows_equal(loss, dtype, backend):
    inputs = [x.to(dtype) for x in loss.inputs(testing.make_case("collapsed", (9, 9, 4)))]
    value, grads = run(loss, inputs, "none")
    exact = loss.formula(*(x.double() for x in inputs), loss.factor(0.1), reduction="none")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("row", [0, 2])
def test_a_nan_query_spoils_its_own_loss_only(row, backend):
    query, positive, negatives = torch.randn(3, 5, 4, generator=testing.generator(0))
    for keys in ([positive], [positive, negatives]):
        expected = fastcl.info_nce(query, *keys, reduction="none")
        spoiled = query.clone()
        spoiled[row, 1] = torch.nan
        got = fastcl.info_nce(spoiled, *keys, reduction="none")
        assert got.isnan().tolist() == [i == row for i in range(5)]
        others = torch.arange(5) != row
        assert torch.equal(got[others], expected[others])


def test_a_nan_key_reaches_every_row_that_compares_with_it(backend):
    query, positive, negatives = torch.randn(3, 5, 4, generator=testing.generator(0))
    negatives[3, 2] = torch.nan
    assert fastcl.info_nce(query, positive, negatives, reduction="none").isnan().all()
    positive[1] = torch.nan
    assert fastcl.info_nce(query, positive, reduction="none").isnan().all()
    assert fastcl.nt_xent(query, positive, reduction="none").isnan().all()


@every_loss
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_in_not_a_number_out(loss, value, backend):
    for rows in (1, 40):
        inputs = [x.float() for x in loss.inputs(testing.make_case("random", (rows + 1, 9, 4)))]
        inputs[0].view(-1)[1] = value
        got, grads = run(loss, inputs)
        # without normalization an infinite logit may have a finite limit
        if math.isnan(value) or loss not in UNNORMALIZED:
            assert got.isnan()
            assert not grads[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_scale_zero_gives_uniform_weights(scale, backend):
    z1, z2 = torch.randn(2, 5, 3)
    loss = fastcl.clip_loss(z1.requires_grad_(), z2, scale)
    assert loss.item() == pytest.approx(math.log(5))
    loss.backward()
    assert z1.grad.abs().max() <= scale
