"""What a statistics call is made of, and the chain rule every backend shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastcl.similarity.numerics import compute_dtype, inverse_norms, row_dot, unit_rows_backward


class Problem(NamedTuple):
    """Arguments of one statistics call, in the order of the ops' schemas.

    ``positive_more`` and ``exclude_more`` are further sets of pairs: ids of the queries and then of the
    keys, or a bool mask; one that is smaller than (N, M) repeats.
    ``symmetric`` promises that key is query, with the same ids and no key bias or scale.
    """

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    scale: Tensor  # ()
    key_bias: Tensor | None = None  # (M,)
    key_scale: Tensor | None = None  # (M,)
    positive_query: Tensor | None = None  # (N,) int64
    positive_key: Tensor | None = None  # (M,) int64
    exclude_query: Tensor | None = None  # (N,) int64
    exclude_key: Tensor | None = None  # (M,) int64
    within_query: Tensor | None = None  # (N,) int64
    within_key: Tensor | None = None  # (M,) int64
    exclude_keys: Tensor | None = None  # (N, k) int64
    positive_more: Sequence[Tensor] = ()
    exclude_more: Sequence[Tensor] = ()
    normalize: bool = False
    columns: bool = False
    symmetric: bool = False
    precision: int = 0  # of float32 products, as matmul_precision_level: of the backward pass too
    # not 0: the positives are the negatives again, their logits times this, without sum and count; of
    # statistics by a backend that says so
    second_scale: float = 0.0

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Those that may need a gradient, in the order of :class:`Needs`."""
        return self.query, self.key, self.scale, self.key_bias, self.key_scale

    def has_positives(self) -> bool:
        """Whether a pair may be positive."""
        return self.positive_query is not None or len(self.positive_more) > 0 or self.second_scale != 0

    def has_simple_rule(self) -> bool:
        """Whether one test of ids each says which pairs are excluded and positive."""
        more = len(self.positive_more) + len(self.exclude_more)
        return not more and self.within_query is None and self.exclude_keys is None


PROBLEM_FIELDS = len(Problem._fields)
PROBLEM_TENSORS = Problem._fields.index("positive_more")  # before the lists of tensors and the flags


class TopK(NamedTuple):
    """Arguments of one top-k call, in the order of the op's schema.

    ``exclude`` and ``only`` are sets of pairs, as Problem's ``exclude_more``: a pair in the first is no
    candidate, nor is one outside the second, where there is one.
    """

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    k: int
    exclude: Sequence[Tensor] = ()
    only: Sequence[Tensor] = ()
    within_query: Tensor | None = None  # (N,) int64
    within_key: Tensor | None = None  # (M,) int64
    exclude_keys: Tensor | None = None  # (N, k) int64
    below: Tensor | None = None  # (N,) in the compute dtype: bounds of the similarities
    largest: bool = True
    normalize: bool = False

    def simple_exclude(self) -> tuple[Tensor, ...] | None:
        """The ids of the queries and the keys, or nothing, if that is all that is asked; else None."""
        rest = (self.within_query, self.exclude_keys, self.below)
        if self.only or not self.largest or any(x is not None for x in rest):
            return None
        return _only_ids(self.exclude)


