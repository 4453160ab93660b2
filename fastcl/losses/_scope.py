"""The scope of a loss, said once: over which ranks its rows lie, and how their losses become one."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastcl.backends.base import Request, WholeLoss
from fastcl.backends.choice import choose
from fastcl.distributed.gather import check_group, group_reduce
from fastcl.distributed.stats import group_stats
from fastcl.losses.families.one_positive import OnePositive
from fastcl.ops import calls
from fastcl.similarity.checks import check_reduction
from fastcl.similarity.numerics import reduce


def check_scope(reduction: str, group: dist.ProcessGroup | None, ring: bool) -> None:
    """Raise unless the reduction is known, and ``group`` and ``ring`` go together."""
    check_reduction(reduction)
    if group is not None or ring:
        check_group(group, ring)


def loss_of(
    args: WholeLoss, group: dist.ProcessGroup | None = None, ring: bool = False, *, labelled: bool = False
) -> Tensor:
    """The loss: by one op of a backend that serves it whole, else from its statistics.

    With ``group`` it is that of all ranks' rows: the same on every rank, or this rank's rows' with 'none'.

    Args:
        args: the loss, of any family.
        group: the ranks, or None.
        ring: pass shards around instead of gathering them.
        labelled: the positive-ids are labels, which mean the same on every rank.
    """
    if group is not None:
        args = args.in_compute_dtype()
        losses = args.losses(*group_stats(args.problem(), group, ring, labelled=labelled))
        return group_reduce(losses, losses.shape[0], args.reduction, group)
    backend = choose(Request.of_loss(args))
    if backend.serves_whole(args):
        return calls.whole_loss(args, backend)
    args = args.in_compute_dtype()
    problem = args.problem()
    losses = args.losses(*calls.statistics(problem, problem.columns, backend.name))
    return reduce(losses, args.reduction)


def paired_loss_of(args: OnePositive) -> Tensor:
    """The loss of queries with negatives of their own: by one op where there is one, else by plain torch."""
    backend = choose(Request.of(args.query))
    if backend.serves_whole(args):
        return calls.whole_loss(args, backend)
    args = args.in_compute_dtype()
    return reduce(args.losses_of(args.paired_lse()), args.reduction)


def lse_neg_of(args: WholeLoss, group: dist.ProcessGroup | None = None, ring: bool = False) -> Tensor:
    """``lse_neg`` (N,) of the statistics that a loss is made of; with ``group`` over all ranks' keys."""
    problem = args.problem()
    rows, _ = calls.statistics(problem) if group is None else group_stats(problem, group, ring)
    return rows.lse_neg
