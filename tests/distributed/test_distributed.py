"""More than one process: loss and gradients are those of one process that holds every rank's rows."""

import itertools
from functools import cache, partial
from typing import NamedTuple

import formulas
import pytest
import torch
import torch.distributed as dist
from processes import on_every_rank
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

import fastcl
from fastcl import PairRule, testing

# rows of each rank: equal, uneven, and a rank without any
COUNTS = {2: ((4, 4), (5, 3)), 3: ((4, 1, 3), (5, 0, 2))}
WIDTH = 6
TEMPERATURE = torch.tensor(0.2, dtype=torch.float64)
QUEUE = fastcl.NegativeQueue(WIDTH, WIDTH)
QUEUE.enqueue(torch.eye(WIDTH))

NATIVE = "cpu" if "cpu" in testing.backends() else "chunked"


class Loss(NamedTuple):
    """Called as ``product(*rows, factor, labels, ...)``, and ``formula`` the same."""

    product: object
    formula: object
    views: int = 1  # losses per sample, view-major
    inputs: int = 2  # how many tensors of rows it takes


def _info_nce(negatives=lambda z: z, mode="unpaired"):
    """With a third input: negatives made of it."""

    def product(x, y, *rest, **options):
        *z, factor, _ = rest
        return fastcl.info_nce(x, y, *map(negatives, z), temperature=factor, negative_mode=mode, **options)

    def formula(x, y, *rest, reduction):
        *z, factor, _ = rest
        return formulas.info_nce(x, y, *map(negatives, z), temperature=factor, reduction=reduction)

    return Loss(product, formula)


def _queue(x, y, factor, _, **options):
    return fastcl.info_nce(x, y, QUEUE, factor, **options)


def _queue_formula(x, y, factor, _, reduction):
    return formulas.info_nce(x, y, QUEUE.keys.double(), temperature=factor, reduction=reduction)


def _nt_xent(x, y, factor, _, **options):
    return fastcl.nt_xent(x, y, factor, **options)


def _nt_xent_formula(x, y, factor, _, reduction):
    return formulas.nt_xent(x, y, temperature=factor, reduction=reduction)


def _clip(x, y, factor, _, **options):
    return fastcl.clip_loss(x, y, 1 / factor, **options)


def _clip_formula(x, y, factor, _, reduction):
    return formulas.clip_loss(x, y, logit_scale=1 / factor, reduction=reduction)


def _sup_con(labelled=True, views=2, **chosen):
    def call(function, x, y, factor, labels, **options):
        return function(
            torch.stack([x, y], dim=1), labels if labelled else None, temperature=factor, **chosen, **options
        )

    return Loss(partial(call, fastcl.sup_con), partial(call, formulas.sup_con), views)


LOSSES = {
    "nt_xent": Loss(_nt_xent, _nt_xent_formula, views=2),
    "clip_loss": Loss(_clip, _clip_formula),
    "info_nce": _info_nce(),
    "info_nce-negatives": _info_nce(lambda z: torch.cat([z, -z.flip(1)]))._replace(inputs=3),
    "info_nce-paired": _info_nce(lambda z: torch.stack([z, z.flip(1)], 1), "paired")._replace(inputs=3),
    "info_nce-queue": Loss(_queue, _queue_formula),
    "sup_con": _sup_con(),
    "sup_con-in": _sup_con(variant="in", base_temperature=0.2),
    "sup_con-one": _sup_con(views=1, contrast_mode="one"),
    "sup_con-simclr": _sup_con(labelled=False),
}


def whole_batch(count, inputs, dtype):
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randn(count, WIDTH, generator=generator).to(dtype) for _ in range(inputs)]
    return rows, torch.arange(count) % 3 - 1


