"""The CUDA kernels, run on the host: the same source, a thread per warp, held to the same budgets."""

import pytest
import torch
from grids import pairwise
from loss_table import LOSSES, check
from torch.library import opcheck

import fastcl
from fastcl import testing
from fastcl.backends import cuda
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.one_positive import BATCH, VIEWS, OnePositive
from fastcl.testing import host

pytestmark = pytest.mark.skipif(
    not host.is_built() or testing.DEVICE.type != "cpu", reason="runs in the library of a checkout"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("nt_xent", "info_nce", "info_nce-negatives", "clip_loss", "clip_loss-unnormalized")
NAMES += tuple(name for name in LOSSES if name.startswith("sup_con"))

every_loss = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_loss
def test_losses(name, grid):
    for row in pairwise(
        dtype=DTYPES,
        shape=[(1, 1, 1), (2, 2, 2), (63, 64, 65), (64, 65, 63), (100, 130, 20)],
        kind=("random", "peaked", "collapsed"),
        scaled=((0.5, "mean"), (0.07, "sum")),
    ):
        case, (temperature, reduction) = testing.make_case(row["kind"], row["shape"], seed=30), row["scaled"]
        options = {"factor_dtype": torch.float64, "reduction": reduction}
        check(LOSSES[name], case, row["dtype"], temperature, **options)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "info_nce-negatives", "sup_con", "sup_con-one"])
def test_any_division_into_squares(name, grid):
    """One square of several tiles, a few, or many of one tile; the last ones ragged; blocks without one."""
    for row in pairwise(dtype=DTYPES, blocks=(1, 3, 16, 40), kind=("random", "collapsed")):
        grid.blocks = row["blocks"]
        case = testing.make_case(row["kind"], (129, 200, 70), seed=31)
        check(LOSSES[name], case, row["dtype"], 0.1)


@every_dtype
def test_widths_around_fragments_and_stages(dtype, grid):
    for row in pairwise(name=NAMES, width=(1, 15, 16, 17, 127, 129, 300)):
        case = testing.make_case("random", (9, 11, row["width"]), seed=32)
        check(LOSSES[row["name"]], case, dtype, 0.2, factor_dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype", "needed"),
    [tuple(row.values()) for row in pairwise(name=NAMES, dtype=DTYPES, needed=range(4))],
)
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
    if not name.endswith("unnormalized"):
        assert not any(g[2].any() for g in grads)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_in_not_a_number_out(name, value, grid):
    inputs = [x.float() for x in LOSSES[name].inputs(testing.make_case("random", (70, 9, 4)))]
    inputs[0][1, ..., 2] = value
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


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_sup_con_is_an_op_and_compiles(mode, variant, grid):
    features = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(42), requires_grad=True)
    labels, scale = torch.tensor([0, 1, 0, 2, 1]), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(features, scale):
        return fastcl.sup_con(features, labels, temperature=1 / scale, contrast_mode=mode, variant=variant)

    rows, every_label = features.detach().transpose(0, 1).flatten(0, 1).requires_grad_(), labels.repeat(2)
    sides = (rows, None, scale, every_label, None, None)
    if mode == "one":
        sides = (rows.detach()[:5].requires_grad_(), rows, scale, labels, every_label, None)
    opcheck(
        torch.ops.fastcl.sup_con, (*sides, True, variant == "in", True, 0, 0b111 if mode == "one" else 0b101)
    )
    eager = torch.autograd.grad(loss(features, scale), (features, scale))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(features, scale), (features, scale)), eager)

    def second():
        grads = torch.autograd.grad(loss(features, scale), (features, scale), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (features, scale))

    got = second()
    with fastcl.use_backend("reference"):
        torch.testing.assert_close(got, second())


