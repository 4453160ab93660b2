"""The specification: every statistic and gradient from dense matrices, by torch's own autograd.

Every other backend is tested against this one in float64. It also serves second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.backends.base import Backend
from fastcl.losses.families.mochi import Mochi
from fastcl.similarity.fields import STATISTICS, Statistics
from fastcl.similarity.numerics import (
    compute_dtype,
    masked_logsumexp,
    product,
    row_dot,
    softplus,
    unit_rows,
    without_autocast,
)
from fastcl.similarity.problem import Problem, SoftTargets, TopK
from fastcl.similarity.rules import PairSets, unflattened


def pair_masks(problem: Problem, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Boolean masks (negative, positive) of the pairs in ``rows`` x all keys."""
    counts = (problem.query.shape[0], problem.key.shape[0])
    exclude = _with_ids(problem.exclude_more, problem.exclude_query, problem.exclude_key)
    included = candidates(
        exclude, problem.within_query, problem.within_key, problem.exclude_keys, counts, rows, problem.query
    )
    if not problem.has_positives():
        return included, included.new_zeros(1, 1).expand(included.shape)
    positives = _with_ids(problem.positive_more, problem.positive_query, problem.positive_key)
    positive = members(positives, counts, rows, problem.query.device)
    return included & ~positive, included & positive


def _with_ids(more: Sequence[Tensor], query: Tensor | None, key: Tensor | None) -> PairSets:
    sets = unflattened(more)
    return sets if query is None or key is None else ((query, key), *sets)


def members(sets: PairSets, counts: tuple[int, int], rows: slice, device: torch.device) -> Tensor:
    """Which pairs of ``rows`` x all keys are in any of the sets; ``counts`` are all rows' and keys'."""
    found: Tensor | None = None
    for pairs in sets:
        if isinstance(pairs, tuple):
            own = pairs[0][rows, None] == pairs[1][None, :]
        elif pairs.shape == counts:
            own = pairs[rows]
        else:  # it repeats
            keys = torch.arange(counts[1], device=device) % pairs.shape[1]
            own = pairs[torch.arange(counts[0], device=device)[rows] % pairs.shape[0]][:, keys]
        found = own if found is None else found | own
    return _constant(False, counts, rows, device) if found is None else found


def _constant(value: bool, counts: tuple[int, int], rows: slice, device: torch.device) -> Tensor:
    shape = (len(range(counts[0])[rows]), counts[1])
    return torch.full((1, 1), value, device=device).expand(shape)


def candidates(
    exclude: PairSets,
    within_query: Tensor | None,
    within_key: Tensor | None,
    exclude_keys: Tensor | None,
    counts: tuple[int, int],
    rows: slice,
    like: Tensor,
) -> Tensor:
    """Which pairs of ``rows`` x all keys are not excluded; absent parts of the rule cost nothing."""
    parts = [~members(exclude, counts, rows, like.device)] if exclude else []
    if within_query is not None and within_key is not None:
        parts.append(within_query[rows, None] == within_key[None, :])
    if exclude_keys is not None:
        own = exclude_keys[rows]
        # padding goes to a column of its own
        named = torch.zeros(own.shape[0], counts[1] + 1, dtype=torch.bool, device=like.device)
        named = named.scatter(1, own.where(own >= 0, counts[1]), True)
        parts.append(~named[:, :-1])
    if not parts:
        return _constant(True, counts, rows, like.device)
    return functools.reduce(torch.logical_and, parts)


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
        second = problem.second_scale
        rows = _pack(pair_logits, negative, positive, second)
        if not problem.columns:
            return rows, rows.new_empty(STATISTICS, 0)
        return rows, _pack(pair_logits.T, negative.T, positive.T, second)


def _pack(pair_logits: Tensor, negative: Tensor, positive: Tensor, second: float) -> Tensor:
    found = dense_statistics(pair_logits, negative, positive)
    again = masked_logsumexp(second * pair_logits, negative) if second else found.lse_pos
    return torch.stack(found._replace(lse_pos=again))


def dense_statistics(logits: Tensor, negative: Tensor, positive: Tensor) -> Statistics:
    """Of each row of the logits (N, M), by masks of its pairs."""
    masked = logits.detach().masked_fill(~negative, -torch.inf)
    return Statistics(
        lse_neg=masked_logsumexp(logits, negative),
        lse_pos=masked_logsumexp(logits, positive),
        pos_sum=logits.masked_fill(~positive, 0.0).sum(dim=1),
        pos_count=positive.sum(dim=1).to(logits.dtype),
        # the extra column makes the maximum defined without keys
        max_neg=torch.nn.functional.pad(masked, (0, 1), value=-torch.inf).amax(dim=1),
    )


