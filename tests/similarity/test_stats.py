"""similarity_stats: every field and every gradient is that of the whole matrix."""

import itertools
from dataclasses import fields

import pytest
import torch
from grids import HERE, every_backend, pairwise

import fastcl
from fastcl import PairRule, testing
from fastcl.backends import chunked

FIELDS = tuple(field.name for field in fields(fastcl.SimilarityStats) if field.name != "columns")
EMPTY = dict.fromkeys(("lse_neg", "lse_pos", "max_neg"), -torch.inf) | {"pos_sum": 0.0, "pos_count": 0.0}
EXTRAS = ("scale", "key_bias", "key_scale")
SMALL = (33, 40, 24)


def flat(stats):
    """The fields, then the columns' fields."""
    sides = [stats] if stats.columns is None else [stats, stats.columns]
    return tuple(getattr(side, name) for side in sides for name in FIELDS)


def tensors(case, dtype, names=EXTRAS, scale=3.0):
    """query, key and the named extras."""
    m = len(case.key)
    extras = {
        "scale": torch.tensor(scale),
        "key_bias": torch.linspace(-1, 1, m),
        "key_scale": torch.linspace(0.5, 1.5, m),
    }
    return [x.to(dtype) for x in (case.query, case.key, *(extras[name] for name in names))]


def check(case, dtype=testing.WIDEST, names=EXTRAS, scale=3.0, each=HERE, **options):
    """All fields and gradients of one call, in each context, against the dense float64 ones."""
    inputs = tensors(case, dtype, names, scale)
    options = {"rule": case.rule(), "columns": True, **options}

    def call(function, query, key, *rest):
        return flat(function(query, key, **dict(zip(names, rest, strict=True)), **options))

    def run(function, data):
        return testing.value_and_grads(lambda *x: call(function, *x), data)

    (exact, exact_grads), (dense, dense_grads) = (
        run(testing.dense_stats, data) for data in ([x.double() for x in inputs], inputs)
    )
    x, y = (t.double().norm(dim=-1).max().item() for t in inputs[:2])
    x, y = (1.0, 1.0) if options.get("normalize") else (x, y)
    largest = 1.0 + 1.5 * abs(scale) * x * y
    # pos_sum and both statistics of both sides reach every pair
    pull = 4.0 * max(inputs[0].shape[0], inputs[1].shape[0]) * max(1.0, largest)
    units = {"query": abs(scale) * y, "key": abs(scale) * x, "scale": len(case.key) * x * y}
    for where, context in each.items():
        with context():
            got, got_grads = run(fastcl.similarity_stats, inputs)
        for i, values in enumerate(zip(got, exact, dense, strict=True)):
            name = FIELDS[i % len(FIELDS)]
            unit = largest * (len(case.key) if name == "pos_sum" else 1)
            name = f"{where} {name}" + " column" * (i >= len(FIELDS))
            testing.assert_within_budget(*values, unit=unit, name=name)
        for name, *grads in zip(("query", "key", *names), got_grads, exact_grads, dense_grads, strict=True):
            unit = pull * units.get(name, largest)
            testing.assert_within_budget(*grads, unit=unit, name=f"{where} gradient of {name}")


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_shapes_and_kinds(shape):
    for kind in testing.KINDS:
        case = testing.make_case(kind, shape)
        check(case, each=every_backend())
        check(case, torch.float32, scale=0.3, each=every_backend())


def test_the_chunks_of_a_call_add_up(monkeypatch):
    """Of rows, of columns and of every gradient; the last chunk is smaller."""
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 10 * SMALL[1])
    with fastcl.use_backend("chunked"):
        for kind in ("random", "duplicate-ids"):
            for columns in (False, True):
                check(testing.make_case(kind, SMALL, seed=6), columns=columns)
        query = testing.make_case("random", SMALL, seed=6).query
        got, exact = (
            testing.value_and_grads(lambda x, f=f: flat(f(x, x)), [query])
            for f in (fastcl.similarity_stats, testing.dense_stats)
        )
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype):
    for row in pairwise(kind=testing.KINDS, normalize=(False, True), columns=(False, True)):
        case = testing.make_case(row.pop("kind"), SMALL, seed=1)
        check(case, dtype, scale=0.5, each=every_backend(), **row)


def test_optional_arguments():
    for names in (s for n in range(4) for s in itertools.combinations(EXTRAS, n)):
        options = {"names": names, "scale": 3.0 if "scale" in names else 1.0, "each": every_backend()}
        for columns in (False, True):
            check(testing.make_case("random", SMALL, seed=2), columns=columns, **options)


@pytest.mark.parametrize("sides", ["none", "positive", "exclude", "both"])
def test_rules(sides):
    dtypes = {testing.WIDEST, torch.float32}
    for row in pairwise(kind=("random", "duplicate-ids"), columns=(False, True), dtype=dtypes):
        case = testing.make_case(row.pop("kind"), SMALL, seed=3)
        rule = PairRule(
            positive=case.labels if sides in ("positive", "both") else None,
            exclude=case.ids if sides in ("exclude", "both") else None,
        )
        check(case, rule=rule, each=every_backend(), **row)


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e-3])
def test_normalized_rows_at_extreme_scales(scale):
    for kind in ("random", "peaked", "collapsed", "duplicate-ids"):
        case = testing.make_case(kind, SMALL, seed=4)
        check(case, torch.float32, ("scale",), scale, normalize=True, each=every_backend())


