"""What grows and what does not: memory is linear, and the bits do not depend on the thread count."""

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from loss_table import LOSSES
from processes import in_a_process

import fastcl
from fastcl import testing
from fastcl.backends import native


def _peak():
    """Of this process's memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _two_views(loss):
    return lambda z1, z2: loss(z1[::2], z2[::2])


CALLS = {
    "nt_xent": _two_views(fastcl.nt_xent),
    "sup_con": _two_views(lambda *z: fastcl.sup_con(torch.stack(z, 1), torch.arange(len(z[0])) % 100)),
    "siglip_loss": lambda z1, z2: fastcl.siglip_loss(z1, z2, 10.0, -10.0),
    "clip_loss": lambda z1, z2: fastcl.clip_loss(z1, z2, 10.0, reduction="none").sum(),
    "top-k": lambda z1, z2: z1.sum() + z2.sum() + fastcl.similarity_topk(z1, z2, 16)[0].sum(),
}


def _grown_by(call, backend, rows):
    """By how much a call with so many rows raises the peak, after one with few."""
    torch.set_num_threads(1)
    with fastcl.use_backend(backend):
        for count in (64, rows):
            before = _peak()
            CALLS[call](*(torch.randn(count, 64, requires_grad=True) for _ in range(2))).backward()
    return _peak() - before


GROWTH = [("cpu", 8192, call) for call in CALLS]
GROWTH += [("chunked", 4096, call) for call in ("sup_con", "clip_loss", "siglip_loss")]


@pytest.mark.parametrize(("name", "rows", "call"), GROWTH)
def test_no_matrix_of_all_pairs_is_stored(name, rows, call):
    grown = in_a_process(_grown_by, call, name, rows)
    # plain PyTorch keeps at least three such matrices, 'chunked' a number of 8 MiB tiles
    matrix = rows * rows * 4 / 2**20
    assert grown < 180 < 3 * matrix, f"{grown:.0f} MiB, one matrix is {matrix:.0f} MiB"


def _prototypes_take():
    """MiB beyond inputs and gradients."""
    torch.set_num_threads(2)

    def inputs(rows, keys):
        shapes = (rows, keys, rows, keys)
        return [torch.randn(n, 256, requires_grad=i < 2) for i, n in enumerate(shapes)]

    def step(query, key, target_query, target_key):
        fastcl.soft_cross_entropy(query, key, target_query, target_key).backward()
        return sum(x.grad.nbytes for x in (query, key)) / 2**20

    step(*inputs(8, 64))
    large = inputs(512, 65536)
    before = _peak()
    gradients = step(*large)
    return _peak() - before - gradients


def test_soft_targets_need_little_beyond_inputs_and_gradients():
    assert in_a_process(_prototypes_take) < 64


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(65, 63, 64), (700, 1500, 40), (65, 5000, 16)], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype, shape, threads):
    case = testing.make_case("random", shape)
    factor = torch.tensor(0.1, dtype=torch.float64)

    def everything(count):
        threads(count)
        results = []
        for name in ("info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con"):
            loss = LOSSES[name]
            inputs = [x.to(dtype) for x in loss.inputs(case)]
            for reduction in ("mean", "none"):
                results.append(
                    testing.value_and_grads(
                        lambda *x, f=loss, r=reduction: f.product(*x, reduction=r), [*inputs, factor]
                    )
                )
        results.append(fastcl.similarity_topk(case.query.to(dtype), case.key.to(dtype), 9))
        return results

    with fastcl.use_backend("cpu"):
        one = everything(1)
        for count in (2, 3, 16):
            torch.testing.assert_close(everything(count), one, rtol=0, atol=0)


def test_calls_from_several_threads_do_not_disturb_each_other(threads):
    threads(2)
    inputs = [torch.randn(2, 300 + 40 * i, 64, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def loss_and_gradients(pair):
        return testing.value_and_grads(lambda *x: fastcl.nt_xent(*x, 0.1), list(pair))

    with fastcl.use_backend("cpu"):
        alone = [loss_and_gradients(pair) for pair in inputs]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(loss_and_gradients, inputs * 3))
    torch.testing.assert_close(together, alone * 3, rtol=0, atol=0)


def test_nt_xent_row_for_row_at_4096():
    z1, z2 = (torch.randn(4096, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    some = torch.arange(0, 8192, 61)

    def dense(dtype):
        rows = F.normalize(torch.cat([z1, z2]).to(dtype), dim=1)
        logits = rows[some] @ rows.T / 0.1
        others = logits.scatter(1, some[:, None], -torch.inf)
        return others.logsumexp(1) - logits.gather(1, ((some + 4096) % 8192)[:, None])[:, 0]

    with torch.no_grad(), fastcl.use_backend("cpu"):
        got = fastcl.nt_xent(z1, z2, 0.1, reduction="none")
    assert got.shape == (8192,)
    testing.assert_within_budget(
        got[some], dense(torch.float64), dense(torch.float32), unit=10.0, name="nt_xent rows"
    )


@pytest.mark.skipif(native.missing_reason() is not None, reason="needs the native extension")
@pytest.mark.parametrize(("rows", "count"), [(1665, 5000), (2240, 5000), (70, 5000), (300, 40_000)])
@pytest.mark.parametrize("loss", ["info_nce", "prototype_nce"])
def test_keys_whose_weights_are_kept(loss, rows, count):
    """In strips of queries, all at a time, and, of 40,000 keys, for 192 queries and then for the rest."""
    query, positive, keys = (
        testing.make_case("random", (rows, rows, 4), seed=1).query,
        testing.make_case("random", (rows, rows, 4), seed=2).query,
        testing.make_case("random", (count, count, 4), seed=3).query,
    )
    assigned = torch.arange(rows) * 2

    def fused(query, keys):
        if loss == "info_nce":
            return fastcl.info_nce(query, positive, keys, temperature=0.2)
        return fastcl.prototype_nce(query, keys, assigned, 0.2)

    def dense(query, keys):
        if loss == "info_nce":
            return testing.dense_info_nce(query, positive.double(), keys, temperature=0.2)
        query, keys = F.normalize(query, dim=1), F.normalize(keys, dim=1)
        return F.cross_entropy(query @ keys.T / 0.2, assigned)

    got, exact = (
        torch.autograd.grad(function(*leaves), leaves)
        for function, leaves in (
            (fused, [query.clone().requires_grad_(), keys.clone().requires_grad_()]),
            (dense, [query.double().requires_grad_(), keys.double().requires_grad_()]),
        )
    )
    for x, y in zip(got, exact, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()
