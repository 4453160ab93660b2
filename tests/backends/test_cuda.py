"""The CUDA backend where there is no GPU: it says why it is missing, and what it would not serve."""

from dataclasses import replace

import pytest
import torch
from loss_table import LOSSES, check
from test_mochi import check as check_mochi

import fastcl
from fastcl import testing
from fastcl.backends import cuda, native
from fastcl.backends.base import Request
from fastcl.backends.choice import choose
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import VIEWS, OnePositive

built = pytest.mark.skipif(not cuda.is_built(), reason="built without CUDA kernels")
on_gpu = pytest.mark.skipif(testing.DEVICE.type != "cuda", reason="needs FASTCL_TEST_DEVICE=cuda")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
H100 = (132, 227 << 10, "")


def request(samples=64, device="cuda", dtype=torch.float32, reduction="mean", negatives=None):
    z = torch.empty(samples, 8, device="meta", dtype=dtype)
    args = OnePositive(z, z, negatives, torch.ones(()), layout=VIEWS, reduction=reduction)
    return Request(torch.device(device), dtype, loss=args)


def sup_con_request(samples=64, reduction="none", positive_mask=None):
    z = torch.empty(samples, 8, device="meta")
    args = ManyPositives(z, None, torch.ones(()), z, reduction=reduction, positive_mask=positive_mask)
    return replace(Request.of_loss(args), device=torch.device("cuda"))


def mochi_request(n_hard, dtype=torch.float32):
    z, ranks = (torch.empty(64, 8, device="meta", dtype=x) for x in (dtype, torch.int64))
    args = Mochi(z, z, torch.ones(()), z, ranks, ranks, z, ranks, z, n_hard)
    return replace(Request.of_mochi(args), device=torch.device("cuda"))


def test_show_config_says_that_it_never_ran():
    line = next(line for line in fastcl.show_config().splitlines() if line.split()[0] == "cuda")
    assert line.endswith("(has never run on a GPU: off in 'auto')")


@no_gpu
def test_selecting_it_says_what_is_missing():
    expected = "no CUDA GPU" if cuda.is_built() else "FASTCL_BUILD"
    with pytest.raises(RuntimeError, match=f"'cuda' is not available.*{expected}"):
        fastcl.use_backend("cuda")


def test_auto_passes_it_over(monkeypatch):
    monkeypatch.setattr(cuda, "_limits", lambda device: H100)
    if native.missing_reason() is None:
        for asked in (request(), sup_con_request(reduction="mean"), mochi_request(n_hard=1024)):
            assert cuda.unsupported_reasons(asked) == []
    assert choose(request()).name != "cuda"


@pytest.mark.skipif(native.missing_reason() is not None, reason="the extension says what fits")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(device="cpu"), "on cpu"),
        (request(dtype=torch.float64), "float64"),
        (request(reduction="none"), "mean or sum"),
        (request(negatives=torch.empty(3, 8, dtype=torch.float16)), "negatives are torch.float16"),
        (request(samples=1561), "1561 queries"),
        (request(samples=2161, dtype=torch.bfloat16), "2161 queries"),
        (sup_con_request(), "whole losses only"),
        (sup_con_request(reduction="mean", positive_mask=torch.ones(8, 8)), "dense mask"),
        (sup_con_request(samples=3121, reduction="mean"), "3121 queries"),
        (Request(torch.device("cuda"), torch.float32), "whole losses only"),
        (Request(torch.device("cuda"), torch.float64, enqueue=True), "float64"),
        (mochi_request(n_hard=1024, dtype=torch.float64), "float64"),
        (mochi_request(n_hard=6000), "6000 hard keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(asked, reason, monkeypatch):
    monkeypatch.setattr(cuda, "_limits", lambda device: H100)
    assert any(reason in text for text in cuda.unsupported_reasons(asked))


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(cuda, "_limits", lambda device: (0, 0, "the GPU's compute capability is below 8.0"))
    assert cuda.unsupported_reasons(request()) == ["the GPU's compute capability is below 8.0"]


@built
@no_gpu
def test_a_driver_that_is_missing_or_too_old_is_a_reason():
    *_, missing = torch.ops.fastcl_native.cuda_limits(0)
    assert missing == "the driver is older than the CUDA that the kernels were built with"


@built
def test_the_ops_have_a_cuda_kernel():
    for space, names in (
        ("fastcl", ("one_positive", "sup_con")),
        ("fastcl_native", ("enqueue", "mix_negatives")),
    ):
        for name in names:
            assert hasattr(getattr(torch.ops, space), name)  # that they have a schema, too
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{space}::{name}", "CUDA")


@on_gpu
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "info_nce-paired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 2), (63, 64, 65), (252, 507, 123), (800, 300, 128)], ids=str)
def test_losses_on_the_gpu(name, dtype, shape):
    with fastcl.use_backend("cuda"):
        for kind in ("random", "peaked", "collapsed"):
            case = testing.make_case(kind, shape, seed=50)
            check(LOSSES[name], case, dtype, 0.1, factor_dtype=torch.float32)


@on_gpu
def test_enqueue_on_the_gpu():
    queues = [fastcl.NegativeQueue(300, 40, device="cuda", with_ids=True) for _ in range(2)]
    queues[1].load_state_dict(queues[0].state_dict())
    for count in (100, 150, 90, 400):
        keys, ids = torch.randn(count, 40, device="cuda"), torch.arange(count, device="cuda")
        for queue, name in zip(queues, ("cuda", "chunked"), strict=True):
            with fastcl.use_backend(name):
                queue.enqueue(keys, ids)
        torch.testing.assert_close(queues[0].state_dict(), queues[1].state_dict())


@on_gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mochi_on_the_gpu(dtype, stored):
    with fastcl.use_backend("cuda"):
        for reduction in ("mean", "none"):
            check_mochi(dtype, stored, reduction)


@on_gpu
def test_captured_in_a_graph_and_replayed():
    z1, z2 = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
    temperature = torch.full((), 0.5, device="cuda")
    with fastcl.use_backend("cuda"):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            fastcl.nt_xent(z1, z2, temperature).backward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = fastcl.nt_xent(z1, z2, temperature)
        z1.data.normal_()
        graph.replay()
        assert torch.equal(loss, fastcl.nt_xent(z1, z2, temperature))
