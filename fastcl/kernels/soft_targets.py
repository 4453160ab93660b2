"""Cross-entropy between two softmaxes over the same keys, and targets under which keys are used equally."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fastcl.kernels import launch, stats, tiles
from fastcl.kernels.device import soft_targets as device
from fastcl.kernels.device.layout import SoftPartial
from fastcl.kernels.device.soft_targets import Softmaxes
from fastcl.kernels.device.tile import Side, Stored
from fastcl.similarity.fields import NEG_MAX, NEG_TOTAL
from fastcl.similarity.numerics import LN2
from fastcl.similarity.problem import (
    Needs,
    PairGradients,
    Problem,
    SoftTargetNeeds,
    SoftTargets,
    input_gradients,
)

_CHUNK_ELEMENTS = 1 << 25
_BLOCK = 64


class _Sides:
    """Both sides of the views' softmaxes, or of the teachers', all of them below each other."""

    def __init__(self, args: SoftTargets, of_teachers: bool) -> None:
        query, key, scale, bias = args.query, args.key, args.scale, None
        if of_teachers:
            query, key, scale, bias = args.target_query, args.target_key, args.target_scale, args.target_bias
            if query.dtype == torch.float64:
                query, key = query.float(), key.float()
        self.count, self.rows, _ = query.shape
        ids = args.simple_exclude() or (None, None)
        self.problem = Problem(
            query.flatten(0, 1),
            key,
            scale,
            bias,
            exclude_query=None if ids[0] is None else ids[0].repeat(self.count),
            exclude_key=ids[1],
            normalize=args.normalize,
        )
        self.sides = stats.Sides(self.problem)

    def of(self, rows: slice, weights: Tensor | None = None) -> Softmaxes:
        """Of some rows of each view, as the rows see them."""

        def some(x: Tensor | None, dim: int = 0) -> Tensor | None:
            if x is None:
                return None
            of_each = x.unflatten(dim, (self.count, self.rows))
            return of_each.narrow(dim + 1, rows.start, rows.stop - rows.start).flatten(dim, dim + 1)

        query, key = self.sides.query, self.sides.key
        own_rows = some(query.rows)
        assert own_rows is not None
        own = query._replace(
            rows=own_rows,
            factor=some(query.factor),
            exclude=some(query.exclude),
            count=own_rows.shape[0],
            stride=own_rows.stride(0),
        )
        matrix = launch.stored(own, key) if self.sides.wide else None
        return Softmaxes(own, key, matrix, self.sides.scale, some(weights, 1), None, self.count)


def _seen_by_keys(softmaxes: Softmaxes) -> Softmaxes:
    own, other, matrix, scale, weights, _, count = softmaxes
    if matrix is not None:
        matrix = Stored(matrix.data, matrix.other_stride, matrix.own_stride)
    return Softmaxes(other, own, matrix, scale, None, weights, count)


def _chunks(views: _Sides, teachers: _Sides) -> Iterator[slice]:
    """All rows; where the library multiplies them, as many as may be stored."""
    step = max(1, views.rows)
    if views.sides.wide or teachers.sides.wide:
        step = max(64, _CHUNK_ELEMENTS // max(1, (views.count + teachers.count) * views.sides.key.count))
    for start in range(0, max(1, views.rows), step):
        yield slice(start, min(views.rows, start + step))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@launch.at_its_precision
def soft_cross_entropy(args: SoftTargets, kept_logits: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.soft_cross_entropy`."""
    views, teachers = _Sides(args, False), _Sides(args, True)
    parts = [_losses(views.of(rows), teachers.of(rows)) for rows in _chunks(views, teachers)]
    losses, state = (_joined(list(found)) for found in zip(*parts, strict=True))
    return losses, state, losses.new_empty(0)


def _losses(view: Softmaxes, target: Softmaxes) -> tuple[Tensor, Tensor]:
    rows, pairs = view.own.count // view.count, view.count * target.count
    walk = launch.plan("soft_targets", view.own, view.other, beside=(target.own, target.other))
    blocks = triton.cdiv(rows, walk.tile.block_m) * pairs
    splits = launch.splits(blocks, view.other.count, walk.tile)
    new = view.scale.new_empty
    partials = new(splits, len(SoftPartial._fields), pairs * rows)
    launch.launch(device.soft_cross_entropy, (blocks, splits), view, target, rows, partials, **walk.options)
    losses, state = new(view.count, rows), new(2 * (view.count + target.count), rows)
    grid = (triton.cdiv(rows, _BLOCK), view.count)
    arguments = (partials, splits, losses, state, rows, target.count)
    launch.launch(device.soft_losses, grid, *arguments, BLOCK=_BLOCK)
    return losses, state


