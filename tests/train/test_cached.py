"""A cached step's gradients are those of all chunks' graphs at once, in the memory of one."""

from __future__ import annotations

import copy
import weakref
from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

pytest.importorskip("fastcl.train")

import torch.distributed as dist
from processes import on_every_rank

import fastcl
from fastcl.train import cached_step

WIDTH = 6
SIZES = [5, 3, 4]
Views = namedtuple("Views", "first second")


def rows(count: int = sum(SIZES)) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(SIZES)


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), *middle, nn.Tanh(), nn.Linear(8, WIDTH)).double()


def contrast(z: Tensor) -> Tensor:
    return fastcl.nt_xent(z, z.flip(1).roll(1, 0), 0.3)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters()]


def whole_step(encoder, inputs, loss, join=torch.cat):
    """The same chunks, one after the other, with all their graphs in memory."""
    value = loss(join([encoder(x) for x in inputs]))
    value.backward()
    return value.detach()


def same(got, exact) -> None:
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)


def check(module: nn.Module, encode=None, loss=contrast, join=torch.cat) -> None:
    """Loss, gradients, buffers and the random numbers that follow are those of a step with all graphs."""
    twin, inputs = copy.deepcopy(module), chunks(rows())
    torch.manual_seed(1)
    exact = whole_step(encode(twin) if encode else twin, inputs, loss, join)
    following = torch.rand(3)
    torch.manual_seed(1)
    got = cached_step(encode(module) if encode else module, inputs, loss)
    assert torch.rand(3).equal(following)
    assert not got.requires_grad
    same(got, exact)
    same(grads(module), grads(twin))
    same(dict(module.named_buffers()), dict(twin.named_buffers()))


