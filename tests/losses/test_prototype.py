"""Losses over prototypes and their concentrations are the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from objective_checks import check, check_compiled, check_derivatives, check_finite, objective, rows

import fastcl
from fastcl import testing
from fastcl.backends import native
from fastcl.losses.families.one_positive import ASSIGNED as ASSIGNED_LAYOUT

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
_OF_SIX = torch.tensor([0, 2, 2, 1, 0, 2])
objective(
    "prototype_nce",
    lambda q, c, *t: fastcl.prototype_nce(q, c, _OF_SIX.to(q.device), *t),
    *((6, 4), (3, 4)),
    signature="query, prototypes, assigned, temperature=0.1, *, bias=None, normalize=True",
    any_count=False,
)
ASSIGNED = torch.tensor([3, 0, 0, 4, 3, 3, 1])
EXTRAS = ("nothing", "temperature", "temperatures", "bias", "temperatures and bias")
every_extra = pytest.mark.parametrize("extra", EXTRAS)


def formula(query, prototypes, assigned, temperature=0.1, bias=0.0, *, normalize=True, reduction="mean"):
    """PCL eq. 11: -log of exp(v . c_s / phi_s) over the sum of exp(v . c_j / phi_j), with biases."""
    if normalize:
        query, prototypes = F.normalize(query, dim=1), F.normalize(prototypes, dim=1)
    return F.cross_entropy(query @ prototypes.T / temperature + bias, assigned, reduction=reduction)


def calls(extra, assigned=ASSIGNED, prototypes=5, **options):
    """The function, the formula and what they take besides the rows."""
    inputs = []
    if "temperature" in extra:
        shape = (prototypes,) if "temperatures" in extra else ()
        inputs.append(0.3 + 0.1 * rows(shape)[0].cos())
    if "bias" in extra:
        inputs.append(rows((prototypes,), seed=5)[0])

    def named(rest):
        names = [name for name in ("temperature", "bias") if name in extra]
        return dict(zip(names, rest, strict=True))

    return (
        lambda q, c, *rest: fastcl.prototype_nce(q, c, assigned, **named(rest), **options),
        lambda q, c, *rest: formula(q, c, assigned, **named(rest), **options),
        inputs,
    )


@in_float64
@every_extra
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_the_formula(backend, extra, normalize, reduction):
    function, exact, given = calls(extra, normalize=normalize, reduction=reduction)
    check(function, exact, [*rows((7, 4), (5, 4)), *given])


@every_extra
@pytest.mark.parametrize("kind", ["random", "peaked", "collapsed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_within_the_budget(backend, extra, kind, dtype):
    case = testing.make_case(kind, (65, 33, 40), seed=3)
    function, exact, given = calls(extra, torch.arange(65) % 33, 33)
    check(function, exact, [case.query, case.key, *given], dtype)


@in_float64
@every_extra
def test_derivatives_of_strided_rows(extra):
    function, exact, given = calls(extra)
    inputs = [*(x.T for x in rows((4, 7), (4, 5))), *given]
    check(function, exact, inputs)
    check_derivatives(function, exact, inputs)


@every_extra
def test_compiles(extra):
    function, _, given = calls(extra)
    check_compiled(function, [*rows((7, 4), (5, 4)), *given])


def test_one_prototype_and_no_rows(backend):
    nobody = torch.zeros(3, dtype=torch.int64)
    value = check_finite(lambda *x: fastcl.prototype_nce(*x, nobody), rows((3, 4), (1, 4)))
    assert value == 0
    empty = torch.zeros(0, dtype=torch.int64)
    assert fastcl.prototype_nce(torch.ones(0, 4), torch.ones(2, 4), empty, reduction="none").shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"assigned": torch.tensor([0, 1, 5])}, ValueError, "assigned must be from 0 to 4 .* from 0 to 5"),
        ({"assigned": torch.tensor([0, -1, 4])}, ValueError, "assigned must be from 0 to 4 .* from -1 to 4"),
        ({"assigned": torch.tensor([0, 1])}, ValueError, "assigned must have one id per row"),
        ({"assigned": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "assigned must be an integer tensor"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be .*\(5,\).*got shape \(3,\)"),
        ({"temperature": 0.0}, ValueError, "temperature must not be zero"),
        ({"temperature": 1e-40}, ValueError, "temperature must be at least 5.9e-39 in size"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have one value per key"),
        ({"prototypes": torch.ones(5, 3)}, ValueError, "prototypes and query"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_refuses(options, error, message):
    arguments = {"query": torch.ones(3, 4), "prototypes": torch.ones(5, 4), "assigned": torch.arange(3)}
    with pytest.raises(error, match=message):
        fastcl.prototype_nce(**{**arguments, **options})


def test_a_tiny_prototype_without_weight_has_no_gradient_at_any_temperature(backend):
    query = torch.tensor([[1.0, 0.0]])
    prototypes = torch.tensor([[1.0, 0.0], [-1e-13, 0.0]], requires_grad=True)
    fastcl.prototype_nce(query, prototypes, torch.zeros(1, dtype=torch.int64), temperature=1e-28).backward()
    assert torch.equal(prototypes.grad, torch.zeros(2, 2))


def concentration_formula(features, assigned, prototypes, temperature, smoothing):
    """PCL eq. 12 and what its section 3.3 does to it."""
    features, prototypes = F.normalize(features, dim=1), F.normalize(prototypes, dim=1)
    phi = []
    for k, prototype in enumerate(prototypes):
        distances = (features[assigned == k] - prototype).norm(dim=1)
        n = len(distances)
        phi.append(distances.sum() / (n * math.log(n + smoothing)) if n > 1 else None)
    largest = max(x for x in phi if x is not None)
    phi = torch.stack([largest if x is None else x for x in phi])
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    return temperature * phi / phi.mean()


@pytest.mark.parametrize("dtype", [*testing.DTYPES])
def test_concentration_is_the_formula(dtype):
    features, prototypes = (x.to(dtype) for x in rows((60, 6), (9, 6)))
    assigned = torch.arange(60) ** 2 % 9  # 3, 6 ... name nobody
    assigned[0] = 8
    got = fastcl.concentration(features, assigned, prototypes, temperature=0.15, smoothing=7.0)
    exact = concentration_formula(features.double(), assigned, prototypes.double(), 0.15, 7.0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        got.double(), exact, **({} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 0})
    )
    torch.testing.assert_close(got.mean().item(), 0.15, rtol=1e-6, atol=0)


def test_concentration_without_distances():
    prototypes = torch.eye(3)
    assigned = torch.tensor([0, 0, 1, 1])
    got = fastcl.concentration(prototypes[assigned], assigned, prototypes)
    torch.testing.assert_close(got, torch.full((3,), 0.2))
    nobody = torch.zeros(0, dtype=torch.int64)
    torch.testing.assert_close(
        fastcl.concentration(torch.ones(0, 3), nobody, prototypes), torch.full((3,), 0.2)
    )


def test_concentration_carries_no_gradient_and_serves_as_temperature():
    features, prototypes = (x.float().requires_grad_() for x in rows((7, 4), (5, 4)))
    temperature = fastcl.concentration(features, ASSIGNED, prototypes)
    assert not temperature.requires_grad
    loss = fastcl.prototype_nce(features, prototypes, ASSIGNED, temperature)
    torch.testing.assert_close(loss, formula(features, prototypes, ASSIGNED, temperature))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assigned": torch.tensor([0, 1, 5])}, "assigned must be from 0 to 4"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"smoothing": -1.0}, "smoothing must be at least 0, got -1.0"),
        ({"prototypes": torch.ones(5, 3)}, "prototypes and features"),
    ],
)
def test_concentration_refuses(options, message):
    arguments = {"features": torch.ones(3, 4), "prototypes": torch.ones(5, 4), "assigned": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        fastcl.concentration(**{**arguments, **options})


@pytest.mark.skipif(native.missing_reason() is not None, reason="needs the native extension")
def test_a_kernel_reads_no_row_that_is_not_there():
    query, prototypes = rows((3, 4), (2, 4))
    scale = torch.ones((), dtype=torch.float64)
    flags = [ASSIGNED_LAYOUT, True, True, False, True, 0, 0]  # normalized, not decoupled, the mean
    for assigned in (torch.tensor([0, 1, 2]), torch.tensor([0, -1, 1])):
        with pytest.raises(IndexError, match="assigned"):
            torch.ops.fastcl.one_positive(query, None, prototypes, scale, assigned, None, *flags)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_same_bits_for_any_number_of_threads(extra, reduction, threads):
    query, prototypes = torch.randn(1500, 200), torch.randn(5, 200)
    assigned = torch.arange(1500) % 5
    options = {"reduction": reduction}
    if "temperature" in extra:
        options["temperature"] = torch.full((5,) if "temperatures" in extra else (), 0.2)
    if "bias" in extra:
        options["bias"] = torch.linspace(0, 1, 5)

    def gradient(count):
        threads(count)
        leaf = prototypes.clone().requires_grad_()
        fastcl.prototype_nce(query, leaf, assigned, **options).sum().backward()
        return leaf.grad

    one = gradient(1)
    for count in (2, 16):
        torch.testing.assert_close(gradient(count), one, rtol=0, atol=0)


@pytest.mark.skipif(native.missing_reason() is not None, reason="needs the native extension")
def test_many_queries_of_few_prototypes():
    """On 'cpu' their sum is formed in blocks: rows that all but cancel leave what is right of them."""
    query, prototypes = torch.randn(1, 64).repeat(8192, 1), torch.randn(4, 64)
    assigned = torch.arange(8192) * 3 % 7 % 4

    def gradient(function, dtype):
        leaf = prototypes.to(dtype).clone().requires_grad_()
        function(query.to(dtype), leaf, assigned).backward()
        return leaf.grad

    exact = gradient(formula, torch.float64)
    plain = gradient(formula, torch.float32)
    with fastcl.use_backend("cpu"):
        got = gradient(fastcl.prototype_nce, torch.float32)
    assert (got - exact).norm() <= 2 * (plain - exact).norm()
