"""The CUDA kernels, run on the host: the same source, a thread per warp, held to the same budgets."""

import warnings

import pytest
import torch
from loss_table import LOSSES, check

import fastcl
from fastcl import cuda, native, testing
from fastcl.one_positive import BATCH, VIEWS

pytestmark = pytest.mark.skipif(
    native.missing_reason() is not None or testing.DEVICE.type != "cpu", reason="runs in the native extension"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("nt_xent", "info_nce", "info_nce-negatives", "clip_loss", "clip_loss-unnormalized")
ROOMY = 1 << 30  # bytes of shared memory

every_loss = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Grid:
    """What the kernels are given: how many blocks may live at once, and their shared memory."""

    def __init__(self):
        self.blocks, self.shared_bytes = 6, ROOMY

    def __call__(self, *arguments):
        return torch.ops.fastcl_native.host_one_positive(*arguments, self.blocks, self.shared_bytes)

    def enqueue(self, *arguments):
        torch.ops.fastcl_native.host_enqueue(*arguments[:5], self.blocks)


@pytest.fixture
def grid():
    """Puts the CUDA kernels in the place of the CPU's, under the public API."""
    grid, library = Grid(), torch.library.Library("fastcl", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden
        library.impl("one_positive", grid, "CPU", allow_override=True)
        library.impl("enqueue", grid.enqueue, "CPU")
    with fastcl.use_backend("cpu"):
        yield grid
    library._destroy()


@every_loss
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (63, 64, 65), (64, 65, 63), (100, 130, 20)], ids=str)
def test_losses(name, dtype, shape, grid):
    for kind in ("random", "peaked", "collapsed"):
        for temperature, reduction in ((0.5, "mean"), (0.07, "sum")):
            case = testing.make_case(kind, shape, seed=30)
            check(LOSSES[name], case, dtype, temperature, factor_dtype=torch.float64, reduction=reduction)


@every_loss
@every_dtype
@pytest.mark.parametrize("blocks", [1, 3, 16, 40])
def test_any_division_into_squares(name, dtype, blocks, grid):
    """One square of several tiles, a few, or many of one tile; the last ones ragged; blocks without one."""
    grid.blocks = blocks
    for kind in ("random", "collapsed"):
        check(LOSSES[name], testing.make_case(kind, (129, 200, 70), seed=31), dtype, 0.1)


@every_loss
@every_dtype
@pytest.mark.parametrize("width", [1, 15, 16, 17, 127, 129, 300])
def test_widths_around_fragments_and_stages(name, dtype, width, grid):
    case = testing.make_case("random", (9, 11, width), seed=32)
    check(LOSSES[name], case, dtype, 0.2, factor_dtype=torch.float64)


@every_loss
@every_dtype
@pytest.mark.parametrize("needed", range(4))
def test_only_the_wanted_gradients(name, dtype, needed, grid):
    """What is not asked for is neither computed nor needed by the rest."""
    case = testing.make_case("random", (20, 30, 10), seed=33)
    tensors = [x.to(dtype) for x in LOSSES[name].inputs(case)]
    tensors.append(torch.tensor(LOSSES[name].factor(0.3), dtype=torch.float64))

    def run(wanted):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        value = LOSSES[name].product(*leaves, reduction="mean")
        if wanted:
            value.backward()
        return value.detach(), [x.grad for x in leaves]

    everything = range(len(tensors))
    alone = (needed % len(tensors),) if needed < len(tensors) else ()
    (value, grads), (expected, expected_grads) = run(alone), run(everything)
    assert torch.equal(value, expected)
    assert torch.equal(run(())[0], expected)
    for i in alone:
        torch.testing.assert_close(grads[i], expected_grads[i], rtol=0, atol=0)


