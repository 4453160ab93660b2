"""Launching the kernels: sides from a problem's tensors, grids that depend on shapes only, merges."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import tiles
from fastcl.kernels.device import attend, gradient, rows, statistics
from fastcl.kernels.device.tile import Partials, Side, Stored
from fastcl.similarity.fields import NEGATIVE_STATE, RUNNING, STATE, STATISTICS
from fastcl.similarity.numerics import LOG2E, matmul_precision_level
from fastcl.similarity.problem import Problem, SoftTargets

INTERPRETED = triton.knobs.runtime.interpret
# enough programs to fill any GPU of today; fixed, so that results depend on shapes only
_PROGRAMS = 256
_COLUMN_PARTIALS_BYTES = 256 << 20

_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# of float32 products, where a call says it: a backward pass keeps to its forward pass
_precision: ContextVar[int | None] = ContextVar("precision", default=None)


def at_its_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a problem, with products formed as the problem says."""

    @functools.wraps(function)
    def call(problem: Problem | SoftTargets, *args: Any) -> Any:
        token = _precision.set(problem.precision)
        try:
            return function(problem, *args)
        finally:
            _precision.reset(token)

    return call


class UnitRows(NamedTuple):
    """Rows ready for products: unit rows are ``rows * factor``; without a factor they are used as given."""

    rows: Tensor  # (N, D)
    factor: Tensor | None  # (N,) float32
    inverse: Tensor | None  # (N,) float32, 1 / norm of the given rows

    def side(self, **options: Any) -> Side:
        """These rows as one side of a similarity matrix."""
        empty = Side(self.rows, self.factor, None, None, None, None, *_extent(self.rows))
        return empty._replace(**options)

    def part(self, rows: slice) -> UnitRows:
        """Some of these rows."""
        vectors = (None if x is None else x[rows] for x in (self.factor, self.inverse))
        return UnitRows(self.rows[rows], *vectors)

    def unit(self) -> Tensor:
        """The unit rows themselves, float32."""
        unit = self.rows.float()
        return unit if self.factor is None else unit * self.factor[:, None]


