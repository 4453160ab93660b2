"""open_clip's ClipLoss and SigLipLoss. Features are gathered and exchanged by open_clip itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.integrations._peer import in_dtype_of, peer
from fastcl.integrations.vision import ensure_torchvision
from fastcl.losses.clip import clip_loss
from fastcl.similarity.logistic import logistic_loss
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats

with peer("open_clip_torch>=3.3,<4"):
    ensure_torchvision()
    from open_clip import loss as original


class ClipLoss(original.ClipLoss):
    """``open_clip.ClipLoss``: images find their texts, texts their images."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, (), of features (N, D) that are used as they are, or it in a dict."""
        if not _are_numbers(logit_scale, logit_bias):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        images, texts = image_features, text_features
        if self.world_size > 1:
            images, texts = original.gather_features(
                image_features,
                text_features,
                local_loss=self.local_loss,
                gather_with_grad=self.gather_with_grad,
                rank=self.rank,
                world_size=self.world_size,
                use_horovod=self.use_horovod,
            )
        if self.world_size > 1 and self.local_loss:
            own = self._own_among(image_features, texts, logit_scale)
            loss = (own + self._own_among(text_features, images, logit_scale)) / 2
        else:
            loss = clip_loss(images, texts, logit_scale, normalize=False)
        loss = in_dtype_of(image_features, loss)
        if isinstance(logit_bias, Tensor):  # which moves no softmax, and has a gradient: zero
            loss = loss + 0 * logit_bias.sum().to(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def _own_among(self, rows: Tensor, all_keys: Tensor, scale: Any) -> Tensor:
        """The mean loss of this rank's rows among all ranks' keys."""
        ids = torch.arange(len(all_keys), device=rows.device)
        own = ids[len(rows) * self.rank :][: len(rows)]
        rule = PairRule(positive=(own, ids))
        return similarity_stats(rows, all_keys, scale=scale, rule=rule).any_positive().mean()


class SigLipLoss(original.SigLipLoss):
    """``open_clip.SigLipLoss``: each pair of an image and a text is classified by itself."""

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        negative_only: bool = False,
    ) -> Any:
        if not _are_numbers(logit_scale, logit_bias):
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only)
        ids = torch.arange(len(image_features), device=image_features.device)
        rule = PairRule() if negative_only else PairRule(positive=(ids, ids))
        bias = 0.0 if logit_bias is None else logit_bias
        rows = (image_features, text_features)
        loss = logistic_loss(*rows, logit_scale, bias, rule, normalize=False, reduction="mean")
        return in_dtype_of(image_features, loss)


def _are_numbers(*values: Any) -> bool:
    return all(not isinstance(x, Tensor) or x.numel() == 1 for x in values)