def _only_ids(sets: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The ids of the queries and the keys, or nothing, if that is all that sets of pairs say; else None."""
    ids = tuple(sets)
    return ids if not ids or (len(ids) == 2 and ids[0].dim() == 1) else None


class SoftTargets(NamedTuple):
    """Arguments of one cross-entropy with soft targets, in the order of the ops' schemas.

    ``exclude`` is a set of pairs as Problem's ``exclude_more``.
    """

    query: Tensor  # (V, N, D)
    key: Tensor  # (K, D)
    scale: Tensor  # ()
    target_query: Tensor  # (T, N, E)
    target_key: Tensor  # (K, E)
    target_scale: Tensor  # ()
    target_bias: Tensor | None = None  # (K,)
    within_query: Tensor | None = None  # (N,) int64
    within_key: Tensor | None = None  # (K,) int64
    exclude_keys: Tensor | None = None  # (N, k) int64
    exclude: Sequence[Tensor] = ()
    normalize: bool = True
    precision: int = 0  # as Problem's

    def counts(self) -> tuple[int, int]:
        """How many rows a view has, and how many keys there are."""
        return self.query.shape[1], self.key.shape[0]

    def simple_exclude(self) -> tuple[Tensor, ...] | None:
        """As :meth:`TopK.simple_exclude`."""
        rest = (self.within_query, self.exclude_keys)
        return None if any(x is not None for x in rest) else _only_ids(self.exclude)


SOFT_TARGET_FIELDS = len(SoftTargets._fields)
SOFT_TARGET_TENSORS = SoftTargets._fields.index("exclude")


class SoftTargetNeeds(NamedTuple):
    """Which inputs of a cross-entropy with soft targets need a gradient: targets are constants."""

    query: bool
    key: bool
    scale: bool


SOFT_TARGET_INPUTS = len(SoftTargetNeeds._fields)


class Needs(NamedTuple):
    """Which inputs of a problem, its first ones, need a gradient."""

    query: bool
    key: bool
    scale: bool
    key_bias: bool
    key_scale: bool


PROBLEM_INPUTS = len(Needs._fields)  # that may need a gradient


class LogisticNeeds(NamedTuple):
    """Which inputs of sums of softplus need a gradient."""

    query: bool
    key: bool
    scale: bool
    bias: bool


class PairGradients(NamedTuple):
    """Sums of the logit gradients ``dl`` (N, M) against unit rows; what a backend's backward returns.

    For a symmetric problem ``query`` holds both roles' sum and ``key`` is None.
    """

    query: Tensor | None  # (N, D): sum_j dl_ij * key_scale_j * y_j
    key: Tensor | None  # (M, D): sum_i dl_ij * x_i
    bias: Tensor | None  # (M,): sum_i dl_ij


@dataclass(frozen=True)
class Prepared:
    """Unit rows in the compute dtype, and what is needed to differentiate through them."""

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    query_inverse: Tensor | None  # (N, 1), None without normalization
    key_inverse: Tensor | None  # (M, 1)


def prepare(problem: Problem) -> Prepared:
    """Unit rows of both sides; no copy where rows are used as they are."""
    dtype = compute_dtype(problem.query.dtype)  # of the query: a queue's keys may have another

    def rows(x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.to(dtype)
        if not problem.normalize:
            return x, None
        inverse = inverse_norms(x)
        return x * inverse, inverse

    query, query_inverse = rows(problem.query)
    if problem.symmetric:
        return Prepared(query, query, query_inverse, query_inverse)
    key, key_inverse = rows(problem.key)
    return Prepared(query, key, query_inverse, key_inverse)


def input_gradients(
    problem: Problem, prepared: Prepared, pairs: PairGradients, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, scale, key_bias and key_scale from the pair gradients: O(N D)."""
    scale = problem.scale.to(prepared.query.dtype)

    def side(x: Tensor, unit: Tensor, inverse: Tensor | None, grad_unit: Tensor) -> Tensor:
        grad = grad_unit if inverse is None else unit_rows_backward(grad_unit, unit, inverse)
        return grad.to(x.dtype).contiguous()

    grad_query = grad_key = grad_scale = grad_bias = grad_key_scale = None
    if needs.query and pairs.query is not None:
        grad_query = side(problem.query, prepared.query, prepared.query_inverse, pairs.query * scale)
    if needs.key and pairs.key is not None:
        factor = scale if problem.key_scale is None else scale * problem.key_scale.to(scale.dtype)[:, None]
        grad_key = side(problem.key, prepared.key, prepared.key_inverse, pairs.key * factor)
    if needs.scale and pairs.query is not None:
        total = row_dot(prepared.query.double(), pairs.query).sum().to(problem.scale.dtype)
        grad_scale = total * 0.5 if problem.symmetric else total
    if needs.key_bias and problem.key_bias is not None and pairs.bias is not None:
        grad_bias = pairs.bias.to(problem.key_bias.dtype)
    if needs.key_scale and problem.key_scale is not None and pairs.key is not None:
        grad_key_scale = (row_dot(prepared.key.double(), pairs.key) * scale).to(problem.key_scale.dtype)
    return grad_query, grad_key, grad_scale, grad_bias, grad_key_scale


def wanted_pairs(problem: Problem, needs: Needs) -> tuple[bool, bool, bool]:
    """Which of the pair gradients (query, key, bias) the needed input gradients are made from."""
    query = needs.query or needs.scale or (problem.symmetric and needs.key)
    return query, not problem.symmetric and (needs.key or needs.key_scale), needs.key_bias
