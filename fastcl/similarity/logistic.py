"""Sums of softplus over pairs: what sigmoid losses, NCE and Jensen-Shannon estimators are made of."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.backends.reference import pair_masks
from fastcl.distributed.gather import check_group, row_counts, with_all_keys
from fastcl.similarity.by_rows import by_rows
from fastcl.similarity.checks import check_matrix, check_same, in_one_dtype, scalar
from fastcl.similarity.numerics import product, softplus, unit_rows, without_autocast
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

    Linear memory: logits are formed a chunk of rows at a time, and again in the backward pass. There is no
    fused kernel for it yet.

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
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    if key.dtype != query.dtype:
        query, key = in_one_dtype(query, key)
    factor, offset = scalar("scale", scale, query), _offset(bias, query)
    check_group(group, False)
    counts = None if group is None else row_counts(key, group)
    check_rule(rule, query, key, None if counts is None else sum(counts))
    problem = Problem(query, key, factor, **rule.fields(), normalize=normalize)
    if group is not None and counts is not None:
        problem = with_all_keys(problem, group, counts)
    with without_autocast(query.device):
        unit_query, unit_key = unit_rows(query, normalize), unit_rows(problem.key, normalize)

    def of_rows(rows: slice) -> Tensor:
        with without_autocast(query.device):
            logits = product(unit_query[rows], unit_key.T) * factor.to(unit_query.dtype)
            logits = logits + (offset[rows, None] if offset.dim() else offset).to(logits.dtype)
            negative, positive = pair_masks(problem, rows)
            sums = softplus(logits).where(negative, 0.0), softplus(-logits).where(positive, 0.0)
            return torch.stack([x.sum(dim=1) for x in sums])

    sums = by_rows("similarity_logistic", of_rows, query, problem.key.shape[0], backend)
    return sums[0], sums[1]


def _offset(bias: float | Tensor, query: Tensor) -> Tensor:
    if isinstance(bias, Tensor) and bias.dim() == 1 and bias.shape[0] == query.shape[0]:
        check_matrix("bias", bias, 1)
        if bias.device != query.device:
            raise ValueError(f"bias must be on {query.device} like query, got {bias.device}")
        return bias
    return scalar("bias", bias, query)
