"""Options of ``pytest bench`` and what goes into its JSON."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench import machine

_LOAD = pytest.StashKey[float]()
_KEPT_STATS = ("min", "median", "iqr", "rounds")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small cases only, a tenth of the time each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOAD] = os.getloadavg()[0]


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    return machine.describe()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keep what the report needs and what says how it was measured: no paths, no single timings."""
    commit = output_json["commit_info"]
    output_json["commit_info"] = {"id": commit["id"], "dirty": commit["dirty"]}
    output_json["quick"] = config.getoption("--quick")
    output_json["load_before"] = config.stash[_LOAD]  # of the last minute: other work spoils the figures
    output_json["benchmarks"] = [
        {
            "name": benchmark["group"],
            **benchmark["extra_info"],
            "seconds": {key: benchmark["stats"][key] for key in _KEPT_STATS},
        }
        for benchmark in output_json["benchmarks"]
    ]
