"""The Triton backend: its kernels, in :mod:`fastcl.kernels`, are imported by the first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastcl.backends.base import Backend, Outputs, Request
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import OnePositive
from fastcl.similarity.problem import LogisticNeeds, Needs, Problem, SoftTargetNeeds, SoftTargets, TopK


def is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_reason() -> str | None:
    """Why Triton's kernels cannot be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if torch.cuda.is_available() or is_interpreted():
        return None
    return "no GPU is visible to torch (on the CPU the kernels run under TRITON_INTERPRET=1 only)"


def unsupported_reasons(request: Request) -> list[str]:
    """What keeps the kernels from serving ``request``."""
    reasons = []
    wanted = "cpu" if is_interpreted() else "cuda"
    if request.device.type != wanted:
        reasons.append(f"inputs are on {request.device}, it takes {wanted} tensors")
    if request.dtype == torch.float64:
        reasons.append("float64 is served by 'chunked' on a GPU")
    if not request.simple_rule:
        reasons.append(
            "masks, lists of pair sets, within, exclude_keys and their like are served by 'chunked'"
        )
    return reasons


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("fastcl.kernels")


def _stats_forward(problem: Problem, weighted_keys: bool) -> Outputs:
    outputs: Outputs = _kernels().stats_forward(problem, weighted_keys)
    return outputs


def _stats_backward(
    problem: Problem,
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = _kernels().stats_backward(
        problem, grad_rows, grad_columns, row_state, column_state, needs
    )
    return grads


def _logistic(problem: Problem, bias: Tensor) -> Tensor:
    sums: Tensor = _kernels().logistic(problem, bias)
    return sums


def _logistic_backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs: LogisticNeeds
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = _kernels().logistic_backward(problem, bias, grad, needs)
    return grads


def _soft_cross_entropy(args: SoftTargets, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    losses, state, logits = _kernels().soft_cross_entropy(args, kept)
    return losses, state, logits


def _soft_cross_entropy_backward(
    args: SoftTargets, grad: Tensor, state: Tensor, kept: Tensor, needs: SoftTargetNeeds
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = _kernels().soft_cross_entropy_backward(args, grad, state, kept, needs)
    return grads


def _sinkhorn(
    query: Tensor, key: Tensor, scale: Tensor, steps: int, normalize: bool, precision: int
) -> Tensor:
    of_keys: Tensor = _kernels().sinkhorn(query, key, scale, steps, normalize, precision)
    return of_keys


def _topk(args: TopK) -> tuple[Tensor, Tensor]:
    values, indices = _kernels().topk(args)
    return values, indices


def _mochi(args: Mochi) -> Outputs:
    outputs: Outputs = _kernels().mochi(args)
    return outputs


def _enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    _kernels().enqueue(keys, ids, pointer, new_keys, new_ids)


def _one_positive(args: OnePositive, needs: int) -> Outputs:
    outputs: Outputs = _kernels().one_positive(args, needs)
    return outputs


BACKEND = Backend(
    "triton",
    summary=(
        "Triton kernels for NVIDIA and AMD GPUs, float32, float16 and bfloat16; `pip install "
        "triton` where torch did not bring it"
    ),
    missing=missing_reason,
    unsupported_reasons=unsupported_reasons,
    whole_losses=(OnePositive,),
    note="float64, masks and lists of pair sets go to 'chunked'; its speed is not measured yet",
    stats_forward=_stats_forward,
    stats_backward=_stats_backward,
    logistic=_logistic,
    logistic_backward=_logistic_backward,
    soft_cross_entropy=_soft_cross_entropy,
    soft_cross_entropy_backward=_soft_cross_entropy_backward,
    sinkhorn=_sinkhorn,
    topk=_topk,
    mochi=_mochi,
    enqueue=_enqueue,
    one_positive=_one_positive,
)
