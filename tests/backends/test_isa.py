"""The CPU kernels on every instruction set this machine has: the same results, within the same budget."""

import ctypes
import subprocess
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import objective_checks
import pytest
import test_logistic
import test_sinkhorn
import test_soft_targets
import test_stats
import test_topk
import test_two_scales
import torch
import torch.nn.functional as F
from grids import pairwise
from loss_table import LOSSES, check

import fastcl
from fastcl import testing
from fastcl.backends import native

BUILT = native.missing_reason() is None
BEST = native.isa_levels()[0] if BUILT else len(native.ISA_LEVELS) - 1
# where only AMX is missing, its instructions are emulated
EMULATED = BUILT and native.ISA_LEVELS[BEST] == "avx512_bf16"
LEVELS = native.ISA_LEVELS[: BEST + 1 + EMULATED]
HALF_LEVELS = ("avx512_bf16", "amx")  # with products of bfloat16


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """Carries out AMX's instructions where the machine refuses them."""
    source, library = Path(__file__).with_name("amx_emulator.cpp"), tmp_path_factory.mktemp("amx") / "amx.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-Wall", "-shared", "-fPIC", source, "-o", library], check=True
    )
    ctypes.CDLL(str(library)).start_emulating_amx()


@contextmanager
def forced(name):
    before = native.isa_levels()[1]
    torch.ops.fastcl_native.force_isa(native.ISA_LEVELS.index(name))
    with fastcl.use_backend("cpu"):
        yield name
    torch.ops.fastcl_native.force_isa(before)


@pytest.fixture
def levels(request):
    """A context for each level, by its name."""
    if EMULATED:
        request.getfixturevalue("emulator")
    return {name: partial(forced, name) for name in LEVELS}


@pytest.fixture(params=LEVELS)
def level(request, levels):
    with levels[request.param]() as name:
        yield name


def test_levels_are_named_and_the_fastest_is_used_by_default():
    best, used = (native.ISA_LEVELS[level] for level in native.isa_levels())
    slow_bfloat16 = best == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert native.ISA_LEVELS[0] == "generic"
    assert used == ("avx512" if slow_bfloat16 else best)


def test_forcing_a_level(level):
    if level != "amx" or not EMULATED:
        native.force_isa(level)
    assert native.ISA_LEVELS[native.isa_levels()[1]] == level
    assert f"cpu kernels: {level} " in fastcl.show_config()


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match=r"level.*'sse9'"):
        native.force_isa("sse9")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_statistics(dtype, levels):
    for row in pairwise(kind=testing.KINDS, shape=testing.SHAPES, normalize=(False, True)):
        case = testing.make_case(row["kind"], row["shape"], seed=20)
        if row["normalize"]:
            test_stats.check(case, dtype, ("scale",), columns=False, normalize=True, each=levels)
        else:
            test_stats.check(case, dtype, scale=0.3, each=levels)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 64, 65), (252, 507, 123)], ids=str)
def test_sums_that_are_no_statistics(shape, dtype, level):
    for kind in ("random", "peaked", "duplicate-ids"):
        case = testing.make_case(kind, shape, seed=23)
        test_logistic.check(case, dtype, normalize=True, per_row=True)
        test_soft_targets.check(kind, shape, dtype, views=2, teachers=2)
    query, key = case.query.to(dtype), case.key.to(dtype)
    exact = test_sinkhorn.potentials(query, key, 0.5, 3, True)
    torch.testing.assert_close(
        fastcl.sinkhorn(query, key, temperature=0.5).double(), exact, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_at_two_scales(dtype, levels):
    functions, (x, scale) = test_two_scales.functions((2.0, 1.0)), test_two_scales.inputs_of(400, 33)
    objective_checks.check(*functions, [x, scale], dtype, each=levels)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 127, 128, 129])
def test_widths_around_the_vector_length(width, levels):
    for rows in (1, 17, 33):
        case = testing.make_case("random", (rows, 2 * rows + 1, width), seed=21)
        for dtype in testing.DTYPES:
            test_stats.check(case, dtype, ("scale",), scale=0.3, each=levels)


