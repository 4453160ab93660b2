"""Calls that together launch every Triton kernel in every form the losses need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastcl
from fastcl import kernels
from fastcl.kernels.tiles import DTYPE_NAMES
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import BATCH, NEGATIVES, PAIRS, VIEWS, OnePositive
from fastcl.similarity.problem import LogisticNeeds, Needs, Problem, SoftTargetNeeds, SoftTargets

_ROWS, _KEYS = 16384, 20480
_ALL_NEEDED = 0b1111


class Call(NamedTuple):
    """One of the backend's functions on inputs of some shape."""

    name: str
    run: Callable[[], object]


def calls() -> Iterator[Call]:
    """Every form in bfloat16 at 128 components; at other widths and dtypes those that differ most."""
    yield from _losses("bfloat16 D=128", torch.bfloat16, 128)
    yield from _statistics("bfloat16 D=128", torch.bfloat16, 128)
    yield from _queue("bfloat16 D=128", torch.bfloat16, 128)
    yield from _sums("bfloat16 D=128", torch.bfloat16, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (64, 128, 256):
            if (dtype, width) != (torch.bfloat16, 128):
                yield from _losses(
                    f"{DTYPE_NAMES[dtype]} D={width}", dtype, width, ("nt_xent", "clip", "queue")
                )
                yield from _sums(f"{DTYPE_NAMES[dtype]} D={width}", dtype, width)
    yield from _statistics("float32 D=128", torch.float32, 128)
    yield from _statistics("float16 D=128", torch.float16, 128)
    yield from _losses("bfloat16 D=512", torch.bfloat16, 512, ("clip",), 1024)
    yield from _statistics("bfloat16 D=512", torch.bfloat16, 512, 1024, 2048)
    yield from _sums("bfloat16 D=512", torch.bfloat16, 512, 1024)


def _rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, width, dtype=dtype)


def _losses(
    name: str, dtype: torch.dtype, width: int, only: tuple[str, ...] = (), n: int = _ROWS
) -> Iterator[Call]:
    scale = torch.ones(())

    def loss(layout: int, rows: int, negatives: Tensor | None = None, needs: int = _ALL_NEEDED) -> object:
        query, positive = _rows(rows, width, dtype), _rows(rows, width, dtype)
        normalize = negatives is not None and needs == _ALL_NEEDED
        args = OnePositive(query, positive, negatives, scale, layout=layout, normalize_negatives=normalize)
        return kernels.one_positive(args, needs)

    runs: dict[str, Callable[[], object]] = {
        "nt_xent": partial(loss, VIEWS, n),
        "nt_xent small": partial(loss, VIEWS, 256),
        "info_nce": partial(loss, BATCH, n),
        "clip": partial(loss, PAIRS, n),
        "queue": lambda: loss(NEGATIVES, 256, _rows(_KEYS, width, dtype), 0b0011),
        "negatives": lambda: loss(NEGATIVES, 256, _rows(_KEYS, width, dtype)),
    }
    for title, run in runs.items():
        if not only or title in only:
            yield Call(f"{title} {name}", run)


def _statistics(name: str, dtype: torch.dtype, width: int, n: int = _ROWS, m: int = _KEYS) -> Iterator[Call]:
    query_ids, key_ids = torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    needs = Needs(query=True, key=True, scale=True, key_bias=True, key_scale=True)

    def run(labelled: bool, symmetric: bool) -> None:
        query, key = _rows(n, width, dtype), _rows(m, width, dtype)
        other_ids = query_ids if symmetric else key_ids
        problem = Problem(
            query=query,
            key=query if symmetric else key,
            scale=torch.ones(()),
            key_bias=None if symmetric else torch.zeros(m),
            key_scale=None if symmetric else torch.ones(m),
            positive_query=query_ids if labelled else None,
            positive_key=other_ids if labelled else None,
            exclude_query=query_ids,
            exclude_key=other_ids,
            normalize=True,
            columns=not symmetric,
            symmetric=symmetric,
            precision=0,
        )
        rows, row_state, columns, column_state, _ = kernels.stats_forward(problem, False)
        kernels.stats_backward(problem, rows, columns, row_state, column_state, needs)
        if not symmetric and not labelled:
            kernels.stats_forward(problem._replace(columns=False), True)

    yield Call(f"statistics {name}", lambda: run(False, False))
    yield Call(f"labelled {name}", lambda: run(True, False))
    yield Call(f"labelled symmetric {name}", lambda: run(True, True))


def _sums(name: str, dtype: torch.dtype, width: int, n: int = _ROWS) -> Iterator[Call]:
    scale, ids = torch.ones(()), torch.zeros(n, dtype=torch.int64)

    def logistic(**rule: Tensor) -> None:
        query, key = _rows(n, width, dtype), _rows(n, width, dtype)
        problem, bias = Problem(query, key, scale, **rule, normalize=True), torch.zeros(n)  # type: ignore[arg-type]
        sums = kernels.logistic(problem, bias)
        kernels.logistic_backward(problem, bias, sums, LogisticNeeds(True, True, True, True))

    def soft_targets(views: int, teachers: int, target_bias: Tensor | None = None) -> None:
        keys = _rows(_KEYS, width, dtype)
        query, target_query = (torch.zeros(count, 512, width, dtype=dtype) for count in (views, teachers))
        args = SoftTargets(query, keys, scale, target_query, keys, scale, target_bias)
        losses, state, kept = kernels.soft_cross_entropy(args, 0)
        kernels.soft_cross_entropy_backward(args, losses, state, kept, SoftTargetNeeds(True, True, True))

    yield Call(f"siglip {name}", lambda: logistic(positive_query=ids, positive_key=ids))
    yield Call(f"logistic {name}", lambda: logistic(exclude_query=ids, exclude_key=ids))
    yield Call(f"soft targets {name}", lambda: soft_targets(1, 1))
    yield Call(f"multi-crop {name}", lambda: soft_targets(10, 2, torch.zeros(_KEYS)))


def _queue(name: str, dtype: torch.dtype, width: int) -> Iterator[Call]:
    keys = _rows(_KEYS, width, dtype)

    def mochi() -> None:
        rows = _rows(32, width, dtype)
        draws = fastcl.MochiDraws(
            *(torch.zeros(32, 512, dtype=torch.int64),) * 2,
            torch.zeros(32, 512),
            torch.zeros(32, 256, dtype=torch.int64),
            torch.zeros(32, 256),
        )
        kernels.mochi(Mochi(rows, rows, torch.ones(()), keys, *draws, 1024))

    def enqueue() -> None:
        ids = torch.zeros(_KEYS, dtype=torch.int64)
        kernels.enqueue(keys, ids, torch.zeros((), dtype=torch.int64), _rows(256, width, dtype), ids[:256])

    yield Call(f"mochi {name}", mochi)
    yield Call(f"enqueue {name}", enqueue)
