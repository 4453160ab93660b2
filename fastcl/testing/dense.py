"""The losses and the statistics in plain PyTorch, as people write them: the whole matrix, one softmax.

They are what results are compared with, and what bench/ times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.losses.mochi import MochiDraws
from fastcl.memory.queue import NegativeQueue
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats


def dense_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | NegativeQueue | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE as people write it: normalize, matmul, cross-entropy."""
    query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    if negative_keys is None:
        targets = torch.arange(query.shape[0], device=query.device)
        return F.cross_entropy(query @ positive_key.T / temperature, targets, reduction=reduction)
    if isinstance(negative_keys, NegativeQueue):
        negative_keys = negative_keys.keys
    else:
        negative_keys = F.normalize(negative_keys, dim=-1)
    positive = (query * positive_key).sum(dim=1, keepdim=True)
    if negative_mode == "paired":
        negative = (query[:, None] @ negative_keys.mT).squeeze(1)
    else:
        negative = query @ negative_keys.T
    logits = torch.cat([positive, negative], dim=1) / temperature
    targets = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, targets, reduction=reduction)


def dense_nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean"
) -> Tensor:
    """NT-Xent as people write it: one (2N, 2N) matrix, its diagonal masked, cross-entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=-1)
    rows = torch.arange(z.shape[0], device=z.device)
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, rows.roll(z1.shape[0]), reduction=reduction)


def dense_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """CLIP's loss as people write it: the mean of two cross-entropies."""
    if normalize:
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * image_features @ text_features.T
    targets = torch.arange(logits.shape[0], device=logits.device)
    by_image = F.cross_entropy(logits, targets, reduction=reduction)
    return (by_image + F.cross_entropy(logits.T, targets, reduction=reduction)) / 2


def dense_sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    variant: str = "out",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """SupCon as people write it: log-probabilities of all pairs, averaged over the positive ones."""
    if features.dim() == 2:
        features = features[:, None]
    samples, views, _ = features.shape
    if mask is None:
        ids = torch.arange(samples, device=features.device) if labels is None else labels
        mask = ids[:, None] == ids
    contrast = torch.cat(features.unbind(1))
    if normalize:
        contrast = F.normalize(contrast, dim=-1)
    anchor = contrast if contrast_mode == "all" else contrast[:samples]
    itself = torch.eye(contrast.shape[0], dtype=torch.bool, device=features.device)[: anchor.shape[0]]
    positive = mask.bool().repeat(anchor.shape[0] // max(samples, 1), views) & ~itself
    logits = (anchor @ contrast.T / temperature).masked_fill(itself, -torch.inf)
    log_prob = logits.log_softmax(dim=1)
    count = positive.sum(dim=1).to(log_prob.dtype)
    if variant == "out":
        losses = -log_prob.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp_min(1)
    else:
        losses = count.clamp_min(1).log() - _logsumexp(log_prob, positive)
    losses = torch.where(count > 0, losses, 0.0)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def dense_mochi_loss(
    query: Tensor,
    positive_key: Tensor,
    queue: NegativeQueue,
    *,
    draws: MochiDraws,
    n_hard: int,
    temperature: float | Tensor = 0.2,
    reduction: str = "mean",
) -> Tensor:
    """MoCHi with the synthetic negatives formed, as its published implementations do."""
    query, positive_key = F.normalize(query, dim=1), F.normalize(positive_key, dim=1)
    similarity = query @ queue.keys.T
    with torch.no_grad():
        hardest = similarity.topk(n_hard, dim=1).indices

        def keys(ranks: Tensor) -> Tensor:
            return queue.keys[hardest.gather(1, ranks)]

        alpha, beta = draws.alpha[:, :, None], draws.beta[:, :, None]
        mixed = alpha * keys(draws.first) + (1 - alpha) * keys(draws.second)
        mixed_with_query = beta * query[:, None] + (1 - beta) * keys(draws.partner)
        synthetic = F.normalize(torch.cat([mixed, mixed_with_query], dim=1), dim=2)
    positive = (query * positive_key).sum(dim=1, keepdim=True)
    on_synthetic = (synthetic @ query[:, :, None]).squeeze(2)
    logits = torch.cat([positive, similarity, on_synthetic], dim=1) / temperature
    targets = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, targets, reduction=reduction)