def logistic(problem: Problem, bias: Tensor) -> Tensor:
    """Sums (2, N) of softplus of the logits plus ``bias`` (N,), and of minus those, over each row's pairs."""
    with without_autocast(problem.query.device):
        shifted = logits(problem)
        shifted = shifted + bias.to(shifted.dtype)[:, None]
        negative, positive = pair_masks(problem)
        sums = [softplus(shifted).where(negative, 0.0).sum(dim=1)]
        sums.append(softplus(-shifted).where(positive, 0.0).sum(dim=1))
        return torch.stack(sums)


def soft_cross_entropy(args: SoftTargets) -> Tensor:
    """Cross-entropy (V, N) of each view's softmax with the mean of the teachers', formed as matrices."""
    with without_autocast(args.query.device):
        kept = kept_pairs(args)
        unit_query, unit_key = (unit_rows(x, args.normalize) for x in (args.query, args.key))
        target, dtype = _mean_target(args, kept), unit_query.dtype
        losses = []
        for view in unit_query:
            pair_logits = product(view, unit_key.T) * args.scale.to(dtype)
            log_p = _filled(pair_logits, kept).log_softmax(dim=1).where(kept, 0.0)
            losses.append(-(target * log_p).sum(dim=1))
        return torch.stack(losses)


def kept_pairs(args: SoftTargets, rows: slice = slice(None)) -> Tensor:
    """Which pairs of ``rows`` x all keys are not excluded."""
    sets = unflattened(args.exclude)
    within = args.within_query, args.within_key
    return candidates(sets, *within, args.exclude_keys, args.counts(), rows, args.query)


def _mean_target(args: SoftTargets, kept: Tensor) -> Tensor:
    """The mean of the teachers' softmaxes over the kept pairs, 0 elsewhere."""
    dtype, softmaxes = compute_dtype(args.query.dtype), []
    key = unit_rows(args.target_key.to(dtype), args.normalize)
    for teacher in unit_rows(args.target_query.to(dtype), args.normalize):
        pair_logits = product(teacher, key.T) * args.target_scale.to(dtype)
        if args.target_bias is not None:
            pair_logits = pair_logits + args.target_bias.to(dtype)
        softmaxes.append(_filled(pair_logits, kept).softmax(dim=1).where(kept, 0.0))
    return torch.stack(softmaxes).mean(dim=0)


def _filled(pair_logits: Tensor, kept: Tensor) -> Tensor:
    """Of which a softmax is over the kept pairs, and finite without any."""
    empty = ~kept.any(dim=1, keepdim=True)
    return pair_logits.masked_fill(~kept, -torch.inf).masked_fill(empty, 0.0)


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query, ties to the lower index, padded with -inf and -1."""
    with without_autocast(args.query.device):
        similarity = product(unit_rows(args.query, args.normalize), unit_rows(args.key, args.normalize).T)
        return best(similarity, excluded_pairs(args, similarity), args)


def excluded_pairs(args: TopK, similarity: Tensor, rows: slice = slice(None)) -> Tensor:
    """Which pairs of ``rows`` x all keys, whose similarities these are, are no candidates."""
    counts = (args.query.shape[0], args.key.shape[0])
    excluded = ~candidates(
        unflattened(args.exclude),
        args.within_query,
        args.within_key,
        args.exclude_keys,
        counts,
        rows,
        similarity,
    )
    if args.only:
        excluded = excluded | ~members(unflattened(args.only), counts, rows, similarity.device)
    return excluded if args.below is None else excluded | (similarity >= args.below[rows, None])


def best(similarity: Tensor, excluded: Tensor, args: TopK) -> tuple[Tensor, Tensor]:
    """The k best of each row: values and indices, padded."""
    nothing = -torch.inf if args.largest else torch.inf
    similarity = torch.nn.functional.pad(
        similarity.masked_fill(excluded, nothing), (0, args.k), value=nothing
    )
    values, indices = similarity.sort(dim=1, descending=args.largest, stable=True)
    values, indices = values[:, : args.k].contiguous(), indices[:, : args.k].contiguous()
    return values, indices.masked_fill(values == nothing, -1)


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
BACKEND = Backend(
    "reference",
    summary="dense torch: the specification that the others are tested against",
    two_scales=True,
    topk=topk,
    enqueue=enqueue,
)