class TestGradients:
    @pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Identity()], ids=str)
    def test_networks_that_treat_rows_apart_get_the_whole_batch_s(self, norm: nn.Module) -> None:
        module = network(norm)
        twin, x = copy.deepcopy(module), rows()
        exact = contrast(twin(x))
        exact.backward()
        same(cached_step(module, chunks(x), contrast), exact.detach())
        same(grads(module), grads(twin))

    def test_random_numbers_are_replayed(self) -> None:
        check(network(nn.Dropout(0.4)))
        check(network(nn.Dropout(0.4)), loss=lambda z: contrast(z + 0.1 * torch.rand(z.shape)))

    def test_batch_normalization_sees_each_chunk_and_its_statistics_advance_once(self) -> None:
        module = network(nn.BatchNorm1d(8))
        check(module)
        assert module[1].num_batches_tracked.item() == len(SIZES)
        check(network(nn.BatchNorm1d(8, momentum=None)))

    def test_buffers_on_which_the_output_depends_are_replayed(self) -> None:
        check(network(spectral_norm(nn.Linear(8, 8))))

    def test_a_buffer_that_is_replaced(self) -> None:
        class Centre(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("centre", torch.zeros(8, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
                return x - self.centre

        check(network(Centre()))

    def test_a_function_that_calls_modules(self) -> None:
        module = network(nn.BatchNorm1d(8), nn.Dropout(0.2))
        check(module, encode=lambda m: lambda x: m(2 * x))
        assert module[1].num_batches_tracked.item() == len(SIZES)

    def test_gradients_add_up(self) -> None:
        module, inputs = network(), chunks(rows())
        cached_step(module, inputs, contrast)
        once = [g.clone() for g in grads(module)]
        cached_step(module, iter(inputs), contrast)
        same(grads(module), [2 * g for g in once])

    def test_the_loss_s_own_parameters(self) -> None:
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        x = rows()
        cached_step(network(), chunks(x), lambda z: fastcl.nt_xent(z, z.roll(1, 0), temperature))
        got, temperature.grad = temperature.grad, None
        z = network()(x)
        fastcl.nt_xent(z, z.roll(1, 0), temperature).backward()
        same(got, temperature.grad)

    def test_a_frozen_encoder_and_a_loss_of_nothing(self) -> None:
        module = network().requires_grad_(False)
        weight = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
        cached_step(module, chunks(rows()), lambda z: contrast(z * weight))
        assert weight.grad.any()
        module.requires_grad_()
        cached_step(module, chunks(rows()), lambda z: weight.sum())
        assert all(g is None for g in grads(module))


class Heads(nn.Module):
    """Two tensors that share a trunk, and one that has no gradient."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.trunk, self.kind = network(nn.BatchNorm1d(8)), kind

    def forward(self, x: Tensor):
        z = self.trunk(x)
        return self.kind(z, z.flip(1) ** 2, x.argmax(1))


def dictionary(a: Tensor, b: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"query": a, "key": b, "ids": ids}


def joined(outputs):
    if isinstance(outputs[0], dict):
        return {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    return tuple(map(torch.cat, zip(*outputs, strict=True)))


class TestStructures:
    def test_tuples_and_mappings_are_concatenated_alike(self) -> None:
        def of_tuple(z) -> Tensor:
            assert isinstance(z, tuple)
            assert z[2].dtype == torch.int64
            return fastcl.clip_loss(z[0], z[1], 5.0)

        def of_mapping(z) -> Tensor:
            assert z["ids"].shape == (sum(SIZES),)
            return fastcl.sup_con(torch.stack([z["query"], z["key"]], 1), z["ids"])

        check(Heads(lambda *tensors: tensors), loss=of_tuple, join=joined)
        check(Heads(dictionary), loss=of_mapping, join=joined)

    def test_a_named_tuple_keeps_its_names(self) -> None:
        check(
            Heads(lambda a, b, _: Views(a, b)),
            loss=lambda z: fastcl.info_nce(*z) if isinstance(z, tuple) else None,
            join=joined,
        )
        cached_step(
            Heads(lambda a, b, _: Views(a, b)), chunks(rows()), lambda z: fastcl.info_nce(z.first, z.second)
        )

    def test_inputs_of_any_kind(self) -> None:
        module, x = network(), rows()
        twin = copy.deepcopy(module)
        texts = [{"rows": part, "name": "a"} for part in chunks(x)]
        cached_step(lambda batch: module(batch["rows"]), texts, contrast)
        contrast(twin(x)).backward()
        same(grads(module), grads(twin))


class TestPrecision:
    def test_a_scaler_scales_the_gradients_and_not_the_loss(self) -> None:
        module, inputs = network().float(), [x.float() for x in chunks(rows())]
        twin = copy.deepcopy(module)
        plain = cached_step(twin, inputs, contrast)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.testing.assert_close(cached_step(module, inputs, contrast, scaler=scaler), plain)
        torch.testing.assert_close(grads(module), [1024 * g for g in grads(twin)])
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin)]
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        torch.testing.assert_close(module.state_dict(), twin.state_dict())

    def test_autocast_around_the_step(self) -> None:
        module, inputs = network(nn.LayerNorm(8)).float(), [x.float() for x in chunks(rows())]
        twin = copy.deepcopy(module)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = cached_step(module, inputs, contrast)
            exact = contrast(torch.cat([twin(x) for x in inputs]))
        exact.backward()
        torch.testing.assert_close(got, exact.detach())
        for mine, theirs in zip(grads(module), grads(twin), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-2 * theirs.abs().max().item())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_random_numbers_of_a_gpu_are_replayed(self) -> None:
        module = network(nn.Dropout(0.4)).cuda()
        twin, inputs = copy.deepcopy(module), chunks(rows().cuda())
        torch.manual_seed(1)
        whole_step(twin, inputs, contrast)
        following = torch.rand(3, device="cuda")
        torch.manual_seed(1)
        cached_step(module, inputs, contrast)
        assert torch.rand(3, device="cuda").equal(following)
        same(grads(module), grads(twin))


def test_one_chunk_s_activations_are_held_at_a_time() -> None:
    held, most = weakref.WeakSet(), 0

    class Held:
        def __init__(self, x: Tensor) -> None:
            nonlocal most
            self.x = x
            held.add(self)
            most = max(most, len(held))

    inputs = rows(64).split(4)

    def peak(step) -> int:
        nonlocal most
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda saved: saved.x):
            step(network(), inputs, lambda z: z.square().sum())
        return most

    assert peak(cached_step) * len(inputs) <= peak(whole_step)


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "error", "said"),
        [
            ({"chunks": rows()}, TypeError, r"chunks.*split.*\(12, 6\)"),
            ({"chunks": []}, ValueError, "chunks.*none"),
            ({"encoder": lambda x: 3}, TypeError, "encoder.*int"),
            ({"encoder": lambda x: (x, None)}, TypeError, "encoder.*tuple of Tensor, NoneType"),
            ({"encoder": lambda x: x.sum()}, ValueError, "encoder.*row per sample"),
            (
                {"encoder": lambda x: x[:, : len(x)]},
                ValueError,
                r"encoder.*\(\'n\', 5\).*\(\'n\', 3\).*chunk 1",
            ),
            ({"encoder": lambda x: x if len(x) > 3 else {"x": x}}, ValueError, "encoder.*'x'.*chunk 1"),
            ({"loss": lambda z: z}, ValueError, r"loss.*\(12, 6\)"),
            ({"loss": lambda z: 1.0}, TypeError, "loss.*float"),
        ],
    )
    def test_arguments(self, given, error, said) -> None:
        arguments = {"encoder": lambda x: x, "chunks": chunks(rows()), "loss": contrast, **given}
        with pytest.raises(error, match=said):
            cached_step(**arguments)


def _check_one_synchronization(group: dist.ProcessGroup, wrapped: bool) -> None:
    module = network(nn.LayerNorm(8))
    alone = copy.deepcopy(module)
    model = DistributedDataParallel(module, process_group=group)
    synchronized = []

    def count(state, bucket):
        synchronized.append(bucket.index())
        return (
            dist.distributed_c10d.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True)
            .get_future()
            .then(lambda done: done.value()[0])
        )

    model.register_comm_hook(None, count)
    x = rows(16)
    own = x.chunk(group.size())[group.rank()]
    encoder = (lambda z: model(z)) if wrapped else model
    parts = own.split(2 + group.rank())  # the ranks' chunks need not match
    for step in range(1, 3):
        model.zero_grad()
        got = cached_step(encoder, parts, partial(_two_views, group=group))
        alone.zero_grad()
        exact = _two_views(alone(x))
        exact.backward()
        same(got, exact.detach())
        same(grads(module), grads(alone))
        assert len(synchronized) == step


def _two_views(z: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    return fastcl.clip_loss(z, z.flip(1), 3.0, group=group)


def _check_running_statistics(group: dist.ProcessGroup) -> None:
    """Of rank 0's chunks, broadcast by the next forward pass, as in any other step."""
    module = network(nn.BatchNorm1d(8))
    models = [DistributedDataParallel(copy.deepcopy(module), process_group=group) for _ in range(2)]
    parts = rows(24).chunk(group.size())[group.rank()].split(4)
    for _ in range(2):
        for model in models:
            model.zero_grad()
        cached_step(models[0], parts, contrast)
        with models[1].no_sync():
            z = [models[1](x) for x in parts[:-1]]
        contrast(torch.cat([*z, models[1](parts[-1])])).backward()
        same(grads(models[0]), grads(models[1]))
        same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))


def test_two_processes_synchronize_once_per_step(tmp_path) -> None:
    checks = (
        partial(_check_one_synchronization, wrapped=False),
        partial(_check_one_synchronization, wrapped=True),
        _check_running_statistics,
    )
    on_every_rank(checks, 2, tmp_path)
