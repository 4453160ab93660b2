"""The losses over all ranks of a process group: those of one process that holds every rank's rows.

Each rank has its own queries and its own shard of the keys. Either it gathers all shards, or the
shards travel around a ring and each rank merges the statistics of its queries over them. Gradients
are those of the sum of what the ranks returned: under the averaging of DistributedDataParallel,
those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcl import dispatch
from fastcl.chunked import empty_state, merge_states, statistics
from fastcl.numerics import compute_dtype
from fastcl.one_positive import OnePositive
from fastcl.problem import PROBLEM_TENSORS, Needs, Problem
from fastcl.similarity import problem_stats
from fastcl.stats import SimilarityStats, from_packed
from fastcl.transforms import is_transformed


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


def one_positive(args: OnePositive, group: dist.ProcessGroup, ring: bool) -> Tensor:
    """The loss of all ranks' rows: the same on every rank, or this rank's rows' with 'none'."""
    args = args.in_compute_dtype()
    stats = group_stats(args.problem(), group, ring)
    column_lse_neg = None if stats.columns is None else stats.columns.lse_neg
    losses = args._replace(reduction="none").loss(stats.lse_neg, column_lse_neg)
    return group_reduce(losses, losses.shape[0], args.reduction, group)


def group_stats(
    problem: Problem, group: dist.ProcessGroup, ring: bool, *, labelled: bool = False
) -> SimilarityStats:
    """Statistics of this rank's queries over all ranks' keys and, if asked, of its keys over all queries.

    Args:
        problem: this rank's rows. Its ids count this rank's samples from 0.
        group: the ranks.
        ring: pass shards around instead of gathering them.
        labelled: the positive-ids are labels, which mean the same on every rank.
    """
    dtype = compute_dtype(problem.query.dtype)  # gradients are summed over ranks, and should round once
    size, rank = dist.get_world_size(group), dist.get_rank(group)

    def unique(ids: Tensor | None) -> Tensor | None:
        return None if ids is None else ids * size + rank

    problem = problem._replace(
        query=problem.query.to(dtype),
        key=problem.key.to(dtype),
        positive_query=problem.positive_query if labelled else unique(problem.positive_query),
        positive_key=problem.positive_key if labelled else unique(problem.positive_key),
        exclude_query=unique(problem.exclude_query),
        exclude_key=unique(problem.exclude_key),
        symmetric=False,
    )
    counts = row_counts(problem.key, group)
    if ring:
        return _ring_stats(problem, _Ring(group, rank, counts))
    return _gathered_stats(problem, group, counts)


