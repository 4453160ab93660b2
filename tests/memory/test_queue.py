"""The queue: first in, first out, unit rows; a loss on it is the loss on the keys it holds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_every_rank
from torch import nn
from torch.library import opcheck

import fastcl
from fastcl import NegativeQueue, info_nce, testing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dense(query, positive, keys, temperature, excluded=None):
    """MoCo's loss: cross-entropy of the positive among the positive and all keys, in float64."""
    query, positive = F.normalize(query.double(), dim=1), F.normalize(positive.double(), dim=1)
    logits = query @ keys.double().T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    logits = torch.cat([(query * positive).sum(1, keepdim=True) / temperature, logits], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


@settings(deadline=None, max_examples=10 if testing.INTERPRETED else 100)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 25), min_size=30, max_size=60))
def test_first_in_first_out(size, batches):
    queue = NegativeQueue(size, 2, with_ids=True)
    fifo, row, count = list(zip(queue.keys.tolist(), queue.ids.tolist(), strict=True)), 0, 0
    for n in batches:
        ids = torch.arange(count, count + n)
        keys = torch.stack([ids.cos(), ids.sin()], dim=1) * 3
        queue.enqueue(keys, ids)
        for key, number in zip(F.normalize(keys, dim=1).tolist(), ids.tolist(), strict=True):
            fifo[row] = (key, number)
            row = (row + 1) % size
        count += n
        assert queue.pointer.item() == row
        assert queue.ids.tolist() == [number for _, number in fifo]
        torch.testing.assert_close(queue.keys, torch.tensor([key for key, _ in fifo]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_with_random_unit_rows(dtype):
    queue = NegativeQueue(100, 16, dtype=dtype, with_ids=True)
    assert queue.keys.dtype == dtype
    torch.testing.assert_close(queue.keys.float().norm(dim=1), torch.ones(100), atol=1e-2, rtol=0)
    assert (queue.ids == -1).all()
    assert NegativeQueue(3, 2).ids is None


def test_save_load_continue_is_bit_equal(tmp_path):
    queue = NegativeQueue(7, 4, with_ids=True)
    queue.enqueue(torch.randn(5, 4), torch.arange(5))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    loaded = NegativeQueue(7, 4, with_ids=True)
    loaded.load_state_dict(torch.load(tmp_path / "queue.pt"))
    for _ in range(3):
        keys, ids = torch.randn(4, 4), torch.randint(100, (4,))
        queue.enqueue(keys, ids)
        loaded.enqueue(keys, ids)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_loads_the_official_moco_layout():
    official = {"module.queue": F.normalize(torch.randn(4, 6), dim=0), "module.queue_ptr": torch.tensor([2])}
    queue = NegativeQueue(6, 4)
    queue.load_moco_state_dict(official)
    assert torch.equal(queue.keys, official["module.queue"].T)
    assert queue.pointer.item() == 2
    with pytest.raises(KeyError, match="queue_ptr"):
        queue.load_moco_state_dict({"queue": torch.randn(4, 6)})
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(6, 4\)"):
        queue.load_moco_state_dict({"queue": torch.randn(6, 4), "queue_ptr": torch.zeros(1)})


class OfficialMoCo(nn.Module):
    """The buffers of MoCo's official code, and how it writes them."""

    def __init__(self, dim, size):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def enqueue(self, keys):
        pointer = int(self.queue_ptr)
        self.queue[:, pointer : pointer + len(keys)] = keys.T
        self.queue_ptr[0] = (pointer + len(keys)) % self.queue.shape[1]


@pytest.mark.parametrize("stored", DTYPES)
def test_writes_the_official_moco_layout(stored):
    """The official module takes it strictly, goes on as the queue does, and is read back."""
    queue, official, again = NegativeQueue(6, 4, dtype=stored), OfficialMoCo(4, 6), NegativeQueue(6, 4)
    queue.enqueue(torch.randn(2, 4))
    written = queue.moco_state_dict()
    described = {name: (x.shape, x.dtype, x.is_contiguous()) for name, x in written.items()}
    assert described == {n: (x.shape, x.dtype, True) for n, x in official.state_dict().items()}
    official.load_state_dict(written)
    again.load_moco_state_dict(written)
    for _ in range(3):
        keys = F.normalize(torch.randn(2, 4), dim=1)
        for each in (queue, official, again):
            each.enqueue(keys)
    for other in (official.state_dict(), again.moco_state_dict()):
        torch.testing.assert_close(queue.moco_state_dict(), dict(other), rtol=0, atol=torch.finfo(stored).eps)
    assert not torch.equal(written["queue"], official.queue)  # a copy, which enqueue does not change


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [d for d in testing.DTYPES if d != torch.float16], ids=str)
def test_loss_is_that_of_the_stored_keys(backend, stored, dtype):
    torch.manual_seed(0)
    queue = NegativeQueue(300, 33, dtype=stored, with_ids=True)
    queue.enqueue(torch.randn(200, 33), torch.arange(200) % 50)
    query_ids = torch.randint(0, 60, (20,))
    excluded = query_ids[:, None] == queue.ids[None]
    results = []
    for run in (fastcl.info_nce, None):
        query, positive = (torch.randn(20, 33, generator=testing.generator(s)) for s in (1, 2))
        query, positive = (x.to(dtype).requires_grad_() for x in (query, positive))
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if run:
            loss = run(query, positive, queue, temperature, query_ids=query_ids)
        else:
            loss = dense(query, positive, queue.keys, temperature, excluded)
        loss.backward()
        results.append([loss, query.grad, positive.grad, temperature.grad])
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=tolerance, atol=tolerance * 1e-2)


