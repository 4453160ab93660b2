"""What a backend is, and what it may be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import OnePositive
from fastcl.similarity.problem import LogisticNeeds, Needs, Problem, SoftTargetNeeds, SoftTargets, TopK

WholeLoss = OnePositive | ManyPositives

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Request:
    """What a call asks of a backend."""

    device: torch.device
    dtype: torch.dtype
    simple_rule: bool = True  # one test of ids each for the excluded and the positives
    loss: WholeLoss | None = None  # where a loss is asked for that a backend may compute as a whole
    enqueue: bool = False  # where a queue's step is
    mochi: Mochi | None = None  # where MoCHi's loss is

    @classmethod
    def of_problem(cls, problem: Problem) -> Request:
        return cls(problem.query.device, problem.query.dtype, problem.has_simple_rule())

    @classmethod
    def of_loss(cls, args: WholeLoss) -> Request:
        return cls(args.query.device, args.query.dtype, args.simple_rule, args)

    @classmethod
    def of_enqueue(cls, x: Tensor) -> Request:
        return cls(x.device, x.dtype, enqueue=True)

    @classmethod
    def of_mochi(cls, args: Mochi) -> Request:
        return cls(args.query.device, args.query.dtype, mochi=args)

    @classmethod
    def of(cls, x: Tensor, simple_rule: bool = True) -> Request:
        return cls(x.device, x.dtype, simple_rule)


def _anything(request: Request) -> list[str]:
    return []


def _nothing_missing() -> str | None:
    return None


def _not_computed(*args: Any) -> Any:
    raise NotImplementedError("the backend says that it serves this call, but has no function for it")


def _nothing_to_keep(args: SoftTargets) -> int:
    return 0


@dataclass(frozen=True)
class Backend:
    """A backend's name, what it cannot do, and its functions, each on prepared and checked arguments.

    A function that is left out must be refused by ``unsupported_reasons``, but for those that say None.
    All of them take the records of :mod:`fastcl.similarity.problem` and of the loss families.
    """

    name: str
    summary: str  # what it is, for the documentation
    missing: Callable[[], str | None] = _nothing_missing  # why it is not available here
    unsupported_reasons: Callable[[Request], list[str]] = _anything  # why it cannot serve a request
    whole_losses: tuple[type[WholeLoss], ...] = ()  # which it computes with their gradients, in one op
    every_form: bool = False  # whether also those that are not common
    note: str = ""  # what a reader of show_config should know
    auto: bool = True  # whether 'auto' may choose it

    two_scales: bool = False  # whether its statistics know Problem.second_scale
    # (problem, weighted_keys) -> statistics and state of the rows, of the columns, sum_j p_ij y_j if asked
    stats_forward: Callable[[Problem, bool], Outputs] = _not_computed
    # (problem, grad_rows, grad_columns, row_state, column_state, needs) -> gradients, as Needs orders them
    stats_backward: Callable[[Problem, Tensor, Tensor, Tensor, Tensor, Needs], tuple[Tensor | None, ...]] = (
        _not_computed
    )
    # (problem, bias) -> sums (2, N) of softplus over negatives and positives, bias (N,) in the compute dtype
    logistic: Callable[[Problem, Tensor], Tensor] = _not_computed
    # (problem, bias, gradient of the sums, needs) -> gradients, as LogisticNeeds orders them
    logistic_backward: Callable[[Problem, Tensor, Tensor, LogisticNeeds], tuple[Tensor | None, ...]] = (
        _not_computed
    )
    # (problem, bias, mean, needs as bits) -> sum or mean over the rows of both sums, and for an incoming 1
    # the gradients that LogisticNeeds names; None: by the two functions before
    logistic_total: Callable[[Problem, Tensor, bool, int], Outputs] | None = None
    # (args, kept) -> losses (V, N); state (2 (V + T), N): maximum and sum of each view's softmax, then of
    # each teacher's; and (kept,), logits for the backward pass
    soft_cross_entropy: Callable[[SoftTargets, int], tuple[Tensor, Tensor, Tensor]] = _not_computed
    # (args, gradient of the losses, state, kept, needs) -> gradients, as SoftTargetNeeds orders them
    soft_cross_entropy_backward: Callable[
        [SoftTargets, Tensor, Tensor, Tensor, SoftTargetNeeds], tuple[Tensor | None, ...]
    ] = _not_computed
    # how many logits of all softmaxes are worth keeping between the passes
    logits_to_keep: Callable[[SoftTargets], int] = _nothing_to_keep
    # (query, key, scale, steps, normalize, precision) -> potentials (K,) of the keys; None: by the statistics
    sinkhorn: Callable[[Tensor, Tensor, Tensor, int, bool, int], Tensor] | None = None
    # values and indices, (N, k) each
    topk: Callable[[TopK], tuple[Tensor, Tensor]] = _not_computed
    # losses (N,) and, for an incoming 1 per row, gradients of query, positive (N, D) and scale (N,)
    mochi: Callable[[Mochi], Outputs] = _not_computed
    # (keys, ids, pointer, new_keys, new_ids): writes in place
    enqueue: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor | None], None] = _not_computed
    # (args, needs as bits) -> loss and gradients; None: the native extension has the op for its device
    one_positive: Callable[[OnePositive, int], Outputs] | None = None

    def serves_whole(self, loss: WholeLoss) -> bool:
        """Whether one op is all of ``loss``, which must be reduced then."""
        served = isinstance(loss, self.whole_losses) and (loss.is_common or self.every_form)
        return served and loss.reduction != "none"
