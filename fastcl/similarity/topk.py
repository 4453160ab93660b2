"""The most similar keys of each query."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.ops import calls
from fastcl.similarity.checks import check_choice, check_matrix, check_same, in_one_dtype
from fastcl.similarity.numerics import compute_dtype
from fastcl.similarity.problem import TopK
from fastcl.similarity.rules import ALL_NEGATIVE, PairRule, check_rule, flattened


def similarity_topk(
    query: Tensor,
    key: Tensor,
    k: int,
    *,
    rule: PairRule = ALL_NEGATIVE,
    normalize: bool = False,
    among: str = "all",
    largest: bool = True,
    below: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most similar keys of each query, without storing the (N, M) matrix.

    Args:
        query: (N, D), any floating dtype.
        key: (M, D), same dtype.
        k: how many, at least 1.
        rule: excluded keys are not candidates.
        normalize: divide rows by their L2 norm first: cosine similarities.
        among: 'all' that are not excluded, or of these the 'negative' or the 'positive' ones only.
        largest: False: the k least similar keys, ascending.
        below: (N,); only similarities strictly below the row's bound.
        backend: 'auto', or a name as in :func:`fastcl.use_backend`.

    Returns:
        values (N, k), float64 for float64 inputs, else float32, descending, ties to the lower index,
        and indices (N, k), int64. A row with fewer than k candidates is padded with -inf (inf with
        ``largest=False``) and -1. Neither carries a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastcl.similarity_stats`; k that is not a positive
            int; an unknown ``among``; a ``below`` that has not one bound per row.
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
    check_choice("among", among, ("all", "negative", "positive"))
    check_rule(rule, query, key)
    if below is not None:
        below = _bounds(below, query)
    exclude, only, within = rule.exclude_sets, rule.positive_sets if among == "positive" else (), rule.within
    if among == "negative":
        exclude = (*exclude, *rule.positive_sets)
    if among == "positive" and not only:
        exclude = (*exclude, _every_pair(query, key))
    within_query, within_key = within or (None, None)
    args = TopK(
        query.detach(),
        key.detach(),
        k,
        exclude=flattened(exclude),
        only=flattened(only),
        within_query=within_query,
        within_key=within_key,
        exclude_keys=rule.exclude_keys,
        below=below,
        largest=largest,
        normalize=normalize,
    )
    return calls.topk(args, backend)


def _bounds(below: Tensor, query: Tensor) -> Tensor:
    check_matrix("below", below, 1)
    if below.shape[0] != query.shape[0]:
        raise ValueError(
            f"below must have one bound per query: expected ({query.shape[0]},), got {tuple(below.shape)}"
        )
    if below.device != query.device:
        raise ValueError(f"below must be on {query.device} like query, got {below.device}")
    return below.detach().to(compute_dtype(query.dtype))


def _every_pair(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    same = torch.zeros(max(query.shape[0], key.shape[0]), dtype=torch.int64, device=query.device)
    return same[: query.shape[0]], same[: key.shape[0]]
