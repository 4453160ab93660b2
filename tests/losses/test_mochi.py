"""MoCHi against its definition, with every synthetic negative formed in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import fastcl
from bench.cases import FASTCL
from bench.memory import peak_bytes
from fastcl import MochiDraws, NegativeQueue, mochi_loss, momentum_update_, testing

SIZES = {"n_hard": 20, "n_mix": 15, "n_query_mix": 9}


def draw(n, n_hard, n_mix, n_query_mix, seed=0):
    generator = testing.generator(seed)
    ranks = [torch.randint(n_hard, (n, count), generator=generator) for count in (n_mix, n_mix, n_query_mix)]
    weights = [
        torch.rand(n, count, generator=generator, dtype=torch.float64) for count in (n_mix, n_query_mix)
    ]
    return MochiDraws(ranks[0], ranks[1], weights[0], ranks[2], weights[1] / 2)


def dense(query, positive, keys, temperature, draws, n_hard):
    """Kalantidis et al., section 3, row by row."""
    query, positive, keys = (
        F.normalize(query.double(), dim=1),
        F.normalize(positive.double(), dim=1),
        keys.double(),
    )
    losses = []
    for i in range(len(query)):
        similarity = keys @ query[i]
        hardest = keys[similarity.detach().argsort(descending=True, stable=True)[:n_hard]]
        alpha, beta = draws.alpha[i, :, None].double(), draws.beta[i, :, None].double()
        mixed = alpha * hardest[draws.first[i]] + (1 - alpha) * hardest[draws.second[i]]
        with_query = beta * query[i].detach() + (1 - beta) * hardest[draws.partner[i]]
        synthetic = F.normalize(torch.cat([mixed, with_query]), dim=1)
        logits = torch.cat([(query[i] @ positive[i])[None], similarity, synthetic @ query[i]]) / temperature
        losses.append(-logits.log_softmax(0)[0])
    return torch.stack(losses)


def check(dtype, stored, reduction):
    """The loss and its three gradients against the definition."""
    torch.manual_seed(0)
    n, size, dim = 13, 150, 24
    queue = NegativeQueue(size, dim, dtype=stored)
    draws = draw(n, **SIZES)
    # spaced similarities: a rounding of the query does not change which keys are the hardest
    base_query, base_positive = torch.randn(n, dim).to(dtype), torch.randn(n, dim).to(dtype)
    weight = torch.rand(n, dtype=torch.float64)
    results = []
    for fused in (True, False):
        query, positive = (x.clone().requires_grad_() for x in (base_query, base_positive))
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if fused:
            loss = mochi_loss(
                query, positive, queue, temperature=temperature, draws=draws, reduction=reduction, **SIZES
            )
        else:
            loss = dense(query, positive, queue.keys, temperature, draws, SIZES["n_hard"])
            loss = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
        (loss.double() * (weight if reduction == "none" else 1)).sum().backward()
        results.append([loss.detach(), query.grad, positive.grad, temperature.grad])
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=tolerance, atol=tolerance * 1e-1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [d for d in testing.DTYPES if d != torch.float16], ids=str)
def test_values_and_gradients(backend, dtype, stored, reduction):
    check(dtype, stored, reduction)


def test_without_mixing_it_is_moco(backend):
    queue = NegativeQueue(40, 8)
    query, positive = torch.randn(6, 8), torch.randn(6, 8)
    plain = mochi_loss(query, positive, queue, n_mix=0, n_query_mix=0)
    torch.testing.assert_close(plain, fastcl.info_nce(query, positive, queue, 0.2))


def test_one_kind_of_mixing_only(backend):
    queue = NegativeQueue(40, 8)
    query, positive = torch.randn(6, 8, dtype=testing.WIDEST), torch.randn(6, 8, dtype=testing.WIDEST)
    for n_mix, n_query_mix in ((5, 0), (0, 5)):
        draws = draw(6, 10, n_mix, n_query_mix)
        sizes = {"n_hard": 10, "n_mix": n_mix, "n_query_mix": n_query_mix}
        got = mochi_loss(query, positive, queue, draws=draws, reduction="none", **sizes)
        exact = dense(query, positive, queue.keys, 0.2, draws, 10)
        torch.testing.assert_close(got, exact.to(got.dtype))


def test_reproducible_with_a_generator():
    queue = NegativeQueue(40, 8)
    query, positive = torch.randn(6, 8), torch.randn(6, 8)

    def run(seed):
        return mochi_loss(query, positive, queue, generator=testing.generator(seed), **SIZES)

    assert run(1) == run(1) != run(2)


def test_n_hard_is_clamped_to_the_queue():
    queue = NegativeQueue(10, 8)
    query, positive = torch.randn(6, 8), torch.randn(6, 8)
    draws = draw(6, 10, 15, 9)
    clamped = mochi_loss(query, positive, queue, n_hard=1000, n_mix=15, n_query_mix=9, draws=draws)
    torch.testing.assert_close(clamped.double(), dense(query, positive, queue.keys, 0.2, draws, 10).mean())


def test_enqueue_between_loss_and_backward():
    queue = NegativeQueue(50, 8)
    query = torch.randn(6, 8, requires_grad=True)
    loss = mochi_loss(query, torch.randn(6, 8), queue, **SIZES)
    queue.enqueue(torch.randn(6, 8))
    loss.backward()
    assert query.grad.isfinite().all()


@pytest.mark.skipif(not testing.IN_FLOAT64, reason="finite differences need float64")
def test_second_derivatives(backend):
    queue = NegativeQueue(12, 4)
    draws = draw(3, 5, 4, 3)
    sizes = {"n_hard": 5, "n_mix": 4, "n_query_mix": 3}
    query, positive = (torch.randn(3, 4, dtype=testing.WIDEST, requires_grad=True) for _ in range(2))
    queue.keys.copy_(F.normalize(torch.randn(12, 4), dim=1))

    def loss(positive):
        # the query's gradient holds the synthetics constant, which finite differences would not
        return mochi_loss(query, positive, queue, draws=draws, **sizes)

    torch.autograd.gradcheck(loss, (positive,))
    torch.autograd.gradgradcheck(loss, (positive,))


def test_is_an_op_and_compiles(backend):
    if backend == "reference":
        return
    queue = NegativeQueue(60, 8)
    query = torch.randn(5, 8, requires_grad=True)
    positive = torch.randn(5, 8)
    draws = draw(5, **SIZES)
    draws = draws._replace(alpha=draws.alpha.float(), beta=draws.beta.float())
    scale = torch.tensor(5.0, dtype=torch.float64)
    arguments = (query, positive, scale, queue.keys, *draws, SIZES["n_hard"], backend)
    opcheck(torch.ops.fastcl.mochi, arguments, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(mochi_loss, fullgraph=True, backend="aot_eager")
    got = compiled(query, positive, queue, draws=draws, **SIZES)
    torch.testing.assert_close(got, mochi_loss(query, positive, queue, draws=draws, **SIZES))


def test_checks_its_input():
    queue = NegativeQueue(40, 8)
    query = torch.randn(6, 8)
    draws = draw(6, **SIZES)
    for changes, error, said in (
        ({"queue": torch.randn(40, 8)}, TypeError, "queue.*NegativeQueue"),
        ({"positive_key": torch.randn(5, 8)}, ValueError, r"positive_key.*\(5, 8\).*\(6, 8\)"),
        ({"query": torch.randn(6, 4), "positive_key": torch.randn(6, 4)}, ValueError, r"\(40, 8\).*\(6, 4\)"),
        ({"n_hard": 0}, ValueError, "n_hard"),
        ({"n_mix": -1}, ValueError, "n_mix"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"reduction": "max"}, ValueError, "reduction"),
        (
            {"draws": draws._replace(first=draws.first[:, :3])},
            ValueError,
            r"draws.first.*\(6, 15\).*\(6, 3\)",
        ),
        ({"draws": draws._replace(partner=draws.partner + 20)}, ValueError, "draws.partner.*0 to 19"),
        ({"draws": draws._replace(beta=draws.beta + 0.5)}, ValueError, "draws.beta.*0 to 0.5"),
        ({"draws": draws._replace(alpha=draws.first)}, TypeError, "draws.alpha"),
    ):
        arguments = {"query": query, "positive_key": torch.randn(6, 8), "queue": queue, **SIZES, **changes}
        with pytest.raises(error, match=said):
            mochi_loss(**arguments)


@pytest.mark.skipif(testing.INTERPRETED, reason="the interpreter's memory, not the kernels'")
def test_memory_beyond_the_queue():
    """256 queries on 65,536 keys: the logits alone would be 64 MiB."""
    assert 0 < peak_bytes("mochi-256x128-65536keys", FASTCL) < 64 * 2**20


def test_momentum_update():
    query_module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    key_module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    query_module(torch.randn(8, 3))
    before = {name: value.clone() for name, value in key_module.state_dict().items()}
    momentum_update_(key_module, query_module, 0.9)
    for name, value in key_module.state_dict().items():
        other = query_module.state_dict()[name]
        expected = 0.9 * before[name] + 0.1 * other if value.is_floating_point() else other
        torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="between 0 and 1"):
        momentum_update_(key_module, query_module, 1.5)
    with pytest.raises(ValueError, match=r"0\.weight"):
        momentum_update_(nn.Sequential(nn.Linear(2, 4)), query_module)