def test_enqueue_between_loss_and_backward(backend):
    """MoCo's order: the gradient is that of the keys the loss saw."""
    if backend == "reference":
        return
    queue = NegativeQueue(50, 8)
    positive = torch.randn(10, 8)
    query = torch.randn(10, 8, requires_grad=True)
    before = copy.deepcopy(queue.keys)
    loss = fastcl.info_nce(query, positive, queue, 0.2)
    queue.enqueue(positive)
    loss.backward()
    expected = query.detach().clone().requires_grad_()
    dense(expected, positive, before, 0.2).backward()
    torch.testing.assert_close(query.grad, expected.grad)


@pytest.mark.skipif(testing.INTERPRETED, reason="the interpreter's memory, not the kernels'")
def test_keys_are_used_in_place():
    queue = NegativeQueue(20_000, 64)
    query = torch.randn(8, 64, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        fastcl.info_nce(query, torch.randn(8, 64), queue).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < queue.keys.nbytes / 10


def test_enqueue_checks_its_input():
    queue, with_ids = NegativeQueue(5, 3), NegativeQueue(5, 3, with_ids=True)
    for call, error, said in (
        (lambda: queue.enqueue(torch.randn(2, 4)), ValueError, r"\(N, 3\).*\(2, 4\)"),
        (lambda: queue.enqueue(torch.randn(3)), ValueError, r"keys.*\(3,\)"),
        (lambda: queue.enqueue(torch.ones(2, 3, dtype=torch.int64)), TypeError, "keys.*int64"),
        (lambda: queue.enqueue(torch.randn(2, 3, device="meta")), ValueError, "keys.*cpu.*meta"),
        (lambda: queue.enqueue(torch.randn(2, 3), torch.arange(2)), ValueError, "with_ids"),
        (lambda: with_ids.enqueue(torch.randn(2, 3)), ValueError, "ids are missing"),
        (lambda: with_ids.enqueue(torch.randn(2, 3), torch.arange(3)), ValueError, r"ids.*\(2,\).*\(3,\)"),
        (lambda: with_ids.enqueue(torch.randn(2, 3), torch.rand(2)), TypeError, "ids.*float32"),
        (lambda: NegativeQueue(0, 3), ValueError, "size.*0"),
        (lambda: NegativeQueue(3, 3, dtype=torch.float64), TypeError, "dtype.*float64"),
        (
            lambda: fastcl.info_nce(torch.randn(2, 4), torch.randn(2, 4), queue),
            ValueError,
            r"\(5, 3\).*\(2, 4\)",
        ),
        (
            lambda: fastcl.info_nce(torch.randn(2, 3), torch.randn(2, 3), queue, query_ids=torch.arange(2)),
            ValueError,
            "with_ids",
        ),
    ):
        with pytest.raises(error, match=said):
            call()
    before = queue.keys.clone()
    queue.enqueue(torch.empty(0, 3))
    assert torch.equal(queue.keys, before)


def test_rows_that_are_not_finite_are_named_on_request():
    queue = NegativeQueue(10, 3)
    queue.validate()
    queue.enqueue(torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 1.0]]))
    with pytest.raises(ValueError, match="rows 1"):
        queue.validate()


