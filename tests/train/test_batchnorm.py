"""Batch normalization that does not tell MoCo which key belongs to which query."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("fastcl.train")

from fastcl.train.batchnorm import SplitBatchNorm2d, encode_shuffled, split_batch_norm


class TestBatchNormalization:
    def test_parts_are_normalized_as_if_each_were_a_batch(self) -> None:
        x = torch.randn(8, 3, 5, 5) * torch.arange(1, 9)[:, None, None, None]
        split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        output = split(x)
        for part in range(4):
            assert output[part::4].isclose(plain(x[part::4]), atol=1e-5).all()

    def test_running_statistics_are_the_mean_over_the_parts(self) -> None:
        x = torch.randn(8, 3, 5, 5)
        split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        split(x), plain(x)
        assert split.running_mean.isclose(plain.running_mean, atol=1e-6).all()

    def test_evaluation_and_state_are_the_plain_ones(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
        x = torch.randn(4, 1, 6, 6)
        network(x)
        expected, names = network.eval()(x), list(network.state_dict())
        split_batch_norm(network, 2)
        assert network.eval()(x).equal(expected)
        assert list(network.state_dict()) == names
        assert isinstance(network[1][0], SplitBatchNorm2d)

    def test_a_batch_that_cannot_be_split_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="multiple of bn_splits = 4, got 6 images"):
            SplitBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))

    def test_shuffling_changes_the_company_and_nothing_else(self) -> None:
        x = torch.randn(8, 3, 2, 2)
        assert encode_shuffled(nn.Flatten(), x, seed=1).equal(x.flatten(1))
        parts = SplitBatchNorm2d(3, 4)
        assert not encode_shuffled(parts, x, seed=1).isclose(parts(x)).all()
