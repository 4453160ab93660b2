"""What only the Triton backend promises: few launches, rows of any width, reasons where it cannot serve."""

import pytest
import torch
from loss_table import LOSSES
from loss_table import check as check_loss

import fastcl
from fastcl import testing
from fastcl.backends.base import Request
from fastcl.backends.choice import choose

needs_kernels = pytest.mark.skipif(
    "triton" not in testing.backends(), reason="run with TRITON_INTERPRET=1, or on a GPU"
)


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, in order."""
    from fastcl.kernels import launch

    names, run = [], launch.launch

    def recorded(kernel, grid, *args, **options):
        names.append(kernel.fn.__name__)
        run(kernel, grid, *args, **options)

    monkeypatch.setattr(launch, "launch", recorded)
    with fastcl.use_backend("triton"):
        yield names


@needs_kernels
def test_a_step_of_nt_xent_is_four_launches(launched):
    z1, z2 = (torch.randn(20, 16, requires_grad=True) for _ in range(2))
    fastcl.nt_xent(z1, z2).backward()
    assert launched == ["unit_rows", "statistics", "losses", "loss_gradient"]


@needs_kernels
def test_the_queue_is_read_in_one_pass(launched):
    queue = fastcl.NegativeQueue(100, 16)
    query = torch.randn(20, 16, requires_grad=True)
    fastcl.info_nce(query, torch.randn(20, 16), queue).backward()
    assert launched == ["unit_rows", "attend", "losses", "pulled_gradient"]
    launched.clear()
    queue.enqueue(torch.randn(30, 16))
    assert launched == ["enqueue"]


@needs_kernels
def test_a_frozen_side_costs_nothing(launched):
    query, key = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16)
    ids = torch.zeros(20, dtype=torch.int64), torch.ones(30, dtype=torch.int64)
    stats = fastcl.similarity_stats(query, key, rule=fastcl.PairRule(positive=ids))
    launched.clear()
    (stats.lse_neg + stats.pos_sum).sum().backward()
    assert launched == ["gradient"]


@needs_kernels
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "info_nce-negatives", "clip_loss"])
@pytest.mark.parametrize("dtype", [d for d in testing.DTYPES if d != torch.float64], ids=str)
def test_losses_of_wide_rows(name, dtype):
    with fastcl.use_backend("triton"):
        for reduction in ("mean", "none"):
            case = testing.make_case("random", (33, 40, 300))
            check_loss(LOSSES[name], case, dtype, 0.1, reduction=reduction)


@pytest.mark.parametrize("width", [256, 257, 520])
@pytest.mark.parametrize("dtype", [d for d in testing.DTYPES if d != torch.float64], ids=str)
@needs_kernels
def test_rows_around_and_beyond_the_widest_tile(width, dtype):
    from test_stats import check

    with fastcl.use_backend("triton"):
        for kind in ("random", "duplicate-ids"):
            case = testing.make_case(kind, (33, 70, width))
            check(case, dtype, scale=0.1)
            check(case, dtype, ("scale",), normalize=True, columns=False)


def test_float64_goes_to_chunked_and_says_so():
    assert "triton" in fastcl.show_config()
    assert "float64, masks and lists of pair sets go to 'chunked'" in fastcl.show_config()
    if "triton" in testing.backends():
        x = torch.randn(3, 4, dtype=torch.float64)
        with (
            fastcl.use_backend("triton"),
            pytest.raises(RuntimeError, match="float64 is served by 'chunked'"),
        ):
            fastcl.nt_xent(x, x)
        assert choose(Request.of(x)).name != "triton"


@pytest.mark.skipif(testing.INTERPRETED or torch.cuda.is_available(), reason="kernels can run here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"'triton' is not available: .*(no GPU|not installed)"):
        fastcl.use_backend("triton")
    assert "triton     not available" in fastcl.show_config()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_gives_the_eager_result():
    z1, z2 = (torch.randn(64, 128, device="cuda", requires_grad=True) for _ in range(2))

    def step():
        loss = fastcl.nt_xent(z1, z2)
        return loss, *torch.autograd.grad(loss, (z1, z2))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z1.copy_(torch.randn_like(z1))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)
