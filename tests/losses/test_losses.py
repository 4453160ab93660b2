"""Each loss is its paper's formula: values, gradients and the temperature's gradient, on every backend."""

import math
from functools import partial

import formulas
import pytest
import torch
import torch.nn.functional as F
from grids import every_backend, pairwise
from loss_table import LOSSES, MASKED, check, scalar_like

import fastcl
from fastcl import testing

PAIR_KINDS = ("random", "peaked", "collapsed")
SMALL = (33, 40, 24)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_shapes(loss):
    *small, large = testing.SHAPES
    dtypes = (torch.float32, torch.bfloat16)
    rows = [*pairwise(shape=small, kind=PAIR_KINDS, dtype=dtypes)]
    rows += [{"shape": large, "kind": "random", "dtype": dtype} for dtype in dtypes]
    for row in rows:
        check(loss, testing.make_case(row["kind"], row["shape"]), row["dtype"], 0.1, each=every_backend())


@every_loss
def test_dtypes_and_temperatures(loss):
    for row in pairwise(dtype=testing.DTYPES, temperature=(0.5, 0.07, 0.005), kind=("random", "peaked")):
        case = testing.make_case(row["kind"], SMALL, seed=1)
        check(loss, case, row["dtype"], row["temperature"], each=every_backend())


@every_loss
def test_temperature_tensor_of_any_dtype_receives_its_gradient(loss):
    case = testing.make_case("random", SMALL, seed=2)
    dtypes = {testing.WIDEST: None, torch.float32: None, torch.bfloat16: None}
    for row in pairwise(dtype=dtypes, factor_dtype=testing.DTYPES):
        check(loss, case, row["dtype"], 0.1, factor_dtype=row["factor_dtype"], each=every_backend())


@every_loss
def test_reductions(loss):
    case = testing.make_case("random", SMALL, seed=3)
    for reduction in ("none", "mean", "sum"):
        for dtype in {testing.WIDEST: None, torch.float32: None}:
            check(loss, case, dtype, 0.1, reduction=reduction, each=every_backend())


@every_loss
def test_rows_of_very_different_length(loss):
    case = testing.make_case("random", SMALL, seed=4)
    lengths = torch.logspace(-3, 3, SMALL[0], dtype=testing.WIDEST)[:, None]
    check(loss, case._replace(query=case.query * lengths), torch.float32, 0.1, each=every_backend())


@every_loss
def test_negative_temperature_and_scale(loss, backend):
    inputs = [x.requires_grad_() for x in loss.inputs(testing.make_case("random", SMALL))]
    got = loss.product(*inputs, loss.factor(-0.2))
    torch.testing.assert_close(got, loss.formula(*inputs, loss.factor(-0.2), reduction="mean"))


@pytest.mark.skipif(testing.INTERPRETED, reason="Triton's kernels take no masks")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize(("samples", "views"), [(13, 3), (90, 3)])
def test_masks_of_several_tiles(samples, views, variant, symmetric, backend):
    """Views repeat a mask, whose end falls anywhere in a tile; a symmetric one may take half the products."""
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, views, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(samples, samples, generator=generator) < 0.2
    mask = mask | mask.T if symmetric else mask
    for laid_out in (mask, mask.T, mask.repeat(1, 2)[:, : 2 * samples : 2]):

        def product(x, mask=laid_out):
            return fastcl.sup_con(x, mask=mask, variant=variant, temperature=0.3)

        def formula(x, mask=laid_out):
            return formulas.sup_con(x, mask=mask, variant=variant, temperature=0.3)

        got, exact = (testing.value_and_grads(f, [features]) for f in (product, formula))
        torch.testing.assert_close(got, exact)


@pytest.mark.skipif(testing.INTERPRETED, reason="Triton's kernels take no masks")
@pytest.mark.parametrize("name", MASKED)
def test_asymmetric_mask(name):
    for kind in PAIR_KINDS:
        for dtype in testing.DTYPES:
            case = testing.make_case(kind, SMALL)
            check(MASKED[name], case, dtype, 0.1, factor_dtype=dtype, each=every_backend())


@pytest.mark.parametrize("variant", ["out", "in"])
def test_rows_without_components_are_all_alike(variant, backend):
    z = torch.zeros(4, 3, 0)
    loss = fastcl.sup_con(z, contrast_mode="one", variant=variant)
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_mask_of_any_dtype_is_read_as_zeros_and_ones(dtype):
    features = testing.make_case("random", (9, 1, 4)).query
    table = testing.example_mask(features)
    got = fastcl.sup_con(features, mask=table.to(dtype))
    torch.testing.assert_close(got, formulas.sup_con(features, mask=table, temperature=0.07))


@pytest.mark.parametrize(
    ("name", "rows"),
    {
        "info_nce": 5,
        "info_nce-negatives": 5,
        "info_nce-paired": 5,
        "nt_xent": 10,
        "clip_loss": 5,
        "sup_con": 10,
        "sup_con-in": 10,
        "sup_con-one": 5,
        "sup_con-2d": 5,
    }.items(),
)
def test_reduction_none_gives_one_loss_per_row_in_order(name, rows, backend):
    loss = LOSSES[name]
    inputs = loss.inputs(testing.make_case("random", (5, 7, 3)))
    got = loss.product(*inputs, loss.factor(0.1), reduction="none")
    assert got.shape == (rows,)
    torch.testing.assert_close(got, loss.formula(*inputs, loss.factor(0.1), reduction="none"))


