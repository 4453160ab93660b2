"""The specification: every statistic and gradient from dense matrices, by torch's own autograd.

Every other backend is tested against this one in float64. It also serves second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.numerics import masked_logsumexp, product, row_dot, softplus, unit_rows, without_autocast
from fastcl.problem import Mochi, Problem, TopK


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
    """Row statistics (5, N) and column statistics (5, M), or (5, 0) if not asked for."""
    with without_autocast(problem.query.device):
        pair_logits = logits(problem)
        negative, positive = pair_masks(problem)
        rows = _pack(pair_logits, negative, positive)
        if not problem.columns:
            return rows, rows.new_empty(5, 0)
        return rows, _pack(pair_logits.T, negative.T, positive.T)


def _pack(pair_logits: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    masked = pair_logits.detach().masked_fill(~negative, -torch.inf)
    # the extra column makes the maximum defined without keys
    max_neg = torch.nn.functional.pad(masked, (0, 1), value=-torch.inf).amax(dim=1)
    return torch.stack(
        [
            masked_logsumexp(pair_logits, negative),
            masked_logsumexp(pair_logits, positive),
            pair_logits.masked_fill(~positive, 0.0).sum(dim=1),
            positive.sum(dim=1).to(pair_logits.dtype),
            max_neg,
        ]
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


def mochi(args: Mochi) -> Tensor:
    """MoCHi's losses (N,), with every synthetic negative formed."""
    with without_autocast(args.query.device):
        query, positive = unit_rows(args.query), unit_rows(args.positive)
        keys, scale = args.keys.to(query.dtype), args.scale.to(query.dtype)
        _, order = topk(TopK(query.detach(), keys, args.n_hard, None, None, False))
        hard = keys[order]  # [N, n_hard, D]

        def ranked(ranks: Tensor) -> Tensor:
            return hard.gather(1, ranks[:, :, None].expand(-1, -1, hard.shape[2]))

        alpha, beta = args.alpha[:, :, None], args.beta[:, :, None]
        mixed = alpha * ranked(args.first) + (1 - alpha) * ranked(args.second)
        mixed_with_query = beta * query.detach()[:, None] + (1 - beta) * ranked(args.partner)
        synthetic = unit_rows(torch.cat([mixed, mixed_with_query], dim=1))
        similarity = torch.cat([product(query, keys.T), (query[:, None] * synthetic).sum(dim=2)], dim=1)
        return softplus((scale * similarity).logsumexp(dim=1) - scale * row_dot(query, positive))
