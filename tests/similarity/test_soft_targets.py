"""soft_cross_entropy: losses and gradients are those of whole matrices, and it is an op like the others."""

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
from fastcl.backends.registry import BACKENDS
from fastcl.similarity.problem import SoftTargets

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
SHAPES = (*testing.SHAPES[:5], (70, 140, 40)) if testing.INTERPRETED else testing.SHAPES
NAMES = ("query", "key", "temperature")
OPS = torch.ops.fastcl
STREAMING = [name for name in testing.backends() if name != "reference"]


def make(kind, shape, dtype=testing.WIDEST, views=0, teachers=0, width=None, seed=0, temperature=0.1):
    """query, key and temperature, then targets: target_query, target_key and target_bias."""
    case = testing.make_case(kind, shape, seed)
    generator, width = testing.generator(seed + 1), width or shape[2]

    def like(x, count):
        noise = torch.randn(max(count, 1), *x.shape, generator=generator, dtype=x.dtype)
        stacked = x + 0.5 * noise if kind == "random" else x.expand_as(noise)
        return stacked if count else stacked[0]

    target_key = torch.randn(shape[1], width, generator=generator, dtype=torch.float64)
    target_query = target_key[torch.arange(shape[0]) % max(shape[1], 1)] if kind == "peaked" else None
    if target_query is None:
        target_query = torch.randn(shape[0], width, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    inputs = [like(case.query, views), case.key, torch.tensor(temperature)]
    return (
        case,
        [x.to(dtype) for x in inputs],
        [x.to(dtype) for x in (like(target_query, teachers), target_key, bias)],
    )


def check(kind, shape, dtype=testing.WIDEST, rule=None, excluded=None, reduction="none", **options):
    """Losses and every gradient of one call against the dense float64 ones."""
    normalize = options.pop("normalize", True)
    case, inputs, targets = make(kind, shape, dtype, **options)
    if kind == "all-excluded" or rule is None:
        excluded = case.ids[0][:, None] == case.ids[1]
        rule = PairRule(exclude=case.ids)

    def run(function, targets, query, key, temperature, **more):
        return function(
            query,
            key,
            *targets[:2],
            target_bias=targets[2],
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            **more,
        )

    wide = [x.double() for x in targets]
    dense = partial(run, testing.dense_soft_cross_entropy, excluded=excluded)
    (got,), got_grads = testing.value_and_grads(
        partial(run, fastcl.soft_cross_entropy, targets, rule=rule), inputs
    )
    (exact,), exact_grads = testing.value_and_grads(partial(dense, wide), [x.double() for x in inputs])
    (plain,), plain_grads = testing.value_and_grads(partial(dense, targets), inputs)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norms = [t.double().norm(dim=-1) for t in inputs[:2]]
    x, y = (1.0, 1.0) if normalize else (n.max().item() for n in norms)
    temperature = abs(inputs[2].item())
    largest = 1.0 + x * y / temperature
    testing.assert_within_budget(got, exact, plain, unit=largest, name="loss")
    low = [n.min().item() for n in norms] if normalize else (1.0, 1.0)
    rows = inputs[0].numel() // inputs[0].shape[-1]
    units = (y / temperature / low[0], rows * x / temperature / low[1], rows * largest / temperature)
    for name, unit, *grads in zip(NAMES, units, got_grads, exact_grads, plain_grads, strict=True):
        testing.assert_within_budget(*grads, unit=2 * largest * unit, name=f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_shapes_and_kinds(kind, shape, backend):
    if testing.IN_FLOAT64:
        check(kind, shape)
        check(kind, shape, torch.float32)
    check(kind, shape, torch.float32, views=3, teachers=2, width=7)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_dtypes(dtype, normalize, kind, backend):
    temperature = 0.1 if normalize else 8.0
    if not testing.INTERPRETED:
        check(kind, SMALL, dtype, normalize=normalize, views=2, teachers=2, temperature=temperature)
    check(kind, SMALL, dtype, normalize=normalize, temperature=temperature, reduction="mean")


@pytest.mark.parametrize("temperature", [1e-3, 0.04, 100.0, -0.2])
def test_temperatures(temperature, backend):
    for kind in ("random", "peaked", "collapsed"):
        check(kind, SMALL, torch.float32, temperature=temperature)


def test_many_keys_for_few_rows_and_the_reverse(backend):
    shapes = (
        ((3, 250, 20), (250, 3, 20))
        if testing.INTERPRETED
        else ((3, 2500, 20), (2500, 3, 20), (700, 900, 32))
    )
    for shape in shapes:
        check("random", shape, torch.float32, views=2, teachers=2)


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
    ids = _ids(data.draw, n), _ids(data.draw, m)
    excluded = ids[0][:, None] == ids[1]
    rules = [
        PairRule(exclude=ids),
        PairRule(exclude=excluded),
        PairRule(exclude=[ids, excluded]),
        PairRule(exclude_keys=torch.where(excluded, torch.arange(m), -1)),
    ]
    for rule in rules if testing.takes_masks(backend) else rules[:1]:
        check("random", (n, m, 5), dtype, rule, excluded, teachers=2)
    if not testing.takes_masks(backend):
        return
    within = PairRule(within=ids)
    check("random", (n, m, 5), dtype, within, ~excluded, views=2)


@pytest.mark.parametrize("views", [0, 2])
def test_gradients_of_converged_rows(views, backend):
    """The difference of two softmaxes is formed before it is rounded: what little is left of it is right."""
    case = testing.make_case("random", (200, 300, 32), seed=3)
    key = case.key.float()
    query = key[torch.arange(200)] + 0.01 * case.query.float()
    query = torch.stack([query] * views) if views else query

    def run(function, dtype, query, key):
        options = {"temperature": 0.07, "target_temperature": 0.07}
        targets = (query if query.dim() == 2 else query[0]).detach() + 1e-4, key.detach()
        return function(query, key, *(x.to(dtype) for x in targets), **options)

    ours = testing.value_and_grads(partial(run, fastcl.soft_cross_entropy, torch.float32), [query, key])
    dense = partial(run, testing.dense_soft_cross_entropy)
    exact = testing.value_and_grads(partial(dense, torch.float64), [query.double(), key.double()])
    plain = testing.value_and_grads(partial(dense, torch.float32), [query, key])
    for got, truth, theirs in zip(ours[1], exact[1], plain[1], strict=True):
        assert (got - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype, backend):
    _, inputs, targets = make("random", SMALL, dtype)

    def call(change, query, key, temperature):
        target_query, target_key, bias = targets
        return fastcl.soft_cross_entropy(
            change(query),
            change(key),
            change(target_query),
            change(target_key),
            target_bias=bias.repeat_interleave(2)[::2],
            temperature=temperature,
        )

    got, exact = (
        testing.value_and_grads(partial(call, f), inputs) for f in (LAYOUTS[layout], torch.Tensor.contiguous)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (1, 1, 1), (4, 1, 3)], ids=str)
def test_empty_and_tiny(shape, backend):
    n, k, d = shape
    query, target = (torch.randn(2, n, d, dtype=testing.WIDEST) for _ in range(2))
    key, target_key = (torch.randn(k, d, dtype=testing.WIDEST) for _ in range(2))
    tiny = 1e-12 if testing.IN_FLOAT64 else 1e-6

    def call(q, y):
        return fastcl.soft_cross_entropy(q, y, target, target_key, reduction="none")

    (losses,), grads = testing.value_and_grads(call, [query, key])
    assert losses.shape == (2, n)
    assert losses.abs().max().item() < tiny if n else True  # of one key, or none, nothing can be wrong
    if k < 2:
        assert all(g.abs().max().item() < tiny for g in grads if g.numel())
    assert all(g.isfinite().all() for g in grads)


def test_a_nan_changes_its_own_row_only(backend):
    _, (query, key, temperature), targets = make("random", (70, 80, 5), torch.float32)
    call = partial(fastcl.soft_cross_entropy, temperature=temperature, reduction="none")
    exact = call(query, key, *targets[:2])
    query[3], targets[0][5] = torch.nan, torch.nan
    got = call(query, key, *targets[:2])
    assert got.isnan().nonzero().flatten().tolist() == [3, 5]
    torch.testing.assert_close(got[~got.isnan()], exact[~got.isnan()])


def test_frozen_sides(backend):
    _, inputs, targets = make("random", SMALL)
    call = lambda x: fastcl.soft_cross_entropy(*x, *targets[:2])  # noqa: E731
    _, every = testing.value_and_grads(lambda *x: call(x), inputs[:2])
    for wanted in range(2):
        _, (grad,) = testing.value_and_grads(
            lambda x, w=wanted: call([x if i == w else y for i, y in enumerate(inputs[:2])]), [inputs[wanted]]
        )
        torch.testing.assert_close(grad, every[wanted])


# ---- as an op ----


def arguments(dtype=torch.float32, sets=False):
    _, (query, key, _), (target_query, target_key, bias) = make(
        "random", (6, 7, 5), dtype, views=2, teachers=2
    )
    more = {}
    if sets:
        ids = torch.arange(6) % 3, torch.arange(7) % 3
        named = torch.randint(-1, 7, (6, 2))
        more = {"exclude": [torch.rand(6, 7) < 0.2, *ids], "exclude_keys": named, "target_bias": bias}
    scale, target_scale = (torch.tensor(x, dtype=torch.float64) for x in (10.0, 20.0))
    live = [x.requires_grad_() for x in (query, key, scale)]
    return SoftTargets(*live, target_query, target_key, target_scale, **more)


@pytest.mark.parametrize("options", [{}, {"sets": True}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", STREAMING)
def test_the_ops(options, name):
    if options.get("sets") and not testing.takes_masks(name):
        pytest.skip("it takes no masks")
    given = arguments(**options)
    kept = BACKENDS[name].logits_to_keep(given)
    for count in (0, kept):
        opcheck(OPS.soft_cross_entropy.default, (*given, count, name))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    losses, *saved = OPS.soft_cross_entropy(*plain, kept, name)
    backward, incoming = OPS.soft_cross_entropy_backward.default, torch.randn_like(losses)
    opcheck(backward, (*plain, incoming, *saved, [True] * 3, name))
    for needs in ([True, False, False], [False, True, False]):
        opcheck(backward, (*plain, incoming, *saved, needs, name), test_utils="test_faketensor")


def small(rows=6):
    _, inputs, targets = make("random", (rows, 7, 5), views=2, teachers=2, seed=7, temperature=0.5)
    return inputs, targets


def loss(targets, query, key, temperature, function=fastcl.soft_cross_entropy):
    return function(
        query, key, *targets[:2], target_bias=targets[2], temperature=temperature, reduction="none"
    )


dense_loss = partial(loss, function=testing.dense_soft_cross_entropy)


@pytest.mark.parametrize("name", STREAMING)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # dynamic from the second size on
    with fastcl.use_backend(name):
        for rows in (6, 9):
            inputs, targets = small(rows)
            got, exact = (
                testing.value_and_grads(partial(f, targets), inputs) for f in (compiled, dense_loss)
            )
            torch.testing.assert_close(got, exact)


# the refusal is in what every backend shares
@pytest.mark.parametrize(("wanted", "views"), [(0, True), (1, False), (2, True)])
def test_second_derivatives_of_a_compiled_call_are_refused(wanted, views):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs, targets = small()
    inputs[0] = inputs[0] if views else inputs[0][0]
    data = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    (grad,) = torch.autograd.grad(compiled(targets, *data).sum(), data[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), data[wanted])


@in_float64
def test_derivatives(backend):
    inputs, targets = small()
    data = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(partial(loss, targets), data, fast_mode=True)
    assert torch.autograd.gradgradcheck(partial(loss, targets), data, fast_mode=True)


@in_float64
def test_transforms(backend):
    inputs, targets = small()
    data, everything = tuple(inputs), (0, 1, 2)
    ours, dense = partial(loss, targets), partial(dense_loss, targets)
    tangents = tuple(torch.randn_like(x) for x in data)
    same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
    same(jvp(ours, data, tangents), jvp(dense, data, tangents))
    same(jacrev(ours, everything)(*data), jacrev(dense, everything)(*data))
    total, dense_total = (lambda *x, f=f: f(*x).sum() for f in (ours, dense))
    same(hessian(total, everything)(*data), hessian(dense_total, everything)(*data))
    batch = [torch.stack([x, 1.5 * x]) for x in data]
    for batched in everything:
        dims = tuple(0 if i == batched else None for i in everything)
        given = [x if d == 0 else x[0] for x, d in zip(batch, dims, strict=True)]
        exact = [dense(*(x[i] if d == 0 else x for x, d in zip(given, dims, strict=True))) for i in (0, 1)]
        same(vmap(ours, dims)(*given), torch.stack(exact))


def test_targets_are_constants_under_transforms(backend):
    (query, key, temperature), targets = small()
    call = lambda t: loss([t, *targets[1:]], query, key, temperature)  # noqa: E731
    _, tangent = jvp(call, (targets[0],), (torch.randn_like(targets[0]),))
    assert not tangent.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype, backend):
    inputs, targets = ([x.to(dtype) for x in group] for group in small())
    exact = testing.value_and_grads(partial(loss, targets), inputs)

    def under_autocast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(targets, *x)

    got = testing.value_and_grads(under_autocast, inputs)
    assert got[0][0].dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_on_meta():
    query, key = (torch.randn(n, 5, device="meta", requires_grad=True) for n in (6, 7))
    fastcl.soft_cross_entropy(query, key, query.detach(), key.detach()).backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)
    assert fastcl.sinkhorn(query, key).shape == (7,)


@pytest.mark.skipif(testing.INTERPRETED, reason="Triton's interpreter has one thread")
@pytest.mark.parametrize("shape", [(65, 63, 64), (300, 2500, 48)], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(shape, dtype):
    _, inputs, targets = make("random", shape, dtype, views=2, teachers=2)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(testing.value_and_grads(partial(loss, targets), inputs))
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


# ---- targets under which keys are used equally ----
