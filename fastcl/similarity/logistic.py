"""Sums of softplus over pairs: what sigmoid losses, NCE and Jensen-Shannon estimators are made of."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastcl.distributed.gather import check_group, reduce, row_counts, with_all_keys
from fastcl.ops.sums import logistic, logistic_total
from fastcl.similarity.checks import check_matrix, check_same, in_one_dtype, scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, matmul_precision_level
from fastcl.similarity.problem import Problem
from fastcl.similarity.rules import ALL_NEGATIVE, PairRule, check_rule


def similarity_logistic(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    rule: PairRule = ALL_NEGATIVE,
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of softplus of the logits ``scale * <query[i], key[j]> + bias[i]`` over each row's pairs.

    Linear memory: logits are formed a tile at a time, and again in the backward pass, by fused
    kernels where a backend has them.

    Args:
        query: (N, D), any floating dtype.
        key: (M, D), same dtype.
        scale: a finite number, or a tensor of one element; receives its gradient.
        bias: a finite number, a tensor of one element, or (N,); receives its gradient.
        rule: which pairs are excluded, positive and negative; by default all are negative.
        normalize: divide rows by their L2 norm first.
        group: this rank's rows are compared with all ranks' keys; a rule's ids mean the same everywhere.
        backend: 'auto', or a name as in :func:`fastcl.use_backend`.

    Returns:
        ``sum softplus(l)`` over negatives and ``sum softplus(-l)`` over positives, (N,) each, float64 for
        float64 inputs, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastcl.similarity_stats`; a bias of another length.
    """
    check_group(group, False)
    problem, offset = _checked(query, key, scale, bias, rule, normalize, group)
    negative, positive = logistic(problem, offset, backend).unbind(0)
    return negative, positive


def logistic_loss(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    rule: PairRule,
    *,
    normalize: bool,
    reduction: str,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Both of :func:`similarity_logistic`'s sums, added and reduced: by one walk where a backend has it."""
    problem, offset = _checked(query, key, scale, bias, rule, normalize, group)
    if group is None and reduction != "none" and query.shape[0]:
        return logistic_total(problem, offset, reduction)
    return reduce(logistic(problem, offset).sum(0), reduction, group)


def _checked(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    rule: PairRule,
    normalize: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Problem, Tensor]:
    """The problem over all ranks' keys, and the bias of each row."""
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    if key.dtype != query.dtype:
        query, key = in_one_dtype(query, key)
    offset = _offset(bias, query)
    counts = None if group is None else row_counts(key, group)
    check_rule(rule, query, key, None if counts is None else sum(counts))
    problem = Problem(
        query,
        key,
        scalar("scale", scale, query),
        **rule.fields(),
        normalize=normalize,
        precision=matmul_precision_level(),
    )
    if group is not None and counts is not None:
        problem = with_all_keys(problem, group, counts)
    return problem, offset


def _offset(bias: float | Tensor, query: Tensor) -> Tensor:
    """(N,) in the compute dtype."""
    if isinstance(bias, Tensor) and bias.dim() == 1 and bias.shape[0] == query.shape[0]:
        check_matrix("bias", bias, 1)
        if bias.device != query.device:
            raise ValueError(f"bias must be on {query.device} like query, got {bias.device}")
        bias = anchored(bias)
    else:
        bias = scalar("bias", bias, query)
    return bias.to(compute_dtype(query.dtype)).expand(query.shape[0])
