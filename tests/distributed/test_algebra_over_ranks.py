"""The algebra over more than one process: every call is that of one process that holds every rank's rows."""

import pytest
import torch
import torch.distributed as dist
from processes import on_every_rank
from test_distributed import own_rows

import fastcl
from fastcl import PairRule, testing

# rows of each rank, and its keys: uneven, and a rank without any
COUNTS = {2: ((5, 3), (4, 2)), 3: ((4, 0, 4), (2, 3, 1))}
ROWS, KEYS, WIDTH = 8, 6, 4
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1]), torch.tensor([1, 0, 2, 2, 0, 1])
SEQUENCES = torch.arange(ROWS) % 2, torch.arange(KEYS) % 2
NAMED = torch.tensor([[0, 5], [5, 5], [2, -1], [1, 3], [-1, -1], [4, 0], [3, 2], [1, 1]])
MASK = (torch.arange(ROWS * KEYS).reshape(ROWS, KEYS) * 7) % 5 < 2


def rule(name, rows=slice(None), keys=slice(None)):
    """Of a rank's rows and keys: ids are its own, masks and named keys of all ranks' keys."""
    ids = LABELS[0][rows], LABELS[1][keys]
    if name == "ids":
        return PairRule(positive=ids)
    if name == "within":
        return PairRule(positive=ids, within=(SEQUENCES[0][rows], SEQUENCES[1][keys]))
    if name == "named":
        return PairRule(positive=ids, exclude_keys=NAMED[rows])
    return PairRule(positive=[MASK[rows], ids], exclude=MASK.flip(0)[rows])


RULES = ("ids", "within", "named", "masks")


def statistics(x, y, scale, bias, name, rows=slice(None), keys=slice(None), **options):
    stats = fastcl.similarity_stats(x, y, scale=scale, rule=rule(name, rows, keys), normalize=True, **options)
    finite = [stats.lse_neg, stats.lse_pos]
    return torch.stack([*(torch.where(t.isfinite(), t, 0.0) for t in finite), stats.pos_sum], 1)


def sums(x, y, scale, bias, name, rows=slice(None), keys=slice(None), **options):
    of = rule(name, rows, keys)
    both = fastcl.similarity_logistic(x, y, scale=scale, bias=bias[rows], rule=of, normalize=True, **options)
    return torch.stack(both, 1)


def inputs(rows=slice(None), keys=slice(None)):
    source = torch.Generator().manual_seed(4)
    x, y = (torch.randn(n, WIDTH, generator=source, dtype=torch.float64) for n in (ROWS, KEYS))
    scale, bias = torch.tensor(1.7, dtype=torch.float64), torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    return [t.clone().requires_grad_() for t in (x[rows], y[keys], scale, bias)]


def total_over(group, *tensors):
    for x in tensors:
        dist.all_reduce(x, group=group)


def _check_rows_by_rule(group):
    counts, key_counts = COUNTS[group.size()]
    own, own_keys = (own_rows(c, group.rank()) for c in (counts, key_counts))
    weights = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)[:, None]
    for call in (statistics, sums):
        for name in RULES:
            leaves, whole = inputs(own, own_keys), inputs()
            exact = call(*whole, name)
            got = call(*leaves, name, own, own_keys, group=group)
            (exact * weights).sum().backward()
            (got * weights[own]).sum().backward()
            said = f"{call.__name__} {name} rank {group.rank()}"
            pairs = [(got, exact[own]), (leaves[0].grad, whole[0].grad[own])]
            pairs.append((leaves[1].grad, whole[1].grad[own_keys]))
            total_over(group, leaves[2].grad)  # each rank's rows pull at the one scale
            pairs.append((leaves[2].grad, whole[2].grad))
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, s=said: f"{s}: {m}")


def soft_targets(query, key, teacher, prototypes, rows=slice(None), **options):
    of = PairRule(exclude_keys=NAMED[rows])
    targets = teacher[rows], prototypes
    return fastcl.soft_cross_entropy(query, key, *targets, temperature=0.4, rule=of, **options)


def _check_soft_targets(group):
    own = own_rows(COUNTS[group.size()][0], group.rank())
    teacher, prototypes = inputs()[0].detach().flip(0), inputs()[1].detach().flip(1)
    for reduction in ("none", "mean", "sum"):
        whole, leaves = inputs()[:2], [inputs(own)[0], inputs()[1]]
        exact = soft_targets(*whole, teacher, prototypes, reduction=reduction)
        got = soft_targets(*leaves, teacher, prototypes, own, reduction=reduction, group=group)
        exact.sum().backward()
        got.sum().backward()
        factor = 1 if reduction == "none" else group.size()  # every rank returned the loss
        torch.testing.assert_close(got, exact[own] if reduction == "none" else exact)
        torch.testing.assert_close(leaves[0].grad, whole[0].grad[own] * factor)
        total_over(group, leaves[1].grad)  # keys are every rank's
        torch.testing.assert_close(leaves[1].grad, whole[1].grad * factor)


def _check_sinkhorn(group):
    own = own_rows(COUNTS[group.size()][0], group.rank())
    query, key = (x.detach() for x in inputs()[:2])
    exact = fastcl.sinkhorn(query, key, temperature=0.3)
    torch.testing.assert_close(fastcl.sinkhorn(query[own], key, temperature=0.3, group=group), exact)


def _check_row_ids_and_reduce(group):
    counts = COUNTS[group.size()][0]
    own = own_rows(counts, group.rank())
    ids = fastcl.row_ids(counts[group.rank()], group)
    gathered = [torch.zeros(n, dtype=torch.int64) for n in counts]
    for rank, part in enumerate(gathered):
        part.copy_(ids) if rank == group.rank() else None
        dist.broadcast(part, rank, group=group)
    assert len(torch.cat(gathered).unique()) == ROWS
    losses = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        here = losses[own].clone().requires_grad_()
        value = fastcl.reduce(here, reduction, group)
        value.backward()
        torch.testing.assert_close(value, getattr(losses, reduction)())
        unit = 1 / ROWS if reduction == "mean" else 1.0
        torch.testing.assert_close(here.grad, torch.full_like(here, unit * group.size()))


CHECKS = (_check_rows_by_rule, _check_soft_targets, _check_sinkhorn, _check_row_ids_and_reduce)


@pytest.mark.skipif(not testing.IN_FLOAT64, reason="compared in float64")
@pytest.mark.parametrize("world", [2, 3])
def test_the_algebra_is_that_of_one_process(world, tmp_path):
    on_every_rank(CHECKS, world, tmp_path)