@every_dtype
def test_long_short_and_strided_rows(dtype, grid):
    """An inverse norm's power of two is taken out before half types are multiplied."""
    z = torch.randn(2, 12, 33, generator=torch.Generator().manual_seed(34))
    lengths = torch.logspace(-3, 3, 12)[:, None]
    case = testing.make_case("random", (12, 1, 33))
    case = case._replace(query=(z[0] * lengths).double(), positive=(z[1] * lengths.flip(0)).double())
    check(LOSSES["nt_xent"], case, dtype, 0.1)
    strided = case.query.to(dtype).T.contiguous().T, case.positive.to(dtype).repeat(2, 1)[::2]
    expected = fastcl.nt_xent(*(x.contiguous() for x in strided))
    assert torch.equal(fastcl.nt_xent(*strided), expected)


@every_dtype
@pytest.mark.parametrize("temperature", [1e-3, -0.5, 100.0])
def test_extreme_temperatures(dtype, temperature, grid):
    case = testing.make_case("random", (70, 1, 16), seed=35)
    for name in ("nt_xent", "clip_loss"):
        value, grads = testing.value_and_grads(
            lambda *x, name=name: LOSSES[name].product(
                *x, LOSSES[name].factor(temperature), reduction="mean"
            ),
            [x.to(dtype) for x in LOSSES[name].inputs(case)],
        )
        exact = LOSSES[name].formula(
            *(x.to(dtype).double() for x in LOSSES[name].inputs(case)),
            LOSSES[name].factor(temperature),
            reduction="mean",
        )
        torch.testing.assert_close(value[0].double(), exact, rtol=1e-4, atol=1e-5)
        assert all(g.isfinite().all() for g in grads)


@every_dtype
def test_small_gradients_of_many_rows_do_not_underflow(dtype, grid):
    """Weights of 1e-9 and less, far below what float16 holds, still add up to a gradient."""
    case = testing.make_case("peaked", (120, 1, 32), seed=36)
    z = [x.to(dtype) for x in (case.query, case.positive)]
    _, grads = testing.value_and_grads(lambda a, b: 2**14 * fastcl.nt_xent(a, b, 0.03), z)
    _, exact = testing.value_and_grads(
        lambda a, b: 2**14 * LOSSES["nt_xent"].formula(a, b, 0.03, reduction="mean"), [x.double() for x in z]
    )
    for got, wanted in zip(grads, exact, strict=True):
        assert (got.double() - wanted).norm() <= (0.05 if dtype.itemsize == 2 else 1e-3) * wanted.norm()


def test_ids_exclude_queued_keys(grid):
    queue = fastcl.NegativeQueue(70, 8, with_ids=True)
    generator = torch.Generator().manual_seed(37)
    queue.enqueue(torch.randn(70, 8, generator=generator), torch.arange(70) % 7 - 3 + (1 << 40))
    query, positive = torch.randn(2, 20, 8, generator=generator)
    query_ids = torch.arange(20) % 9 - 4 + (1 << 40)
    got = fastcl.info_nce(query, positive, queue, query_ids=query_ids)
    with fastcl.use_backend("reference"):
        torch.testing.assert_close(got, fastcl.info_nce(query, positive, queue, query_ids=query_ids))


@every_loss
@every_dtype
def test_no_rows_one_row_and_zero_rows(name, dtype, grid):
    loss = LOSSES[name]
    inputs = [x.to(dtype) for x in loss.inputs(testing.make_case("random", (5, 6, 4)))]
    nothing = [x[:0] for x in inputs]
    assert loss.product(*nothing, loss.factor(0.1), reduction="sum").item() == 0
    assert loss.product(*nothing, loss.factor(0.1), reduction="mean").isnan()
    for x in inputs:
        x[2] = 0
    value, grads = testing.value_and_grads(lambda *x: loss.product(*x, loss.factor(0.1)), inputs)
    assert value[0].isfinite()
    assert all(g.isfinite().all() for g in grads)
    if name != "clip_loss-unnormalized":
        assert not any(g[2].any() for g in grads)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_in_not_a_number_out(name, value, grid):
    inputs = [x.float() for x in LOSSES[name].inputs(testing.make_case("random", (70, 9, 4)))]
    inputs[0][1, 2] = value
    got, grads = testing.value_and_grads(
        lambda *x: LOSSES[name].product(*x, LOSSES[name].factor(0.1)), inputs
    )
    assert not got[0].isfinite()
    assert not grads[0].isfinite().all()


