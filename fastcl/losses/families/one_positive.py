"""The family of losses with one positive per row, said once for every backend.

Each row's loss is ``softplus(lse_neg - positive_logit)``, where ``lse_neg`` leaves out the row
itself and its positive. It equals cross-entropy, but never forms ``p - 1``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.similarity.compiled import anchored
from fastcl.similarity.fields import Statistics
from fastcl.similarity.numerics import (
    compute_dtype,
    inverse_norms,
    masked_logsumexp,
    matmul_precision_level,
    product,
    row_dot,
    softplus,
    unit_rows,
    without_autocast,
)
from fastcl.similarity.problem import Problem

# Layouts: what the rows are compared with.
VIEWS = 0  # both sides of query and positive, stacked, with each other (NT-Xent)
BATCH = 1  # query with all positives (InfoNCE in-batch)
PAIRS = 2  # query with all positives and the reverse, averaged (CLIP)
NEGATIVES = 3  # query with the given negatives (InfoNCE, MoCo)
PAIRED = 4  # each query with negatives of its own
ASSIGNED = 5  # query with the given negatives, one of which is its positive (ProtoNCE)


class OnePositive(NamedTuple):
    """Arguments of one loss, in the order of the op's schema (whose last one says only: mean or sum)."""

    query: Tensor  # (N, D)
    positive: Tensor | None  # (N, D); None with ASSIGNED
    negatives: Tensor | None  # (M, D) with NEGATIVES and ASSIGNED, (N, M, D) with PAIRED, else None
    scale: Tensor  # (), or (N, 1) until with_scaled_rows
    # (N,) int64, with NEGATIVES: negatives of the same id are excluded; with ASSIGNED: which is the positive
    query_ids: Tensor | None = None
    negative_ids: Tensor | None = None  # (M,) int64
    layout: int = BATCH
    normalize: bool = True  # query and positive
    normalize_negatives: bool = True
    decoupled: bool = False  # lse_neg - positive_logit, in place of its softplus; 0 without negatives
    reduction: str = "mean"

    @property
    def is_common(self) -> bool:
        """Whether every whole-loss op takes these arguments; those of all forms take them in any case."""
        as_they_are = self.negatives is not None and not self.normalize_negatives
        learned = self.negatives is not None and self.negatives.requires_grad
        return not (self.layout in (PAIRED, ASSIGNED) or self.decoupled or (as_they_are and learned))

    @property
    def simple_rule(self) -> bool:
        """Whether :meth:`problem` tests ids only."""
        return True

    def in_compute_dtype(self) -> OnePositive:
        """What enters twice converted once, so that its gradient rounds once: queries and positives."""
        dtype = compute_dtype(self.query.dtype)
        query = anchored(self.query).to(dtype)
        if self.positive is not None:
            return self._replace(query=query, positive=anchored(self.positive).to(dtype))
        assert self.negatives is not None
        return self._replace(query=query, negatives=anchored(self.negatives).to(dtype))

    def with_scaled_rows(self) -> OnePositive:
        """The same loss with the rows' own scales in the queries."""
        return self._replace(
            query=unit_rows(self.query, self.normalize) * self.scale.to(compute_dtype(self.query.dtype)),
            positive=None if self.positive is None else unit_rows(self.positive, self.normalize),
            scale=torch.ones((), dtype=self.scale.dtype, device=self.scale.device),
            normalize=False,
        )

    def problem(self) -> Problem:
        """The statistics call whose ``lse_neg`` (rows, for PAIRS columns too) the loss is made of.

        PAIRED has none: its ``lse_neg`` is :meth:`paired_lse`.
        """
        query, key = self.query, self.positive
        query_ids, key_ids = self.query_ids, self.negative_ids
        normalize = self.normalize
        if self.layout in (NEGATIVES, ASSIGNED):
            assert self.negatives is not None
            key = self.negatives
            if self.layout == ASSIGNED:
                key_ids = torch.arange(key.shape[0], device=key.device)
            if normalize != self.normalize_negatives:
                query, normalize = unit_rows(query, normalize), False
                key = unit_rows(key) if self.normalize_negatives else key
        else:
            assert key is not None
            query_ids = key_ids = torch.arange(query.shape[0], device=query.device)
            if self.layout == VIEWS:
                query = key = torch.cat([query, key])
                query_ids = key_ids = query_ids.repeat(2)
        return Problem(
            query,
            key,
            self.scale,
            exclude_query=query_ids,
            exclude_key=key_ids,
            normalize=normalize,
            columns=self.layout == PAIRS,
            symmetric=self.layout == VIEWS,
            precision=matmul_precision_level(),
        )

    def losses(self, rows: Statistics, columns: Statistics | None) -> Tensor:
        """The loss of each row from the statistics of :meth:`problem`."""
        positive_logit = self._positive_logit()
        losses = self._losses(rows.lse_neg, positive_logit)
        return losses if columns is None else 0.5 * (losses + self._losses(columns.lse_neg, positive_logit))

    def losses_of(self, lse_neg: Tensor) -> Tensor:
        """The loss of each row from its ``lse_neg``."""
        return self._losses(lse_neg, self._positive_logit())

    def _losses(self, lse_neg: Tensor, positive_logit: Tensor) -> Tensor:
        excess = lse_neg - positive_logit
        return excess.masked_fill(lse_neg == -torch.inf, 0.0) if self.decoupled else softplus(excess)

    def paired_lse(self) -> Tensor:
        """``lse_neg`` (N,) of PAIRED in plain torch: the logits are D times smaller than the negatives."""
        assert self.negatives is not None
        with without_autocast(self.query.device):
            query = unit_rows(self.query, self.normalize)
            negatives = anchored(self.negatives).to(compute_dtype(self.negatives.dtype))
            dots = product(negatives, query[:, :, None]).squeeze(-1)  # [N, M]
            if self.normalize_negatives:
                dots = dots * inverse_norms(negatives).squeeze(-1)
            logits = self.scale.to(query.dtype) * dots
            return masked_logsumexp(logits, torch.ones_like(logits, dtype=torch.bool))

    def _positive_logit(self) -> Tensor:
        query = unit_rows(self.query, self.normalize)
        if self.layout == ASSIGNED:
            assert self.negatives is not None
            assert self.query_ids is not None
            positive = unit_rows(self.negatives.index_select(0, self.query_ids), self.normalize_negatives)
        else:
            assert self.positive is not None
            positive = unit_rows(self.positive, self.normalize)
        logit = row_dot(query, positive) * self.scale.to(query.dtype)
        return logit.repeat(2) if self.layout == VIEWS else logit


ONE_POSITIVE_INPUTS = OnePositive._fields.index("query_ids")  # the first ones, which may need a gradient
ONE_POSITIVE_TENSORS = OnePositive._fields.index("layout")  # before the flags
