"""The most similar keys of each query."""

from __future__ import annotations

from torch import Tensor

from fastcl.ops import calls
from fastcl.similarity.checks import check_matrix, check_same, in_one_dtype
from fastcl.similarity.problem import TopK
from fastcl.similarity.rules import ALL_NEGATIVE, PairRule, check_rule


def similarity_topk(
    query: Tensor,
    key: Tensor,
    k: int,
    *,
    rule: PairRule = ALL_NEGATIVE,
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
        TypeError, ValueError, RuntimeError: as :func:`fastcl.similarity_stats`; k that is not a positive int.
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
    check_rule(rule, query, key)
    exclude_query, exclude_key = rule.exclude or (None, None)
    args = TopK(query.detach(), key.detach(), k, exclude_query, exclude_key, normalize)
    return calls.topk(args, backend)