def test_anchors_without_positives_count_but_add_nothing(grid):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(43), requires_grad=True)
    alone = fastcl.sup_con(features, torch.arange(6))
    assert alone.item() == 0
    assert not torch.autograd.grad(alone, features)[0].any()
    paired = torch.tensor([0, 0, 1, 2, 3, 4])
    mean, total = (fastcl.sup_con(features, paired, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(6 * mean, total)


def test_temperature_over_base_temperature_scales_sup_con(grid):
    features, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(44)), torch.arange(6) % 2
    scaled = fastcl.sup_con(features, labels, temperature=0.1, base_temperature=0.4)
    torch.testing.assert_close(scaled, fastcl.sup_con(features, labels, temperature=0.1) / 4)


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
    z = torch.randn(2, 220, 8)
    grid.blocks, grid.shared_bytes = 3, 227 << 10
    fastcl.nt_xent(*z[:, :200])
    with pytest.raises(RuntimeError, match=r"one_launch.*440 x 440 rows.*3 blocks"):
        fastcl.nt_xent(*z)
    with pytest.raises(RuntimeError, match="CUDA kernels take float32, float16 and bfloat16"):
        fastcl.nt_xent(*z.double())


# what is compared with what, and the loss's arguments where there is no memory behind them
def views(samples, dtype):
    z = torch.empty(samples, 3, dtype=dtype, device="meta")
    return OnePositive(z, z, None, z, layout=VIEWS)


def batch(samples, dtype):
    return views(samples, dtype)._replace(layout=BATCH)


def classes(rows, dtype):
    z = torch.empty(rows, 3, dtype=dtype, device="meta")
    return ManyPositives(z, None, z, z)


def largest(arguments, dtype, *device):
    low, high = 0, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cuda.fits(arguments(middle, dtype), *device) else (low, middle)
    return low


@every_dtype
def test_what_fits_is_what_runs(dtype, grid):
    """The limit that keeps the backend from serving a call is the one its kernel has."""
    blocks, shared_bytes = grid.blocks, grid.shared_bytes = 6, 60 << 10
    for arguments, loss in (
        (views, lambda n: fastcl.nt_xent(*torch.randn(2, n, 3, dtype=dtype))),
        (batch, lambda n: fastcl.info_nce(*torch.randn(2, n, 3, dtype=dtype))),
        (classes, lambda n: fastcl.sup_con(torch.randn(n, 3, dtype=dtype), torch.arange(n) % 4)),
    ):
        most = largest(arguments, dtype, blocks, shared_bytes)
        assert loss(most).isfinite()
        with pytest.raises(RuntimeError, match="does not fit"):
            loss(most + 1)


@pytest.mark.parametrize(
    ("device", "arguments", "in_float32", "in_half"),
    [
        ("H100", views, 15 * 208 // 2, 15 * 288 // 2),
        ("H100", batch, 11 * 208, 11 * 288),
        ("H100", classes, 15 * 208, 15 * 288),
        ("A100", views, 14 * 160 // 2, 14 * 240 // 2),
        ("A100", batch, 10 * 160, 10 * 240),
        ("A100", classes, 14 * 160, 14 * 224),
    ],
)
def test_largest_batches(device, arguments, in_float32, in_half):
    """So many squares, of so many rows each, in 132 blocks of 227 KiB, or 108 of 163 KiB."""
    limits = {"H100": (132, 227 << 10), "A100": (108, 163 << 10)}[device]
    assert largest(arguments, torch.float32, *limits) == in_float32
    for dtype in (torch.float16, torch.bfloat16):
        assert largest(arguments, dtype, *limits) == in_half


@every_loss
def test_cells_of_half_types(name, grid):
    """Where there is no room for float32: cosines in fixed point, then weights in the inputs' type."""
    grid.shared_bytes = 60 << 10
    of_two_views = name == "nt_xent" or name.startswith("sup_con")
    samples = 220 if name == "sup_con-2d" else 110 if of_two_views else 150
    kinds = ("random", "peaked", "collapsed")
    cases = {kind: testing.make_case(kind, (samples, 150, 40), seed=41) for kind in kinds}
    inputs = LOSSES[name].inputs(cases["random"])
    with pytest.raises(RuntimeError, match="does not fit"):
        LOSSES[name].product(*(x.float() for x in inputs), LOSSES[name].factor(0.5))
    for row in pairwise(dtype=DTYPES[1:], kind=kinds, temperature=(0.5, 0.07)):
        check(LOSSES[name], cases[row["kind"]], row["dtype"], row["temperature"], factor_dtype=torch.float64)


@pytest.mark.parametrize("loss", [fastcl.nt_xent, lambda x, y: fastcl.sup_con(x[:, None].expand(-1, 2, -1))])
def test_where_there_is_no_memory_the_kernel_is_named(loss, grid):
    z = torch.zeros(1 << 20).as_strided((400_000, 1 << 20), (0, 1)).requires_grad_()
    with pytest.raises(RuntimeError, match="one_launch: allocating memory failed"):
        loss(z, z)
