"""The CPU kernels on every instruction set this machine has: the same results, within the same budget."""

import pytest
import test_stats
import test_topk
import torch
from loss_table import LOSSES, check

import fastcl
from fastcl import native, testing

LEVELS = native.ISA_LEVELS if native.missing_reason() else native.ISA_LEVELS[: native.isa_levels()[0] + 1]


@pytest.fixture(params=LEVELS)
def level(request):
    before = native.ISA_LEVELS[native.isa_levels()[1]]
    native.force_isa(request.param)
    with fastcl.use_backend("cpu"):
        yield request.param
    native.force_isa(before)


def test_levels_are_named_and_the_best_is_used_by_default():
    best, used = native.isa_levels()
    assert native.ISA_LEVELS == ("generic", "avx2", "avx512", "avx512_bf16", "amx")
    assert used == best


def test_forcing_a_level(level):
    assert native.ISA_LEVELS[native.isa_levels()[1]] == level
    assert f"cpu kernels: {level} " in fastcl.show_config()


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match=r"level.*'sse9'"):
        native.force_isa("sse9")


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_statistics(shape, dtype, level):
    for kind in testing.KINDS:
        case = testing.make_case(kind, shape, seed=20)
        test_stats.check(case, dtype, scale=0.3)
        test_stats.check(case, dtype, ("scale",), columns=False, normalize=True)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 127, 128, 129])
def test_widths_around_the_vector_length(width, level):
    for rows in (1, 17, 33):
        case = testing.make_case("random", (rows, 2 * rows + 1, width), seed=21)
        for dtype in testing.DTYPES:
            test_stats.check(case, dtype, ("scale",), scale=0.3)


@pytest.mark.parametrize(
    "name", ["info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con", "sup_con-in"]
)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_losses(name, dtype, level):
    for kind in ("random", "peaked", "collapsed"):
        for shape in ((2, 2, 2), (65, 63, 64)):
            case = testing.make_case(kind, shape, seed=22)
            for reduction in ("mean", "none"):
                check(LOSSES[name], case, dtype, 0.07, reduction=reduction)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 64, 300])
def test_top_k(k, dtype, level):
    for width in (1, 6, 33):
        query, key = test_topk.integers(21, width, 23), test_topk.integers(301, width, 24)
        test_topk.check(query, key, k, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_converted_exactly(dtype, level):
    """One component and no normalization: the similarity is the value itself, subnormals included."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    values = values[values.float().abs() < 1e37]
    similarity, _ = fastcl.similarity_topk(values[:, None], torch.ones(1, 1, dtype=dtype), 1)
    assert torch.equal(similarity[:, 0], values.float())