def dense_siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """SigLIP's loss as people write it: the log-sigmoid of the whole matrix, signs on it."""
    if normalize:
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    losses = -F.logsigmoid(signs * logits).sum(dim=1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def dense_similarity_logistic(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    positive: Tensor | None = None,
    excluded: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums of softplus from the whole matrix; (N, M) masks say which pairs are positive and excluded."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = scale * (query @ key.T)
    logits = logits + (bias[:, None] if isinstance(bias, Tensor) and bias.dim() else bias)
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    positive = nothing if positive is None else positive
    excluded = nothing if excluded is None else excluded
    losses = -F.logsigmoid(torch.where(positive, logits, -logits)).masked_fill(excluded, 0.0)
    return losses.masked_fill(positive, 0.0).sum(dim=1), losses.masked_fill(~positive, 0.0).sum(dim=1)


def dense_soft_cross_entropy(
    query: Tensor,
    key: Tensor,
    target_query: Tensor,
    target_key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    target_temperature: float | Tensor = 0.05,
    target_bias: Tensor | None = None,
    excluded: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy between two softmaxes as people write it; ``excluded`` is an (N, K) mask."""
    rows = (query, key, target_query.detach(), target_key.detach())
    x, y, t, c = (F.normalize(r, dim=-1) if normalize else r for r in rows)
    logits, target_logits = x @ y.T / temperature, t @ c.T / target_temperature
    if target_bias is not None:
        target_logits = target_logits + target_bias
    if excluded is None:
        excluded = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    empty = excluded.all(dim=-1, keepdim=True)
    excluded = excluded & ~empty
    target = target_logits.masked_fill(excluded, -torch.inf).softmax(dim=-1)
    target = (target.mean(dim=0) if target.dim() > 2 else target).masked_fill(empty, 0.0)
    log_p = logits.masked_fill(excluded, -torch.inf).log_softmax(dim=-1).masked_fill(excluded, 0.0)
    losses = -(target * log_p).sum(dim=-1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def dense_swav_loss(
    query: Tensor,
    key: Tensor,
    target_query: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    target_temperature: float | Tensor = 0.05,
) -> Tensor:
    """SwAV's loss of one view as its authors write it: three rounds over the exponentials of all scores."""
    x, y, t = (F.normalize(rows, dim=1) for rows in (query, key, target_query))
    with torch.no_grad():
        codes = torch.exp(t @ y.T / target_temperature).T
        codes /= codes.sum()
        for _ in range(3):
            codes /= codes.sum(dim=1, keepdim=True)
            codes /= codes.shape[0]
            codes /= codes.sum(dim=0, keepdim=True)
            codes /= codes.shape[1]
        target = (codes * codes.shape[1]).T
    return -(target * (x @ y.T / temperature).log_softmax(dim=1)).sum(dim=1).mean()


def dense_stats(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    rule: PairRule | None = None,
    normalize: bool = False,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    columns: bool = False,
) -> SimilarityStats:
    """Similarity statistics from the whole matrix, in the dtype of the inputs."""
    rule = rule or PairRule()
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = scale * (query @ key.T)
    if key_scale is not None:
        logits = logits * key_scale
    if key_bias is not None:
        logits = logits + key_bias
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    excluded = nothing if rule.exclude is None else rule.exclude[0][:, None] == rule.exclude[1]
    matching = nothing if rule.positive is None else rule.positive[0][:, None] == rule.positive[1]
    negative, positive = ~excluded & ~matching, ~excluded & matching
    rows = _dense_rows(logits, negative, positive)
    return replace(rows, columns=_dense_rows(logits.T, negative.T, positive.T)) if columns else rows


def _dense_rows(logits: Tensor, negative: Tensor, positive: Tensor) -> SimilarityStats:
    negatives = F.pad(logits.detach().masked_fill(~negative, -torch.inf), (0, 1), value=-torch.inf)
    return SimilarityStats(
        lse_neg=_logsumexp(logits, negative),
        lse_pos=_logsumexp(logits, positive),
        pos_sum=logits.masked_fill(~positive, 0.0).sum(dim=1),
        pos_count=positive.sum(dim=1).to(logits.dtype),
        max_neg=negatives.amax(dim=1),
    )


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    # a row without pairs is -inf with zero gradient, where torch's logsumexp alone would give NaN
    empty = ~mask.any(dim=1, keepdim=True)
    kept = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
    return F.pad(kept, (0, 1), value=-torch.inf).logsumexp(dim=1).masked_fill(empty[:, 0], -torch.inf)
