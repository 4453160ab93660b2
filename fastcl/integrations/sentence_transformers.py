"""sentence-transformers' MultipleNegativesRankingLoss, plain and cached, and GISTEmbedLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.integrations._gist import GISTEmbedLoss
from fastcl.integrations._peer import peer
from fastcl.integrations._ranking import fuses, ranking_loss

with peer("sentence-transformers>=6.2,<7"):
    from sentence_transformers.sentence_transformer import losses

__all__ = ["CachedMultipleNegativesRankingLoss", "GISTEmbedLoss", "MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss``, with all its options."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Any:
        """The loss, (), of queries, their documents and any hard negatives, (N, D) each."""
        if len(embeddings) < 2 or not fuses(self, embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """``sentence_transformers.losses.CachedMultipleNegativesRankingLoss``; the loss is made at once."""

    def calculate_loss(self, reps: Any, labels: Any = None, *, with_backward: bool = False) -> Any:
        """The loss, (), of each column's mini-batches of embeddings (n, D); detached ``with_backward``."""
        embeddings = [torch.cat(column) for column in reps]
        if not fuses(self, embeddings):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = ranking_loss(self, embeddings)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss
