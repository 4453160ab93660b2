"""Random shapes, dtypes, rules, layouts and options: every backend agrees with the whole matrix."""

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_table import LOSSES, check
from test_stats import LAYOUTS, flat
from test_stats import check as check_stats
from test_topk import check as check_topk
from test_topk import integers

import fastcl
from fastcl import PairRule, testing

quick = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.integers(1, 40)
shapes = st.tuples(sizes, sizes, sizes)
seeds = st.integers(0, 1 << 16)
dtypes = st.sampled_from(testing.DTYPES)
kinds = st.sampled_from(testing.KINDS)
temperatures = st.floats(0.005, 2.0)
ids = st.one_of(st.integers(-3, 3), st.integers(-(1 << 63), (1 << 63) - 1))


@st.composite
def rules(draw, n, m):
    """Ids from a small pool, so that some pairs match."""
    pool = draw(st.lists(ids, min_size=1, max_size=5))

    def side(count):
        return torch.tensor(draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count)))

    both = [(side(n), side(m)) if draw(st.booleans()) else None for _ in range(2)]
    return PairRule(*both)


@quick
@given(data=st.data(), shape=shapes, seed=seeds, dtype=dtypes, kind=kinds, scale=st.floats(-2.0, 2.0))
def test_statistics(backend, data, shape, seed, dtype, kind, scale):
    rule = data.draw(rules(*shape[:2]))
    options = {"columns": data.draw(st.booleans()), "normalize": data.draw(st.booleans())}
    extras = [name for name in ("key_bias", "key_scale") if data.draw(st.booleans())]
    case = testing.make_case(kind, shape, seed)
    check_stats(case, dtype, ("scale", *extras), scale, rule=rule, **options)


@quick
@given(
    name=st.sampled_from(sorted(LOSSES)),
    shape=shapes,
    seed=seeds,
    dtype=dtypes,
    factor_dtype=st.one_of(st.none(), dtypes),
    kind=kinds,
    temperature=temperatures,
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_losses(backend, name, shape, seed, dtype, factor_dtype, kind, temperature, reduction):
    case = testing.make_case(kind, shape, seed)
    check(LOSSES[name], case, dtype, temperature, factor_dtype=factor_dtype, reduction=reduction)


@quick
@given(
    name=st.sampled_from(sorted(LOSSES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    shape=shapes,
    seed=seeds,
    dtype=dtypes,
)
def test_layouts_do_not_matter(backend, name, layout, shape, seed, dtype):
    loss = LOSSES[name]
    plain = [x.to(dtype) for x in loss.inputs(testing.make_case("random", shape, seed))]

    def call(*tensors):
        return loss.product(*tensors, loss.factor(0.2))

    def changed(*tensors):
        return call(
            *(
                LAYOUTS[layout](x) if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1)
                for x in tensors
            )
        )

    got, exact = (testing.value_and_grads(f, plain) for f in (changed, call))
    torch.testing.assert_close(got, exact)


@quick
@given(shape=shapes, seed=seeds, dtype=dtypes, k=st.integers(1, 60), largest=st.integers(1, 3))
def test_top_k(backend, shape, seed, dtype, k, largest):
    n, m, d = shape
    check_topk(integers(n, d, seed, largest), integers(m, d, seed + 1, largest), k, dtype)


@quick
@given(shape=shapes, seed=seeds, cut=st.integers(0, 40))
def test_merging_two_halves_is_the_whole(backend, shape, seed, cut):
    case = testing.make_case("duplicate-ids", shape, seed)

    def part(keys):
        (labels, key_labels), (query_ids, key_ids) = case.labels, case.ids
        rule = PairRule(positive=(labels, key_labels[keys]), exclude=(query_ids, key_ids[keys]))
        return fastcl.similarity_stats(case.query, case.key[keys], rule=rule)

    merged = part(slice(cut)).merge(part(slice(cut, None)))
    torch.testing.assert_close(flat(merged), flat(part(slice(None))))


@quick
@given(shape=shapes, seed=seeds)
def test_the_order_of_rows_does_not_matter(backend, shape, seed):
    z1, z2 = testing.make_case("random", shape, seed)[:2]
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(seed))
    for name in ("info_nce", "nt_xent", "clip_loss"):
        loss = LOSSES[name]
        got, exact = (
            loss.product(a, b, loss.factor(0.2), reduction="none")
            for a, b in ((z1[order], z2[order]), (z1, z2))
        )
        torch.testing.assert_close(got[: len(z1)], exact[: len(z1)][order])


REDUCED = ("info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con", "sup_con-in")


@quick
@given(name=st.sampled_from(REDUCED), shape=shapes, seed=seeds, temperature=st.floats(0.05, 2.0))
def test_forward_mode_is_reverse_mode(backend, name, shape, seed, temperature):
    loss = LOSSES[name]
    inputs = tuple(loss.inputs(testing.make_case("random", shape, seed)))
    tangents = tuple(torch.randn(x.shape, generator=testing.generator(seed), dtype=x.dtype) for x in inputs)

    def call(*tensors):
        return loss.product(*tensors, loss.factor(temperature), reduction="mean")

    _, forward = torch.func.jvp(call, inputs, tangents)
    _, grads = testing.value_and_grads(call, inputs)
    reverse = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close(forward, reverse)


@pytest.mark.skipif(not testing.IN_FLOAT64, reason="the cases come in float64 too")
@quick
@given(seed=seeds)
def test_random_calls_in_every_layout_and_magnitude(seed):
    """As tests/fuzz.py makes them: all arguments, ids, draws and queues; rows of 1e-20 to 1e20, wide ones."""
    found, _ = fuzz.run(seed, range(3), testing.backends())
    assert not found, found