def _extent(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.stride(0)


def row_contiguous(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous; rows may be any distance apart."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def given_rows(x: Tensor) -> UnitRows:
    """Rows to be used as they are."""
    return UnitRows(row_contiguous(x), None, None)


def unit_rows(first: Tensor, second: Tensor | None = None) -> UnitRows:
    """Rows of ``first``, then of ``second``, to be used divided by their norms; one launch."""
    first = row_contiguous(first)
    second = None if second is None else row_contiguous(second)
    count, width = first.shape[0] + (0 if second is None else second.shape[0]), first.shape[1]
    result = first.new_empty(count, width)
    factor, inverse = first.new_empty(2, count, dtype=torch.float32).unbind(0)
    block_d = tiles.block_width(width)
    block = max(1, 4096 // block_d)
    launch(
        rows.unit_rows,
        (triton.cdiv(count, block),),
        first,
        second,
        result,
        factor,
        inverse,
        first.shape[0],
        count,
        first.stride(0),
        0 if second is None else second.stride(0),
        D=width,
        BLOCK_D=block_d,
        BLOCK=block,
    )
    return UnitRows(result, factor, inverse)


def part(side: Side, rows: slice) -> Side:
    """Some of a side's rows."""
    fields = {
        name: None if (values := getattr(side, name)) is None else values[rows]
        for name in ("rows", "factor", "bias", "exclude", "positive")
    }
    return side._replace(count=rows.stop - rows.start, **fields)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the library, accumulated and returned in float32."""
    if a.device.type == "cuda" and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def stored(own: Side, other: Side) -> Stored:
    """All products of two sides, formed by the library."""
    return Stored(matmul(own.rows, other.rows.T), other.count, 1)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on its first tensor's device; nothing for an empty grid."""
    if 0 in grid:
        return
    device = next(x.device for x in _tensors(args))
    context = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with context:
        kernel[grid](*args, **options)


def _tensors(args: tuple[Any, ...]) -> Any:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


def dot_dtype(own: Tensor, other: Tensor) -> torch.dtype:
    """The dtype products are formed in: the sides' own, float32 if they differ."""
    if own.dtype != other.dtype or (INTERPRETED and own.dtype == torch.bfloat16):
        return torch.float32  # the interpreter's bfloat16 arithmetic is wrong
    return own.dtype


def input_precision(device: torch.device) -> str:
    """How float32 products are formed on the device."""
    if torch.version.hip is not None or device.type != "cuda":
        return "ieee"
    level = _precision.get()
    if level is None:
        level = matmul_precision_level()
    return "tf32x3" if level == 0 else "tf32"


class Plan(NamedTuple):
    """One kernel's tile, grid and compile-time arguments for two sides."""

    tile: tiles.Tile
    grid: tuple[int, int]
    options: dict[str, Any]


def plan(
    kernel: str, own: Side, other: Side, fill: bool = False, beside: tuple[Side, Side] | None = None
) -> Plan:
    """How ``kernel`` walks own rows (blocks) and other rows (splits of tiles).

    ``fill``: blocks of fewer rows, down to 16, where there are few. ``beside``: the sides of the products
    that the kernel forms besides, for its target.
    """
    sides = [(own, other)] if beside is None else [(own, other), beside]
    dtype = max((dot_dtype(a.rows, b.rows) for a, b in sides), key=lambda dtype: dtype.itemsize)
    width = min(max(a.rows.shape[1] for a, _ in sides), tiles.MAX_WIDTH)
    tile = tiles.tile(kernel, tiles.architecture(own.rows.device), dtype, width)
    while fill and tile.block_m > 16 and triton.cdiv(own.count, tile.block_m) < _PROGRAMS // 2:
        tile = tile._replace(block_m=tile.block_m // 2)
    blocks = triton.cdiv(own.count, tile.block_m)
    options = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": input_precision(own.rows.device),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    for prefix, (a, b) in zip(("", "TARGET_"), sides, strict=False):
        width = a.rows.shape[1]
        block_d = tiles.block_width(1 if width > tiles.MAX_WIDTH else width)
        options |= {
            f"{prefix}D": width,
            f"{prefix}BLOCK_D": block_d,
            f"{prefix}BLOCK_K": min(tile.block_k or block_d, block_d),
            f"{prefix}DOT": _DOT[dot_dtype(a.rows, b.rows)],
        }
    return Plan(tile, (blocks, splits(blocks, other.count, tile)), options)


def splits(blocks: int, others: int, tile: tiles.Tile) -> int:
    """How many programs share the other rows of each block of own rows."""
    return max(1, min(triton.cdiv(others, tile.block_n), _PROGRAMS // max(1, blocks)))


def row_statistics(
    own: Side,
    other: Side,
    scale: Tensor,
    matrix: Stored | None = None,
    columns: bool = False,
    triangle: bool = False,
) -> tuple[Partials, Partials | None]:
    """Partial statistics of own rows and, if asked for, of the other side's negatives."""
    walk = plan("statistics", own, other)
    fields = RUNNING if own.positive is not None else NEGATIVE_STATE
    partials = scale.new_empty(walk.grid[1], fields, own.count)
    of_columns = scale.new_empty(walk.grid[0], NEGATIVE_STATE, other.count) if columns else None
    arguments = (own, other, scale, matrix, partials, of_columns)
    launch(statistics.statistics, walk.grid, *arguments, TRIANGLE=triangle, **walk.options)
    width = walk.tile.block_m if triangle else None
    return as_partials(partials), None if of_columns is None else as_partials(of_columns, width)


def as_partials(values: Tensor, width: int | None = None) -> Partials:
    """Values (slots, fields, count) as kernels take them."""
    return Partials(values, values.shape[0], values.shape[1], width)


def column_partials_fit(own: Side, other: Side) -> bool:
    """Whether one pass may keep every row block's partials; else columns take a pass of their own."""
    blocks = plan("statistics", own, other).grid[0]
    return blocks * NEGATIVE_STATE * other.count * torch.float32.itemsize <= _COLUMN_PARTIALS_BYTES


def merge(partials: Partials, triangle: Partials | None = None) -> tuple[Tensor, Tensor]:
    """Statistics and state of rows from partials; of the triangle's those of its columns."""
    values: Tensor = partials.data
    count, block = values.shape[2], 64
    state, result = values.new_empty(STATE, count), values.new_empty(STATISTICS, count)
    launch(
        statistics.merge,
        (triton.cdiv(count, block),),
        partials,
        triangle,
        state,
        result,
        count,
        POSITIVES=values.shape[1] == RUNNING,
        BLOCK=block,
        SLOTS=16,
    )
    return result, state


def attend_keys(own: Side, other: Side, scale: Tensor, spare: int = 0) -> tuple[Partials, Tensor]:
    """Partial states and weighted keys (slots, N, D) of own rows; ``spare`` slots are left to the caller."""
    walk = plan("attend", own, other)
    partials = scale.new_empty(walk.grid[1] + spare, NEGATIVE_STATE, own.count)
    weighted = scale.new_empty(walk.grid[1] + spare, *own.rows.shape)
    launch(attend.attend, walk.grid, own, other, scale, partials, weighted, **walk.options)
    return as_partials(partials), weighted


def merge_weighted(partials: Partials, weighted: Tensor, state: Tensor) -> Tensor:
    """Weighted keys (N, D) under the merged state."""
    _, count, width = weighted.shape
    block_d = tiles.block_width(width)
    block = max(1, 4096 // block_d)
    result = weighted.new_empty(count, width)
    launch(
        attend.merge_weighted,
        (triton.cdiv(count, block),),
        partials,
        weighted,
        state,
        result,
        count,
        D=width,
        BLOCK_D=block_d,
        BLOCK=block,
    )
    return result


def row_gradient(
    own: Side,
    other: Side,
    scale: Tensor,
    own_weights: Tensor | None,
    other_weights: Tensor | None,
    unit: Tensor,
    sums: bool = False,
    weights: Any = gradient.tile_weights,
) -> tuple[Tensor, Tensor | None]:
    """``sum_j dl_ij factor_j y_j`` (N, D) and, if asked for, ``sum_j dl_ij`` (N,).

    ``weights``: the function on the device that forms the logits' gradients.
    """
    walk = plan("gradient", own, other)
    partial = scale.new_empty(walk.grid[1], *own.rows.shape)
    partial_sums = scale.new_empty(walk.grid[1], own.count) if sums else None
    arguments = (own, other, scale, own_weights, other_weights, unit, partial, partial_sums)
    launch(gradient.gradient, walk.grid, *arguments, WEIGHTS=weights, **walk.options)
    return over_splits(partial), None if partial_sums is None else over_splits(partial_sums)


def over_splits(parts: Tensor) -> Tensor:
    """The sum of what each split found."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)


def power_of_two_over(largest: Tensor) -> Tensor:
    """The power of two that brings a positive number to [1, 2), within float32's range."""
    return torch.exp2(-torch.floor(torch.log2(largest)).nan_to_num(0.0).clamp(-100, 100))


def logit_gradient(
    own: Side,
    other: Side,
    scale: Tensor,
    matrix: Stored,
    own_weights: Tensor | None,
    other_weights: Tensor | None = None,
    unit: Tensor | None = None,
    weights: Any = gradient.tile_weights,
) -> Tensor:
    """The logits' gradients (N, M) of stored products, times ``unit``, in the dtype of products."""
    dtype = dot_dtype(own.rows, other.rows)
    result = scale.new_empty(own.count, other.count, dtype=dtype)
    walk = plan("statistics", own, other)
    launch(
        gradient.logit_gradient,
        tile_grid(walk, own, other),
        own,
        other,
        scale,
        matrix,
        own_weights,
        other_weights,
        torch.ones_like(scale) if unit is None else unit,
        result,
        WEIGHTS=weights,
        BLOCK_M=walk.tile.block_m,
        BLOCK_N=walk.tile.block_n,
    )
    return result


def tile_grid(walk: Plan, own: Side, other: Side) -> tuple[int, int]:
    """A program for every tile."""
    return triton.cdiv(own.count, walk.tile.block_m), triton.cdiv(other.count, walk.tile.block_n)


def bias2(bias: Tensor | None) -> Tensor | None:
    """A bias in the kernels' log2 units."""
    return None if bias is None else (bias.float() * LOG2E).contiguous()
