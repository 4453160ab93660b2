"""Pure torch over row chunks: linear memory, any device, any rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcl.backends.base import Backend
from fastcl.backends.reference import best, enqueue, excluded_pairs, kept_pairs, pair_masks
from fastcl.losses.families.mochi import Mochi
from fastcl.losses.families.one_positive import NEGATIVES, OnePositive
from fastcl.similarity.fields import (
    LSE_NEG,
    LSE_POS,
    MAXIMA,
    NEG_MAX,
    OF_NEGATIVES,
    OF_POSITIVES,
    POS_SUM,
    STATE,
    STATISTICS,
    TOTALS,
    PositiveSums,
    Statistics,
    empty_state,
    merge_positive_sums,
    no_positive_sums,
)
from fastcl.similarity.numerics import (
    LN2,
    LOG2E,
    compute_dtype,
    inverse_norms,
    product,
    row_dot,
    softplus,
    unit_rows,
    unit_rows_backward,
)
from fastcl.similarity.problem import (
    LogisticNeeds,
    Needs,
    PairGradients,
    Prepared,
    Problem,
    SoftTargetNeeds,
    SoftTargets,
    TopK,
    input_gradients,
    prepare,
    wanted_pairs,
)

_CHUNK_ELEMENTS = 1 << 21


def row_chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Slices of rows whose tiles hold about two million elements."""
    step = max(1, _CHUNK_ELEMENTS // max(1, n_columns))
    for start in range(0, n_rows, step):
        yield slice(start, min(n_rows, start + step))


def stats_forward(problem: Problem, weighted_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics and state of the rows, the same of the columns, and sum_j p_ij y_j (N, D) if asked."""
    prepared = prepare(problem)
    n, m = problem.query.shape[0], problem.key.shape[0]
    new = prepared.query.new_empty
    rows, row_state = new(STATISTICS, n), new(STATE, n)
    m_columns = m if problem.columns else 0
    columns, column_state = new(STATISTICS, m_columns), empty_state(prepared.query, m_columns)
    column_sums = no_positive_sums(prepared.query, m_columns)
    weighted = new(problem.query.shape if weighted_keys else (0,))
    for chunk in row_chunks(n, m):
        logits2 = _logits2(problem, prepared, chunk)
        negative, positive = pair_masks(problem, chunk)
        row_state[:, chunk] = _tile_state(logits2, negative, positive)
        rows[:, chunk] = statistics(row_state[:, chunk], _positive_sums(logits2, positive))
        if weighted_keys:
            probabilities = _weights(logits2, negative, row_state[OF_NEGATIVES, chunk])
            weighted[chunk] = probabilities @ _scaled_keys(problem, prepared)
        if problem.columns:
            tile = _tile_state(logits2.T, negative.T, positive.T)
            column_state = merge_states(column_state, tile)
            column_sums = merge_positive_sums(column_sums, _positive_sums(logits2.T, positive.T))
    if problem.columns:
        columns = statistics(column_state, column_sums)
    return rows, row_state, columns, column_state, weighted


def stats_backward(
    problem: Problem,
    grad_rows: Tensor,
    grad_columns: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, scale, key_bias and key_scale, from the saved row states."""
    prepared = prepare(problem)
    want_query, want_key, want_bias = wanted_pairs(problem, needs)
    query_sum = prepared.query.new_zeros(prepared.query.shape) if want_query else None
    key_sum = prepared.key.new_zeros(prepared.key.shape) if want_key else None
    bias_sum = prepared.key.new_zeros(problem.key.shape[0]) if want_bias else None
    for chunk in row_chunks(problem.query.shape[0], problem.key.shape[0]):
        logits2 = _logits2(problem, prepared, chunk)
        negative, positive = pair_masks(problem, chunk)
        dlogits = _logit_gradient(logits2, negative, positive, row_state[:, chunk], grad_rows[:, chunk])
        if problem.columns:
            other = _logit_gradient(logits2.T, negative.T, positive.T, column_state, grad_columns)
            dlogits = dlogits + other.T
        if query_sum is not None:
            query_sum[chunk] += dlogits @ _scaled_keys(problem, prepared)
            if problem.symmetric:  # by the logits of the forward pass: l_ji may be rounded otherwise
                query_sum += dlogits.T @ prepared.query[chunk]
        if key_sum is not None:
            key_sum += dlogits.T @ prepared.query[chunk]
        if bias_sum is not None:
            bias_sum += dlogits.sum(dim=0)
    return input_gradients(problem, prepared, PairGradients(query_sum, key_sum, bias_sum), needs)


def logistic(problem: Problem, bias: Tensor) -> Tensor:
    """Sums (2, N) of softplus over negatives and positives; ``bias`` is (N,) in the compute dtype."""
    prepared = prepare(problem)
    sums = torch.zeros(2, problem.query.shape[0], dtype=bias.dtype, device=bias.device)
    for chunk in row_chunks(problem.query.shape[0], problem.key.shape[0]):
        logits = _logits(problem, prepared, chunk) + bias[chunk, None]
        negative, positive = pair_masks(problem, chunk)
        sums[0, chunk] = softplus(logits).where(negative, 0.0).sum(dim=1)
        if problem.has_positives():
            sums[1, chunk] = softplus(-logits).where(positive, 0.0).sum(dim=1)
    return sums


def logistic_backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs: LogisticNeeds
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, scale and bias from that of the sums (2, N)."""
    prepared = prepare(problem)
    query_sum = torch.zeros_like(prepared.query) if needs.query or needs.scale else None
    key_sum = torch.zeros_like(prepared.key) if needs.key else None
    grad_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format) if needs.bias else None
    for chunk in row_chunks(problem.query.shape[0], problem.key.shape[0]):
        logits = _logits(problem, prepared, chunk) + bias[chunk, None]
        negative, positive = pair_masks(problem, chunk)
        dlogits = (logits.sigmoid() * grad[0, chunk, None]).where(negative, 0.0)
        if problem.has_positives():
            dlogits -= ((-logits).sigmoid() * grad[1, chunk, None]).where(positive, 0.0)
        if query_sum is not None:
            query_sum[chunk] = dlogits @ prepared.key
        if key_sum is not None:
            key_sum += dlogits.T @ prepared.query[chunk]
        if grad_bias is not None:
            grad_bias[chunk] = dlogits.sum(dim=1)
    pairs = PairGradients(query_sum, key_sum, None)
    of_inputs = input_gradients(problem, prepared, pairs, Needs(*needs[:-1], False, False))
    return (*of_inputs[: len(needs) - 1], grad_bias)


def soft_cross_entropy(args: SoftTargets, kept_logits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (V, N), of each view's and each teacher's softmax the maximum and the sum, and no logits."""
    views, teachers = _Softmaxes(args, False), _Softmaxes(args, True)
    new, rows = views.prepared.query.new_zeros, args.query.shape[1]
    losses, state = new(views.count, rows), new(2 * (views.count + teachers.count), rows)
    of_views, of_teachers = state.unflatten(0, (-1, 2)).split([views.count, teachers.count])
    for chunk in row_chunks(*args.counts()):
        kept = kept_pairs(args, chunk)
        for teacher in range(teachers.count):
            of_teachers[teacher, :, chunk] = _max_sum(teachers.logits2(teacher, chunk), kept)
        target = teachers.mean(of_teachers, kept, chunk)
        for view in range(views.count):
            logits2 = views.logits2(view, chunk)
            maximum, total = of_views[view, :, chunk] = _max_sum(logits2, kept)
            distances = (_finite(maximum)[:, None] - logits2).where(kept, 0.0)
            losses[view, chunk] = (
                (target * distances).sum(dim=1) + total.where(total != 0, 1.0).log2()
            ) * LN2
    return losses, state, new(0)


def soft_cross_entropy_backward(
    args: SoftTargets, grad: Tensor, state: Tensor, kept_logits: Tensor, needs: SoftTargetNeeds
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and scale from that of the losses (V, N)."""
    views, teachers = _Softmaxes(args, False), _Softmaxes(args, True)
    of_views, of_teachers = state.unflatten(0, (-1, 2)).split([views.count, teachers.count])
    unit = views.prepared
    query_sum = torch.zeros_like(unit.query) if needs.query or needs.scale else None
    key_sum = torch.zeros_like(unit.key) if needs.key else None
    for chunk in row_chunks(*args.counts()):
        kept = kept_pairs(args, chunk)
        target = teachers.mean(of_teachers, kept, chunk)
        for view in range(views.count):
            own = _weights(views.logits2(view, chunk), kept, of_views[view, :, chunk])
            dlogits = (own - target) * grad[view, chunk, None]
            if query_sum is not None:
                query_sum[views.rows(view, chunk)] = dlogits @ unit.key
            if key_sum is not None:
                key_sum += dlogits.T @ unit.query[views.rows(view, chunk)]
    pairs = PairGradients(query_sum, key_sum, None)
    grad_query, *others = input_gradients(views.problem, unit, pairs, Needs(*needs, False, False))
    return None if grad_query is None else grad_query.view(args.query.shape), *others[: len(needs) - 1]


class _Softmaxes:
    """The views' softmaxes over the keys, or the teachers'."""

    def __init__(self, args: SoftTargets, of_teachers: bool) -> None:
        query, key, scale, bias = args.query, args.key, args.scale, None
        if of_teachers:
            query, key, scale, bias = args.target_query, args.target_key, args.target_scale, args.target_bias
        self.count, self._rows, _ = query.shape
        self.problem = Problem(query.flatten(0, 1), key, scale, bias, normalize=args.normalize)
        self.prepared = prepare(self.problem)
        self._dtype = compute_dtype(args.query.dtype)

    def rows(self, index: int, chunk: slice) -> slice:
        return slice(index * self._rows + chunk.start, index * self._rows + chunk.stop)

    def logits2(self, index: int, chunk: slice) -> Tensor:
        return _logits2(self.problem, self.prepared, self.rows(index, chunk)).to(self._dtype)

    def mean(self, states: Tensor, kept: Tensor, chunk: slice) -> Tensor:
        total = torch.zeros(kept.shape, dtype=self._dtype, device=kept.device)
        for index in range(self.count):
            total += _weights(self.logits2(index, chunk), kept, states[index, :, chunk])
        return total / self.count


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The state (STATE, N) over two disjoint sets of keys."""
    merged = torch.empty_like(a)
    maxima = torch.maximum(a[MAXIMA], b[MAXIMA])
    shift = _finite(maxima)
    merged[MAXIMA] = maxima
    merged[TOTALS] = a[TOTALS] * torch.exp2(a[MAXIMA] - shift) + b[TOTALS] * torch.exp2(b[MAXIMA] - shift)
    return merged


def statistics(state: Tensor, positive_sums: Tensor) -> Tensor:
    """Statistics (STATISTICS, N) from a state (STATE, N) and the POSITIVE_SUMS (RUNNING - STATE, N)."""
    lse_neg, lse_pos = (state[MAXIMA] + state[TOTALS].log2()) * LN2
    sums = PositiveSums(*positive_sums)
    return torch.stack(Statistics(lse_neg, lse_pos, *sums, max_neg=state[NEG_MAX] * LN2))


def topk(args: TopK) -> tuple[Tensor, Tensor]:
    """The best of the similarities of a chunk of rows with all keys, by a stable sort."""
    query, key = unit_rows(args.query, args.normalize), unit_rows(args.key, args.normalize)
    values = query.new_empty(query.shape[0], args.k)
    indices = torch.empty(values.shape, dtype=torch.int64, device=query.device)
    for rows in row_chunks(query.shape[0], key.shape[0]):
        similarity = product(query[rows], key.T)
        values[rows], indices[rows] = best(similarity, excluded_pairs(args, similarity, rows), args)
    return values, indices


def mochi(args: Mochi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,) and, for an incoming 1 per row, gradients of query, positive (N, D) and scale (N,)."""
    dtype = compute_dtype(args.query.dtype)
    query, positive = args.query.to(dtype), args.positive.to(dtype)
    query_inverse, positive_inverse = inverse_norms(query), inverse_norms(positive)
    query, positive, scale = query * query_inverse, positive * positive_inverse, args.scale.to(dtype)
    _, order, rows, _, pull = over_queue(args, query)
    queue_lse = rows[LSE_NEG]
    lse = torch.empty_like(queue_lse)
    formed = max(args.n_hard, args.first.shape[1] + args.partner.shape[1])
    for chunk in row_chunks(query.shape[0], formed * query.shape[1]):
        hard = args.keys[order[chunk]].to(dtype)  # [n, n_hard, D]
        lse[chunk], synthetic = _mix(args, chunk, query[chunk], hard, queue_lse[chunk], scale)
        pull[chunk] = pull[chunk] * torch.exp(queue_lse[chunk] - lse[chunk])[:, None] + synthetic
    margin = lse - scale * row_dot(query, positive)
    slope = torch.sigmoid(margin)[:, None]
    pull = (pull - positive) * slope
    grad_query = unit_rows_backward(scale * pull, query, query_inverse)
    grad_positive = unit_rows_backward(-scale * slope * query, positive, positive_inverse)
    return softplus(margin), grad_query, grad_positive, row_dot(query, pull)


def over_queue(args: Mochi, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of unit queries: similarities and indices (N, n_hard) of the hardest keys, then all of the queue.

    Of it the statistics and the state of the rows, and the mean key by their probabilities (N, D).
    """
    similarity, order = topk(TopK(query, args.keys.to(query.dtype), args.n_hard))
    plain = OnePositive(
        query,
        query,
        negatives=args.keys,
        scale=args.scale,
        layout=NEGATIVES,
        normalize=False,
        normalize_negatives=False,
    )
    rows, row_state, _, _, pull = stats_forward(plain.problem(), weighted_keys=True)
    return similarity, order, rows, row_state, pull


def _mix(
    args: Mochi, chunk: slice, query: Tensor, hard: Tensor, lse: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``lse`` with the synthetic logits added, and ``sum_h exp(logit_h - lse) h``, for a chunk of rows."""

    def ranked(ranks: Tensor) -> Tensor:
        return hard.gather(1, ranks[chunk, :, None].expand(-1, -1, hard.shape[2]))

    alpha, beta = args.alpha[chunk, :, None], args.beta[chunk, :, None]
    mixed = alpha * ranked(args.first) + (1 - alpha) * ranked(args.second)
    mixed_with_query = beta * query[:, None] + (1 - beta) * ranked(args.partner)
    synthetic = torch.cat([mixed, mixed_with_query], dim=1)  # [n, n_mix + n_query_mix, D]
    inverses = inverse_norms(synthetic).squeeze(2)
    logits = scale * product(synthetic, query[:, :, None]).squeeze(2) * inverses
    lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
    weights = torch.exp(logits - lse[:, None]) * inverses
    return lse, (weights[:, None] @ synthetic).squeeze(1)


def _logits(problem: Problem, prepared: Prepared, chunk: slice) -> Tensor:
    logits = product(prepared.query[chunk], prepared.key.T)
    return logits * problem.scale.to(logits.dtype)


def _logits2(problem: Problem, prepared: Prepared, chunk: slice) -> Tensor:
    factor = problem.scale * LOG2E
    if problem.key_scale is not None:
        factor = factor * problem.key_scale.to(prepared.key.dtype)
    logits2 = product(prepared.query[chunk], prepared.key.T)
    logits2 *= factor.to(logits2.dtype)  # not before the product, where it might overflow
    if problem.key_bias is not None:
        logits2 += problem.key_bias.to(logits2.dtype) * LOG2E
    return logits2


def _scaled_keys(problem: Problem, prepared: Prepared) -> Tensor:
    if problem.key_scale is None:
        return prepared.key
    return prepared.key * problem.key_scale.to(prepared.key.dtype)[:, None]


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _max_sum(logits2: Tensor, mask: Tensor) -> Tensor:
    if logits2.shape[1] == 0:
        return empty_state(logits2, logits2.shape[0])[OF_NEGATIVES]
    masked = logits2.masked_fill(~mask, -torch.inf)
    maximum = masked.amax(dim=1)
    return torch.stack([maximum, torch.exp2(masked - _finite(maximum)[:, None]).sum(dim=1)])


def _tile_state(logits2: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    return torch.cat([_max_sum(logits2, negative), _max_sum(logits2, positive)])


def _positive_sums(logits2: Tensor, positive: Tensor) -> Tensor:
    total = logits2.masked_fill(~positive, 0.0).sum(dim=1) * LN2
    return torch.stack(PositiveSums(total, positive.sum(dim=1).to(logits2.dtype)))


def _weights(logits2: Tensor, mask: Tensor, maximum_and_total: Tensor) -> Tensor:
    """exp(l - lse) over the mask, 0 elsewhere; ``maximum_and_total`` (2, rows) is half a state."""
    maximum, total = maximum_and_total
    inverse = total.masked_fill(total == 0, 1.0).reciprocal()
    shifted = (logits2 - _finite(maximum)[:, None]).masked_fill(~mask, -torch.inf)
    weights: Tensor = torch.exp2(shifted) * inverse[:, None]
    return weights


def _logit_gradient(
    logits2: Tensor, negative: Tensor, positive: Tensor, state: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of the logits through one side's statistics, whose gradient is ``grad``."""
    dlogits = _weights(logits2, negative, state[OF_NEGATIVES]) * grad[LSE_NEG, :, None]
    dlogits += _weights(logits2, positive, state[OF_POSITIVES]) * grad[LSE_POS, :, None]
    return dlogits + grad[POS_SUM, :, None] * positive


BACKEND = Backend(
    "chunked",
    summary="plain torch in linear memory, any device, any rule",
    stats_forward=stats_forward,
    stats_backward=stats_backward,
    logistic=logistic,
    logistic_backward=logistic_backward,
    soft_cross_entropy=soft_cross_entropy,
    soft_cross_entropy_backward=soft_cross_entropy_backward,
    topk=topk,
    mochi=mochi,
    enqueue=enqueue,
)