@launch.at_its_precision
def soft_cross_entropy_backward(
    args: SoftTargets, grad: Tensor, state: Tensor, kept_logits: Tensor, needs: SoftTargetNeeds
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.soft_cross_entropy_backward`."""
    views, teachers = _Sides(args, False), _Sides(args, True)
    of_views, of_teachers = state.unflatten(0, (-1, 2)).split([views.count, teachers.count])
    view_weights = _weights(of_views, 1.0, grad)
    target_weights = _weights(of_teachers, 1.0 / teachers.count)
    unit = _weight_unit(views, view_weights, target_weights)
    query_parts, key_sum = [], None
    for rows in _chunks(views, teachers):
        view, target = views.of(rows, view_weights), teachers.of(rows, target_weights)
        of_query, of_key = _gradients(view, target, unit, needs.query or needs.scale, needs.key)
        if of_query is not None:
            query_parts.append(of_query.unflatten(0, (views.count, -1)))
        if of_key is not None:
            key_sum = of_key if key_sum is None else key_sum + of_key
    query_sum = _joined(query_parts).flatten(0, 1) if query_parts else None
    pairs = PairGradients(query_sum, key_sum, None)
    grad_query, *others = input_gradients(
        views.problem, views.sides.prepared(), pairs, Needs(*needs, False, False)
    )
    return None if grad_query is None else grad_query.view(args.query.shape), *others[: len(needs) - 1]


def _weights(state: Tensor, share: float, *more: Tensor) -> Tensor:
    """Of softmaxes (count, 2, N), packed: the maximum, ``share / sum``, and more of the kind (count, N)."""
    maximum, total = state[:, NEG_MAX], state[:, NEG_TOTAL]
    slope = share / total.masked_fill(total == 0, torch.inf)
    return torch.stack([maximum.masked_fill(maximum == -torch.inf, 0.0), slope, *more]).flatten(1)


def _weight_unit(views: _Sides, view_weights: Tensor, target_weights: Tensor) -> Tensor:
    """As the statistics': neither softmax is above its 1 / sum."""
    one = views.sides.scale.new_ones(())
    if views.sides.query.rows.dtype != torch.float16 or not view_weights.numel():
        return one
    _, of_views, grad = view_weights.unflatten(1, (views.count, views.rows))
    of_targets = target_weights[NEG_TOTAL].unflatten(0, (-1, views.rows)).sum(dim=0)
    return launch.power_of_two_over((torch.maximum(of_views, of_targets) * grad.abs()).amax())


def _gradients(
    view: Softmaxes, target: Softmaxes, unit: Tensor, want_query: bool, want_key: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the logits' gradients against keys, and against queries."""
    of_query = of_key = None
    if view.matrix is None:
        if want_query:
            of_query = _row_gradient(view, target, unit)
        if want_key:
            of_key = _row_gradient(_seen_by_keys(view), _seen_by_keys(target), unit)
    elif want_query or want_key:
        dlogits = _logit_gradient(view, target, unit)
        if want_query:
            of_query = launch.matmul(dlogits, stats.operand(view.other)) / unit
        if want_key:
            of_key = launch.matmul(dlogits.T, stats.operand(view.own)) / unit
    return of_query, of_key


def _row_gradient(view: Softmaxes, target: Softmaxes, unit: Tensor) -> Tensor:
    walk = launch.plan("soft_gradient", view.own, view.other, beside=(target.own, target.other))
    partial = unit.new_empty(walk.grid[1], *view.own.rows.shape)
    arguments = (view, target, _rows_of(target), unit, partial)
    launch.launch(device.soft_gradient, walk.grid, *arguments, **walk.options)
    return launch.over_splits(partial)


def _logit_gradient(view: Softmaxes, target: Softmaxes, unit: Tensor) -> Tensor:
    dtype = launch.dot_dtype(view.own.rows, view.other.rows)
    result = unit.new_empty(view.own.count, view.other.count, dtype=dtype)
    walk = launch.plan("soft_targets", view.own, view.other, beside=(target.own, target.other))
    own = ("D", "BLOCK_D", "BLOCK_K", "DOT")
    launch.launch(
        device.soft_logit_gradient,
        launch.tile_grid(walk, view.own, view.other),
        view,
        target,
        _rows_of(target),
        unit,
        result,
        **{name: option for name, option in walk.options.items() if name not in own},
    )
    return result


def _rows_of(target: Softmaxes) -> int:
    queries: Side = target.other if target.own_weights is None else target.own
    return int(queries.count) // int(target.count)


def sinkhorn(
    query: Tensor, key: Tensor, scale: Tensor, steps: int, normalize: bool, precision: int
) -> Tensor:
    """Potentials (K,) of the keys: a pass over all pairs for each half of a round, and nothing kept."""
    return _potentials(Problem(query, key, scale, normalize=normalize, precision=precision), steps)


@launch.at_its_precision
def _potentials(problem: Problem, steps: int) -> Tensor:
    sides = stats.Sides(problem)
    query, key = sides.query, sides.key
    of_keys = -_log2_sum(key, query, sides.scale)
    for _ in range(steps - 1):
        of_rows = -_log2_sum(query, key._replace(bias=of_keys), sides.scale)
        of_keys = -_log2_sum(key, query._replace(bias=of_rows), sides.scale)
    return of_keys * LN2


def _log2_sum(own: Side, other: Side, scale: Tensor) -> Tensor:
    """``log2 sum_j exp2(logit_ij)``, (N,)."""
    if own.rows.shape[1] > tiles.MAX_WIDTH:
        _, state, _, _ = stats.wide_statistics(own, other, scale, False)
    else:
        _, state = launch.merge(launch.row_statistics(own, other, scale)[0])
    return state[NEG_MAX] + state[NEG_TOTAL].log2()
