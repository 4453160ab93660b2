"""The objectives in plain torch are their papers' formulas, and keep what every loss promises."""

import math
from functools import partial

import plain_table
import pytest
import torch
from plain_table import PLAIN, different
from torch.autograd import forward_ad

import fastcl
from fastcl import testing
from fastcl.similarity.numerics import compute_dtype

every_loss = pytest.mark.parametrize("loss", PLAIN.values(), ids=PLAIN.keys())
SHAPES = ((2, 1), (2, 3), (7, 5), (16, 32), (15, 32), (33, 24), (9, 70))


def make(loss, shape, kind="random", seed=0):
    """Three tensors, the second near the first, the third a logarithm's size apart."""
    generator = testing.generator(seed)
    first, noise, third = (torch.randn(shape, generator=generator, dtype=testing.WIDEST) for _ in range(3))
    second = first + noise * (0.01 if kind == "converged" else 1.0)
    if kind == "collapsed":
        first = second = third = first[:1].repeat(shape[0], 1)
    if kind == "outlier":  # one component outweighs the others
        first, second, third = (
            x * x.new_tensor([300.0, *[1.0] * (shape[1] - 1)]) for x in (first, second, third)
        )
    if loss.inputs == 3:
        return [first, noise, second]
    return [first, second]


def check(loss, inputs, dtype, **options):
    inputs = [x.to(dtype) for x in inputs]
    options = {**loss.options, **options}
    (got,), got_grads = testing.value_and_grads(partial(loss.product, **options), inputs)
    (exact,), exact_grads = testing.value_and_grads(
        partial(loss.formula, **options), [x.double() for x in inputs]
    )
    (dense,), dense_grads = testing.value_and_grads(
        lambda *x: loss.formula(*(y.to(compute_dtype(dtype)) for y in x), **options), inputs
    )
    assert got.dtype == compute_dtype(dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got_grads, exact_grads, rtol=1e-9, atol=1e-12)
        return
    testing.assert_within_budget(got, exact, dense)
    for i, grads in enumerate(zip(got_grads, exact_grads, dense_grads, strict=True)):
        assert grads[0].dtype == dtype
        unit = max(grads[1].abs().max().item(), unprojected(loss, inputs[i].double()))
        testing.assert_within_budget(*grads, name=f"gradient {i}", unit=unit)


def unprojected(loss, x):
    """The size of a gradient to unit rows or components, of which scaling to unit size takes most away."""
    if loss.formula is plain_table.barlow_twins:
        return 1 / (len(x) * x.std(0, correction=0).min().item())
    return 1 / x.norm(dim=1).min().item() if loss.formula is plain_table.negative_cosine else 0.0


@every_loss
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_formula(loss, shape, dtype):
    for kind in ("random", "converged"):
        check(loss, make(loss, shape, kind), dtype)


@pytest.mark.parametrize("name", ["vicreg", "vicreg-weights", "barlow_twins"])
@pytest.mark.parametrize("shape", [(16, 64), (16, 24)], ids=str)
def test_a_component_that_outweighs_the_others(name, shape):
    for dtype in (torch.float32, torch.bfloat16):
        check(PLAIN[name], make(PLAIN[name], shape, "outlier"), dtype)


@pytest.mark.parametrize("name", ["negative_cosine", "pair_margin"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions(name, reduction):
    loss = PLAIN[name]
    for dtype in (testing.WIDEST, torch.float32):
        check(loss, make(loss, (11, 6)), dtype, reduction=reduction)
    with pytest.raises(ValueError, match=r"reduction.*'max'"):
        loss.product(*make(loss, (4, 3)), reduction="max")


@every_loss
def test_no_rows(loss):
    inputs = [x.requires_grad_() for x in make(loss, (0, 4))]
    value = loss.product(*inputs)
    assert value.isnan()
    value.backward()
    assert all(x.grad is None or x.grad.shape == (0, 4) for x in inputs)
    if loss.has_rows:
        assert loss.product(*inputs, reduction="none").shape == (0,)
        assert loss.product(*inputs, reduction="sum").item() == 0.0


@every_loss
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (6, 4), (3, 8)], ids=str)
def test_one_row_and_equal_rows(loss, dtype, shape):
    inputs = [x.to(dtype) for x in make(loss, shape, "collapsed")]
    (value,), grads = testing.value_and_grads(partial(loss.product, **loss.options), inputs)
    exact = loss.formula(*(x.double() for x in inputs), **loss.options)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


