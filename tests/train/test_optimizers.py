"""The optimizers and their schedules."""

from __future__ import annotations

import math

import pytest
from torch import nn

pytest.importorskip("fastcl.train")

from fastcl.train import Cosine, Optimization


class TestOptimization:
    def test_the_rate_warms_up_and_falls_to_zero(self) -> None:
        optimization = Optimization("sgd", lr=1.0, warmup_epochs=2)
        optimizer = optimization.configure(nn.Linear(2, 2))
        rates = [optimization.set_rates(optimizer, step, 50, 5) for step in range(50)]
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        assert rates[0] == pytest.approx(0.1)
        assert rates[:11] == sorted(rates[:11])
        assert max(rates) == rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01

    def test_a_steady_part_keeps_the_highest_rate(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimization = Optimization("adamw", lr=1.0, warmup_epochs=2)
        optimizer = optimization.configure(network, network[1])
        rates: dict[bool, list[float]] = {True: [], False: []}
        for step in range(50):
            optimization.set_rates(optimizer, step, 50, 5)
            for group in optimizer.param_groups:
                steady = [any(x is y for y in network[1].parameters()) for x in group["params"]]
                assert steady in ([True] * len(steady), [False] * len(steady))
                rates[all(steady)].append(group["lr"])
        assert rates[True][:11] == rates[False][:11]
        assert rates[True][10:] == [1.0] * 40
        assert rates[False][-1] < 0.01

    def test_lars_spares_biases_and_batch_norm(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer = Optimization("lars", lr=1.0, weight_decay=0.1).configure(network)
        decayed = {
            id(parameter): group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert [decayed[id(p)] for p in network.parameters()] == [0.1, 0.0, 0.0, 0.0]

    def test_weight_decay_follows_its_schedule_where_there_is_any(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimization = Optimization("lars", lr=1.0, weight_decay=Cosine(0.0, 0.4))
        optimizer = optimization.configure(network)
        found = []
        for step in (0, 25, 50, 100):
            optimization.set_rates(optimizer, step, 100, 10)
            found.append(sorted(group["weight_decay"] for group in optimizer.param_groups))
        decays = [0.0, 0.2 * (1 - math.cos(math.pi / 4)), 0.2, 0.4]
        assert [pair[0] for pair in found] == [0.0] * 4
        assert [pair[1] for pair in found] == pytest.approx(decays)
