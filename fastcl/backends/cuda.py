"""The CUDA backend: whole losses, and MoCHi's mixing, in one launch, by kernels of the native extension."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastcl.backends import chunked, native
from fastcl.backends.base import Backend, Request, WholeLoss
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import BATCH, VIEWS, OnePositive
from fastcl.similarity.fields import OF_NEGATIVES
from fastcl.similarity.numerics import constant_when_compiled, unit_rows

_WARPS = 8  # of a block


def is_built() -> bool:
    """Whether the native extension holds CUDA kernels."""
    return native.missing_reason() is None and hasattr(torch.ops.fastcl_native, "cuda_limits")


def missing_reason() -> str | None:
    """Why the CUDA kernels cannot be used here, or None."""
    if native.missing_reason() is not None:
        return native.missing_reason()
    if not is_built():
        return "the native extension was built without them (FASTCL_BUILD=cuda needs nvcc)"
    return None if torch.cuda.is_available() else "no CUDA GPU is visible to torch"


def unsupported_reasons(request: Request) -> list[str]:
    """What keeps the kernels from serving ``request``."""
    loss = request.loss
    if not (request.enqueue or request.mochi) and (loss is None or loss.reduction == "none"):
        return ["it serves whole losses only, reduced to their mean or sum"]
    reasons = []
    if request.device.type != "cuda":
        reasons.append(f"inputs are on {request.device}, it takes CUDA tensors")
    if request.dtype == torch.float64:
        reasons.append("it takes float32, float16 and bfloat16, not float64")
    if not request.simple_rule:
        reasons.append("a dense mask is served by 'chunked' only")
    elif loss is not None and not loss.is_common:
        reasons.append("it has no kernel for this form of the loss")
    negatives = loss.negatives if isinstance(loss, OnePositive) else None
    if negatives is not None and negatives.dtype != request.dtype:
        reasons.append(f"the negatives are {negatives.dtype}, the queries {request.dtype}")
    if not reasons:
        reasons += _beyond_the_device(request, request.device.index or 0)
    return reasons


def _beyond_the_device(request: Request, device: int) -> list[str]:
    blocks, shared_bytes, missing = _limits(device)
    loss, mochi = request.loss, request.mochi
    if missing:
        return [missing]
    if loss is not None and not fits(loss, blocks, shared_bytes):
        return [f"the similarity matrix of {loss.query.shape[0]} queries does not fit on the GPU's chip"]
    if mochi is not None and not mixing_fits(mochi, shared_bytes):
        return [f"mixing from {mochi.n_hard} hard keys does not fit into a block's shared memory"]
    return []


def enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    """As :func:`fastcl.backends.chunked.enqueue`, in one launch."""
    torch.ops.fastcl_native.enqueue(keys, ids, pointer, new_keys, new_ids)


def mochi(args: Mochi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastcl.backends.chunked.mochi`, whose top-k and pass over the queue it takes.

    The mixing, the loss and the gradients are one launch.
    """
    _, hard, _, queue_state, mean = chunked.over_queue(args, unit_rows(args.query))
    maximum, total = queue_state[OF_NEGATIVES]
    draws = (x.contiguous() for x in (args.first, args.second, args.alpha, args.partner, args.beta))
    mixed: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.fastcl_native.mix_negatives(
        args.query, args.positive, args.scale.float(), args.keys, hard, maximum, total, mean, *draws
    )
    return mixed


def mixing_fits(args: Mochi, shared_bytes: int) -> bool:
    """Whether a block of ``shared_bytes`` holds what is known of a query's hard keys."""
    synthetics, width = args.first.shape[1] + args.partner.shape[1], args.query.shape[1]
    per_warp = args.n_hard + width + 1
    floats = width + 2 * args.n_hard + 2 * synthetics + _WARPS * per_warp
    return floats * torch.float32.itemsize <= shared_bytes


def fits(loss: WholeLoss, blocks: int, shared_bytes: int) -> bool:
    """Whether ``blocks`` of ``shared_bytes`` each hold the similarity matrix of ``loss``."""
    edge = _largest_square(loss.query.element_size(), isinstance(loss, ManyPositives), shared_bytes)
    if edge == 0:
        return False
    queries = keys = loss.query.shape[0]
    symmetric = False
    if isinstance(loss, ManyPositives):
        symmetric = loss.key is None
        keys = queries if loss.key is None else loss.key.shape[0]
    elif loss.layout == VIEWS:
        symmetric, queries = True, 2 * queries
    elif loss.negatives is not None:
        keys = loss.negatives.shape[0]
    down, across = (queries + edge - 1) // edge, (keys + edge - 1) // edge
    if symmetric:
        return down * (down + 1) // 2 <= blocks
    return max(down, across) <= blocks and down * across <= blocks


@cache
@constant_when_compiled
def _largest_square(element_bytes: int, labelled: bool, shared_bytes: int) -> int:
    """How many queries and keys one block can compare; a compiled graph keeps what it found."""
    native = torch.ops.fastcl_native
    low, high = 0, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        if labelled:
            fit = native.sup_con_fits(middle, None, element_bytes, 1, shared_bytes)
        else:
            fit = native.one_positive_fits(BATCH, middle, 0, element_bytes, 1, shared_bytes)
        low, high = (middle, high) if fit else (low, middle)
    return low


@constant_when_compiled
@cache
def _limits(device: int) -> tuple[int, int, str]:
    limits: tuple[int, int, str] = torch.ops.fastcl_native.cuda_limits(device)
    return limits


BACKEND = Backend(
    "cuda",
    summary=(
        "C++/CUDA: whole losses in one launch, for batches whose similarities stay on the chip; off in 'auto'"
    ),
    missing=missing_reason,
    unsupported_reasons=unsupported_reasons,
    whole_losses=(OnePositive, ManyPositives),
    note="has never run on a GPU: off in 'auto'",
    auto=False,
    mochi=mochi,
    enqueue=enqueue,
)
