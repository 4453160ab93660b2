"""open_clip's losses: values and gradients, on one process and over two."""

import itertools

import pytest
import torch
import torch.distributed as dist
from peer_checks import assert_fused, assert_not_fused, assert_same, assert_same_signature
from processes import on_every_rank

pytest.importorskip("fastcl.integrations.open_clip")

from open_clip import loss as theirs

from fastcl.integrations import open_clip as ours

SCALE, BIAS = torch.tensor(8.0, dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)


def features(count=6, dtype=torch.float64):
    return [torch.nn.functional.normalize(torch.randn(count, 5, dtype=dtype)) for _ in range(2)]


def test_names_signatures_and_defaults():
    assert_same_signature(ours.ClipLoss, theirs.ClipLoss, "forward")
    assert_same_signature(ours.SigLipLoss, theirs.SigLipLoss, "forward", "_loss")


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("bias", [(), (BIAS,)], ids=["no bias", "bias"])
def test_clip_on_one_process(local_loss, gather_with_grad, bias):
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": True}
    pair = [module.ClipLoss(**options) for module in (ours, theirs)]
    assert_same(*pair, [*features(), SCALE, *bias])
    for loss in pair:
        assert loss(*features(), SCALE, output_dict=True).keys() == {"contrastive_loss"}


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_on_one_process(negative_only):
    def call(module):
        return lambda *x: module.SigLipLoss()._loss(*x, negative_only=negative_only)

    assert_same(call(ours), call(theirs), [*features(), SCALE, BIAS])
    assert_same(call(ours), call(theirs), [*features(), SCALE])
    for module in (ours, theirs):
        found = module.SigLipLoss()(*features(), SCALE, BIAS, output_dict=True)
        assert found.keys() == {"contrastive_loss"}


def test_in_float32_and_half():
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        x, scale, bias = features(dtype=dtype), SCALE.to(dtype), BIAS.to(dtype)
        assert_same(ours.ClipLoss(), theirs.ClipLoss(), [*x, scale], rtol)
        assert_same(ours.SigLipLoss(), theirs.SigLipLoss(), [*x, scale, bias], rtol)


def test_the_default_form_is_fused():
    inputs = [*features(64, torch.float32), SCALE.float()]
    assert_fused(ours.ClipLoss(), inputs, below=64 * 64)
    assert_fused(ours.SigLipLoss(), [*inputs, BIAS.float()], below=64 * 64)


def test_a_scale_or_bias_per_pair_is_the_originals():
    inputs = [*features(), SCALE, torch.randn(6, 6, dtype=torch.float64)]
    for name in ("ClipLoss", "SigLipLoss"):
        pair = [getattr(module, name)() for module in (ours, theirs)]
        assert_same(*pair, inputs)
        assert_not_fused(pair[0], inputs)


def check_gathering(group):
    place = {"rank": dist.get_rank(group), "world_size": dist.get_world_size(group)}
    torch.manual_seed(place["rank"])
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        pair = [m.ClipLoss(local_loss, gather_with_grad, **place) for m in (ours, theirs)]
        inputs = [*features(4), SCALE, BIAS]
        assert_same(*pair, inputs)
        assert_fused(pair[0], [*features(32, torch.float32), SCALE.float()], below=32 * 32)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        pair = [m.SigLipLoss(dist_impl=dist_impl, **place) for m in (ours, theirs)]
        assert_same(*pair, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_over_ranks_gradients_are_the_originals_in_every_combination(tmp_path):
    on_every_rank([check_gathering], 2, tmp_path)
