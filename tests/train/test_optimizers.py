"""The optimizers and their schedules."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("fastcl.train")

from fastcl.train import Optimization


class TestOptimization:
    def test_the_rate_warms_up_and_falls_to_zero(self) -> None:
        optimizer, schedule = Optimization("sgd", lr=1.0, warmup_epochs=2).configure(nn.Linear(2, 2), 10, 5)
        rates = []
        for _ in range(50):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[0] == pytest.approx(0.1)
        assert rates[:11] == sorted(rates[:11])
        assert max(rates) == rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01

    def test_lars_spares_biases_and_batch_norm(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer, _ = Optimization("lars", lr=1.0, weight_decay=0.1).configure(network, 1, 1)
        decayed = {
            id(parameter): group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert [decayed[id(p)] for p in network.parameters()] == [0.1, 0.0, 0.0, 0.0]