@pytest.mark.parametrize("kind", ["random", "peaked", "duplicate-ids"])
def test_unnormalized_logits_to_1e4(kind):
    case = testing.make_case(kind, SMALL, seed=5)
    largest = (case.query @ case.key.T).abs().max()
    for dtype in (torch.float32, testing.WIDEST):
        check(case, dtype, ("scale",), scale=1e4 / largest.item(), each=every_backend())


def test_a_row_of_logits_far_below_zero(backend):
    case = testing.make_case("random", SMALL)
    bias = torch.full((SMALL[1],), -1e4)
    got = fastcl.similarity_stats(case.query.float(), case.key.float(), key_bias=bias)
    exact = testing.dense_stats(case.query, case.key, key_bias=bias.double())
    torch.testing.assert_close(got.lse_neg.double(), exact.lse_neg, rtol=1e-6, atol=0)


HIGH = 1 << 32


@pytest.mark.parametrize(
    "ids",
    [
        [5, 5 + HIGH, 5 - HIGH, 5 + 2 * HIGH],
        [-1, 0xFFFFFFFF, 0x7FFFFFFF, -0x80000000],
        [-(1 << 63), (1 << 63) - 1, 0, HIGH],
    ],
)
def test_ids_are_compared_in_full(ids, backend):
    case = testing.make_case("random", (20, 24, 5))
    values = torch.tensor(ids)
    sides = values[torch.arange(20) % 4], values[torch.arange(24) % 4]
    check(case, rule=PairRule(positive=sides))
    check(case, rule=PairRule(exclude=sides))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_ids_equal_wide_ones(dtype, backend):
    case = testing.make_case("random", (20, 24, 5))
    query_ids, key_ids = torch.arange(20) % 5, torch.arange(24) % 7
    check(
        case,
        rule=PairRule(positive=(query_ids.to(dtype), key_ids), exclude=(query_ids, key_ids.to(dtype) + 1)),
    )


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("columns", [False, True])
def test_symmetric_call_equals_the_general_one(kind, columns, backend):
    case = testing.make_case(kind, (65, 65, 24), seed=6)
    labels, ids = case.labels[0], case.ids[0]
    same = PairRule(positive=(labels, labels), exclude=(ids, ids))
    for dtype in testing.DTYPES:
        x = case.query.to(dtype)
        scale = torch.tensor(0.5, dtype=dtype)
        options = {"rule": same, "columns": columns, "normalize": True}

        def symmetric(x, scale, options=options):
            return flat(fastcl.similarity_stats(x, x, scale=scale, **options))

        def dense(x, scale, options=options):
            return flat(testing.dense_stats(x, x, scale=scale, **options))

        got, got_grads = testing.value_and_grads(symmetric, [x, scale])
        exact, exact_grads = testing.value_and_grads(dense, [x.double(), scale.double()])
        base, base_grads = testing.value_and_grads(dense, [x, scale])
        for values in zip(got, exact, base, strict=True):
            testing.assert_within_budget(*values, unit=len(x))
        for grads in zip(got_grads, exact_grads, base_grads, strict=True):
            testing.assert_within_budget(*grads, unit=8.0 * len(x))