def own_rows(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def assert_close(got, exact, tolerance, said):
    assert got.shape == exact.shape, said
    largest = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(
        got.double(), exact, rtol=0, atol=tolerance * largest, msg=lambda m: f"{said}: {m}"
    )


@cache
def exact_result(name, counts, dtype, reduction):
    """The formula on all rows: its value, the weight of each rank's result, and the weighted gradients."""
    loss = LOSSES[name]
    rows, labels = whole_batch(sum(counts), loss.inputs, dtype)
    leaves = [x.to(torch.float64, copy=True).requires_grad_() for x in (*rows, TEMPERATURE)]
    value = loss.formula(*leaves, labels, reduction=reduction)
    weights = 1 + torch.arange(len(value) if reduction == "none" else len(counts)).double()
    grads = torch.autograd.grad(value, leaves, weights if reduction == "none" else weights.sum())
    return value.detach(), weights, grads


def check_loss(name, counts, group, dtype, tolerance, reduction, ring):
    """What each rank returns, and the gradients of its weighted sum over ranks, against the formula."""
    loss, rank = LOSSES[name], dist.get_rank(group)
    said = f"{name} {counts} {dtype} {reduction} ring={ring} rank={rank}"
    exact, weights, exact_grads = exact_result(name, counts, dtype, reduction)
    rows, labels = whole_batch(sum(counts), loss.inputs, dtype)
    own = own_rows(counts, rank)
    weight = weights[rank]
    if reduction == "none":
        exact, weight = (x.unflatten(0, (loss.views, -1))[:, own].flatten() for x in (exact, weights))

    leaves = [*(x[own].clone().requires_grad_() for x in rows), TEMPERATURE.clone().requires_grad_()]
    got = loss.product(*leaves, labels[own], reduction=reduction, group=group, ring=ring)
    grads = torch.autograd.grad(got, leaves, weight.to(got.dtype))

    assert_close(got.detach(), exact, tolerance, said)
    for i, (grad, exact_grad) in enumerate(zip(grads[:-1], exact_grads[:-1], strict=True)):
        assert grad.dtype == dtype
        assert_close(grad, exact_grad[own], 4 * tolerance, f"{said} gradient {i}")
    dist.all_reduce(grads[-1], group=group)
    assert_close(grads[-1], exact_grads[-1], 4 * tolerance, f"{said} temperature")


def _check_every_loss(group):
    for name, counts, reduction, ring in itertools.product(
        LOSSES, COUNTS[group.size()], ("mean", "sum", "none"), (False, True)
    ):
        for backend, dtype, tolerance in (("chunked", torch.float64, 1e-12), (NATIVE, torch.float32, 2e-6)):
            with fastcl.use_backend(backend):
                check_loss(name, counts, group, dtype, tolerance, reduction, ring)


def _check_other_backends_dtypes_and_groups(group):
    for name in LOSSES:
        with fastcl.use_backend("reference"):
            check_loss(name, (4, 1, 3), group, torch.float64, 1e-12, "mean", ring=False)
        for ring in (False, True):
            check_loss(name, (4, 1, 3), group, torch.bfloat16, 2**-8, "mean", ring)
    last_two = dist.new_group([1, 2])
    if group.rank() > 0:
        for ring in (False, True):
            check_loss("clip_loss", (2, 3), last_two, torch.float64, 1e-12, "mean", ring)


class Model(nn.Module):
    """An encoder and a learned temperature. No BatchNorm: its synchronized form runs on GPUs only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, WIDTH))
        self.log_temperature = nn.Parameter(torch.tensor(-1.5))
        self.double()

    def forward(self, *views):
        return *map(self.encoder, views), self.log_temperature.exp()


def _check_parameter_gradients(group):
    model, alone = DistributedDataParallel(Model(), process_group=group), Model()
    for name, counts, reduction, ring in itertools.product(
        ("nt_xent", "clip_loss", "info_nce", "sup_con"), COUNTS[group.size()], ("mean", "sum"), (False, True)
    ):
        views, labels = whole_batch(sum(counts), 2, torch.float64)
        alone.zero_grad()
        LOSSES[name].formula(*alone(*views), labels, reduction=reduction).backward()

        own = own_rows(counts, dist.get_rank(group))
        model.zero_grad()
        outputs = model(*(view[own] for view in views))
        LOSSES[name].product(*outputs, labels[own], reduction=reduction, group=group, ring=ring).backward()
        for got, exact in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got.grad, exact.grad, rtol=1e-9, atol=1e-11)


def _saved(call):
    """Bytes that autograd saves for the backward pass of ``call``, shared storage counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = call()
    return sum(storage.nbytes() for storage in storages.values()), loss


def _check_the_ring_saves_one_shard(group):
    """Among three ranks autograd keeps what it keeps for one; gathered keys are kept whole."""
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    for name in ("nt_xent", "clip_loss", "sup_con", "info_nce-negatives"):
        loss = LOSSES[name]
        rows, labels = whole_batch(64, loss.inputs, torch.float64)
        leaves = [x.requires_grad_() for x in rows]
        call = partial(loss.product, *leaves, 0.2, labels)
        (one, _), (ring, _), (gathered, _) = (
            _saved(partial(call, group=ranks, ring=ring))
            for ranks, ring in ((alone, True), (group, True), (group, False))
        )
        shard = 64 * WIDTH * 8
        assert ring < one + shard / 8, name
        assert gathered > one + shard, name


def _check_frozen_keys(group):
    """Keys without gradient, as a momentum encoder's."""
    counts = COUNTS[group.size()][-1]
    (query, key), labels = whole_batch(sum(counts), 2, torch.float64)
    own = own_rows(counts, group.rank())
    exact_query = query.clone().requires_grad_()
    LOSSES["info_nce"].formula(exact_query, key, 0.2, labels, reduction="mean").backward()
    for ring in (False, True):
        leaf = query[own].clone().requires_grad_()
        fastcl.info_nce(leaf, key[own], temperature=0.2, group=group, ring=ring).backward()
        torch.testing.assert_close(leaf.grad, exact_query.grad[own] * group.size())


def _check_a_temperature_per_row(group):
    counts = COUNTS[group.size()][0]
    (query, key), _ = whole_batch(sum(counts), 2, torch.float64)
    temperature = torch.linspace(0.1, 1.0, len(query), dtype=torch.float64)[:, None]
    own = own_rows(counts, group.rank())
    whole = [x.clone().requires_grad_() for x in (query, key, temperature)]
    exact = fastcl.info_nce(*whole[:2], None, whole[2])
    exact.backward()
    queue = fastcl.info_nce(query, key, QUEUE, temperature)
    for ring in (False, True):
        leaves = [x[own].clone().requires_grad_() for x in (query, key, temperature)]
        got = fastcl.info_nce(*leaves[:2], None, leaves[2], group=group, ring=ring)
        got.backward()
        torch.testing.assert_close(got, exact)
        for x, y in zip(leaves, whole, strict=True):
            torch.testing.assert_close(x.grad, y.grad[own] * group.size())
        own_queue = fastcl.info_nce(query[own], key[own], QUEUE, temperature[own], group=group, ring=ring)
        torch.testing.assert_close(own_queue, queue)


def _check_statistics(group):
    """Of rows and of columns, with labels and ids that mean the same on every rank, each side its own."""
    counts = COUNTS[group.size()][0]
    (query, key), labels = whole_batch(sum(counts), 2, torch.float64)
    ids = torch.arange(len(query))
    sides = (labels, labels.flip(0)), (ids, (ids + 1) % len(query))
    own = own_rows(counts, group.rank())

    whole = testing.every_statistic(
        fastcl.similarity_stats(query, key, rule=PairRule(positive=sides[0], exclude=sides[1]), columns=True)
    )
    positive, exclude = (tuple(x[own] for x in side) for side in sides)
    rule = PairRule(positive=positive, exclude=exclude)
    for ring in (False, True):
        got = fastcl.similarity_stats(query[own], key[own], rule=rule, columns=True, group=group, ring=ring)
        for a, b in zip(testing.every_statistic(got), whole, strict=True):
            torch.testing.assert_close(a, b[own])


def _check_errors(group):
    x = torch.randn(4, 3, requires_grad=True)
    for transformed in (torch.func.grad, lambda f: lambda z: torch.func.jvp(f, (z,), (z,)), torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"group=.*torch\.func"):
            transformed(lambda z: fastcl.nt_xent(x.detach(), x.detach() + z.sum(), group=group))(x.detach())
    wide = torch.randn(4, 3 + group.rank())
    for ring in (False, True):
        loss = fastcl.nt_xent(x, x, group=group, ring=ring)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(ValueError, match=r"same number of components on every rank.*\[3, 4"):
            fastcl.nt_xent(wide, wide, group=group, ring=ring)
        with pytest.raises(ValueError, match=r"mask.*group"):
            fastcl.sup_con(x, mask=torch.eye(4), group=group, ring=ring)
    with fastcl.use_backend("reference"), pytest.raises(RuntimeError, match=r"'reference'.*ring=True"):
        fastcl.nt_xent(x, x, group=group, ring=True)
    first = dist.new_group([0])
    if group.rank() > 0:
        with pytest.raises(TypeError, match=r"group.*rank belongs to"):
            fastcl.nt_xent(x, x, group=first)


@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_parameter_gradients_are_those_of_one_process(world, tmp_path):
    on_every_rank((_check_every_loss, _check_parameter_gradients), world, tmp_path)


def test_other_backends_dtypes_and_groups_memory_and_errors(tmp_path):
    checks = (
        _check_other_backends_dtypes_and_groups,
        _check_the_ring_saves_one_shard,
        _check_frozen_keys,
        _check_a_temperature_per_row,
        _check_statistics,
        _check_errors,
    )
    on_every_rank(checks, 3, tmp_path)


def test_a_ring_needs_a_group():
    x = torch.ones(4, 3)
    for loss in (
        fastcl.nt_xent,
        fastcl.info_nce,
        partial(fastcl.clip_loss, logit_scale=1.0),
        lambda a, b, **options: fastcl.sup_con(a, torch.arange(4), **options),
    ):
        with pytest.raises(ValueError, match=r"ring=True.*group=None"):
            loss(x, x, ring=True)
        with pytest.raises(TypeError, match=r"group.*str"):
            loss(x, x, group="all")