@every_loss
def test_zero_rows(loss):
    inputs = [torch.zeros(5, 4) for _ in range(loss.inputs)]
    (value,), grads = testing.value_and_grads(partial(loss.product, **loss.options), inputs)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@every_loss
def test_strided_inputs_and_autocast(loss):
    inputs = [x.float() for x in make(loss, (6, 16))]
    expected = loss.product(*inputs)
    strided = [x.T.contiguous().T for x in inputs]
    torch.testing.assert_close(loss.product(*strided), expected)
    with torch.autocast(testing.DEVICE.type, dtype=torch.bfloat16):
        torch.testing.assert_close(loss.product(*inputs), expected)
        mixed = loss.product(inputs[0].bfloat16(), *inputs[1:])
    torch.testing.assert_close(mixed, loss.product(inputs[0].bfloat16().float(), *inputs[1:]))


@pytest.mark.parametrize("name", [name for name in PLAIN if "-weight" not in name])
@pytest.mark.parametrize(("shape", "dynamic"), [((6, 16), True), ((8, 5), False)], ids=str)
def test_compiled(name, shape, dynamic):
    loss = PLAIN[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss.product, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = make(loss, shape)
    got, exact = (testing.value_and_grads(f, inputs) for f in (compiled, loss.product))
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)
    leaves = [x.requires_grad_() for x in inputs]
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        torch.autograd.grad(compiled(*leaves), leaves[0], create_graph=True)[0].sum().backward()


@pytest.mark.skipif(not testing.IN_FLOAT64, reason="finite differences are taken in float64")
@every_loss
@pytest.mark.parametrize("shape", [(3, 7), (5, 3)], ids=str)
def test_derivatives_of_every_kind(loss, shape):
    inputs = [x.requires_grad_() for x in make(loss, shape)]
    if loss is PLAIN["negative_cosine"]:
        inputs[1].requires_grad_(False)
    product = partial(loss.product, **loss.options)
    assert torch.autograd.gradcheck(product, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, inputs)
    values = [x.detach() for x in inputs]
    expected = torch.autograd.grad(product(*inputs), inputs[0])[0]
    torch.testing.assert_close(torch.func.grad(product)(*values), expected)
    batched = torch.func.vmap(product)(*(torch.stack([x, 2 * x]) for x in values))
    torch.testing.assert_close(batched[1], product(*(2 * x for x in values)))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (fastcl.vicreg_loss, "invariance"),
        (fastcl.vicreg_loss, "variance"),
        (fastcl.vicreg_loss, "covariance"),
        (fastcl.barlow_twins_loss, "off_diagonal"),
        (lambda a, b, **o: fastcl.pair_margin_loss(a, b, different(len(a)), **o), "margin"),
    ],
)
def test_weights_are_finite_numbers_or_learned(call, name):
    z1, z2 = make(PLAIN["vicreg"], (6, 4))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}.*{bad}"):
            call(z1, z2, **{name: bad})
    with pytest.raises(TypeError, match=rf"{name}.*str"):
        call(z1, z2, **{name: "1"})
    with pytest.raises(ValueError, match=rf"{name}.*\(3,\)"):
        call(z1, z2, **{name: torch.ones(3)})
    weight = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    loss = call(z1.float(), z2.float(), **{name: weight})
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss.detach(), call(z1.float(), z2.float(), **{name: 2.5}))
    above, below = (call(z1, z2, **{name: 2.5 + h}) for h in (1e-4, -1e-4))
    assert weight.grad.item() == pytest.approx((above - below).item() / 2e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (fastcl.vicreg_loss, ("z1", "z2")),
        (fastcl.barlow_twins_loss, ("z1", "z2")),
        (fastcl.negative_cosine, ("prediction", "target")),
        (lambda a, b: fastcl.pair_margin_loss(a, b, different(len(a))), ("x1", "x2")),
        (lambda a, b: fastcl.club_bound(a, b, a), ("mean", "log_variance")),
        (lambda a, b: fastcl.club_bound(a, a, b), ("mean", "y")),
    ],
)
def test_inputs_that_do_not_fit(call, names):
    z = torch.ones(4, 3)
    first, second = names
    for bad in (torch.ones(5, 3), torch.ones(4, 2), torch.ones(4)):
        with pytest.raises(
            ValueError, match=rf"{second}.*{tuple(bad.shape)}".replace("(", r"\(").replace(")", r"\)")
        ):
            call(z, bad)
    with pytest.raises(TypeError, match=rf"{second}.*float64"):
        call(z, z.double())
    with pytest.raises(TypeError, match=rf"{first}.*int64"):
        call(z.long(), z)