def test_enqueue_is_an_op_and_compiles(backend):
    queue = NegativeQueue(6, 4, with_ids=True)
    arguments = (queue.keys, queue.ids, queue.pointer, torch.randn(4, 4), torch.arange(4), backend)
    opcheck(torch.ops.fastcl.enqueue, arguments)
    opcheck(torch.ops.fastcl.enqueue, (queue.keys, None, queue.pointer, torch.randn(9, 4), None, backend))
    twin = copy.deepcopy(queue)

    def step(queue, query, keys, ids):
        loss = fastcl.info_nce(query, keys, queue, 0.2)
        queue.enqueue(keys, ids)
        return loss

    query, keys, ids = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4), torch.arange(4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queue, query, keys, ids), step(twin, query, keys, ids))
    assert torch.equal(queue.keys, twin.keys)
    assert queue.pointer == twin.pointer == 4


def _check_keys_are_all_ranks_in_rank_order(group):
    queue = NegativeQueue(8, 2, with_ids=True)
    ids = torch.tensor([10, 11, 12]) if group.rank() == 0 else torch.tensor([20])
    queue.enqueue(torch.stack([ids.cos(), ids.sin()], dim=1), ids, group=group)
    assert queue.ids.tolist() == [10, 11, 12, 20, -1, -1, -1, -1]
    angles = queue.ids[:4].float()
    torch.testing.assert_close(queue.keys[:4], torch.stack([angles.cos(), angles.sin()], dim=1))


def test_all_ranks_keys_in_rank_order(tmp_path):
    on_every_rank((_check_keys_are_all_ranks_in_rank_order,), 2, tmp_path)


def test_ids_may_be_strided(backend):
    queue = NegativeQueue(12, 4, with_ids=True)
    queue.enqueue(torch.randn(12, 4), (torch.arange(24) % 5)[::2])
    query, positive = torch.randn(2, 6, 4)
    strided = (torch.arange(12) % 5)[::2]
    assert not strided.is_contiguous()
    expected = info_nce(query, positive, queue, query_ids=strided.contiguous())
    assert torch.equal(info_nce(query, positive, queue, query_ids=strided), expected)


QUEUE_LOSSES = {
    "in one op": lambda q, k, queue: fastcl.info_nce(q, k, queue),
    "by its statistics": lambda q, k, queue: fastcl.info_nce(q, k, queue, reduction="none").sum(),
    "mochi": lambda q, k, queue: fastcl.mochi_loss(q, k, queue, n_hard=4, n_mix=2, n_query_mix=2),
}


@pytest.mark.parametrize("name", QUEUE_LOSSES)
def test_an_overwritten_queue_has_first_derivatives_only(name):
    query, key = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    queue = fastcl.NegativeQueue(8, 3)
    loss = QUEUE_LOSSES[name](query, key, queue)
    expected = torch.autograd.grad(loss, query, retain_graph=True)
    queue.enqueue(key)
    torch.testing.assert_close(torch.autograd.grad(loss, query, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="the keys were modified in place"):
        torch.autograd.grad(loss, query, create_graph=True)
