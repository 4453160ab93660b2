"""The two public calls on which losses are built: statistics and top-k of a similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import dispatch, ops
from fastcl.checks import check_matrix, check_same, check_vector, in_one_dtype, scalar
from fastcl.numerics import matmul_precision_level
from fastcl.problem import Problem, TopK
from fastcl.rules import PairRule
from fastcl.stats import SimilarityStats, from_packed

_ALL_NEGATIVE = PairRule()


def similarity_stats(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    rule: PairRule = _ALL_NEGATIVE,
    normalize: bool = False,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    columns: bool = False,
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
        normalize: divide rows by their L2 norm first (a zero row stays zero).
        key_bias: (M,), added to the logits of each key.
        key_scale: (M,), multiplies the similarities of each key.
        columns: also return the statistics of each key over the queries.
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
    _check_rule(rule, query, key)
    symmetric = query is key and key_bias is None and key_scale is None and rule.is_symmetric()
    positive, exclude = rule.positive or (None, None), rule.exclude or (None, None)
    problem = Problem(
        query,
        key,
        scalar("scale", scale, query),
        key_bias,
        key_scale,
        positive[0],
        positive[1],
        None,
        exclude[0],
        exclude[1],
        normalize,
        columns and not symmetric,
        symmetric,
        matmul_precision_level(),
    )
    return problem_stats(problem, columns, backend)


def problem_stats(problem: Problem, columns: bool = False, backend: str = "auto") -> SimilarityStats:
    """Statistics of an already checked problem; a symmetric one's columns are its rows."""
    dense_mask = problem.positive_table is not None
    chosen = dispatch.choose(dispatch.Request.of(problem.query, dense_mask), backend)
    rows, packed_columns = ops.stats(problem, chosen.name, _frozen_keys(problem))
    if not columns:
        return from_packed(rows)
    return from_packed(rows, from_packed(rows if problem.symmetric else packed_columns))


def _frozen_keys(problem: Problem) -> bool:
    """Whether only the query needs a gradient, so that the forward pass can accumulate it."""
    others = (problem.key, problem.scale, problem.key_bias, problem.key_scale)
    return (
        torch.is_grad_enabled()
        and problem.query.requires_grad
        and not any(x is not None and x.requires_grad for x in others)
        and problem.positive_query is None
        and not problem.columns
        and not problem.symmetric
    )


def similarity_topk(
    query: Tensor,
    key: Tensor,
    k: int,
    *,
    rule: PairRule = _ALL_NEGATIVE,
    normalize: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query, without storing the (N, M) matrix.

    Args:
        query: (N, D), any floating dtype.
        key: (M, D), same dtype.
        k: how many, at least 1.
        rule: only its ``exclude`` matters: excluded keys are not candidates.
        normalize: divide rows by their L2 norm first: cosine similarities.
        backend: 'auto', or a name as in :func:`fastcl.use_backend`.

    Returns:
        values (N, k), float64 for float64 inputs, else float32, descending, ties to the lower index,
        and indices (N, k), int64. A row with fewer than k candidates is padded with -inf and -1.
        Neither carries a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`similarity_stats`; k that is not a positive int.
    """
    check_matrix("query", query)
    check_matrix("key", key)
    check_same("key", key, "query", query)
    if key.dtype != query.dtype:
        query, key = in_one_dtype(query, key)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_rule(rule, query, key)
    exclude_query, exclude_key = rule.exclude or (None, None)
    chosen = dispatch.choose(dispatch.Request.of(query), backend)
    args = TopK(query.detach(), key.detach(), k, exclude_query, exclude_key, normalize)
    return ops.topk(args, chosen.name)


def _check_rule(rule: PairRule, query: Tensor, key: Tensor) -> None:
    if not isinstance(rule, PairRule):
        raise TypeError(f"rule must be a PairRule, got {type(rule).__name__}")
    rule.check_against(query, key)