@pytest.mark.parametrize("base_temperature", [None, 0.07, 0.2])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_base_temperature_scales_the_loss(base_temperature, as_tensor, backend):
    features = testing.make_case("random", (12, 1, 5)).query.reshape(6, 2, 5)
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True) if as_tensor else 0.1
    options = {"temperature": temperature, "base_temperature": base_temperature}
    got = fastcl.sup_con(features, labels, **options)
    exact = formulas.sup_con(features, labels, **options)
    torch.testing.assert_close(got, exact.to(got.dtype))
    if as_tensor:
        (got_grad,), (exact_grad,) = (torch.autograd.grad(x, temperature) for x in (got, exact))
        torch.testing.assert_close(got_grad.to(got.dtype), exact_grad.to(got.dtype))


@pytest.mark.parametrize("views", [1, 2, 3, 5])
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_views(views, contrast_mode, variant, backend):
    features = testing.make_case("random", (7 * views, 1, 6)).query.reshape(7, views, 6)
    labels = torch.tensor([0, 1, 0, 1, 5, -3, 5])
    options = {"temperature": 0.1, "contrast_mode": contrast_mode, "variant": variant, "reduction": "none"}
    (got,), got_grads = testing.value_and_grads(lambda x: fastcl.sup_con(x, labels, **options), [features])
    (exact,), exact_grads = testing.value_and_grads(
        lambda x: formulas.sup_con(x, labels, **options), [features]
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(got_grads, exact_grads)


def test_sup_con_of_two_views_without_labels_is_nt_xent(backend):
    z1, z2 = testing.make_case("random", (9, 1, 5))[:2]
    got = fastcl.sup_con(torch.stack([z1, z2], dim=1), temperature=0.2, reduction="none")
    torch.testing.assert_close(got, fastcl.nt_xent(z1, z2, 0.2, reduction="none"))


def _converged(count=128, width=64):
    generator = testing.generator(5)
    z1, z2 = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    z1 = F.normalize(z1, dim=-1)
    return z1, F.normalize(z1 + 0.02 * F.normalize(z2, dim=-1), dim=-1)


@pytest.mark.parametrize("name", ["info_nce", "info_nce-negatives", "nt_xent", "clip_loss"])
def test_converged_pairs_have_a_far_smaller_gradient_error_than_cross_entropy(name, backend):
    loss = LOSSES[name]
    z1, z2 = _converged()
    inputs = [z1, z2] if name != "info_nce-negatives" else [z1, z2, z1.flip(1)]
    inputs = [x.float() for x in inputs]
    call = [partial(f, reduction="mean") for f in (loss.product, loss.formula, loss.dense)]
    factor = loss.factor(0.07)
    grads = [
        testing.value_and_grads(lambda *x, f=f: f(*x, factor), data)[1][0]
        for f, data in zip(call, (inputs, [x.double() for x in inputs], inputs), strict=True)
    ]
    got_error, dense_error = ((grads[i].double() - grads[1]).norm().item() for i in (0, 2))
    assert got_error * 5 <= dense_error


def test_float16_gradients_do_not_underflow_under_mean_reduction(backend):
    z1, z2 = testing.make_case("random", (128 if testing.INTERPRETED else 1024, 1, 32))[:2]
    inputs = [x.half() for x in (z1, z2)]
    _, got = testing.value_and_grads(lambda a, b: fastcl.nt_xent(a, b, 0.5), inputs)
    _, exact = testing.value_and_grads(
        lambda a, b: testing.dense_nt_xent(a, b, 0.5), [x.double() for x in inputs]
    )
    for grad, exact_grad in zip(got, exact, strict=True):
        rounded = exact_grad.half().double()
        assert (grad.double() - exact_grad).norm() <= 2 * (rounded - exact_grad).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_rounded_once(dtype, backend):
    """Equal unit rows: what the positive and the negatives pull cancels, unless each was rounded before."""
    case = testing.make_case("collapsed", (64, 65, 63))
    check(LOSSES["clip_loss-unnormalized"], case, dtype, 0.5)


def test_only_the_gradients_asked_for(backend):
    for name, loss in LOSSES.items():
        inputs = loss.inputs(testing.make_case("random", (6, 7, 5)))
        _, every = testing.value_and_grads(lambda *x, f=loss: f.product(*x, f.factor(0.1)), inputs)
        for i in range(len(inputs)):
            leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
            loss.product(*leaves, loss.factor(0.1)).backward()
            torch.testing.assert_close(leaves[i].grad, every[i], msg=f"{name}, input {i} alone")
            assert all(x.grad is None for j, x in enumerate(leaves) if j != i)


def test_one_tensor_in_two_places_gets_both_gradients(backend):
    x = testing.make_case("random", (6, 1, 5)).query
    for product, formula in (
        (fastcl.nt_xent, lambda a, b: formulas.nt_xent(a, b, temperature=0.5)),
        (fastcl.info_nce, lambda a, b: formulas.info_nce(a, b, temperature=0.1)),
        (lambda a, b: fastcl.clip_loss(a, b, 10.0), lambda a, b: formulas.clip_loss(a, b, logit_scale=10.0)),
    ):
        (_, got), (_, exact) = (
            testing.value_and_grads(lambda a, f=f: f(2 * a, 2 * a), [x]) for f in (product, formula)
        )
        torch.testing.assert_close(got, exact)


def test_worked_example():
    """Two orthogonal pairs at temperature 1: every loss is log(1 + number of others / e)."""
    z = torch.eye(2)
    in_batch, views = math.log(1 + 1 / math.e), math.log(1 + 2 / math.e)
    assert fastcl.info_nce(z, z, temperature=1.0).item() == pytest.approx(in_batch)
    assert fastcl.clip_loss(z, z, scalar_like(1.0, torch.float32)).item() == pytest.approx(in_batch)
    assert fastcl.nt_xent(z, z, 1.0).item() == pytest.approx(views)
    assert fastcl.sup_con(torch.stack([z, z], 1), temperature=1.0).item() == pytest.approx(views)
