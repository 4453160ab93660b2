"""MoCHi: MoCo with synthetic hard negatives, mixed without ever being materialized.

Kalantidis et al. 2020, https://arxiv.org/abs/2010.01028.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.losses.families.mochi import Mochi
from fastcl.losses.info_nce import info_nce
from fastcl.memory.queue import NegativeQueue
from fastcl.ops import calls
from fastcl.similarity.checks import check_pair, check_reduction, check_same, inverse_scalar
from fastcl.similarity.numerics import compute_dtype, reduce
from fastcl.similarity.transforms import is_readable


class MochiDraws(NamedTuple):
    """The random numbers of one :func:`mochi_loss` call. Ranks are positions in a query's hard list.

    Attributes:
        first: (N, n_mix) int64 ranks of the keys weighted by alpha.
        second: (N, n_mix) int64 ranks of the keys weighted by 1 - alpha.
        alpha: (N, n_mix) in (0, 1).
        partner: (N, n_query_mix) int64 ranks of the keys mixed with the query.
        beta: (N, n_query_mix) in (0, 1/2), the query's weight.
    """

    first: Tensor
    second: Tensor
    alpha: Tensor
    partner: Tensor
    beta: Tensor


def mochi_loss(
    query: Tensor,
    positive_key: Tensor,
    queue: NegativeQueue,
    *,
    temperature: float | Tensor = 0.2,
    n_hard: int = 1024,
    n_mix: int = 512,
    n_query_mix: int = 256,
    generator: torch.Generator | None = None,
    draws: MochiDraws | None = None,
    reduction: str = "mean",
) -> Tensor:
    """MoCo's loss with synthetic negatives mixed from each query's hardest queue keys.

    Type 1 mixes two hard keys, ``alpha * first + (1 - alpha) * second``; type 2 a hard key with the
    query, ``beta * query + (1 - beta) * partner``; both are normalized again, join the whole queue in
    the denominator, and are constants: the gradient reaches the query through its similarities only.
    Kalantidis et al. 2020, https://arxiv.org/abs/2010.01028.

    Args:
        query: (N, D), any floating dtype; normalized inside.
        positive_key: (N, D), same dtype; normalized inside.
        queue: the negatives, used in place; they may have another dtype.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        n_hard: how many of the most similar keys are mixed from; at most the queue's size is used.
        n_mix: synthetic negatives of type 1 per query.
        n_query_mix: synthetic negatives of type 2 per query. With both 0 this is MoCo's loss.
        generator: the source of the draws, on the query's device.
        draws: the draws themselves, for exact results; their range is checked on the CPU only.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        The loss, () or (N,) with 'none'; float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes that do not fit, negative counts, n_hard below 1 with mixing on, draws of a
            wrong shape or range.
        TypeError: dtypes that are not floating, or differ; a queue that is not a NegativeQueue.
    """
    check_reduction(reduction)
    query, positive_key = check_pair("query", query, "positive_key", positive_key)
    if not isinstance(queue, NegativeQueue):
        raise TypeError(f"queue must be a NegativeQueue, got {type(queue).__name__}")
    check_same("queue.keys", queue.keys, "query", query, dtype=False)
    for name, count in (("n_mix", n_mix), ("n_query_mix", n_query_mix)):
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    if n_mix == 0 and n_query_mix == 0:
        return info_nce(query, positive_key, queue, temperature, reduction)
    if n_hard < 1:
        raise ValueError(f"n_hard must be at least 1 to mix from, got {n_hard}")
    n_hard = min(n_hard, queue.size)
    if draws is None:
        draws = _draw(query, n_hard, n_mix, n_query_mix, generator)
    else:
        draws = _checked_draws(draws, query, n_hard, n_mix, n_query_mix)
    scale = inverse_scalar("temperature", temperature, query)
    args = Mochi(
        query,
        positive_key,
        scale,
        queue.keys,
        first=draws.first,
        second=draws.second,
        alpha=draws.alpha,
        partner=draws.partner,
        beta=draws.beta,
        n_hard=n_hard,
    )
    return reduce(calls.mochi(args), reduction)


def _draw(
    query: Tensor, n_hard: int, n_mix: int, n_query_mix: int, generator: torch.Generator | None
) -> MochiDraws:
    n = query.shape[0]
    dtype = compute_dtype(query.dtype)
    # a graph with a dynamic number of rows cannot be given the generator None
    source: dict[str, Any] = {} if generator is None else {"generator": generator}

    def ranks(count: int) -> Tensor:
        return torch.randint(n_hard, (n, count), **source, device=query.device)

    def uniform(count: int) -> Tensor:
        return torch.rand(n, count, **source, device=query.device, dtype=dtype)

    return MochiDraws(
        ranks(n_mix), ranks(n_mix), uniform(n_mix), ranks(n_query_mix), uniform(n_query_mix) * 0.5
    )


def _checked_draws(draws: MochiDraws, query: Tensor, n_hard: int, n_mix: int, n_query_mix: int) -> MochiDraws:
    n = query.shape[0]
    counts = MochiDraws(n_mix, n_mix, n_mix, n_query_mix, n_query_mix)  # type: ignore[arg-type]
    for name, values, count in zip(MochiDraws._fields, draws, counts, strict=True):
        if values.shape != (n, count):
            raise ValueError(f"draws.{name} must have shape ({n}, {count}), got {tuple(values.shape)}")
        if values.device != query.device:
            raise ValueError(f"draws.{name} must be on {query.device} like query, got {values.device}")
        if values.is_floating_point() != (name in ("alpha", "beta")):
            raise TypeError(f"draws.{name} has the wrong kind of dtype: {values.dtype}")
        if values.numel() == 0 or not is_readable(values):
            continue
        low, high = values.min().item(), values.max().item()
        limit = {"alpha": 1.0, "beta": 0.5}.get(name, n_hard - 1)
        if not (low >= 0 and high <= limit):
            raise ValueError(f"draws.{name} must lie in 0 to {limit}, got {low} to {high}")
    dtype = compute_dtype(query.dtype)
    return MochiDraws(
        draws.first.long(),
        draws.second.long(),
        draws.alpha.to(dtype),
        draws.partner.long(),
        draws.beta.to(dtype),
    )
