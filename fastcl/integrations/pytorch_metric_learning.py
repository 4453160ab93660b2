"""pytorch-metric-learning's NTXentLoss and SupConLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.integrations._peer import in_dtype_of, peer
from fastcl.similarity.logistic import similarity_logistic
from fastcl.similarity.numerics import INTEGER_DTYPES
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats, similarity_stats

with peer("pytorch-metric-learning>=2.9,<3"):
    from pytorch_metric_learning import distances, losses, reducers
    from pytorch_metric_learning.utils import common_functions
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs

_PRODUCTS = (distances.CosineSimilarity, distances.DotProductSimilarity)


class _Fused(losses.GenericPairLoss):
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> Any:
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        found = self._rule(embeddings, labels, indices_tuple, ref_emb, ref_labels) if self._fuses() else None
        if found is None:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        rule, pairs = found
        normalize = self.distance.normalize_embeddings
        logits = {"scale": 1 / self.temperature, "rule": rule, "normalize": normalize}
        stats = similarity_stats(embeddings, ref_emb, **logits)
        positives = int(stats.pos_count.sum(dtype=torch.float64))
        if not 0 < positives < pairs or pairs == 2:  # the original wants more than one of either
            return self.zero_losses()
        info = self._losses(embeddings, ref_emb, logits, stats, positives)
        return {"loss": {**info, "losses": in_dtype_of(embeddings, info["losses"])}}

    def _fuses(self) -> bool:
        d = self.distance
        return type(d) in _PRODUCTS and (d.p, d.power) == (2, 1) and not d.collect_stats

    def _rule(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> tuple[PairRule, int] | None:
        """The pairs, and how many there are; None: repeated, or said by what are no integers."""
        shape = len(embeddings), len(ref_emb)
        if indices_tuple is None:
            if not {labels.dtype, ref_labels.dtype} <= set(INTEGER_DTYPES):
                return None
            itself = torch.arange(shape[0], device=embeddings.device) if ref_labels is labels else None
            exclude = None if itself is None else (itself, itself)
            pairs = shape[0] * shape[1] - (0 if itself is None else shape[0])
            return PairRule(positive=(labels, ref_labels), exclude=exclude), pairs
        anchor, positive, other, negative = convert_to_pairs(indices_tuple, labels, ref_labels)
        masks = torch.zeros(2, *shape, dtype=torch.bool, device=embeddings.device)
        masks[0, anchor, positive] = True
        masks[1, other, negative] = True
        used, pairs = masks[0] | masks[1], len(anchor) + len(other)
        return (PairRule(positive=masks[0], exclude=~used), pairs) if int(used.sum()) == pairs else None


class NTXentLoss(_Fused, losses.NTXentLoss):
    """``pytorch_metric_learning.losses.NTXentLoss``: each positive pair among its anchor's negatives."""

    def _fuses(self) -> bool:
        return super()._fuses() and type(self.reducer) is reducers.MeanReducer

    def _losses(
        self, embeddings: Tensor, ref_emb: Tensor, logits: Any, stats: SimilarityStats, positives: int
    ) -> dict[str, Any]:
        # an anchor without negatives has no loss
        bias = -stats.lse_neg.clamp_min(torch.finfo(stats.lse_neg.dtype).min / 2)
        _, of_positives = similarity_logistic(embeddings, ref_emb, bias=bias, **logits)
        return {
            "losses": of_positives.sum() / positives,
            "indices": None,
            "reduction_type": "already_reduced",
        }


class SupConLoss(_Fused, losses.SupConLoss):
    """``pytorch_metric_learning.losses.SupConLoss``: each anchor's mean over its positives."""

    def _losses(
        self, embeddings: Tensor, ref_emb: Tensor, logits: Any, stats: SimilarityStats, positives: int
    ) -> dict[str, Any]:
        indices = torch.arange(len(embeddings), device=embeddings.device)
        return {"losses": stats.each_positive(), "indices": indices, "reduction_type": "element"}
