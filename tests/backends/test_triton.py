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


@needs_kernels
@pytest.mark.parametrize("widths", [(256, 20), (300, 20), (20, 300), (300, 400)], ids=str)
def test_sums_of_wide_rows(widths):
    import test_logistic
    import test_soft_targets

    width, target_width = widths
    with fastcl.use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            shape = (33, 70, width)
            test_logistic.check(testing.make_case("random", shape), dtype, scale=0.1, per_row=True)
            test_soft_targets.check("random", shape, dtype, views=2, teachers=2, width=target_width)


@needs_kernels
def test_the_chunks_of_wide_soft_targets_add_up(monkeypatch):
    import test_soft_targets

    from fastcl.kernels import soft_targets

    monkeypatch.setattr(soft_targets, "_CHUNK_ELEMENTS", 0)
    with fastcl.use_backend("triton"):
        for widths in ((300, 20), (20, 300)):
            shape = (70, 40, widths[0])
            test_soft_targets.check("duplicate-ids", shape, views=2, teachers=2, width=widths[1])


@needs_kernels
def test_targets_of_another_dtype():
    """A teacher and its centre in float64."""
    query, key = (torch.randn(n, 16, requires_grad=True) for n in (20, 30))
    targets = torch.randn(20, 24, dtype=torch.float64), torch.randn(30, 24, dtype=torch.float64)
    options = {"target_bias": torch.randn(30, dtype=torch.float64), "reduction": "sum"}
    with fastcl.use_backend("triton"):
        loss = fastcl.soft_cross_entropy(query, key, *targets, **options)
    exact = testing.dense_soft_cross_entropy(query.double(), key.double(), *targets, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    for got, wanted in zip(*(torch.autograd.grad(x, (query, key)) for x in (loss, exact)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_both_softmaxes_are_found_in_one_pass(launched):
    query = torch.randn(3, 20, 16, requires_grad=True)
    key, targets = torch.randn(30, 16), (torch.randn(2, 20, 8), torch.randn(30, 8))
    loss = fastcl.soft_cross_entropy(query, key, *targets, normalize=False)
    assert launched == ["soft_cross_entropy", "soft_losses"]
    launched.clear()
    loss.backward()
    assert launched == ["soft_gradient"]


@needs_kernels
def test_a_step_of_siglip(launched):
    images, texts = (torch.randn(20, 16, requires_grad=True) for _ in range(2))
    loss = fastcl.siglip_loss(images, texts, 10.0, -10.0, normalize=False)
    assert launched == ["logistic"]
    launched.clear()
    loss.backward()
    assert launched == ["gradient", "gradient"]


@needs_kernels
def test_rules_that_are_more_than_a_test_of_ids_are_refused():
    x = torch.randn(3, 4)
    mask, named = torch.eye(3) > 0, torch.zeros(3, 1, dtype=torch.int64)
    with fastcl.use_backend("triton"):
        with pytest.raises(RuntimeError, match="served by 'chunked'"):
            fastcl.similarity_logistic(x, x, rule=fastcl.PairRule(positive=mask))
        for rule in ({"exclude": mask}, {"exclude_keys": named}, {"within": (named[:, 0], named[:, 0])}):
            with pytest.raises(RuntimeError, match="served by 'chunked'"):
                fastcl.soft_cross_entropy(x, x, x, x, rule=fastcl.PairRule(**rule))


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


def test_every_kernel_has_a_tile_on_every_target():
    """Which the interpreter, that takes one tile for all, would not miss."""
    pytest.importorskip("triton")
    from bench.aot import TARGETS
    from bench.tiles import FUNCTIONS
    from fastcl.kernels import tiles

    for target in TARGETS:
        for kernel in FUNCTIONS:
            for dtype in tiles.DTYPE_NAMES:
                for width in tiles.WIDTHS:
                    assert tiles.tile(kernel, target, dtype, width).block_m >= 16
