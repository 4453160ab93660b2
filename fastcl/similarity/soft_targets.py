"""Cross-entropy between two softmaxes over the same keys, and targets under which keys are used equally."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.backends.base import Request
from fastcl.backends.choice import choose
from fastcl.backends.registry import BACKENDS
from fastcl.distributed.gather import check_group, gather_rows, reduce
from fastcl.ops import sums
from fastcl.similarity.checks import (
    check_matrix,
    check_reduction,
    check_same,
    check_same_count,
    check_vector,
    in_one_dtype,
    inverse_scalar,
)
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, matmul_precision_level
from fastcl.similarity.problem import SoftTargets
from fastcl.similarity.rules import ALL_NEGATIVE, PairRule, check_rule, flattened
from fastcl.similarity.stats import similarity_stats


def soft_cross_entropy(
    query: Tensor,
    key: Tensor,
    target_query: Tensor,
    target_key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    target_temperature: float | Tensor = 0.05,
    target_bias: Tensor | None = None,
    rule: PairRule = ALL_NEGATIVE,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """``-sum_j q_ij log p_ij``: how far a softmax over keys is from a target softmax over the same keys.

    ``p_i = softmax_j(<query_i, key_j> / temperature)`` and
    ``q_i = softmax_j(<target_query_i, target_key_j> / target_temperature + target_bias_j)``, excluded keys
    in neither. Targets are constants. DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294), SwAV
    (Caron et al. 2020, https://arxiv.org/abs/2006.09882). Linear memory: both softmaxes are formed a tile at
    a time, and again in the backward pass, by fused kernels where a backend has them.

    Args:
        query: (N, D), or (V, N, D): V views of each row, which share its target.
        key: (K, D), same dtype.
        target_query: (N, E), or (T, N, E): the target is the mean of the T softmaxes.
        target_key: (K, E).
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        target_temperature: the same, a constant.
        target_bias: (K,); DINO's centre is ``-center / target_temperature``.
        rule: excluded pairs take part in neither softmax.
        normalize: divide the rows of all four by their L2 norms first.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is over all ranks' rows; keys are the same on every rank.
        backend: 'auto', or a name as in :func:`fastcl.use_backend`.

    Returns:
        The loss; with 'none' (N,), or (V, N). A row without keys gives 0.

    Raises:
        TypeError, ValueError: as :func:`fastcl.similarity_stats`; other counts of rows or of keys.
    """
    check_reduction(reduction)
    check_group(group, False)
    _check_rows(query, key, target_query, target_key)
    query, key = in_one_dtype(query, key)
    views = query if query.dim() == 3 else anchored(query)[None]
    teachers = (target_query if target_query.dim() == 3 else target_query[None]).detach()
    check_same_count("target_query", teachers[0], "query", views[0])
    if target_bias is not None:
        check_vector("target_bias", target_bias, target_key)
        target_bias = target_bias.detach()
    check_rule(rule, views[0], key)
    within_query, within_key = rule.within or (None, None)
    args = SoftTargets(
        views,
        key,
        inverse_scalar("temperature", temperature, query),
        teachers,
        target_key.detach(),
        inverse_scalar("target_temperature", target_temperature, target_query).detach(),
        target_bias,
        within_query,
        within_key,
        rule.exclude_keys,
        flattened(rule.exclude_sets),
        normalize,
        matmul_precision_level(),
    )
    losses = sums.soft_cross_entropy(args, backend)
    return reduce(losses if query.dim() == 3 else losses[0], reduction, group)


def _check_rows(query: Tensor, key: Tensor, target_query: Tensor, target_key: Tensor) -> None:
    for name, x in (("query", query), ("target_query", target_query)):
        check_matrix(name, x, (2, 3))
    for name, x in (("key", key), ("target_key", target_key)):
        check_matrix(name, x)
    check_same("key", key, "query", query)
    check_same("target_key", target_key, "target_query", target_query)
    check_same_count("target_key", target_key, "key", key)


@torch.no_grad()
def sinkhorn(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    steps: int = 3,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The ``target_bias`` (K,) under which every key is about equally often the target.

    Sinkhorn and Knopp's iteration on the potentials, which cannot overflow; at the same temperature equal
    to SwAV's (Caron et al. 2020, https://arxiv.org/abs/2006.09882). Defined up to a constant, no gradient.

    Args:
        query: (N, D), any floating dtype.
        key: (K, D), same dtype.
        temperature: a finite non-zero number, or a tensor of one element.
        steps: rounds, at least 1.
        normalize: divide rows by their L2 norm first.
        group: the rows are all ranks'; keys are the same on every rank.

    Raises:
        TypeError, ValueError: as :func:`fastcl.similarity_stats`; steps that is not a positive int.
    """
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    check_group(group, False)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    scale = inverse_scalar("temperature", temperature, query)
    query, key = in_one_dtype(query, key)
    backend = choose(Request.of(query)).name
    if group is None and BACKENDS[backend].sinkhorn is not None:
        of_keys: Tensor = torch.ops.fastcl.sinkhorn(
            query, key, scale, steps, normalize, matmul_precision_level(), backend
        )
        return of_keys
    return _by_statistics(query, key, scale, steps, normalize, group)


def _by_statistics(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    steps: int,
    normalize: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """A pass over all pairs for each half of a round, and nothing kept."""
    stats = partial(similarity_stats, scale=scale, normalize=normalize)
    of_rows = torch.zeros(query.shape[0], dtype=compute_dtype(query.dtype), device=query.device)
    for step in range(steps):
        lse = stats(key, query, key_bias=of_rows).lse_neg
        if group is not None:
            lse = gather_rows(lse[None], [1] * dist.get_world_size(group), group).logsumexp(dim=0)
        of_keys = -lse
        if step + 1 < steps:
            of_rows = -stats(query, key, key_bias=of_keys).lse_neg
    return of_keys
