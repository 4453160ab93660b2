"""sentence-transformers' GISTEmbedLoss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastcl.integrations._peer import in_dtype_of, peer
from fastcl.integrations.vision import ensure_torchvision
from fastcl.similarity.numerics import row_dot, softplus, unit_rows
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats

with peer("sentence-transformers>=6.2,<7"):
    ensure_torchvision()
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import all_gather_with_grad, batch_to_device, get_rank

_ROWS = 256  # of the guide's similarities at a time


class GISTEmbedLoss(losses.GISTEmbedLoss):
    """``sentence_transformers.losses.GISTEmbedLoss``: a guide says which pairs are no negatives.

    What the guide says is kept as a mask, one byte per pair; no similarities are.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any) -> Any:
        """The loss, (), of anchors, positives and, if given, negatives."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"sentence_features must have 2 or 3 columns, got {len(features)}")
        with torch.no_grad():
            guide_features = self._guide_features(features)
        columns = embed_columns(self.model, features)
        with torch.no_grad():
            guides = embed_columns(self.guide, guide_features)
        offset = 0
        if self.gather_across_devices:
            offset = get_rank() * len(columns[0])
            for x in (columns, guides):
                x[1:] = [all_gather_with_grad(keys) for keys in x[1:]]
        return in_dtype_of(columns[0], self._loss(columns, guides, offset))

    def _loss(self, columns: list[Tensor], guides: list[Tensor], offset: int) -> Tensor:
        own = slice(offset, offset + len(columns[0]))
        limit = self.similarity_fct(guides[0], guides[1][own])
        limit = limit - (limit.abs() if self.margin_strategy == "relative" else 1) * self.margin
        anchor, positive, *negative = (unit_rows(x) for x in columns)
        among = [1, *([0] if self.contrast_anchors else []), *range(2, len(columns))]
        keys = torch.cat([(anchor, positive, *negative)[i] for i in among])
        mask = self._too_similar(guides[0], torch.cat([guides[i] for i in among]), limit)
        rows = torch.arange(len(anchor), device=anchor.device)
        mask[rows, offset + rows] = True  # the positive is none of the others
        scale = 1 / self.temperature
        stats = similarity_stats(anchor, keys, scale=scale, rule=PairRule(exclude=mask))
        if self.contrast_positives:
            mask = self._too_similar(guides[1][own], guides[1], limit)
            rule = PairRule(exclude=mask)
            stats = stats.merge(similarity_stats(positive[own], positive, scale=scale, rule=rule))
        return softplus(stats.lse_neg - scale * row_dot(anchor, positive[own])).mean()

    def _too_similar(self, rows: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
        """Which of the guide's similarities are above their row's limit, bool (N, M)."""
        unit, unit_keys = unit_rows(rows), unit_rows(keys)
        mask = torch.empty(len(rows), len(keys), dtype=torch.bool, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            excess = unit[start : start + _ROWS] @ unit_keys.T - limit[start : start + _ROWS, None]
            mask[start : start + _ROWS] = excess > 0
            # where rounding could decide, as between copies of a text: by the original's own formula
            i, j = (excess.abs() <= 64 * torch.finfo(rows.dtype).eps).nonzero(as_tuple=True)
            mask[start + i, j] = self.similarity_fct(rows[start + i], keys[j]) > limit[start + i]
        return mask

    def _guide_features(self, features: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if not self.must_retokenize:
            return [dict(column) for column in features]
        texts = (self.tokenizer.batch_decode(_tokens(x), skip_special_tokens=True) for x in features)
        return [batch_to_device(self.guide.preprocess(x), self.guide.device) for x in texts]


def _tokens(column: dict[str, Tensor]) -> Any:
    """The token ids of each text, also where texts lie one after the other in one row."""
    ids, ends = column["input_ids"], column.get("cu_seq_lens_q")
    return ids if ends is None else ids[0].tensor_split(ends[1:-1].cpu())
