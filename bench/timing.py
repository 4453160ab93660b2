"""Interleaved timing: what is compared runs in turns, so a slow second hits both sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MIN_ROUNDS, _MAX_ROUNDS = 3, 300


def seconds(run: Callable[[], object]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_within(budget: float, runs: Sequence[Callable[[], object]]) -> int:
    """Warm all ``runs`` up, and say how many rounds of them take ``budget`` seconds (3 to 300)."""
    for run in runs:
        run()
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(budget / sum(map(seconds, runs)))))


@dataclass(frozen=True)
class Paired:
    """The same rounds of two sides: medians, and the median and quartiles of the rounds' ratios.

    ``ratio_of_minima`` compares the best round of each: near ``ratio`` unless other work interfered.
    """

    plain_ms: float
    ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    ratio_of_minima: float

    @classmethod
    def of(cls, plain: Sequence[float], other: Sequence[float]) -> Paired:
        """From the seconds of each round, in the order they ran."""
        ratios = [p / o for p, o in zip(plain, other, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        plain_ms, ms = 1e3 * statistics.median(plain), 1e3 * statistics.median(other)
        return cls(plain_ms, ms, ratio, (low, high), min(plain) / min(other))


def paired(plain: Callable[[], object], other: Callable[[], object], budget: float) -> Paired:
    """Time both in turns for about ``budget`` seconds."""
    rounds = range(rounds_within(budget, [plain, other]))
    pairs = [(seconds(plain), seconds(other)) for _ in rounds]
    return Paired.of([p for p, _ in pairs], [o for _, o in pairs])
