"""The total of both sums of softplus, with its gradients in one walk where a backend has that."""

import pytest
import torch
from test_logistic import NAMES, OPS, STREAMING, arguments, in_float64, masks, tensors
from test_stats import SMALL
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl import testing
from fastcl.similarity.logistic import logistic_loss


def total(case, reduction="mean", normalize=False):
    def call(query, key, scale, bias):
        options = {"normalize": normalize, "reduction": reduction}
        return logistic_loss(query, key, scale, bias, case.rule(), **options)

    return call


def dense(case, reduction="mean", normalize=False):
    positive, excluded = masks(case)

    def call(query, key, scale, bias):
        options = {"positive": positive, "excluded": excluded, "normalize": normalize}
        sums = testing.dense_similarity_logistic(query, key, scale=scale, bias=bias, **options)
        return getattr(torch.stack(sums).sum(0), reduction)()

    return call


@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 63, 64), (300, 450, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_row", [False, True])
@in_float64
def test_it_is_the_sum_of_both(per_row, reduction, shape, backend):
    for kind in testing.KINDS:
        case = testing.make_case(kind, shape)
        data = tensors(case, torch.float64, per_row=per_row)
        got, exact = (testing.value_and_grads(f(case, reduction), data) for f in (total, dense))
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes(normalize, dtype, backend):
    case = testing.make_case("random", SMALL, seed=1)
    data = tensors(case, dtype, scale=0.5)
    (got,), got_grads = testing.value_and_grads(total(case, normalize=normalize), data)
    exact_of, wide = dense(case, normalize=normalize), [x.double() for x in data]
    (exact,), exact_grads = testing.value_and_grads(exact_of, wide)
    (plain,), plain_grads = testing.value_and_grads(exact_of, data)
    longest = 1.0 if normalize else max(x.norm(dim=-1).max().item() for x in wide[:2])
    shortest = min(x.norm(dim=-1).min().item() for x in wide[:2]) if normalize else 1.0
    largest = 1.0 + 0.5 * longest**2 + 2
    testing.assert_within_budget(got, exact, plain, unit=largest * len(case.key), name="total")
    units = (longest / shortest,) * 2 + (len(case.key) * longest**2, len(case.key))
    for name, unit, *grads in zip(NAMES, units, got_grads, exact_grads, plain_grads, strict=True):
        testing.assert_within_budget(*grads, unit=2 * largest * unit, name=f"gradient of {name}")


@in_float64
def test_second_derivatives(backend):
    case = testing.make_case("random", (6, 7, 5))
    data = [x.requires_grad_() for x in tensors(case, torch.float64, per_row=True)]
    assert torch.autograd.gradgradcheck(total(case), data, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_of_no_rows(reduction, backend):
    x = torch.zeros(0, 4, requires_grad=True)
    loss = fastcl.siglip_loss(x, x, 2.0, 0.0, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    loss.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("options", [{}, {"sets": True}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", [name for name in STREAMING if name == "cpu"])
def test_the_op(name, options):
    problem, bias = arguments(**options)
    opcheck(OPS.logistic_total.default, (*problem, bias, True, name, 0b1111))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in problem]
    for needs in (0, 0b0001, 0b1010):
        opcheck(OPS.logistic_total.default, (*plain, bias.detach(), False, name, needs))


def test_the_same_bits_for_any_number_of_threads():
    case = testing.make_case("random", (700, 1500, 40))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(testing.value_and_grads(total(case), tensors(case, torch.float32)))
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_to_be_differentiated_again_is_the_same_under_autocast(reduction, backend):
    if backend == "reference":
        pytest.skip("plain torch: what torch does")
    case = testing.make_case("random", (9, 9, 6))

    def gradient():
        x, y = (t.float().requires_grad_() for t in (case.query, case.key))
        loss = fastcl.siglip_loss(x, y, 5.0, -2.0, reduction=reduction).sum()
        return torch.autograd.grad(loss, (x, y), create_graph=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradient()
    torch.testing.assert_close(got, gradient())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_may_be_computed_again_in_the_backward_pass(reduction, backend):
    x, y = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)

    def loss(z):
        return fastcl.siglip_loss(z, y, 5.0, -2.0, reduction=reduction).sum()

    (exact,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    torch.testing.assert_close(got, exact)
