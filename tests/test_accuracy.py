"""Inputs on which rounding adds up, cancels or overflows: as accurate as plain PyTorch even there."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl import testing
from fastcl.testing import assert_within_budget, value_and_grads

pytestmark = pytest.mark.skipif(testing.INTERPRETED, reason="too large for Triton's interpreter")
streaming = pytest.mark.parametrize(
    "backend", [name for name in testing.backends() if name != "reference"], indirect=True
)


def check(product, dense, inputs, **budget):
    """Values and gradients of ``product`` against ``dense`` in float64 and in the dtype of the inputs."""
    (got,), got_grads = value_and_grads(product, inputs)
    (exact,), exact_grads = value_and_grads(dense, [x.double() for x in inputs])
    (plain,), plain_grads = value_and_grads(dense, inputs)
    assert_within_budget(got, exact, plain, **budget)
    for grads in zip(got_grads, exact_grads, plain_grads, strict=True):
        assert_within_budget(*grads, name="gradient")


@streaming
def test_a_long_sum_of_positives(backend):
    count, temperature = 8192, 0.07
    features, labels = torch.randn(1, 128).repeat(count, 1), torch.zeros(count, dtype=torch.int64)
    exact = torch.tensor(math.log(count - 1), dtype=torch.float64)
    got = fastcl.sup_con(features, labels, temperature=temperature)
    plain = testing.dense_sup_con(features, labels, temperature=temperature)
    assert_within_budget(got, exact, plain, unit=1 / temperature)


@pytest.mark.parametrize("logit", [1e4, 1e5, 1e7])
@streaming
def test_a_logit_is_rounded_alike_in_both_passes(logit, backend):
    rows = F.normalize(torch.randn(300, 64), dim=1) * logit**0.5
    rule = fastcl.PairRule(exclude=(ids := torch.arange(300), ids))
    check(
        lambda x: fastcl.similarity_stats(x, x, rule=rule).lse_neg,
        lambda x: testing.dense_stats(x, x, rule=rule).lse_neg,
        [rows],
        unit=logit,
    )
    options = {"temperature": 1.0, "variant": "in", "normalize": False}
    labels = torch.arange(300) // 3
    check(
        lambda x: fastcl.sup_con(x, labels, **options),
        lambda x: testing.dense_sup_con(x, labels, **options),
        [rows],
        unit=logit,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tiny_temperature(reduction, backend):
    z1, z2 = torch.randn(2, 200, 64)

    def grads(function, *inputs):
        return value_and_grads(lambda a, b: function(a, b, 1e-5, reduction=reduction), inputs)[1]

    exact = grads(testing.dense_nt_xent, z1.double(), z2.double())
    for grad, right in zip(grads(fastcl.nt_xent, z1, z2), exact, strict=True):
        assert (grad - right).norm() < 1e-4 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1024, 2049, 16384])
def test_a_long_dot_product_of_one_sign(width, dtype, backend):
    query, key = torch.rand(2, 64, width).to(dtype)
    similarities = query.double() @ key.double().T
    plain = query.float() @ key.float().T
    got = fastcl.similarity_stats(query, key).max_neg
    assert_within_budget(got, similarities.amax(dim=1), plain.amax(dim=1))
    check(
        lambda q, k: fastcl.info_nce(q, k, temperature=0.01),
        lambda q, k: testing.dense_info_nce(q, k, temperature=0.01),
        [query, key],
    )


LOSSES = {
    "nt_xent": fastcl.nt_xent,
    "info_nce": fastcl.info_nce,
    "clip_loss": lambda a, b, **options: fastcl.clip_loss(a, b, 10.0, **options),
    "sup_con": lambda a, b, **options: fastcl.sup_con(
        torch.stack([a, b], 1), torch.arange(200) // 4, **options
    ),
    "similarity_stats": lambda a, b, **_: fastcl.similarity_stats(a, b, normalize=True, columns=True).lse_neg,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e25), (torch.float32, 1e37)])
def test_rows_whose_squares_are_beyond_float32(loss, dtype, size, backend):
    small = torch.randn(200, 8).to(dtype)
    other = torch.randn(200, 8).to(dtype)
    for reduction in ("mean", "none"):
        (exact,), _ = value_and_grads(lambda a, b: LOSSES[loss](a, b, reduction=reduction), [small, other])  # noqa: B023
        large = (small.double() * size).to(dtype)
        (got,), grads = value_and_grads(lambda a, b: LOSSES[loss](a, b, reduction=reduction), [large, other])  # noqa: B023
        torch.testing.assert_close(got, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
        assert all(grad.isfinite().all() for grad in grads)


def test_mochi_mixes_a_query_with_nearly_opposite_keys(backend):
    query = torch.randn(8, 32)
    queue = fastcl.NegativeQueue(16, 32)
    queue.keys.copy_(F.normalize(-query.repeat(2, 1) + 1e-3 * torch.randn(16, 32), dim=1))
    ranks = torch.randint(0, 16, (8, 7))
    draws = fastcl.MochiDraws(ranks, ranks.flip(1), torch.rand(8, 7), ranks, torch.full((8, 7), 0.499))
    positive = torch.randn(8, 32)

    def loss(query, positive):
        return fastcl.mochi_loss(query, positive, queue, n_hard=16, n_mix=7, n_query_mix=7, draws=draws)

    (got,), got_grads = value_and_grads(loss, [query, positive])
    with fastcl.use_backend("reference"):
        (plain,), plain_grads = value_and_grads(loss, [query, positive])
        (exact,), exact_grads = value_and_grads(loss, [query.double(), positive.double()])
    assert_within_budget(got, exact, plain)
    for grads in zip(got_grads, exact_grads, plain_grads, strict=True):
        assert_within_budget(*grads, name="gradient")


def _pull(stats):
    return (stats.lse_neg - stats.pos_sum).mean()


ROW = torch.arange(300)
WITH_TEMPERATURE = {
    "nt_xent": (fastcl.nt_xent, testing.dense_nt_xent),
    "info_nce": tuple(
        lambda a, b, t, f=f: f(a, b, temperature=t) for f in (fastcl.info_nce, testing.dense_info_nce)
    ),
    "info_nce of negatives": tuple(
        lambda a, b, t, f=f: f(a, b, b.flip(0), temperature=t)
        for f in (fastcl.info_nce, testing.dense_info_nce)
    ),
    "clip_loss": tuple(
        lambda a, b, t, f=f: f(a, b, 1 / t) for f in (fastcl.clip_loss, testing.dense_clip_loss)
    ),
    "sup_con": tuple(
        lambda a, b, t, f=f: f(torch.stack([a, b], 1), ROW // 3, temperature=t)
        for f in (fastcl.sup_con, testing.dense_sup_con)
    ),
    "similarity_stats": tuple(
        lambda a, b, t, f=f: _pull(
            f(a, b, scale=1 / t, normalize=True, rule=fastcl.PairRule(positive=(ROW, ROW)))
        )
        for f in (fastcl.similarity_stats, testing.dense_stats)
    ),
}


@pytest.mark.parametrize("loss", WITH_TEMPERATURE)
def test_the_gradient_of_a_temperature_that_all_but_cancels(loss, backend):
    """Of bfloat16 rows that are alike: as accurate as float32's, though products are of bfloat16."""
    center = torch.randn(1, 64)
    rows = [(center + 0.1 * torch.randn(300, 64)).bfloat16() for _ in range(2)]
    ours, dense = WITH_TEMPERATURE[loss]

    def gradient(function, dtype):
        temperature = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        return torch.autograd.grad(function(*leaves, temperature), temperature)[0]

    plain, exact = (gradient(dense, dtype) for dtype in (torch.float32, torch.float64))
    got = gradient(ours, torch.bfloat16).float()
    assert_within_budget(got, exact, plain, unit=20 / 0.05)


def test_products_of_rows_too_short_for_bfloat16_units(backend):
    """A row shorter than 1e-12 is divided by that; the units would take its products for zero."""
    query, key = (torch.randn(5, 16) * 1e-21).bfloat16(), (torch.randn(7, 16) * 1e-21).bfloat16()
    got = fastcl.similarity_stats(query, key, normalize=True).max_neg
    exact = ((query.double() / 1e-12) @ (key.double() / 1e-12).T).amax(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
