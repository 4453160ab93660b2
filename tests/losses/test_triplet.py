"""Triplet losses against loops over all triplets' distances."""

import pytest
import torch
import torch.nn.functional as F
from objective_checks import by_row, objective

import fastcl
from fastcl import testing

objective("triplet_loss", fastcl.triplet_loss, (6, 4), (6, 4), scaled=False)
objective(
    "batch_hard_triplet_loss",
    lambda x: fastcl.batch_hard_triplet_loss(x, by_row(x, torch.tensor([0, 1]))),
    *((6, 4),),
    scaled=False,
)
pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
N, D = 20, 5


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64).requires_grad_()


def same(got, exact, inputs):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
    pairs = [torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (got, exact)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mining", ["hard", "semi_hard"])
def test_triplets(mining, own, backend):
    a, p, k = rows(N, 0), rows(N, 1), rows(7, 2)
    x, y = F.normalize(a), F.normalize(p)
    keys = F.normalize(k) if own else y
    exact = []
    for i in range(N):
        near = (x[i] - y[i]).square().sum()
        others = [(x[i] - keys[j]).square().sum() for j in range(len(keys)) if own or j != i]
        others = [d for d in others if mining == "hard" or d > near]
        exact.append((near - min(others) + 0.3).clamp_min(0) if others else 0 * near)
    exact = torch.stack(exact)
    negatives = k if own else None
    got = fastcl.triplet_loss(a, p, negatives, margin=0.3, mining=mining, reduction="none")
    inputs = [a, p, k] if own else [a, p]
    same(got, exact, inputs)
    same(fastcl.TripletLoss(0.3, mining)(a, p, negatives), exact.mean(), inputs)


@pytest.mark.parametrize("width", [7, 100, 333])
def test_a_key_as_far_as_the_positive_is_not_farther(width, backend):
    """Their similarities differ by how the products are rounded."""
    for dtype in (torch.float32, torch.float64):
        a, p = torch.randn(2, 300, width, generator=torch.Generator().manual_seed(width), dtype=dtype)
        equal = a[:1].repeat(32, 1)
        assert fastcl.triplet_loss(equal, equal) == 0
        with_own = fastcl.triplet_loss(a, p, p, reduction="none")
        torch.testing.assert_close(with_own, fastcl.triplet_loss(a, p, reduction="none"))


@pytest.mark.parametrize("classes", [1, 4, N])
def test_batch_hard(classes, backend):
    z, labels = rows(N, 3), torch.arange(N) % classes
    x = F.normalize(z)
    distance = (x[:, None] - x).square().sum(2)
    exact = [0 * x[i].sum() for i in range(N)]
    counted = 0
    for i in range(N):
        positive = [distance[i, j] for j in range(N) if j != i and labels[j] == labels[i]]
        negative = [distance[i, j] for j in range(N) if labels[j] != labels[i]]
        if positive and negative:
            counted += 1
            exact[i] = (max(positive) - min(negative) + 0.2).clamp_min(0)
    exact = torch.stack(exact)
    same(fastcl.batch_hard_triplet_loss(z, labels, reduction="none"), exact, [z])
    same(fastcl.batch_hard_triplet_loss(z, labels), exact.sum() / max(counted, 1), [z])


def test_a_zero_row_is_as_far_as_an_orthogonal_one(backend):
    """In what is mined and in what is paid: squared distances are 2 - 2 cos."""
    anchor = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    positive = torch.tensor([[0.28, 0.96], [0.6, 0.8]])
    negatives = torch.tensor([[0.0, 0.0], [-0.6, 0.8]])
    hard = fastcl.triplet_loss(anchor, positive, negatives, margin=0.5, mining="hard", reduction="none")
    torch.testing.assert_close(hard, torch.tensor([1.44 - 2 + 0.5, 0.5]).clamp_min(0))
    semi_hard = fastcl.triplet_loss(anchor[:1], positive[:1], negatives[:1], margin=1.0)
    torch.testing.assert_close(semi_hard, torch.tensor(1.44 - 2 + 1.0))
    batch = torch.cat([anchor, positive[:1]])
    losses = fastcl.batch_hard_triplet_loss(batch, torch.tensor([0, 1, 0]), margin=1.0, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([1.44 - 2 + 1.0, 0.0, 1.44 - 2 + 1.0]))


def test_bad_options():
    a = rows(3, 4)
    with pytest.raises(ValueError, match="mining"):
        fastcl.triplet_loss(a, a, mining="easy")
    with pytest.raises(ValueError, match="margin"):
        fastcl.triplet_loss(a, a, margin=-1)
    with pytest.raises(ValueError, match="labels"):
        fastcl.batch_hard_triplet_loss(a, torch.arange(4))
    assert fastcl.triplet_loss(a[:1], a[:1]).item() == 0


def test_no_negative_is_farther_than_the_positive(backend):
    a, k = rows(N, 5), rows(7, 6)
    losses = fastcl.triplet_loss(a, -a.detach(), k, reduction="none")
    assert losses.eq(0).all()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(losses.sum(), [a, k]))
    assert fastcl.triplet_loss(a, -a.detach(), k, mining="hard").item() > 1
