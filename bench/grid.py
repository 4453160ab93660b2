"""Is plain PyTorch faster anywhere? 80 cells, forward and backward: ``python -m bench.grid``.

A cell fails when the upper quartile of its rounds' ratios, plain PyTorch's time by fastcl's, is under 0.9
in two runs of three.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

import fastcl
from bench import machine
from bench.cases import LOSSES, Arguments, Case
from bench.timing import Paired, paired
from fastcl import PairRule, SimilarityStats
from fastcl.testing import dense_info_nce, dense_stats, dense_sup_con

Function = Callable[..., Any]

_SLOW = 0.9
_SECONDS = 1.5  # a run of a cell, without what a cell of few rounds takes longer
_KEYS = 4096  # of a queue, or explicit negatives
_BFLOAT16 = torch.bfloat16
_LOSSES = ("nt_xent", "info_nce", "info_nce_negatives", "moco", "mochi", "clip_loss", "sup_con")


@dataclass(frozen=True)
class Cell:
    """One call at one size; ``make`` gives fastcl's function, plain PyTorch's, and what both take."""

    name: str
    make: Callable[[], tuple[Function, Function, Arguments]]

    def sides(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """One step of plain PyTorch, and one of fastcl."""
        ours, plain, arguments = self.make()
        return partial(_step, plain, arguments), partial(_step, ours, arguments)

    def measured(self, seconds: float = _SECONDS) -> list[Paired]:
        """The runs, until two of them agree on whether the cell is slow."""
        plain, ours = self.sides()
        runs = [paired(plain, ours, seconds)]
        if slow(runs[0]):
            runs.append(paired(plain, ours, seconds))
            if not slow(runs[1]):
                runs.append(paired(plain, ours, seconds))
        return runs


def slow(run: Paired) -> bool:
    return run.ratio_quartiles[1] < _SLOW


def failed(runs: Sequence[Paired]) -> bool:
    return sum(map(slow, runs)) >= 2


def _step(function: Function, arguments: Arguments) -> object:
    returned = function(*arguments)
    outputs = [returned] if isinstance(returned, Tensor) else returned
    live = [x for x in outputs if x.requires_grad]
    if not live:
        return outputs
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(live, wanted, [torch.ones_like(x) for x in live])


def _suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else "-bfloat16"


def _rows(count: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def _stats(n: int, m: int, d: int, ruled: bool, dtype: torch.dtype = torch.float32) -> Cell:
    def make() -> tuple[Function, Function, Arguments]:
        ids = torch.arange(n), torch.arange(m)
        rule = PairRule(positive=(ids[0] % 10, ids[1] % 10), exclude=ids) if ruled else PairRule()

        def call(function: Callable[..., SimilarityStats], query: Tensor, key: Tensor) -> list[Tensor]:
            stats = function(query, key, scale=10.0, rule=rule, normalize=True)
            return [stats.lse_neg, stats.lse_pos, stats.pos_sum] if ruled else [stats.lse_neg]

        arguments = _rows(n, d, dtype, 0), _rows(m, d, dtype, 1)
        return partial(call, fastcl.similarity_stats), partial(call, dense_stats), arguments

    return Cell(f"similarity_stats{'-rule' if ruled else ''}-{n}x{m}x{d}{_suffix(dtype)}", make)


def _topk(n: int, m: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> Cell:
    def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(query @ key.T, k)
        return values, indices

    def make() -> tuple[Function, Function, Arguments]:
        arguments = _rows(n, d, dtype, 0).detach(), _rows(m, d, dtype, 1).detach()
        return partial(fastcl.similarity_topk, k=k), plain, arguments

    return Cell(f"similarity_topk-{n}x{m}x{d}-k{k}{_suffix(dtype)}", make)


def _loss(name: str, rows: int, dtype: torch.dtype = torch.float32) -> Cell:
    keys = _KEYS if name in ("info_nce_negatives", "moco", "mochi") else 0
    case = Case(name, rows, 128, keys=keys, classes=10, dtype=dtype)

    def make() -> tuple[Function, Function, Arguments]:
        loss = LOSSES[name]
        return (
            partial(loss.fastcl, **loss.options),
            partial(loss.plain, **loss.options),
            case.arguments(),
        )

    return Cell(case.name, make)


def _paired_info_nce(rows: int, dtype: torch.dtype = torch.float32) -> Cell:
    def make() -> tuple[Function, Function, Arguments]:
        x = [_rows(rows, 128, dtype, seed) for seed in range(2)]
        negatives = _rows(rows * 64, 128, dtype, 2).detach().reshape(rows, 64, 128).requires_grad_()
        ours, plain = (partial(f, negative_mode="paired") for f in (fastcl.info_nce, dense_info_nce))
        return ours, plain, (*x, negatives)

    return Cell(f"info_nce_paired-{rows}x128-64keys{_suffix(dtype)}", make)


def _sup_con(form: str, rows: int, dtype: torch.dtype = torch.float32) -> Cell:
    def make() -> tuple[Function, Function, Arguments]:
        features = _rows(rows * 2, 128, dtype, 0).detach().reshape(rows, 2, 128).requires_grad_()
        labels = torch.arange(rows) % 10
        mask = labels[:, None] == labels
        forms: dict[str, dict[str, Any]] = {
            "in": {"labels": labels, "variant": "in"},
            "one": {"labels": labels, "contrast_mode": "one"},
            "mask": {"mask": mask},
            "views": {},
        }
        ours, plain = (partial(f, **forms[form]) for f in (fastcl.sup_con, dense_sup_con))
        return ours, plain, (features,)

    return Cell(f"sup_con_{form}-{rows}x128{_suffix(dtype)}", make)


def _every_loss(rows: int, dtype: torch.dtype = torch.float32) -> list[Cell]:
    return [
        *(_loss(name, rows, dtype) for name in _LOSSES),
        *(_sup_con(form, rows, dtype) for form in ("in", "one", "mask", "views")),
        _paired_info_nce(rows, dtype),
    ]


_SHAPES = (
    (1, 1, 1),
    (1, 1, 4096),
    (1, 4096, 1),
    (4096, 1, 1),
    (1, 4096, 128),
    (4096, 1, 128),
    (8, 8, 16),
    (64, 64, 64),
    (64, 64, 4096),
    (256, 256, 128),
    (1024, 1024, 4096),
    (4096, 4096, 1),
    (4096, 4096, 128),
)
_HALF_SHAPES = ((1, 1, 1), (8, 8, 16), (64, 64, 64), (4096, 4096, 128))

CELLS = (
    *(_stats(*shape, ruled) for shape in _SHAPES for ruled in (False, True)),
    *(_stats(*shape, ruled, _BFLOAT16) for shape in _HALF_SHAPES for ruled in (False, True)),
    _topk(1, 1, 1, 1),
    _topk(8, 8, 16, 4),
    _topk(1, 4096, 128, 10),
    _topk(64, 20_000, 1, 10),
    _topk(4096, 4096, 16, 10),
    _topk(256, 4096, 4096, 200),
    _topk(8, 8, 16, 4, _BFLOAT16),
    _topk(256, 4096, 128, 10, _BFLOAT16),
    *_every_loss(8),
    *_every_loss(256),
    *_every_loss(64, _BFLOAT16),
    _loss("sup_con", 1),
    _loss("sup_con", 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grid", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/grid-COMMIT.json")
    arguments = parser.parse_args()
    commit = get_commit_info()  # type: ignore[no-untyped-call]
    out = arguments.out or Path(__file__).parent / "results" / f"grid-{commit['id'][:7]}.json"
    load = os.getloadavg()[0]

    print(f"{'plain, ms':>10} {'fastcl, ms':>10} {'ratio':>7}  quartiles      cell")
    found: dict[str, list[Paired]] = {}
    for cell in CELLS:
        found[cell.name] = runs = cell.measured()
        last = runs[-1]
        low, high = last.ratio_quartiles
        times = f"{last.plain_ms:10.3f} {last.ms:10.3f} {last.ratio:6.2f}x  {low:5.2f} to {high:5.2f}"
        print(f"{times}  {cell.name}{'  FAILED' if failed(runs) else ''}", flush=True)

    out.write_text(
        json.dumps(
            {
                "machine_info": machine.describe(),
                "commit_info": {"id": commit["id"], "dirty": commit["dirty"]},
                "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "load_before": load,
                "cells": {name: [asdict(run) for run in runs] for name, runs in found.items()},
            },
            indent=1,
        )
        + "\n"
    )
    slowest = sorted(found, key=lambda name: found[name][-1].ratio)[:10]
    print("worst:", ", ".join(f"{name} ({found[name][-1].ratio:.2f}x)" for name in slowest))
    bad = [name for name, runs in found.items() if failed(runs)]
    print(f"{len(found)} cells, {len(bad)} failed; {out}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
