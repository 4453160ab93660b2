"""What all ranks hold, brought together: rows, and the sum of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.ops import calls
from fastcl.similarity.checks import check_reduction
from fastcl.similarity.fields import Measured
from fastcl.similarity.numerics import compute_dtype
from fastcl.similarity.numerics import reduce as reduce_rows
from fastcl.similarity.problem import Problem
from fastcl.similarity.rules import flattened, unflattened
from fastcl.similarity.transforms import is_transformed


def check_group(group: dist.ProcessGroup | None, ring: bool) -> None:
    """Raise unless ``group`` is None or a process group of this rank, and given where ``ring`` is.

    Raises:
        RuntimeError: a group under forward mode or ``torch.func``, which ranks do not share.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup that this rank belongs to, got {type(group).__name__}")
    if ring and group is None:
        raise ValueError("ring=True passes keys between the ranks of a group, but got group=None")
    if group is not None and is_transformed():
        raise RuntimeError("with group= derivatives are those of backward(): no torch.func, no forward mode")


def refuse_second_order() -> None:
    """Raise in a backward pass that is to be differentiated itself: ranks exchange values, not graphs."""
    if torch.is_grad_enabled():
        raise RuntimeError("with group= there are no second derivatives: call backward without create_graph")


def group_reduce(losses: Tensor, count: int, reduction: str, group: dist.ProcessGroup) -> Tensor:
    """The loss of all ranks' rows from this rank's ``count`` losses or, unless 'none', from their sum."""
    if reduction == "none":
        return losses
    total = group_sum(torch.stack([losses.sum(), losses.new_full((), count)]), group)
    return total[0] / total[1] if reduction == "mean" else total[0]


def group_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's ``x``, on every rank; differentiable once."""
    return gather_rows(x[None], [1] * dist.get_world_size(group), group).sum(dim=0)


def reduce(losses: Tensor, reduction: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """Apply 'none', 'mean' or 'sum' to the losses of all ranks' rows.

    Args:
        losses: this rank's rows'.
        reduction: 'none', 'mean' or 'sum'.
        group: the ranks, or None. Averaged over them, gradients are those of one process.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a ``group`` that is none.
    """
    check_reduction(reduction)
    check_group(group, False)
    if group is None:
        return reduce_rows(losses, reduction)
    return group_reduce(losses, losses.numel(), reduction, group)


def row_counts(rows: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows each rank brings; waits for the device.

    Raises:
        ValueError: the (N, D) rows are not equally wide on all ranks.
    """
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    counts, widths = torch.stack(shapes).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"rows must have the same number of components on every rank, got {widths}")
    return list(counts)


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in rank order, differentiable once."""
    gathered: Tensor = _GatherRows.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    """Rows are padded on the way, since ranks may bring different numbers of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        parts = [rows.new_empty(max(counts), *rows.shape[1:]) for _ in counts]
        dist.all_gather(parts, _padded(rows, max(counts)), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Every rank's rows receive the sum of their gradients on all ranks."""
        refuse_second_order()
        parts = [_padded(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own[: ctx.counts[dist.get_rank(ctx.group)]], None, None


def _padded(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def ids_of_rows(count: int, group: dist.ProcessGroup | None, device: torch.device | None) -> Tensor:
    """Ids (count,) int64 of this rank's rows, which no other rank's have."""
    return unique_ids(torch.arange(count, device=device), group)


def unique_ids(ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Ids that count this rank's samples from 0, as ids that no other rank has."""
    return ids if group is None else ids * dist.get_world_size(group) + dist.get_rank(group)


def row_ids(count: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Ids (count,) int64 of this rank's rows, which no other rank's have.

    Args:
        count: how many rows this rank has.
        group: the ranks, or None.
    """
    check_group(group, False)
    return ids_of_rows(count, group, None)


def with_all_keys(problem: Problem, group: dist.ProcessGroup, counts: Sequence[int]) -> Problem:
    """This rank's rows with the keys of all ranks, in rank order, and with what belongs to keys.

    Masks and ``exclude_keys`` are of all ranks' keys already.
    """

    def gather(of_keys: Tensor | None) -> Tensor | None:
        return None if of_keys is None else gather_rows(of_keys, counts, group)

    def gather_sets(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sets = unflattened(tensors)
        return flattened(
            tuple((s[0], gather_rows(s[1], counts, group)) if isinstance(s, tuple) else s for s in sets)
        )

    # gradients are summed over ranks, and should round once
    key = problem.key.to(compute_dtype(problem.query.dtype))
    return problem._replace(
        key=gather_rows(key, counts, group),
        key_bias=gather(problem.key_bias),
        key_scale=gather(problem.key_scale),
        positive_key=gather(problem.positive_key),
        exclude_key=gather(problem.exclude_key),
        within_key=gather(problem.within_key),
        positive_more=gather_sets(problem.positive_more),
        exclude_more=gather_sets(problem.exclude_more),
    )


def gathered_stats(
    problem: Problem, group: dist.ProcessGroup, counts: Sequence[int], backend: str = "auto"
) -> Measured:
    """Statistics of this rank's rows over the keys of all ranks, gathered here."""

    def over_all(own: Problem) -> Measured:
        return calls.statistics(with_all_keys(own, group, counts), backend=backend)

    by_rows = problem._replace(columns=False)
    if not problem.columns:
        return over_all(by_rows)
    # a column's queries are spread over the ranks: its statistics are those of a row of the swapped problem
    by_columns = by_rows._replace(
        query=problem.key,
        key=problem.query,
        positive_query=problem.positive_key,
        positive_key=problem.positive_query,
        exclude_query=problem.exclude_key,
        exclude_key=problem.exclude_query,
    )
    return Measured(over_all(by_rows).rows, over_all(by_columns).rows)