def test_the_target_is_a_constant():
    prediction, target = (x.requires_grad_() for x in make(PLAIN["negative_cosine"], (5, 4)))
    fastcl.negative_cosine(prediction, target).backward()
    assert prediction.grad.any()
    assert target.grad is None
    same = fastcl.negative_cosine(prediction, 3 * prediction, reduction="none")
    torch.testing.assert_close(same, -torch.ones_like(same))


def test_a_pair_at_distance_zero_has_no_gradient_of_any_kind():
    x1 = torch.randn(4, 3, dtype=testing.WIDEST, requires_grad=True)
    x2 = x1.detach().clone()
    losses = fastcl.pair_margin_loss(x1, x2, torch.tensor([1, 1, 0, 0]), margin=2.0, reduction="none")
    assert losses.tolist() == [2.0, 2.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(losses.sum(), x1, create_graph=True)
    assert not grad.any()
    (second,) = torch.autograd.grad(grad.sum(), x1)
    assert second.isfinite().all()
    with forward_ad.dual_level():
        dual = fastcl.pair_margin_loss(
            forward_ad.make_dual(x1.detach(), torch.ones_like(x2)), x2, torch.ones(4, dtype=torch.bool)
        )
        assert forward_ad.unpack_dual(dual).tangent.item() == 0.0


def test_different_is_bool_or_zeros_and_ones():
    x1, x2 = make(PLAIN["pair_margin"], (4, 3))
    flags = different(4)
    expected = fastcl.pair_margin_loss(x1, x2, flags)
    for dtype in (torch.int64, torch.uint8, torch.int32):
        torch.testing.assert_close(fastcl.pair_margin_loss(x1, x2, flags.to(dtype)), expected)
    with pytest.raises(ValueError, match=r"different.*zeros and ones"):
        fastcl.pair_margin_loss(x1, x2, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"different.*\(4,\).*\(5,\)"):
        fastcl.pair_margin_loss(x1, x2, different(5))
    with pytest.raises(TypeError, match=r"different.*float32"):
        fastcl.pair_margin_loss(x1, x2, torch.ones(4))
    with pytest.raises(TypeError, match=r"different.*list"):
        fastcl.pair_margin_loss(x1, x2, [0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"margin.*-1"):
        fastcl.pair_margin_loss(x1, x2, flags, margin=-1)


def test_modules_are_their_functions():
    z1, z2 = make(PLAIN["vicreg"], (6, 4))
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    for module, function, options in (
        (fastcl.VICRegLoss, fastcl.vicreg_loss, weights),
        (fastcl.BarlowTwinsLoss, fastcl.barlow_twins_loss, {"off_diagonal": 0.3}),
    ):
        torch.testing.assert_close(module()(z1, z2), function(z1, z2))
        torch.testing.assert_close(module(**options)(z1, z2), function(z1, z2, **options))


def test_wide_rows_take_no_table_of_components():
    z = torch.randn(4, 60_000)  # whose D x D table would take 14 GB
    assert fastcl.vicreg_loss(z, z.flip(0)).isfinite()
    assert fastcl.barlow_twins_loss(z, z.flip(0)).isfinite()