@pytest.mark.parametrize(
    "name", ["info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con", "sup_con-in"]
)
def test_losses(name, levels):
    for row in pairwise(
        dtype=testing.DTYPES,
        kind=("random", "peaked", "collapsed"),
        shape=((2, 2, 2), (65, 63, 64)),
        reduction=("mean", "none"),
    ):
        case = testing.make_case(row["kind"], row["shape"], seed=22)
        check(LOSSES[name], case, row["dtype"], 0.07, reduction=row["reduction"], each=levels)


def test_top_k(level):
    for row in pairwise(dtype=testing.DTYPES, k=(1, 5, 64, 300), width=(1, 6, 33)):
        query, key = (test_topk.integers(n, row["width"], seed) for n, seed in ((21, 23), (301, 24)))
        test_topk.check(query, key, row["k"], row["dtype"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_converted_exactly(dtype, level):
    """One component and no normalization: the similarity is the value itself, subnormals included."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    values = values[values.float().abs() < 1e37]
    similarity, _ = fastcl.similarity_topk(values[:, None], torch.ones(1, 1, dtype=dtype), 1)
    assert torch.equal(similarity[:, 0], values.float())


@pytest.fixture
def any_precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con"])
def test_float32_matmul_precision(name, levels, any_precision):
    """'high' splits float32 into two bfloat16 where that is faster, 'medium' rounds to one."""
    loss, case = LOSSES[name], testing.make_case("random", (140, 161, 123), seed=25)
    inputs = loss.inputs(case)
    _, exact = testing.value_and_grads(
        lambda *x: loss.formula(*x, loss.factor(0.1), reduction="mean"), inputs
    )
    for level, precision in product(levels, ("highest", "high", "medium")):
        torch.set_float32_matmul_precision(precision)
        with levels[level]():
            _, got = testing.value_and_grads(
                lambda *x: loss.product(*x, loss.factor(0.1), reduction="mean"), [x.float() for x in inputs]
            )
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
        split = precision == "high" and level == "amx"
        rounded = precision == "medium" and level in HALF_LEVELS
        assert max(errors) < (1e-2 if rounded else 2e-5 if split else 4e-6), (level, precision)
        assert (max(errors) > 1e-4) == rounded, (level, precision)


def test_a_bfloat16_loss_is_of_exact_products(level):
    """The inputs are not rounded again: the loss is as good as in float32."""
    case = testing.make_case("random", (140, 161, 123), seed=26)
    z1, z2 = (x.bfloat16() for x in (case.query, case.positive))
    got, exact = fastcl.nt_xent(z1, z2, 0.05), fastcl.nt_xent(z1.double(), z2.double(), 0.05)
    assert abs(got.item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 70])
def test_a_queue_of_either_dtype(width, dtype, stored, level):
    """Stored keys may be of another dtype than the queries, and of widths that are not whole vectors."""
    queue = fastcl.NegativeQueue(1000, width, dtype=stored)
    query, positive = torch.randn(2, 65, width).to(dtype)
    leaf = query.clone().requires_grad_()
    loss = fastcl.info_nce(leaf, positive, queue, temperature=0.2)
    loss.backward()
    exact_leaf = query.double().requires_grad_()
    unit = F.normalize(exact_leaf, dim=1)
    logits = torch.cat(
        [(unit * F.normalize(positive.double(), dim=1)).sum(1, keepdim=True), unit @ queue.keys.double().T], 1
    )
    exact = F.cross_entropy(logits / 0.2, torch.zeros(65, dtype=torch.int64))
    exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    error = (leaf.grad.double() - exact_leaf.grad).norm() / exact_leaf.grad.norm()
    assert error < (4e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_bfloat16_rows_that_start_anywhere(offset, level):
    query, key = torch.randn(2, 90, 67).bfloat16()[:, :, offset : offset + 64].unbind()
    got, expected = (
        fastcl.similarity_stats(x, y, scale=3.0, columns=True)
        for x, y in ((query, key), (query.contiguous(), key.contiguous()))
    )
    assert torch.equal(got.lse_neg, expected.lse_neg)
    assert torch.equal(got.columns.lse_neg, expected.columns.lse_neg)
