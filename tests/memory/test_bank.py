"""The memory bank: rows move by index towards features; the last of repeated indices wins."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl import MemoryBank, testing


def one_by_one(keys, indices, features, momentum):
    """What an update means: of each index the last feature, mixed with the row as it was."""
    keys, old = keys.clone(), keys.double()
    for i, feature in zip(indices.tolist(), features.double(), strict=True):
        mixed = momentum * old[i] + (1 - momentum) * F.normalize(feature, dim=0)
        keys[i] = F.normalize(mixed, dim=0).to(keys.dtype)
    return keys


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_update_is_one_by_one_and_the_last_wins(dtype, momentum):
    bank = MemoryBank(9, 4, momentum=momentum, dtype=dtype)
    for seed in range(3):
        source = testing.generator(seed)
        indices = torch.randint(9, (20,), generator=source)
        features = (3 * torch.randn(20, 4, generator=source)).to(dtype)
        exact = one_by_one(bank.keys, indices, features, momentum)
        bank.update(indices, features)
        assert bank.keys.dtype == dtype
        torch.testing.assert_close(bank.keys, exact)


def test_starts_with_random_unit_rows():
    bank = MemoryBank(100, 16)
    torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(100))
    assert bank.keys.dtype == torch.float32
    assert not bank.keys.requires_grad
    assert (bank.size, bank.dim) == (100, 16)
    assert "momentum=0.5" in repr(bank)
    torch.manual_seed(0)
    assert torch.equal(MemoryBank(100, 16).keys, bank.keys)


def test_save_load_continue_is_bit_equal(tmp_path):
    bank = MemoryBank(7, 4)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    loaded = MemoryBank(7, 4)
    loaded.load_state_dict(torch.load(tmp_path / "bank.pt"))
    assert list(bank.state_dict()) == ["keys"]
    for _ in range(3):
        indices, features = torch.randint(7, (5,)), torch.randn(5, 4)
        bank.update(indices, features)
        loaded.update(indices, features)
    assert torch.equal(bank.keys, loaded.keys)


def test_nothing_to_write_and_nothing_left_of_a_mixture():
    bank = MemoryBank(3, 3)
    bank.keys.copy_(torch.eye(3))
    before = bank.keys.clone()
    bank.update(torch.zeros(0, dtype=torch.int64), torch.ones(0, 3))
    bank.update(torch.tensor([1]), -before[1:2])
    torch.testing.assert_close(bank.keys, before)


def test_features_may_need_gradients_have_another_dtype_and_any_strides():
    bank = MemoryBank(5, 4)
    features = torch.randn(4, 3, dtype=torch.float64).T.requires_grad_()
    bank.update(torch.tensor([0, 2, 4], dtype=torch.int32), features)
    assert bank.keys.dtype == torch.float32
    assert bank.keys.grad_fn is None


def test_compiles():
    bank = MemoryBank(5, 4)
    twin = copy.deepcopy(bank)
    indices, features = torch.tensor([1, 3, 1]), torch.randn(3, 4)
    torch._dynamo.reset()
    torch.compile(bank.update, fullgraph=True, backend="aot_eager")(indices, features)
    twin.update(indices, features)
    torch.testing.assert_close(bank.keys, twin.keys)


def test_made_in_inference_mode_it_serves_training():
    with torch.inference_mode():
        bank = MemoryBank(5, 4)
    query = torch.randn(2, 4, requires_grad=True)
    fastcl.prototype_nce(query, bank.keys, torch.tensor([0, 3])).backward()
    assert query.grad.isfinite().all()


def test_on_meta_nothing_is_read():
    bank = MemoryBank(5, 4, device="meta")
    bank.update(torch.zeros(3, dtype=torch.int64, device="meta"), torch.ones(3, 4, device="meta"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"size": 5.0}, TypeError, "size must be a whole number, got 5.0"),
        ({"momentum": 1.1}, ValueError, "momentum must be between 0 and 1, got 1.1"),
        ({"momentum": float("nan")}, ValueError, "momentum must be between 0 and 1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be"),
    ],
)
def test_refuses_to_be_made(options, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(**{"size": 5, "dim": 4, **options})


@pytest.mark.parametrize(
    ("indices", "features", "error", "message"),
    [
        (torch.tensor([0, 5]), torch.ones(2, 4), ValueError, "indices must be from 0 to 4, got from 0 to 5"),
        (
            torch.tensor([0, -1]),
            torch.ones(2, 4),
            ValueError,
            "indices must be from 0 to 4, got from -1 to 0",
        ),
        (torch.tensor([0]), torch.ones(2, 4), ValueError, "indices must have one id per row"),
        (torch.tensor([0.0, 1.0]), torch.ones(2, 4), TypeError, "indices must be an integer tensor"),
        (torch.tensor([0, 1]), torch.ones(2, 3), ValueError, r"features must have shape \(N, 4\)"),
        (torch.tensor([0, 1]), torch.ones(2, 4).long(), TypeError, "features must be float64"),
    ],
)
def test_refuses_to_update(indices, features, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(5, 4).update(indices, features)