@pytest.mark.parametrize("cuts", [(), (7,), (0, 7, 7, 40), (20, 39)])
def test_merge_over_disjoint_key_chunks(cuts, backend):
    case = testing.make_case("random", SMALL, seed=7)
    edges = [0, *cuts, SMALL[1]]
    (labels, key_labels), (ids, key_ids) = case.labels, case.ids

    def merged(query, key):
        parts = [
            fastcl.similarity_stats(
                query,
                key[a:b],
                rule=PairRule(positive=(labels, key_labels[a:b]), exclude=(ids, key_ids[a:b])),
            )
            for a, b in itertools.pairwise(edges)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        return flat(total)

    def whole(query, key):
        return flat(fastcl.similarity_stats(query, key, rule=case.rule()))

    got, got_grads = testing.value_and_grads(merged, [case.query, case.key])
    exact, exact_grads = testing.value_and_grads(whole, [case.query, case.key])
    tolerance = {} if testing.IN_FLOAT64 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(got, exact, **tolerance)
    torch.testing.assert_close(got_grads, exact_grads, **tolerance)


ROLES = ("query", "key", "scale", "key_bias", "key_scale")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_any_subset_of_inputs_may_need_gradients(labelled, columns, backend):
    case = testing.make_case("random", (20, 24, 5), seed=8)
    rule = case.rule() if labelled else PairRule(exclude=case.ids)
    inputs = tensors(case, testing.WIDEST)

    def call(query, key, scale, key_bias, key_scale):
        extras = {"scale": scale, "key_bias": key_bias, "key_scale": key_scale}
        return flat(fastcl.similarity_stats(query, key, rule=rule, columns=columns, normalize=True, **extras))

    _, every = testing.value_and_grads(call, inputs)
    for chosen in itertools.product((False, True), repeat=5):
        if not any(chosen):
            continue
        wanted = [i for i in range(5) if chosen[i]]

        def partly(*some, wanted=wanted):
            return call(*(some[wanted.index(i)] if i in wanted else x for i, x in enumerate(inputs)))

        _, grads = testing.value_and_grads(partly, [inputs[i] for i in wanted])
        for i, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, every[i], msg=f"{ROLES[i]} with {[ROLES[j] for j in wanted]}")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_frozen_keys(dtype, kind, backend):
    case = testing.make_case(kind, SMALL, seed=9)
    rule = PairRule(exclude=case.ids)
    key = case.key.to(dtype)

    def lse(function, key):
        return lambda query: function(query, key, scale=10.0, rule=rule, normalize=True).lse_neg

    query = case.query.to(dtype)
    got = testing.value_and_grads(lse(fastcl.similarity_stats, key), [query])
    exact = testing.value_and_grads(lse(testing.dense_stats, key.double()), [query.double()])
    dense = testing.value_and_grads(lse(testing.dense_stats, key), [query])
    for (value,), (wanted,), (base,) in zip(got, exact, dense, strict=True):
        testing.assert_within_budget(
            value, wanted, base, unit=100.0 / query.double().norm(dim=1).min().item()
        )


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second component": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "reversed storage": lambda x: x.flip(0).contiguous().flip(0),
    "slice of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype, backend):
    case = testing.make_case("random", SMALL, seed=10)
    change = LAYOUTS[layout]
    plain = [case.query.to(dtype), case.key.to(dtype)]
    rule = PairRule(
        positive=tuple(x.repeat_interleave(3)[::3] for x in case.labels),
        exclude=tuple(x.repeat_interleave(2)[::2] for x in case.ids),
    )
    got, exact = (
        testing.value_and_grads(
            lambda q, k, f=f: flat(fastcl.similarity_stats(f(q), f(k), rule=rule, columns=True)), plain
        )
        for f in (change, torch.Tensor.contiguous)
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(got[1], exact[1])


def test_expanded_rows(backend):
    row, key = torch.randn(1, 24, dtype=testing.WIDEST), torch.randn(40, 24, dtype=testing.WIDEST)
    got, exact = (
        testing.value_and_grads(lambda q, k, f=f: flat(f(q.expand(33, -1), k, normalize=True)), [row, key])
        for f in (fastcl.similarity_stats, testing.dense_stats)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (5, 7, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_empty_and_tiny(shape, columns, backend):
    n, m, d = shape
    query, key = torch.randn(n, d, dtype=testing.WIDEST), torch.randn(m, d, dtype=testing.WIDEST)
    rule = PairRule(
        exclude=(torch.arange(n), torch.arange(m)), positive=(torch.arange(n) % 2, torch.arange(m) % 2)
    )
    got, exact = (
        testing.value_and_grads(lambda q, k, f=f: flat(f(q, k, rule=rule, columns=columns)), [query, key])
        for f in (fastcl.similarity_stats, testing.dense_stats)
    )
    torch.testing.assert_close(got, exact)


def test_a_set_without_pairs_is_minus_infinity_with_zero_gradient(backend):
    query, key = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    nobody = torch.zeros(4, dtype=torch.int64)
    stats = fastcl.similarity_stats(query, key, rule=PairRule(exclude=(nobody, nobody)), columns=True)
    for side in (stats, stats.columns):
        for name, nothing in EMPTY.items():
            assert getattr(side, name).tolist() == [nothing] * 4, name
    torch.autograd.backward(flat(stats)[:3], [torch.ones(4)] * 3)
    assert not query.grad.any()
    assert not key.grad.any()


def test_a_positive_of_minus_infinity_counts(backend):
    if backend == "triton":
        pytest.xfail("Triton's kernels take a logit of -inf for a pair that is excluded")
    key = torch.tensor([[-torch.inf, 1.0], [1.0, 0.0], [0.5, 0.0]])
    rule = PairRule(positive=(torch.tensor([0]), torch.tensor([0, 0, 1])))
    stats = fastcl.similarity_stats(torch.tensor([[1.0, 0.0]]), key, rule=rule)
    assert (stats.pos_sum, stats.pos_count, stats.lse_neg) == (-torch.inf, 2, 0.5)


def test_count_and_maximum_carry_no_gradient(backend):
    query, key = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    stats = fastcl.similarity_stats(query, key, columns=True)
    live = {name: getattr(stats, name).requires_grad for name in FIELDS}
    assert live == {name: name in ("lse_neg", "lse_pos", "pos_sum") for name in FIELDS}


def test_the_backend_argument_wins(backend):
    query = torch.randn(4, 3, dtype=testing.WIDEST)
    with fastcl.use_backend("reference"):
        got = fastcl.similarity_stats(query, query, backend=backend)
    torch.testing.assert_close(flat(got), flat(testing.dense_stats(query, query)))
