"""similarity_logistic: sums and gradients are those of the whole matrix, and it is an op like the others."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_stats import LAYOUTS, SMALL
from torch.func import hessian, jacrev, jvp, vmap
from torch.library import opcheck

import fastcl
from fastcl import PairRule, testing
from fastcl.similarity.problem import Problem

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
NAMES = ("query", "key", "scale", "bias")
OPS = torch.ops.fastcl


def masks(case):
    """Which pairs are positive and which are excluded."""
    return [rows[:, None] == keys for rows, keys in (case.labels, case.ids)]


def tensors(case, dtype, scale=3.0, bias=-2.0, per_row=False):
    offset = torch.linspace(-1, 1, len(case.query)) + bias if per_row else torch.tensor(bias)
    return [x.to(dtype) for x in (case.query, case.key, torch.tensor(scale), offset)]


def check(case, dtype=testing.WIDEST, rule=None, normalize=False, **inputs):
    """Both sums and every gradient of one call against the dense float64 ones."""
    positive, excluded = masks(case)
    data = tensors(case, dtype, **inputs)

    def product(query, key, scale, bias):
        options = {"scale": scale, "bias": bias, "normalize": normalize}
        return fastcl.similarity_logistic(query, key, rule=rule or case.rule(), **options)

    def dense(query, key, scale, bias):
        options = {"positive": positive, "excluded": excluded, "normalize": normalize}
        return testing.dense_similarity_logistic(query, key, scale=scale, bias=bias, **options)

    got, got_grads = testing.value_and_grads(product, data)
    exact, exact_grads = testing.value_and_grads(dense, [x.double() for x in data])
    plain, plain_grads = testing.value_and_grads(dense, data)
    x, y = (1.0, 1.0) if normalize else (t.double().norm(dim=-1).max().item() for t in data[:2])
    scale, bias = (t.double().abs().max().item() for t in data[2:])
    largest = 1.0 + scale * x * y + bias
    for name, *values in zip(("negative", "positive"), got, exact, plain, strict=True):
        assert values[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        testing.assert_within_budget(*values, unit=largest * max(1, len(case.key)), name=name)
    count = 2.0 * max(case.query.shape[0], case.key.shape[0]) * largest
    shrink = [t.double().norm(dim=-1).min().item() for t in data[:2]] if normalize else (1.0, 1.0)
    units = (scale * y / shrink[0], scale * x / shrink[1], len(case.key) * x * y, len(case.key))
    for name, unit, *grads in zip(NAMES, units, got_grads, exact_grads, plain_grads, strict=True):
        testing.assert_within_budget(*grads, unit=count * unit, name=f"gradient of {name}")


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_shapes_and_kinds(kind, shape, backend):
    case = testing.make_case(kind, shape)
    for per_row in (True,) if testing.INTERPRETED else (False, True):
        check(case, per_row=per_row)
        if testing.IN_FLOAT64:
            check(case, torch.float32, scale=0.3, per_row=per_row)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_dtypes(dtype, normalize, kind, backend):
    check(testing.make_case(kind, SMALL, seed=1), dtype, normalize=normalize, scale=0.5)


@pytest.mark.parametrize("bias", [-10.0, -80.0, 200.0])
@pytest.mark.parametrize("scale", [1e-3, 10.0, -100.0])
def test_normalized_rows_at_any_scale_and_bias(scale, bias, backend):
    for kind in ("random", "peaked", "collapsed"):
        case = testing.make_case(kind, SMALL, seed=2)
        check(case, torch.float32, scale=scale, bias=bias, normalize=True)


def test_what_is_left_far_below_zero(backend):
    """Of well separated pairs each term is tiny, and as accurate as a rounded logit lets it be."""
    rows = torch.eye(5)
    rule = PairRule(positive=(torch.arange(5), torch.arange(5)))
    negative, positive = fastcl.similarity_logistic(rows, rows, scale=60.0, bias=-30.0, rule=rule)
    exact = torch.tensor(-30.0).double().exp().log1p()
    torch.testing.assert_close(negative.double(), (4 * exact).expand(5), rtol=30 * 2**-23, atol=0)
    torch.testing.assert_close(positive.double(), exact.expand(5), rtol=30 * 2**-23, atol=0)


def _ids(draw, count):
    return torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count)))


@settings(
    max_examples=5 if testing.INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), n=st.integers(1, 40), m=st.integers(1, 40), dtype=st.sampled_from(testing.DTYPES))
def test_ids_masks_and_named_keys_say_the_same(backend, data, n, m, dtype):
    sides = [(_ids(data.draw, n), _ids(data.draw, m)) for _ in range(2)]
    case = testing.make_case("random", (n, m, 5))._replace(labels=sides[0], ids=sides[1])
    positive, excluded = masks(case)
    named = torch.where(excluded, torch.arange(m), -1)
    rules = [
        case.rule(),
        PairRule(positive=positive, exclude=excluded),
        PairRule(positive=[sides[0], positive], exclude=[excluded, sides[1]]),
        PairRule(positive=sides[0], exclude_keys=named),
    ]
    for rule in rules if testing.takes_masks(backend) else rules[:1]:
        check(case, dtype, rule, scale=0.5)


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(4), n)])
def test_any_subset_of_inputs_may_need_gradients(wanted, backend):
    case = testing.make_case("random", (20, 24, 5), seed=3)
    data = tensors(case, testing.WIDEST, per_row=True)

    def call(*x):
        return fastcl.similarity_logistic(x[0], x[1], scale=x[2], bias=x[3], rule=case.rule())

    def partly(*some):
        return call(*(some[wanted.index(i)] if i in wanted else x for i, x in enumerate(data)))

    _, every = testing.value_and_grads(call, data)
    _, grads = testing.value_and_grads(partly, [data[i] for i in wanted])
    torch.testing.assert_close(grads, tuple(every[i] for i in wanted))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype, backend):
    case = testing.make_case("random", SMALL, seed=4)
    data = tensors(case, dtype, scale=0.5, per_row=True)

    def call(change, query, key, scale, bias):
        bias = bias.repeat_interleave(2)[::2]
        return fastcl.similarity_logistic(
            change(query), change(key), scale=scale, bias=bias, rule=case.rule()
        )

    got, exact = (
        testing.value_and_grads(partial(call, f), data) for f in (LAYOUTS[layout], torch.Tensor.contiguous)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (1, 1, 1)], ids=str)
def test_empty_and_tiny(shape, backend):
    case = testing.make_case("random", shape) if shape[1] else None
    n, m, d = shape
    query, key = (torch.randn(count, d, dtype=testing.WIDEST) for count in (n, m))
    rule = PairRule() if case is None else case.rule()
    positive, excluded = (None, None) if case is None else masks(case)
    query, key = (query, key) if case is None else (case.query, case.key)

    def dense(q, k, s, b):
        options = {"positive": positive, "excluded": excluded}
        return testing.dense_similarity_logistic(q, k, scale=s, bias=b, **options)

    data = [query, key, torch.tensor(2.0), torch.randn(n, dtype=testing.WIDEST)]
    got = testing.value_and_grads(
        lambda q, k, s, b: fastcl.similarity_logistic(q, k, scale=s, bias=b, rule=rule), data
    )
    torch.testing.assert_close(got, testing.value_and_grads(dense, data))


def test_a_nan_changes_its_own_row_only(backend):
    case = testing.make_case("random", (70, 80, 5))
    query = case.query.float()
    exact = fastcl.similarity_logistic(query, case.key.float(), rule=case.rule())
    query[3] = torch.nan
    got = fastcl.similarity_logistic(query, case.key.float(), rule=case.rule())
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x.isnan().nonzero().flatten(), torch.tensor([3])[: int(x[3].isnan())])
        torch.testing.assert_close(x[x == x], y[x == x])
    assert got[0][3].isnan()


# ---- as an op ----


def arguments(dtype=torch.float32, sets=False, symmetric=False):
    case = testing.make_case("random", (6, 7, 5))
    query, key = (x.to(dtype).requires_grad_() for x in (case.query, case.key))
    key = query if symmetric else key
    count = len(key)
    ids = torch.arange(6) % 3, torch.arange(count) % 3
    more = {}
    if sets:
        named = torch.randint(-1, count, (6, 2))
        more = {"exclude_keys": named, "positive_more": [torch.rand(6, count) < 0.3], "exclude_more": [*ids]}
    else:
        more = {"positive_query": ids[0], "positive_key": ids[1]}
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(query, key, scale, **more), torch.randn(6, dtype=compute, requires_grad=True)


STREAMING = [name for name in testing.backends() if name != "reference"]


@pytest.mark.parametrize("options", [{}, {"sets": True}, {"symmetric": True}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", STREAMING)
def test_the_ops(options, name):
    if options.get("sets") and not testing.takes_masks(name):
        pytest.skip("it takes no masks")
    problem, bias = arguments(**options)
    opcheck(OPS.logistic.default, (*problem, bias, name))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in problem]
    given = (*plain, bias.detach(), torch.randn(2, 6))
    opcheck(OPS.logistic_backward.default, (*given, [True] * 4, name))
    for needs in ([True, False, False, False], [False, True, False, True]):
        opcheck(OPS.logistic_backward.default, (*given, needs, name), test_utils="test_faketensor")


def loss(query, key, scale, bias, **options):
    ids = torch.arange(len(query)), torch.arange(len(key))
    sums = fastcl.similarity_logistic(
        query, key, scale=scale, bias=bias, rule=PairRule(positive=ids), normalize=True, **options
    )
    return torch.stack(sums)


def plain_loss(query, key, scale, bias):
    positive = torch.arange(len(query))[:, None] == torch.arange(len(key))
    sums = testing.dense_similarity_logistic(
        query, key, scale=scale, bias=bias, positive=positive, normalize=True
    )
    return torch.stack(sums)


def small(per_row=True, rows=6, dtype=testing.WIDEST):
    case = testing.make_case("random", (rows, rows + 1, 5), seed=7)
    return tensors(case, dtype, per_row=per_row)


@pytest.mark.parametrize("name", STREAMING)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # dynamic from the second size on
    with fastcl.use_backend(name):
        for rows in (6, 9):
            data = small(rows=rows)
            got, exact = (testing.value_and_grads(f, data) for f in (compiled, plain_loss))
            torch.testing.assert_close(got, exact)


# the refusal is in what every backend shares
@pytest.mark.parametrize("wanted", range(4))
def test_second_derivatives_of_a_compiled_call_are_refused(wanted):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    data = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(small())]
    (grad,) = torch.autograd.grad(compiled(*data).sum(), data[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), data[wanted])


@in_float64
@pytest.mark.parametrize("per_row", [False, True])
def test_derivatives(per_row, backend):
    data = [x.requires_grad_() for x in small(per_row)]
    assert torch.autograd.gradcheck(loss, data, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, data, fast_mode=True)


@in_float64
@pytest.mark.parametrize("per_row", [False, True])
def test_transforms(per_row, backend):
    data = tuple(small(per_row))
    tangents = tuple(torch.randn_like(x) for x in data)
    same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    same(jvp(loss, data, tangents), jvp(plain_loss, data, tangents))
    everything = tuple(range(4))
    same(jacrev(loss, everything)(*data), jacrev(plain_loss, everything)(*data))
    total, plain_total = (lambda *x, f=f: f(*x).sum() for f in (loss, plain_loss))
    same(hessian(total, everything)(*data), hessian(plain_total, everything)(*data))
    batch = [torch.stack([x, 1.5 * x]) for x in data]
    for batched in everything:
        dims = tuple(0 if i == batched else None for i in everything)
        given = [x if d == 0 else x[0] for x, d in zip(batch, dims, strict=True)]
        exact = [
            plain_loss(*(x[i] if d == 0 else x for x, d in zip(given, dims, strict=True))) for i in (0, 1)
        ]
        same(vmap(loss, dims)(*given), torch.stack(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype, backend):
    data = small(dtype=dtype)
    exact = testing.value_and_grads(loss, data)

    def under_autocast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(*x)

    got = testing.value_and_grads(under_autocast, data)
    assert got[0][0].dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_on_meta():
    query, key = (torch.randn(n, 5, device="meta", requires_grad=True) for n in (6, 7))
    negative, positive = fastcl.similarity_logistic(query, key, bias=-1.0)
    (negative + positive).sum().backward()
    assert negative.shape == (6,)
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


@pytest.mark.skipif(testing.INTERPRETED, reason="Triton's interpreter has one thread")
@pytest.mark.parametrize("shape", [(65, 63, 64), (700, 1500, 40)], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(shape, dtype):
    data = tensors(testing.make_case("random", shape), dtype, per_row=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(testing.value_and_grads(loss, data))
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
