"""Spherical k-means: plain Lloyd steps, seeded, no cluster empty, on ranks as on one process."""

import pytest
import torch
import torch.nn.functional as F
from processes import on_every_rank
from test_distributed import own_rows

import fastcl
from fastcl import testing


def features(count=60, width=5, dtype=torch.float64):
    return torch.randn(count, width, generator=testing.generator(0), dtype=torch.float64).to(dtype)


def plain(rows, k, steps, seed):
    """Lloyd's steps on the sphere, a cluster at a time."""
    rows = F.normalize(rows, dim=1)
    prototypes = rows[torch.randperm(len(rows), generator=testing.generator(seed))[:k]]
    for _ in range(steps):
        similarity, assigned = (rows @ prototypes.T).max(dim=1)
        worst = iter(similarity.argsort(stable=True).tolist())
        members = [rows[assigned == j] for j in range(k)]
        prototypes = torch.stack([m.sum(0) if len(m) else rows[next(worst)] for m in members])
        prototypes = F.normalize(prototypes, dim=1)
    return prototypes, (rows @ prototypes.T).argmax(dim=1)


@pytest.mark.parametrize(("k", "steps"), [(1, 3), (7, 0), (7, 5), (40, 6), (60, 2)])
def test_is_lloyd_on_the_sphere(backend, k, steps):
    x = features(dtype=testing.WIDEST)
    prototypes, assigned = fastcl.k_means(x, k, steps=steps, generator=testing.generator(3))
    exact, exact_assigned = plain(x, k, steps, 3)
    assert (prototypes.dtype, assigned.dtype) == (x.dtype, torch.int64)
    torch.testing.assert_close(prototypes, exact)
    assert torch.equal(assigned, exact_assigned)


def test_an_empty_cluster_takes_the_worst_served_row(backend):
    angles = torch.tensor([0.0, 0.0, 0.0, 0.1, 1.5])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    for seed in range(5):
        _, assigned = fastcl.k_means(x, 3, generator=testing.generator(seed))
        assert assigned.unique().numel() == 3
        assert assigned[0] == assigned[1] == assigned[2]


def test_finds_clusters_and_repeats_itself():
    centres = torch.eye(6)
    x = centres.repeat(20, 1) + 0.05 * torch.randn(120, 6)
    runs = [fastcl.k_means(x, 6, generator=testing.generator(1)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    prototypes, assigned = runs[0]
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(6))
    assert ((F.normalize(x, dim=1) * prototypes[assigned]).sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_give_float32_without_gradient(dtype):
    x = features(dtype=dtype).requires_grad_()
    prototypes, assigned = fastcl.k_means(x, 4)
    assert prototypes.dtype == torch.float32
    assert not prototypes.requires_grad
    assert assigned.shape == (60,)


def test_all_rows_equal():
    prototypes, assigned = fastcl.k_means(torch.ones(5, 3), 3)
    torch.testing.assert_close(prototypes, F.normalize(torch.ones(3, 3), dim=1))
    assert (assigned >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(4, 3), 5), {}, ValueError, "k must be at most the number of rows, 4, got 5"),
        ((torch.ones(4, 3), 0), {}, ValueError, "k must be at least 1, got 0"),
        ((torch.ones(4, 3), 2.0), {}, TypeError, "k must be an int"),
        ((torch.ones(4, 3), 2), {"steps": -1}, ValueError, "steps must be at least 0"),
        ((torch.ones(4), 2), {}, ValueError, "features must have 2 dimensions"),
        ((torch.ones(4, 3), 2), {"group": "all"}, TypeError, "group must be a ProcessGroup"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastcl.k_means(*arguments, **options)


COUNTS = {2: (30, 30), 3: (50, 0, 10)}


def _check_it_is_one_process(group):
    own = own_rows(COUNTS[group.size()], group.rank())
    source = testing.generator(3 + group.rank())
    prototypes, assigned = fastcl.k_means(features()[own], 40, steps=6, generator=source, group=group)
    exact, exact_assigned = fastcl.k_means(features(), 40, steps=6, generator=testing.generator(3))
    torch.testing.assert_close(prototypes, exact)
    assert torch.equal(assigned, exact_assigned[own])


@pytest.mark.parametrize("world", COUNTS)
def test_on_ranks_it_is_one_process(world, tmp_path):
    on_every_rank((_check_it_is_one_process,), world, tmp_path)
