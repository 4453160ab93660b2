"""Similarity statistics: the few numbers per row that every loss here is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.numerics import logaddexp


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
        return SimilarityStats(
            lse_neg=logaddexp(self.lse_neg, other.lse_neg),
            lse_pos=logaddexp(self.lse_pos, other.lse_pos),
            pos_sum=self.pos_sum + other.pos_sum,
            pos_count=self.pos_count + other.pos_count,
            max_neg=torch.maximum(self.max_neg, other.max_neg),
        )


def from_packed(rows: Tensor, columns: SimilarityStats | None = None) -> SimilarityStats:
    """Unpack the (5, N) tensor the backends return, field by field."""
    lse_neg, lse_pos, pos_sum, pos_count, max_neg = rows.unbind(0)
    return SimilarityStats(lse_neg, lse_pos, pos_sum, pos_count.detach(), max_neg.detach(), columns)
