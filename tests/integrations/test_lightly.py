"""lightly's losses: values, gradients and the state of the memory bank."""

import pytest
import torch
import torch.distributed as dist
from peer_checks import assert_fused, assert_same, assert_same_signature
from processes import on_every_rank

pytest.importorskip("fastcl.integrations.lightly")

from lightly import loss as theirs

from fastcl.integrations import lightly as ours

NAMES = "NTXentLoss", "DCLLoss", "DCLWLoss"


def views(count=7, dtype=torch.float64):
    return [torch.randn(count, 5, dtype=dtype) for _ in range(2)]


def twice_the_distance(out0, out1):
    return 2 * (out0 - out1).square().sum(dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_names_signatures_and_defaults(name):
    assert_same_signature(getattr(ours, name), getattr(theirs, name), "forward")


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NTXentLoss", {}),
        ("NTXentLoss", {"temperature": 0.1}),
        ("NTXentLoss", {"gather_distributed": True}),
        ("DCLLoss", {}),
        ("DCLLoss", {"temperature": 0.3, "weight_fn": twice_the_distance}),
        ("DCLWLoss", {}),
        ("DCLWLoss", {"temperature": 0.2, "sigma": 0.3}),
    ],
)
def test_values_and_gradients(name, options, dtype):
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    assert_same(getattr(ours, name)(**options), getattr(theirs, name)(**options), views(dtype=dtype), rtol)


def test_the_memory_bank_serves_and_is_filled_as_the_original_fills_it():
    pair = [module.NTXentLoss(temperature=0.1, memory_bank_size=(16, 5)) for module in (ours, theirs)]
    pair[0].load_state_dict(pair[1].state_dict())
    pair[0].memory_bank.bank = pair[1].memory_bank.bank.clone()
    for _ in range(4):  # 7 rows into 16: round the corner
        assert_same(*pair, views(dtype=torch.float32), 1e-4)
        torch.testing.assert_close(pair[0].memory_bank.bank, pair[1].memory_bank.bank)
    bank = pair[0].memory_bank.bank.clone()
    with torch.no_grad():  # a loss that is only looked at
        pair[0](*views(dtype=torch.float32))
    assert torch.equal(bank, pair[0].memory_bank.bank)


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", NAMES)
def test_the_default_form_is_fused(name):
    assert_fused(getattr(ours, name)(), views(64, torch.float32), below=64 * 64)


def test_the_memory_bank_meets_no_matrix():
    loss = ours.NTXentLoss(memory_bank_size=(1024, 5))
    assert_fused(loss, views(64, torch.float32), below=64 * 1024)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_losss_dtype_is_the_originals(dtype):
    for name in ("NTXentLoss", "DCLLoss"):
        z = [x.to(dtype) for x in views()]
        assert getattr(ours, name)()(*z).dtype == getattr(theirs, name)()(*z).dtype == dtype


def test_errors_are_the_originals():
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(temperature=0)
    with pytest.raises(ValueError, match="dim"):
        ours.NTXentLoss(memory_bank_size=16)


def check_gathering(group):
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    for name in NAMES:
        pair = [getattr(module, name)(gather_distributed=True) for module in (ours, theirs)]
        assert_same(*pair, views(4))
    pair = [module.NTXentLoss(memory_bank_size=(10, 5), gather_distributed=True) for module in (ours, theirs)]
    pair[0].memory_bank.bank = pair[1].memory_bank.bank.clone()
    for _ in range(2):
        assert_same(*pair, views(4, torch.float32), 1e-4)
        torch.testing.assert_close(pair[0].memory_bank.bank, pair[1].memory_bank.bank)


def test_over_ranks_gradients_are_those_of_the_gathering_original(tmp_path):
    on_every_rank([check_gathering], 2, tmp_path)
