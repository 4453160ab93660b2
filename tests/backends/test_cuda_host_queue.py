"""The CUDA kernels of a queue, run on the host: its step, and MoCHi's mixing."""

import pytest
import torch
from test_mochi import check as check_mochi
from test_mochi import dense, draw

import fastcl
from fastcl import testing
from fastcl.testing import host

pytestmark = pytest.mark.skipif(
    not host.is_built() or testing.DEVICE.type != "cpu", reason="runs in the library of a checkout"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
def test_queue(dtype, queue_dtype, grid):
    """The rows that stay, normalized, in the order of their arrival; beyond the end the queue wraps."""
    size, width = 21, 9
    queue = fastcl.NegativeQueue(size, width, dtype=queue_dtype, with_ids=True)
    rows = torch.randn(80, width + 1, generator=torch.Generator().manual_seed(40)).to(dtype)[:, :width]
    keys, ids = queue.keys.clone(), queue.ids.clone()
    start = 0
    for count in (5, 0, 20, 21, 34):
        batch, batch_ids = rows[start : start + count], torch.arange(start, start + count)
        queue.enqueue(batch, batch_ids)
        unit = torch.nn.functional.normalize(batch.double()).to(queue_dtype)
        for i in range(max(0, count - size), count):
            keys[(start + i) % size], ids[(start + i) % size] = unit[i], start + i
        start += count
        assert queue.pointer.item() == start % size
        assert torch.equal(queue.ids, ids)
        torch.testing.assert_close(queue.keys, keys)


@pytest.mark.parametrize("blocks", [1, 6, 40])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mochi(blocks, stored, dtype, grid):
    """Blocks of several queries, of one, and blocks without."""
    grid.blocks = blocks
    for reduction in ("mean", "sum", "none"):
        check_mochi(dtype, stored, reduction)


@pytest.mark.parametrize(("n_mix", "n_query_mix"), [(5, 0), (0, 5), (40, 1), (1, 300)])
def test_mochi_of_any_mixture(n_mix, n_query_mix, grid):
    """Keys drawn many times, and not at all; a width between multiples of a warp."""
    queue = fastcl.NegativeQueue(60, 45)
    query, positive = torch.randn(2, 6, 45, generator=torch.Generator().manual_seed(45))
    sizes = {"n_hard": 11, "n_mix": n_mix, "n_query_mix": n_query_mix}
    draws = draw(6, **sizes)
    got, grads = testing.value_and_grads(
        lambda q, p: fastcl.mochi_loss(q, p, queue, draws=draws, **sizes), [query, positive]
    )
    exact, exact_grads = testing.value_and_grads(
        lambda q, p: dense(q, p, queue.keys, 0.2, draws, 11).mean(), [query.double(), positive.double()]
    )
    torch.testing.assert_close(got[0].double(), exact[0], rtol=3e-6, atol=3e-7)
    for a, b in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-7)
    again = testing.value_and_grads(
        lambda q, p: fastcl.mochi_loss(q, p, queue, draws=draws, **sizes), [query, positive]
    )
    assert all(torch.equal(a, b) for a, b in zip((*got, *grads), (*again[0], *again[1]), strict=True))


def test_mochi_of_rows_that_are_zero_or_not_finite(grid):
    queue = fastcl.NegativeQueue(60, 8)
    query, positive = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(46))
    draws = draw(6, 10, 5, 5)
    sizes = {"n_hard": 10, "n_mix": 5, "n_query_mix": 5, "draws": draws, "reduction": "none"}

    def run():
        return testing.value_and_grads(
            lambda q, p: fastcl.mochi_loss(q, p, queue, **sizes), [query, positive]
        )

    (expected,), expected_grads = run()
    query[1], query[2], positive[3] = 0, torch.nan, torch.inf
    (got,), grads = run()
    others = [0, 4, 5]
    assert torch.equal(got[others], expected[others])
    assert all(torch.equal(g[others], e[others]) for g, e in zip(grads, expected_grads, strict=True))
    assert got[1].isfinite()
    assert not grads[0][1].any()
    assert got[2:4].isnan().all()
    assert grads[0][2].isnan().all()


def test_mochi_with_more_hard_keys_than_a_block_holds_is_refused(grid):
    queue = fastcl.NegativeQueue(600, 8)
    query, positive = torch.randn(2, 6, 8)
    grid.shared_bytes = 10 << 10
    fastcl.mochi_loss(query, positive, queue, n_hard=100, n_mix=9, n_query_mix=9)
    with pytest.raises(RuntimeError, match=r"mix_negatives: 500 hard keys.*shared memory"):
        fastcl.mochi_loss(query, positive, queue, n_hard=500, n_mix=9, n_query_mix=9)
