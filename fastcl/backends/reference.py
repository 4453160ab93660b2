"""The specification: every statistic and gradient from dense matrices, by torch's own autograd.

Every other backend is tested against this one in float64. It also serves second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.backends.base import Backend
from fastcl.losses.families.mochi import Mochi
from fastcl.similarity.fields import STATISTICS, Statistics
from fastcl.similarity.numerics import (
    masked_logsumexp,
    product,
    row_dot,
    softplus,
    unit_rows,
    without_autocast,
)
from fastcl.similarity.problem import Problem, TopK


def pair_masks(problem: Problem, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Boolean masks (negative, positive) of the pairs in ``rows`` x all keys."""
    shape = (problem.query[rows].shape[0], problem.key.shape[0])
    included = torch.ones(shape, dtype=torch.bool, device=problem.query.device)
    if problem.exclude_query is not None and problem.exclude_key is not None:
        included = problem.exclude_query[rows, None] != problem.exclude_key[None, :]
    if problem.positive_query is None or problem.positive_key is None:
        return included, torch.zeros_like(included)
    if problem.positive_table is not None:
        positive = problem.positive_table[problem.positive_query[rows]][:, problem.positive_key]
    else:
        positive = problem.positive_query[rows, None] == problem.positive_key[None, :]
    return included & ~positive, included & positive


def logits(problem: Problem) -> Tensor:
    """The logits (N, M) in the compute dtype."""
    query = unit_rows(problem.query, problem.normalize)
    key = query  # rows used twice are converted once: their gradient rounds once
    if problem.key is not problem.query:
        key = unit_rows(problem.key, problem.normalize).to(query.dtype)
    similarity = problem.scale.to(query.dtype) * product(query, key.T)
    if problem.key_scale is not None:
        similarity = similarity * problem.key_scale.to(query.dtype)
    return similarity if problem.key_bias is None else similarity + problem.key_bias.to(query.dtype)


def stats(problem: Problem) -> tuple[Tensor, Tensor]:
    """Statistics (STATISTICS, N) of the rows and (STATISTICS, M) of the columns, M = 0 if not asked for."""
    with without_autocast(problem.query.device):
        pair_logits = logits(problem)
        negative, positive = pair_masks(problem)
        rows = _pack(pair_logits, negative, positive)
        if not problem.columns:
            return rows, rows.new_empty(STATISTICS, 0)
        return rows, _pack(pair_logits.T, negative.T, positive.T)


def _pack(pair_logits: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    masked = pair_logits.detach().masked_fill(~negative, -torch.inf)
    # the extra column makes the maximum defined without keys
    max_neg = torch.nn.functional.pad(masked, (0, 1), value=-torch.inf).amax(dim=1)
    return torch.stack(
        Statistics(
            lse_neg=masked_logsumexp(pair_logits, negative),
            lse_pos=masked_logsumexp(pair_logits, positive),
            pos_sum=pair_logits.masked_fill(~positive, 0.0).sum(dim=1),
            pos_count=positive.sum(dim=1).to(pair_logits.dtype),
            max_neg=max_neg,
        )
    )


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query, ties to the lower index, padded with -inf and -1."""
    with without_autocast(args.query.device):
        similarity = product(unit_rows(args.query, args.normalize), unit_rows(args.key, args.normalize).T)
    if args.exclude_query is not None and args.exclude_key is not None:
        excluded = args.exclude_query[:, None] == args.exclude_key[None, :]
        similarity = similarity.masked_fill(excluded, -torch.inf)
    similarity = torch.nn.functional.pad(similarity, (0, args.k), value=-torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, : args.k].contiguous(), indices[:, : args.k].contiguous()
    return values, indices.masked_fill(values == -torch.inf, -1)


def enqueue(
    keys: Tensor, ids: Tensor | None, pointer: Tensor, new_keys: Tensor, new_ids: Tensor | None
) -> None:
    """Normalize ``new_keys`` (N, D) and write them to ``keys`` (size, D) from ``pointer`` on, in place."""
    size, count = keys.shape[0], new_keys.shape[0]
    skipped = max(0, count - size)  # would be overwritten at once
    unit = unit_rows(new_keys[skipped:]).to(keys.dtype)
    rows = (torch.arange(skipped, count, device=keys.device) + pointer) % size
    keys.index_copy_(0, rows, unit)
    if ids is not None and new_ids is not None:
        ids.index_copy_(0, rows, new_ids[skipped:])
    pointer.add_(count).remainder_(size)


def mochi(args: Mochi) -> Tensor:
    """MoCHi's losses (N,), with every synthetic negative formed."""
    with without_autocast(args.query.device):
        query, positive = unit_rows(args.query), unit_rows(args.positive)
        keys, scale = args.keys.to(query.dtype), args.scale.to(query.dtype)
        _, order = topk(TopK(query.detach(), keys, args.n_hard))
        hard = keys[order]  # [N, n_hard, D]

        def ranked(ranks: Tensor) -> Tensor:
            return hard.gather(1, ranks[:, :, None].expand(-1, -1, hard.shape[2]))

        alpha, beta = args.alpha[:, :, None], args.beta[:, :, None]
        mixed = alpha * ranked(args.first) + (1 - alpha) * ranked(args.second)
        mixed_with_query = beta * query.detach()[:, None] + (1 - beta) * ranked(args.partner)
        synthetic = unit_rows(torch.cat([mixed, mixed_with_query], dim=1))
        similarity = torch.cat([product(query, keys.T), (query[:, None] * synthetic).sum(dim=2)], dim=1)
        return softplus((scale * similarity).logsumexp(dim=1) - scale * row_dot(query, positive))


# statistics and MoCHi need no op: autograd differentiates them
BACKEND = Backend("reference", topk=topk, enqueue=enqueue)
