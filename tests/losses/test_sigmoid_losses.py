"""SigLIP, NCE, Jensen-Shannon and weighted InfoNCE against their papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from objective_checks import by_row, objective

import fastcl

_PAIR = ((6, 4), (6, 4))
_NAMED = torch.tensor([[0, 2], [1, 1], [3, -1], [-1, -1], [4, 5]])  # targets, of six keys


def _weighted(q, k, *t):
    return fastcl.weighted_info_nce(q, k, by_row(q, _NAMED), by_row(q, torch.tensor([[0.75, 0.5]])), *t)


objective("weighted_info_nce", _weighted, *_PAIR)
objective(
    "siglip_loss", lambda x, y, s=3.0: fastcl.siglip_loss(x, y, s, -1.0), *_PAIR, out_of_range=torch.nan
)
objective("nce_loss", lambda q, p, n, *t: fastcl.nce_loss(q, p, n, *t, log_z=0.5), *_PAIR, (5, 4))
objective(
    "jsd_loss",
    lambda x, y: fastcl.jsd_loss(x, y, by_row(x, torch.tensor([0, 2, 1]))),
    *_PAIR,
    scaled=False,
)
N, M, D = 9, 14, 6


def rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def same(got, exact, inputs):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
    weights = torch.arange(1.0, 1 + got.numel()).reshape(got.shape).double()
    pairs = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (got, exact))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def unit(x):
    return F.normalize(x, dim=-1)


def test_siglip():
    a, b = rows(N, D, seed=0), rows(N, D, seed=1)
    scale, bias = rows(seed=2).abs() + 2, rows(seed=3) - 5.0
    z = 2 * torch.eye(N, dtype=torch.float64) - 1
    exact = -F.logsigmoid(z * (scale * unit(a) @ unit(b).T + bias)).sum(1)
    same(fastcl.siglip_loss(a, b, scale, bias, reduction="none"), exact, [a, b])
    same(fastcl.siglip_loss(a, b, scale, bias), exact.mean(), [a, b])
    same(fastcl.SigLIPLoss()(a, b, scale, bias), exact.mean(), [a, b])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("log_noise", [None, -math.log(1000)])
def test_nce(own, log_noise):
    q, p = rows(N, D, seed=4), rows(N, D, seed=5)
    noise = rows(N, M, D, seed=6) if own else rows(M, D, seed=6)
    shift = 0.5 if log_noise is None else 0.5 + math.log(M) + log_noise
    positive = (unit(q) * unit(p)).sum(1) / 0.3 - shift
    table = (unit(q)[:, None] * (unit(noise) if own else unit(noise)[None])).sum(2) / 0.3 - shift
    exact = -F.logsigmoid(positive) - F.logsigmoid(-table).sum(1)
    got = fastcl.nce_loss(q, p, noise, 0.3, log_z=0.5, log_noise=log_noise, reduction="none")
    same(got, exact, [q, p, noise])
    module = fastcl.NCELoss(0.3, log_z=0.5, log_noise=log_noise)
    same(module(q, p, noise), exact.mean(), [q, p, noise])


def test_jensen_shannon():
    local, pooled, owner = rows(20, D, seed=7), rows(5, D, seed=8), torch.arange(20) % 5
    table = local @ pooled.T
    owned = owner[:, None] == torch.arange(5)
    exact = -F.logsigmoid(table[owned]).mean() - F.logsigmoid(-table[~owned]).mean()
    same(fastcl.jsd_loss(local, pooled, owner), exact, [local, pooled])
    with pytest.raises(ValueError, match="owner must be from 0 to 4 for 5 wholes, got from 1 to 5"):
        fastcl.jsd_loss(local, pooled, owner + 1)


def test_weighted_targets_some_named_twice():
    q, k, w = rows(N, D, seed=9), rows(M, D, seed=10), rows(N, 4, seed=11)
    targets = torch.randint(-1, M, (N, 4), generator=torch.Generator().manual_seed(12))
    targets[0] = torch.tensor([3, 3, -1, 3])
    targets[1] = -1
    table = unit(q) @ unit(k).T / 0.2
    log_p = table.log_softmax(1)
    exact = -(w * log_p.gather(1, targets.clamp_min(0)) * (targets >= 0)).sum(1)
    same(fastcl.weighted_info_nce(q, k, targets, w, reduction="none"), exact, [q, k, w])
    with pytest.raises(ValueError, match="targets must be from -1"):
        fastcl.weighted_info_nce(q, k, targets + M, w)
    with pytest.raises(ValueError, match="weights"):
        fastcl.weighted_info_nce(q, k, targets, w[:, 1:])
