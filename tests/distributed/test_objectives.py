"""Objectives over more than one process are those of one process that holds every rank's rows."""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import on_every_rank
from test_distributed import own_rows

import fastcl
from fastcl import testing

# rows of each rank, and its further keys: uneven, and a rank without any
COUNTS = {2: ((5, 3), (4, 2)), 3: ((4, 0, 4), (2, 3, 1))}
ROWS, KEYS, WIDTH = 8, 6, 4
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])
OWNER = torch.tensor([5, 0, 3, 3, 1, 2, 4, 0])
TARGETS = torch.tensor([[0, 5], [5, 5], [2, -1], [1, 3], [-1, -1], [4, 0], [3, 2], [1, 1]])
WEIGHTS = torch.linspace(0.2, 1.1, 2 * ROWS, dtype=torch.float64).reshape(ROWS, 2)
HAS_ROWS = "triplet", "triplet, own negatives", "batch hard", "weighted", "siglip"


def called(name, own, x, y, keys, **options):
    """The objective of rows x and y, of which ``own`` are here, and further keys."""
    if name == "triplet":
        return fastcl.triplet_loss(x, y, margin=0.3, mining="hard", **options)
    if name == "triplet, own negatives":
        return fastcl.triplet_loss(x, y, keys, margin=0.9, **options)
    if name == "batch hard":
        return fastcl.batch_hard_triplet_loss(x, LABELS[own], **options)
    if name == "weighted":
        return fastcl.weighted_info_nce(x, keys, TARGETS[own], WEIGHTS[own], **options)
    if name == "siglip":
        return fastcl.siglip_loss(x, y, 3.0, -1.0, **options)
    return fastcl.jsd_loss(x, keys, OWNER[own], **options)


def inputs():
    source = torch.Generator().manual_seed(3)
    return [torch.randn(n, WIDTH, generator=source, dtype=torch.float64) for n in (ROWS, ROWS, KEYS)]


def result(call, tensors, reduction):
    """The value and the gradients of the sum of what was returned."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = call(*leaves, **({} if reduction is None else {"reduction": reduction}))
    return value.detach(), torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)


def cases():
    yield from itertools.product(HAS_ROWS, ("none", "mean", "sum"))
    yield "jensen-shannon", None


def _check_every_objective(group):
    rank = dist.get_rank(group)
    counts, key_counts = COUNTS[group.size()]
    own, own_keys = own_rows(counts, rank), own_rows(key_counts, rank)
    for name, reduction in cases():
        value, grads = result(lambda *x, n=name, **o: called(n, slice(None), *x, **o), inputs(), reduction)
        x, y, keys = inputs()
        here = [x[own], y[own], keys[own_keys]]
        got, got_grads = result(lambda *x, n=name, **o: called(n, own, *x, group=group, **o), here, reduction)
        if reduction == "none":
            value = value[own]
        else:
            grads = [grad * group.size() for grad in grads]  # every rank returned the loss
        expected = [grad[part] for grad, part in zip(grads, (own, own, own_keys), strict=True)]
        said = f"{name} {reduction} rank {rank}: "
        for a, b in zip((got, *got_grads), (value, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, said=said: said + m)


@pytest.mark.skipif(not testing.IN_FLOAT64, reason="compared in float64")
@pytest.mark.parametrize("world", [2, 3])
def test_every_objective_is_that_of_one_process(world, tmp_path):
    on_every_rank((_check_every_objective,), world, tmp_path)


@pytest.mark.parametrize("name", [*HAS_ROWS, "jensen-shannon"])
def test_what_is_no_group_is_refused(name):
    with pytest.raises(TypeError, match="group must be a ProcessGroup"):
        called(name, slice(None), *inputs(), group="all")


def test_every_function_of_all_ranks_rows_is_compared_with_one_process():
    of_ranks = {
        name
        for name in fastcl.__all__
        if inspect.isfunction(function := getattr(fastcl, name))
        and "group" in inspect.signature(function).parameters
    }
    texts = [path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py")]
    on_ranks = " ".join(text for text in texts if "on_every_rank(" in text)
    missing = {name for name in of_ranks if not re.search(rf"fastcl\.{name}\b", on_ranks)}
    assert not missing
