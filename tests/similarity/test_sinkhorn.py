"""sinkhorn: the potentials of whole matrices, and it is an op like the others."""

import pytest
import torch
from torch.func import vmap
from torch.library import opcheck

import fastcl
from fastcl import testing
from fastcl.backends.registry import BACKENDS

LARGE = ((70, 140, 40),) if testing.INTERPRETED else ((252, 507, 123), (700, 2500, 20))
OPS = torch.ops.fastcl


def potentials(query, key, temperature, steps, normalize):
    """The definition, in float64."""
    query, key = query.double(), key.double()
    if normalize:
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
    logits = query @ key.T / temperature
    of_keys = -logits.logsumexp(0)
    for _ in range(steps - 1):
        of_keys = -(logits - (logits + of_keys).logsumexp(1, keepdim=True)).logsumexp(0)
    return of_keys


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*testing.SHAPES[:-1], *LARGE], ids=str)
def test_sinkhorn(shape, dtype, backend):
    case = testing.make_case("random", shape, seed=11)
    query, key = case.query.to(dtype), case.key.to(dtype)
    for temperature, steps, normalize in ((0.05, 3, True), (5.0, 2, False), (1.0, 1, True), (0.002, 4, True)):
        got = fastcl.sinkhorn(query, key, temperature=temperature, steps=steps, normalize=normalize)
        exact = potentials(query, key, temperature, steps, normalize)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        ulp = torch.finfo(got.dtype).eps * (exact.abs().max().item() + 3 / temperature)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=8 * steps * ulp)


def test_sinkhorn_as_an_op(backend):
    query, key = torch.randn(6, 5), torch.randn(7, 5)
    exact = fastcl.sinkhorn(query, key)
    if backend != "reference":  # plain torch: what torch does
        torch._dynamo.reset()
        compiled = torch.compile(fastcl.sinkhorn, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(query, key), exact)
        torch.testing.assert_close(compiled(query[:5], key), fastcl.sinkhorn(query[:5], key))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fastcl.sinkhorn(query, key), exact, rtol=0, atol=0)
    torch.testing.assert_close(vmap(lambda x: fastcl.sinkhorn(x, key))(query[None])[0], exact)
    if BACKENDS[backend].sinkhorn is not None:
        scale = torch.tensor(20.0, dtype=torch.float64)
        opcheck(OPS.sinkhorn.default, (query, key, scale, 3, True, 0, backend))


def test_sinkhorn_of_nothing(backend):
    assert fastcl.sinkhorn(torch.randn(4, 3), torch.randn(0, 3)).shape == (0,)
    assert fastcl.sinkhorn(torch.randn(0, 3), torch.randn(5, 3)).isinf().all()
