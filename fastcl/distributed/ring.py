"""Statistics over all ranks by passing shards of keys around a ring: never more than two in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.backends import reference
from fastcl.backends.base import Request
from fastcl.backends.choice import choose
from fastcl.backends.chunked import merge_states, statistics
from fastcl.distributed.gather import refuse_second_order
from fastcl.similarity.fields import (
    POSITIVE_SUMS,
    RUNNING,
    RUNNING_STATE,
    RUNNING_SUMS,
    STATE,
    STATISTICS,
    Measured,
    merge_positive_sums,
    nothing_seen,
    unpack,
)
from fastcl.similarity.problem import PROBLEM_INPUTS, PROBLEM_TENSORS, Needs, Problem


def ring_stats(problem: Problem, ring: Ring, backend: str = "auto") -> Measured:
    """Statistics of this rank's rows over the keys of all ranks, a shard at a time."""
    name = choose(Request.of(problem.query), backend).name
    if name == reference.BACKEND.name:
        raise RuntimeError("backend 'reference' cannot serve ring=True: it has no backward pass of its own")
    rows, columns = _RingStats.apply(ring, name, *problem)  # type: ignore[no-untyped-call]
    return Measured(unpack(rows), unpack(columns) if problem.columns else None)


class Shard(NamedTuple):
    """What of a rank's keys the others need to see, rows first."""

    key: Tensor  # (M, D)
    positive_key: Tensor | None  # (M,)
    exclude_key: Tensor | None  # (M,)
    columns: Tensor | None = None  # (M, STATISTICS + STATE): gradient and state of the column statistics

    @classmethod
    def of(cls, problem: Problem, columns: Tensor | None = None) -> Shard:
        return cls(problem.key, problem.positive_key, problem.exclude_key, columns)

    def seen_by(self, problem: Problem) -> Problem:
        return problem._replace(key=self.key, positive_key=self.positive_key, exclude_key=self.exclude_key)


class Ring(NamedTuple):
    """The ranks in a circle: each receives from the one before and sends to the one after."""

    group: dist.ProcessGroup
    rank: int
    counts: list[int]  # rows of each rank's shard

    def travel(
        self,
        shard: Shard,
        carried: Tensor | None,
        visit: Callable[[Shard, Tensor | None], Tensor | None],
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
                shard = Shard._make(received())
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
    """Statistics of the rows (STATISTICS, N) and of the columns (STATISTICS, M or 0), over all shards.

    The whole way around is one node of the graph: it saves its own rows and the merged states, and
    the backward pass goes around once more.
    """

    @staticmethod
    def forward(ctx: Any, ring: Ring, backend: str, *fields: Any) -> tuple[Tensor, Tensor]:
        problem = Problem(*fields)
        rows = nothing_seen(problem.query, problem.query.shape[0])

        def visit(shard: Shard, columns: Tensor | None) -> Tensor | None:
            nonlocal rows
            block, row_state, block_columns, column_state, _ = torch.ops.fastcl.stats_forward(
                *shard.seen_by(problem), False, backend
            )
            rows = _merge(rows, block, row_state)
            return None if columns is None else _merge(columns.T, block_columns, column_state).T

        carried = nothing_seen(problem.key, problem.key.shape[0]).T if problem.columns else None
        carried = ring.travel(Shard.of(problem), carried, visit)
        columns = rows.new_empty(RUNNING, 0) if carried is None else carried.T
        states = rows[RUNNING_STATE], columns[RUNNING_STATE]
        assert problem.has_simple_rule()
        ctx.save_for_backward(*problem[:PROBLEM_TENSORS], *states)
        ctx.ring, ctx.backend, ctx.flags = ring, backend, problem[PROBLEM_TENSORS:]
        return statistics(states[0], rows[RUNNING_SUMS]), statistics(states[1], columns[RUNNING_SUMS])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        *tensors, row_state, column_state = ctx.saved_tensors
        # the first two inputs are not of the problem
        problem, needs = Problem(*tensors, *ctx.flags), Needs(*ctx.needs_input_grad[2 : 2 + PROBLEM_INPUTS])
        grad_query = torch.zeros_like(problem.query) if needs.query else None
        grad_scale = torch.zeros_like(problem.scale) if needs.scale else None

        def visit(shard: Shard, grad_key: Tensor | None) -> Tensor | None:
            columns = grad_columns, column_state
            if shard.columns is not None:
                columns = shard.columns.T.split([STATISTICS, STATE])
            block = torch.ops.fastcl.stats_backward(
                *shard.seen_by(problem), grad_rows, columns[0], row_state, columns[1], needs, ctx.backend
            )
            for total, part in zip((grad_query, grad_key, grad_scale), block[:3], strict=True):
                if total is not None:
                    total += part
            return grad_key

        columns = torch.cat([grad_columns, column_state]).T if problem.columns else None
        grad_key = torch.zeros_like(problem.key) if needs.key else None
        grad_key = ctx.ring.travel(Shard.of(problem, columns), grad_key, visit)
        return (None, None, grad_query, grad_key, grad_scale, *(None for _ in problem[3:]))


def _merge(merged: Tensor, block: Tensor, state: Tensor) -> Tensor:
    """``merged`` (RUNNING, N) with a block's statistics (STATISTICS, N) and state (STATE, N)."""
    both = merge_states(merged[RUNNING_STATE], state)
    return torch.cat([both, merge_positive_sums(merged[RUNNING_SUMS], block[POSITIVE_SUMS])])
