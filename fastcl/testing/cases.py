"""The device and the backends under test, and a grid of cases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.backends import triton
from fastcl.backends.base import Request
from fastcl.backends.registry import BACKENDS
from fastcl.similarity.fields import Statistics
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats

# FASTCL_TEST_DEVICE=cuda tests the GPU's backends, TRITON_INTERPRET=1 Triton's kernels on the CPU
DEVICE = torch.device(os.environ.get("FASTCL_TEST_DEVICE", "cpu"))
INTERPRETED = triton.is_interpreted()
# Triton leaves float64 to other backends
IN_FLOAT64 = DEVICE.type == "cpu" and not INTERPRETED
WIDEST = torch.float64 if IN_FLOAT64 else torch.float32
DTYPES = (*{WIDEST: None, torch.float32: None}, torch.float16, torch.bfloat16)

# queries, keys, components
SHAPES = (
    (1, 1, 1),
    (2, 2, 2),
    (63, 64, 65),
    (64, 65, 63),
    (65, 63, 64),
    (64, 64, 64),
    (140, 200, 123) if INTERPRETED else (252, 507, 123),
)

# random: independent rows         peaked: every row has near copies on the other side
# collapsed: all rows are equal    all-excluded: no pair takes part
# duplicate-ids: few distinct ids, negative and beyond 32 bits, so that many pairs match
KINDS = ("random", "peaked", "collapsed", "all-excluded", "duplicate-ids")


def backends() -> tuple[str, ...]:
    """The backends under test, the one that 'auto' prefers last."""
    if INTERPRETED:
        return ("triton",)
    request = Request(DEVICE, torch.float32)
    serving = [x for x in BACKENDS.values() if x.missing() is None and not x.unsupported_reasons(request)]
    return tuple(x.name for x in reversed(serving))


def takes_masks(backend: str) -> bool:
    """Whether a backend serves rules that are more than one test of ids each."""
    request = Request(DEVICE, torch.float32, simple_rule=False)
    return not BACKENDS[backend].unsupported_reasons(request)


def every_statistic(stats: SimilarityStats, names: Sequence[str] = Statistics._fields) -> list[Tensor]:
    """The fields of the rows and then, if there are any, those of the columns."""
    sides = [side for side in (stats, stats.columns) if side is not None]
    return [getattr(side, name) for side in sides for name in names]


class Case(NamedTuple):
    """Inputs of one call in the widest dtype under test, with ids for both sides."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    key: Tensor  # (M, D)
    labels: tuple[Tensor, Tensor]  # (N,) and (M,)
    ids: tuple[Tensor, Tensor]  # (N,) and (M,)

    def rule(self) -> PairRule:
        """Equal labels are positive, equal ids excluded."""
        return PairRule(positive=self.labels, exclude=self.ids)


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device under test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_case(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Case:
    """One of :data:`KINDS` with N queries, M keys and D components; ``shape`` is (N, M, D)."""
    n, m, d = shape
    source = generator(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=source, dtype=torch.float64)

    def draw(values: Tensor, count: int) -> Tensor:
        return values[torch.randint(len(values), (count,), generator=source)]

    query, positive, key = normal(n), normal(n), normal(m)
    if kind == "peaked":
        positive = query + 0.01 * positive
        key = query[torch.arange(m) % max(n, 1)] + 0.1 * key
    elif kind == "collapsed":
        row = normal(1)
        query, positive, key = row.repeat(n, 1), row.repeat(n, 1), row.repeat(m, 1)
    classes = torch.arange(max(1, n // 4))
    labels = draw(classes, n), draw(classes, m)
    ids = torch.arange(n), torch.arange(m)
    if kind == "all-excluded":
        ids = torch.full((n,), 7), torch.full((m,), 7)
    elif kind == "duplicate-ids":
        values = torch.tensor([-1, 3, 3 + (1 << 32), -(1 << 62)])
        labels, ids = (draw(values, n), draw(values, m)), (draw(values, n), draw(values, m))
    return Case(query.to(WIDEST), positive.to(WIDEST), key.to(WIDEST), labels, ids)
