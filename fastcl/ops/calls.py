"""The ops as the package calls them: on checked arguments, by the backend chosen here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.backends import reference
from fastcl.backends.base import Backend, Request, WholeLoss
from fastcl.backends.choice import choose
from fastcl.losses.families.many_positives import (
    MANY_POSITIVES_INPUTS,
    MANY_POSITIVES_TENSORS,
    ManyPositives,
)
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import ONE_POSITIVE_INPUTS
from fastcl.ops.autograd import WHOLE_LOSS_FUNCTIONS, needs_of
from fastcl.similarity.fields import Measured, unpack
from fastcl.similarity.numerics import matmul_precision_level, without_autocast
from fastcl.similarity.problem import Problem, TopK


def statistics(problem: Problem, columns: bool = False, backend: str = "auto") -> Measured:
    """Statistics of a problem, differentiable; a symmetric one's columns are its rows."""
    chosen = choose(Request.of_problem(problem), backend)
    if chosen.name == reference.BACKEND.name:
        rows, packed_columns = reference.stats(problem)
    else:
        rows, _, packed_columns, _, _ = torch.ops.fastcl.stats_forward(
            *problem, _frozen_keys(problem), chosen.name
        )
    if not columns:
        return Measured(unpack(rows), None)
    return Measured(unpack(rows), unpack(rows if problem.symmetric else packed_columns))


def serves_two_scales(problem: Problem) -> bool:
    """Whether :func:`statistics` of such a problem may have a ``second_scale``."""
    return choose(Request.of_problem(problem)).two_scales


def _frozen_keys(problem: Problem) -> bool:
    """Whether only the query needs a gradient, so that the forward pass can accumulate it."""
    others = (problem.key, problem.scale, problem.key_bias, problem.key_scale)
    return (
        torch.is_grad_enabled()
        and problem.query.requires_grad
        and not any(x is not None and x.requires_grad for x in others)
        and not problem.has_positives()
        and not problem.columns
        and not problem.symmetric
    )


def whole_loss(args: WholeLoss, backend: Backend) -> Tensor:
    """The 'mean' or 'sum' loss, differentiable, by one op of a backend that serves it whole."""
    mean = args.reduction == "mean"
    if isinstance(args, ManyPositives):
        flags = (args.normalize, args.variant == "in", mean, matmul_precision_level())
        return _by_one_op("sup_con", MANY_POSITIVES_INPUTS, *args[:MANY_POSITIVES_TENSORS], *flags)
    arguments = (*args[:-1], mean, matmul_precision_level())
    if backend.one_positive is None:
        return _by_one_op("one_positive", ONE_POSITIVE_INPUTS, *arguments)
    return _by_one_op("one_positive_by", ONE_POSITIVE_INPUTS, *arguments, backend.name)


def _by_one_op(name: str, inputs: int, *arguments: Any) -> Tensor:
    """The first ``inputs`` arguments are differentiable."""
    needs = needs_of(arguments[:inputs]) if torch.is_grad_enabled() else 0
    call = getattr(torch.ops.fastcl, name).default
    if needs and not torch.compiler.is_compiling():
        call = WHOLE_LOSS_FUNCTIONS[name].apply  # where the dispatcher would arrive, without the way there
    loss: Tensor = call(*arguments, needs)[0]
    return loss


def topk(args: TopK, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Values (N, k) and indices (N, k); no gradient."""
    chosen = choose(Request.of(args.query, simple_rule=args.simple_exclude() is not None), backend)
    if chosen.name == reference.BACKEND.name:
        return reference.topk(args)
    if type(args.query) is Tensor and not torch.compiler.is_compiling():
        with without_autocast(args.query.device):
            return chosen.topk(args)  # what the op would call: no gradient, so nothing else sees it
    values, indices = torch.ops.fastcl.topk(*args, chosen.name)
    return values, indices


def mochi(args: Mochi) -> Tensor:
    """MoCHi's losses (N,), differentiable in query, positive and scale."""
    chosen = choose(Request.of_mochi(args))
    if chosen.name == reference.BACKEND.name:
        return reference.mochi(args)
    losses: Tensor = torch.ops.fastcl.mochi(*args, chosen.name)[0]
    return losses


def enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    """Normalize ``new_keys`` (N, D) and write them to ``keys`` (size, D) from ``pointer`` on, in place."""
    chosen = choose(Request.of_enqueue(new_keys))
    torch.ops.fastcl.enqueue(keys, ids, pointer, new_keys, new_ids, chosen.name)
