"""Times each case: ``pytest bench``. A side that is wrong fails, a slow one does not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench.agreement import assert_agreement
from bench.cases import CASES, FASTCL, LOSSES, PLAIN, PYPI, Case, step
from bench.memory import peak_bytes
from bench.timing import Paired, rounds_within, seconds
from fastcl.backends.base import Request
from fastcl.backends.choice import choose

_SECONDS, _QUICK_SECONDS = 6.0, 0.6
_QUICK_PAIRS = 1 << 22

_TIMED = [(case.name, side) for case in CASES.values() for side in case.sides if side != PLAIN]


@pytest.mark.parametrize(("name", "side"), _TIMED)
def test_forward_and_backward(
    name: str,
    side: str,
    benchmark: Any,  # pytest_benchmark leaves it untyped
    request: pytest.FixtureRequest,
) -> None:
    case = CASES[name]
    quick = request.config.getoption("--quick")
    if quick and case.pairs > _QUICK_PAIRS:
        pytest.skip("not a small case")
    compared = PLAIN in case.sides
    if compared and side == FASTCL:
        assert_agreement(case)

    run = step(case, side)
    plain_runs = [step(case, PLAIN)] if compared else []
    plain_seconds: list[float] = []

    def before_each_round() -> None:  # outside the clock of pedantic: the two sides take turns
        plain_seconds.extend(map(seconds, plain_runs))

    rounds = rounds_within(_QUICK_SECONDS if quick else _SECONDS, [run, *plain_runs])
    benchmark.group = name
    benchmark.pedantic(run, setup=before_each_round, rounds=rounds)

    benchmark.extra_info.update(
        loss=case.loss,
        rows=case.rows,
        dim=case.dim,
        pairs=case.pairs,
        dtype=str(case.dtype).removeprefix("torch."),
        side=side,
        implementation=_implementation(case, side),
        peak_bytes=peak_bytes(name, side),
        versus_plain=None,
    )
    if compared:
        times = Paired.of(plain_seconds, benchmark.stats.stats.data)
        benchmark.extra_info["versus_plain"] = {**asdict(times), "plain_peak_bytes": peak_bytes(name, PLAIN)}


def _implementation(case: Case, side: str) -> str | None:
    """The backend of fastcl, or the package from PyPI."""
    if side == FASTCL:
        return choose(Request.of(case.arguments()[0])).name
    return LOSSES[case.loss].package if side == PYPI else None