def test_a_nan_query_spoils_no_other_gradient(grid):
    query, positive = torch.randn(2, 70, 8, generator=torch.Generator().manual_seed(38))
    _, (expected, _) = testing.value_and_grads(fastcl.info_nce, [query, positive])
    query[3] = torch.nan
    _, (got, _) = testing.value_and_grads(fastcl.info_nce, [query, positive])
    others = torch.arange(70) != 3
    assert torch.equal(got[others], expected[others])
    assert got[3].isnan().all()


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss"])
def test_scale_zero_has_a_gradient(name, grid):
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(39))
    if name == "clip_loss":
        got, exact = fastcl.clip_loss(x, y, scale), LOSSES[name].formula(x.double(), y.double(), scale)
        gradients = [torch.autograd.grad(f, scale)[0] for f in (got, exact)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    else:
        assert fastcl.nt_xent(x, y, torch.tensor(torch.inf)).item() == pytest.approx(torch.tensor(17.0).log())


@every_dtype
def test_the_bits_do_not_depend_on_the_order_of_the_warps(dtype, grid):
    z = [x.to(dtype) for x in testing.make_case("random", (150, 1, 40))[:2]]
    first = testing.value_and_grads(fastcl.nt_xent, z)
    for _ in range(5):
        again = testing.value_and_grads(fastcl.nt_xent, z)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b)


def test_too_many_rows_for_the_chip_are_refused(grid):
    z = torch.randn(2, 200, 8)
    grid.blocks, grid.shared_bytes = 3, 227 << 10
    fastcl.nt_xent(*z[:, :150])
    with pytest.raises(RuntimeError, match=r"one_launch.*200 samples.*3 blocks"):
        fastcl.nt_xent(*z)
    with pytest.raises(RuntimeError, match="CUDA kernels take float32, float16 and bfloat16"):
        fastcl.nt_xent(*z.double())


@every_dtype
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
def test_queue(dtype, queue_dtype, grid):
    """The rows that stay, normalized, in the order of their arrival; beyond the end the queue wraps."""
    size, width = 21, 9
    queue = fastcl.NegativeQueue(size, width, dtype=queue_dtype, with_ids=True)
    rows = torch.randn(80, width + 1, generator=torch.Generator().manual_seed(40)).to(dtype)[:, :width]
    keys, ids = queue.keys.clone(), queue.ids.clone()
    start = 0
    for count in (5, 0, 20, 21, 34):
        batch, batch_ids = rows[start : start + count], torch.arange(start, start + count)
        queue.enqueue(batch, batch_ids)
        unit = torch.nn.functional.normalize(batch.double()).to(queue_dtype)
        for i in range(max(0, count - size), count):
            keys[(start + i) % size], ids[(start + i) % size] = unit[i], start + i
        start += count
        assert queue.pointer.item() == start % size
        assert torch.equal(queue.ids, ids)
        torch.testing.assert_close(queue.keys, keys)


def test_what_fits_is_what_runs(grid):
    """The limit that keeps the backend from serving a call is the one its kernel has."""
    blocks, shared_bytes = grid.blocks, grid.shared_bytes = 6, 120 << 10
    limits = {}
    for layout, loss in ((VIEWS, fastcl.nt_xent), (BATCH, fastcl.info_nce)):
        samples = next(n for n in range(1, 999) if not cuda.fits(layout, n, 0, blocks, shared_bytes)) - 1
        loss(*torch.randn(2, samples, 3))
        with pytest.raises(RuntimeError, match="does not fit"):
            loss(*torch.randn(2, samples + 1, 3))
        limits[layout] = samples
    assert limits == {VIEWS: 3 * 128 // 2, BATCH: 2 * 128}