def group_reduce(losses: Tensor, count: int, reduction: str, group: dist.ProcessGroup) -> Tensor:
    """The loss of all ranks' rows from this rank's ``count`` losses or, unless 'none', from their sum."""
    if reduction == "none":
        return losses
    own = torch.stack([losses.sum(), losses.new_full((), count)])
    total = gather_rows(own[None], [1] * dist.get_world_size(group), group).sum(dim=0)
    return total[0] / total[1] if reduction == "mean" else total[0]


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Every rank's rows receive the sum of their gradients on all ranks."""
        parts = [_padded(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own[: ctx.counts[dist.get_rank(ctx.group)]], None, None


def _padded(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _gathered_stats(problem: Problem, group: dist.ProcessGroup, counts: Sequence[int]) -> SimilarityStats:
    def gather(ids: Tensor | None) -> Tensor | None:
        return None if ids is None else gather_rows(ids, counts, group)

    def over_all(own: Problem) -> SimilarityStats:
        return problem_stats(
            own._replace(
                key=gather_rows(own.key, counts, group),
                positive_key=gather(own.positive_key),
                exclude_key=gather(own.exclude_key),
            )
        )

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
    return replace(over_all(by_rows), columns=over_all(by_columns))


def _ring_stats(problem: Problem, ring: _Ring) -> SimilarityStats:
    backend = dispatch.choose(dispatch.Request.of(problem.query)).name
    if backend == "reference":
        raise RuntimeError("backend 'reference' cannot serve ring=True: it has no backward pass of its own")
    rows, columns = _RingStats.apply(ring, backend, *problem)  # type: ignore[no-untyped-call]
    return from_packed(rows, from_packed(columns) if problem.columns else None)


class _Shard(NamedTuple):
    """What of a rank's keys the others need to see, rows first."""

    key: Tensor  # (M, D)
    positive_key: Tensor | None  # (M,)
    exclude_key: Tensor | None  # (M,)
    columns: Tensor | None = None  # (M, 9): gradient and state of the column statistics

    @classmethod
    def of(cls, problem: Problem, columns: Tensor | None = None) -> _Shard:
        return cls(problem.key, problem.positive_key, problem.exclude_key, columns)

    def seen_by(self, problem: Problem) -> Problem:
        return problem._replace(key=self.key, positive_key=self.positive_key, exclude_key=self.exclude_key)


class _Ring(NamedTuple):
    """The ranks in a circle: each receives from the one before and sends to the one after."""

    group: dist.ProcessGroup
    rank: int
    counts: list[int]  # rows of each rank's shard

    def travel(
        self,
        shard: _Shard,
        carried: Tensor | None,
        visit: Callable[[_Shard, Tensor | None], Tensor | None],
    ) -> Tensor | None:
        """Bring every rank's shard here in turn, this rank's first; ``carried`` (M, ...) goes with it.

        ``visit`` returns the shard's new ``carried``. The next shard arrives meanwhile, so there are
        never more than two. Returns what this rank's shard comes home with.
        """
        size = len(self.counts)
        for step in range(size):
            received = self._pass_on(shard, step) if step + 1 < size else None
            carried = visit(shard, carried)
            if size > 1:
                (carried,) = self._pass_on([carried], step)()
            if received is not None:
                shard = _Shard._make(received())
        return carried

    def _pass_on(self, tensors: Sequence[Tensor | None], step: int) -> Callable[[], list[Tensor | None]]:
        """Start to exchange tensors of the shard that is here at ``step`` for those of the next one."""
        size = len(self.counts)
        count = self.counts[(self.rank - step - 1) % size]
        sent = [None if x is None else x.contiguous() for x in tensors]
        received = [None if x is None else x.new_empty(count, *x.shape[1:]) for x in sent]
        transfers = [
            dist.P2POp(operation, x, group=self.group, group_peer=(self.rank + offset) % size)
            for operation, offset, side in ((dist.isend, 1, sent), (dist.irecv, -1, received))
            for x in side
            if x is not None and x.numel()
        ]
        works = dist.batch_isend_irecv(transfers) if transfers else []

        def finish() -> list[Tensor | None]:
            for work in works:
                work.wait()
            sent.clear()
            return received

        return finish


class _RingStats(torch.autograd.Function):
    """Row statistics (5, N) and column statistics (5, M or 0), over all shards.

    The whole way around is one node of the graph: it saves its own rows and the merged states, and
    the backward pass goes around once more.
    """

    @staticmethod
    def forward(ctx: Any, ring: _Ring, backend: str, *fields: Any) -> tuple[Tensor, Tensor]:
        problem = Problem(*fields)
        rows = _nothing(problem.query)

        def visit(shard: _Shard, columns: Tensor | None) -> Tensor | None:
            nonlocal rows
            block, row_state, block_columns, column_state, _ = torch.ops.fastcl.stats_forward(
                *shard.seen_by(problem), False, backend
            )
            rows = _merge(rows, block, row_state)
            return None if columns is None else _merge(columns.T, block_columns, column_state).T

        carried = _nothing(problem.key).T if problem.columns else None
        carried = ring.travel(_Shard.of(problem), carried, visit)
        columns = rows.new_empty(6, 0) if carried is None else carried.T
        ctx.save_for_backward(*problem[:PROBLEM_TENSORS], rows[:4], columns[:4])
        ctx.ring, ctx.backend, ctx.flags = ring, backend, problem[PROBLEM_TENSORS:]
        return statistics(rows[:4], rows[4:]), statistics(columns[:4], columns[4:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_state, column_state = ctx.saved_tensors
        problem, needs = Problem(*tensors, *ctx.flags), Needs(*ctx.needs_input_grad[2:7])
        grad_query = torch.zeros_like(problem.query) if needs.query else None
        grad_scale = torch.zeros_like(problem.scale) if needs.scale else None

        def visit(shard: _Shard, grad_key: Tensor | None) -> Tensor | None:
            columns = (grad_columns, column_state) if shard.columns is None else shard.columns.T.split([5, 4])
            block = torch.ops.fastcl.stats_backward(
                *shard.seen_by(problem), grad_rows, columns[0], row_state, columns[1], needs, ctx.backend
            )
            for total, part in zip((grad_query, grad_key, grad_scale), block[:3], strict=True):
                if total is not None:
                    total += part
            return grad_key

        columns = torch.cat([grad_columns, column_state]).T if problem.columns else None
        grad_key = torch.zeros_like(problem.key) if needs.key else None
        grad_key = ctx.ring.travel(_Shard.of(problem, columns), grad_key, visit)
        return (None, None, grad_query, grad_key, grad_scale, *(None for _ in problem[3:]))


def _nothing(rows: Tensor) -> Tensor:
    """State and positive sums (6, N) before any key was seen."""
    return torch.cat([empty_state(rows, rows.shape[0]), rows.new_zeros(2, rows.shape[0])])


def _merge(merged: Tensor, block: Tensor, state: Tensor) -> Tensor:
    """``merged`` (6, N) with a block's statistics (5, N) and state (4, N)."""
    return torch.cat([merge_states(merged[:4], state), merged[4:] + block[2:4]])
