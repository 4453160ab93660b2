"""Similarity statistics: the few numbers per row that losses are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl.backends.reference import dense_statistics
from fastcl.distributed.gather import check_group, row_counts
from fastcl.distributed.stats import group_stats
from fastcl.ops import calls
from fastcl.similarity import forms
from fastcl.similarity.checks import check_matrix, check_same, check_vector, in_one_dtype, scalar
from fastcl.similarity.fields import Statistics, merge
from fastcl.similarity.numerics import matmul_precision_level
from fastcl.similarity.problem import Problem
from fastcl.similarity.rules import ALL_NEGATIVE, PairRule, check_rule


@dataclass(frozen=True, eq=False)
class SimilarityStats:
    """Statistics of each row of a similarity matrix, all of shape (N,).

    Values are float64 for float64 inputs and float32 for all others.

    Attributes:
        lse_neg: log-sum-exp of the logits over negatives; -inf (zero gradient) without any.
        lse_pos: the same over positives.
        pos_sum: sum of the logits over positives; 0 without any.
        pos_count: number of positives; carries no gradient.
        max_neg: largest logit over negatives; -inf without any; carries no gradient.
        columns: the same statistics per key, shape (M,), or None.
    """

    lse_neg: Tensor
    lse_pos: Tensor
    pos_sum: Tensor
    pos_count: Tensor
    max_neg: Tensor
    columns: SimilarityStats | None = None

    def merge(self, other: SimilarityStats) -> SimilarityStats:
        """Statistics over the union of two disjoint key sets, for the same queries.

        Raises:
            ValueError: different row counts, or either side carries column statistics.
        """
        if self.columns is not None or other.columns is not None:
            raise ValueError("statistics with columns cannot be merged: their key sets differ")
        if self.lse_neg.shape != other.lse_neg.shape:
            raise ValueError(
                "statistics to merge must have the same number of rows, got shapes "
                f"{tuple(self.lse_neg.shape)} and {tuple(other.lse_neg.shape)}"
            )
        return SimilarityStats(*merge(self._of_rows(), other._of_rows()))

    def join(self, *, negatives: Tensor | None = None, positives: Tensor | None = None) -> SimilarityStats:
        """Statistics with each row's own logits, already scaled, added to its negatives and positives.

        Args:
            negatives: (N, k) logits, differentiable; -inf is padding and not counted.
            positives: the same.

        Raises:
            ValueError: another row count, or these statistics have columns.
        """
        if self.columns is not None:
            raise ValueError("logits cannot be joined to statistics with columns: they belong to no key")
        fields = self._of_rows()
        for name, logits in (("negatives", negatives), ("positives", positives)):
            if logits is None:
                continue
            check_matrix(name, logits)
            if logits.shape[0] != self.lse_neg.shape[0]:
                raise ValueError(
                    f"{name} must have a row of logits per row: expected ({self.lse_neg.shape[0]}, k), "
                    f"got {tuple(logits.shape)}"
                )
            logits = logits.to(self.lse_neg.dtype)
            given = logits != -torch.inf
            sets = (given, given & False) if name == "negatives" else (given & False, given)
            fields = merge(fields, dense_statistics(logits, *sets))
        return SimilarityStats(*fields)

    def any_positive(self) -> Tensor:
        """``softplus(lse_neg - lse_pos)``: that any positive is picked; 0 without positives. (N,)."""
        return forms.any_positive(self._of_rows())

    def each_positive(self) -> Tensor:
        """``LSE - pos_sum / pos_count``: the mean over positives; 0 without positives. (N,)."""
        return forms.each_positive(self._of_rows())

    def decoupled(self) -> Tensor:
        """``lse_neg - pos_sum / pos_count``; 0 without positives or without negatives. (N,)."""
        return forms.decoupled(self._of_rows())

    def _of_rows(self) -> Statistics:
        return Statistics(**{name: getattr(self, name) for name in Statistics._fields})


def similarity_stats(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    rule: PairRule = ALL_NEGATIVE,
    normalize: bool = False,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    columns: bool = False,
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> SimilarityStats:
    """Statistics of the logits ``scale * key_scale[j] * <query[i], key[j]> + key_bias[j]``.

    The (N, M) matrix is never stored (but by the 'reference' backend). Gradients reach query, key,
    scale, key_bias and key_scale; pass ``key=query`` itself, with the same id tensors on both sides
    of the rule, and the symmetric kernels do half the work.

    Args:
        query: (N, D), float64, float32, float16 or bfloat16.
        key: (M, D), same dtype.
        scale: a finite number, or a tensor of one element.
        rule: which pairs are excluded, positive and negative; by default all are negative.
        normalize: divide rows by their L2 norm first, or by 1e-12 if that is larger (a zero row stays zero).
        key_bias: (M,), added to the logits of each key.
        key_scale: (M,), multiplies the similarities of each key.
        columns: also return the statistics of each key over the queries.
        group: query, key, key_bias, key_scale and ids are this rank's shard, and ids mean the same on every
            rank (:func:`fastcl.row_ids` makes unique ones); ``exclude_keys`` index the keys of all ranks in
            rank order, and a mask is of this rank's rows and all keys. Columns are this rank's keys over all
            queries; with them, or with ``ring``, the rule is one test of ids each, without bias or scale.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.
        backend: 'auto', or a name as in :func:`fastcl.use_backend`.

    Returns:
        :class:`SimilarityStats` of shape (N,), float64 for float64 inputs, else float32.

    Raises:
        TypeError: dtypes that are not floating, or differ outside autocast.
        ValueError: shapes or devices that do not fit; a scale that is not finite.
        RuntimeError: a backend asked for by name that cannot serve the call.
    """
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    if key.dtype != query.dtype:
        query, key = in_one_dtype(query, key)
    for name, vector in (("key_bias", key_bias), ("key_scale", key_scale)):
        if vector is not None:
            check_vector(name, vector, key)
    check_group(group, ring)
    counts = None if group is None else row_counts(key, group)
    check_rule(rule, query, key, None if counts is None else sum(counts))
    symmetric = query is key and key_bias is None and key_scale is None and rule.is_symmetric()
    problem = Problem(
        query,
        key,
        scalar("scale", scale, query),
        key_bias,
        key_scale,
        **rule.fields(),
        normalize=normalize,
        columns=columns and not symmetric,
        symmetric=symmetric,
        precision=matmul_precision_level(),
    )
    if group is None:
        of_rows, of_columns = calls.statistics(problem, columns, backend)
    else:
        simple = problem.has_simple_rule() and key_bias is None and key_scale is None
        if (columns or ring) and not simple:
            raise ValueError(
                "with group and columns or ring, rule must be one test of ids each; no key_bias or key_scale"
            )
        problem = problem._replace(columns=columns)
        of_rows, of_columns = group_stats(
            problem, group, ring, global_ids=True, counts=counts, backend=backend
        )
    return SimilarityStats(*of_rows, columns=None if of_columns is None else SimilarityStats(*of_columns))


def lse_at_two_scales(
    x: Tensor,
    scale: Tensor,
    factors: tuple[float, float],
    rule: PairRule,
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor]:
    """``lse_neg`` of the rows of x (N, D) with each other at ``scale`` times each factor, not both 0."""
    first, second = factors
    if abs(first) < abs(second):
        of_second, of_first = lse_at_two_scales(x, scale, (second, first), rule, group, ring)
        return of_first, of_second
    problem = Problem(
        x,
        x,
        scalar("scale", scale, x) * first,
        **rule.fields(),
        symmetric=rule.is_symmetric(),
        precision=matmul_precision_level(),
        second_scale=second / first,
    )
    if group is None and problem.second_scale and calls.serves_two_scales(problem):
        rows, _ = calls.statistics(problem)
        return rows.lse_neg, rows.lse_pos
    stats = partial(similarity_stats, x, x, rule=rule, group=group, ring=ring)
    return stats(scale=scale * first).lse_neg, stats(scale=scale * second).lse_neg
