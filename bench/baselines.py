"""What fastcl is compared with: each loss in plain PyTorch, compiled, and from PyPI.

The plain versions are what people write: one matmul, one cross-entropy, the whole similarity matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl import MochiDraws, NegativeQueue

LossFunction = Callable[..., Tensor]


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent over the 2N views; the diagonal masked, the other view is the class to pick."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(own, -torch.inf)
    other_view = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, other_view)


def info_nce(query: Tensor, positive_key: Tensor, temperature: float) -> Tensor:
    """InfoNCE; the other rows' positives are the negatives."""
    logits = F.normalize(query, dim=1) @ F.normalize(positive_key, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def info_nce_negatives(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, temperature: float
) -> Tensor:
    """InfoNCE with explicit negatives (M, D), which are normalized like the rest."""
    return info_nce_queue(query, positive_key, F.normalize(negative_keys, dim=1), temperature)


def info_nce_queue(query: Tensor, positive_key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss: the queue (M, D) holds unit rows and is used as it is."""
    query, positive_key = F.normalize(query, dim=1), F.normalize(positive_key, dim=1)
    positive = (query * positive_key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def moco(query: Tensor, positive_key: Tensor, queue: NegativeQueue, temperature: float) -> Tensor:
    """MoCo's loss on a queue, used in place."""
    return info_nce_queue(query, positive_key, queue.keys, temperature)


def mochi(
    query: Tensor,
    positive_key: Tensor,
    queue: NegativeQueue,
    draws: MochiDraws,
    n_hard: int,
    temperature: float,
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
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss: cross-entropy over rows and over columns of one similarity matrix."""
    logits = logit_scale * F.normalize(image_features, dim=1) @ F.normalize(text_features, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sup_con(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon (out) over features (B, V, D), all views as anchors, by SupContrast's formula."""
    samples, views, _ = features.shape
    z = F.normalize(torch.cat(torch.unbind(features, dim=1)), dim=1)
    logits = z @ z.T / temperature
    logits = logits - logits.amax(dim=1, keepdim=True).detach()
    others = 1 - torch.eye(samples * views, dtype=z.dtype, device=z.device)
    positives = (labels[:, None] == labels[None, :]).to(z.dtype).repeat(views, views) * others
    log_probability = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
    return -((positives * log_probability).sum(dim=1) / positives.sum(dim=1)).mean()


def compiled(function: LossFunction) -> LossFunction:
    """The function under ``torch.compile``, for one shape and as one graph.

    Forgets what was compiled before, or after eight shapes it would run uncompiled without a word.
    """
    torch.compiler.reset()
    compiled_function: LossFunction = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled_function


def pypi_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, *, temperature: float
) -> Tensor:
    """``info-nce-pytorch``."""
    import info_nce as package

    loss: Tensor = package.info_nce(query, positive_key, negative_keys, temperature=temperature)
    return loss


def pypi_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """``pytorch-metric-learning``'s NTXentLoss; it compares pairs of pairs, O(N^3) memory."""
    samples = torch.arange(len(z1), device=z1.device).repeat(2)
    loss: Tensor = _metric_learning("NTXentLoss", temperature)(torch.cat([z1, z2]), samples)
    return loss


def pypi_sup_con(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``pytorch-metric-learning``'s SupConLoss."""
    views = features.shape[1]
    loss: Tensor = _metric_learning("SupConLoss", temperature)(
        features.flatten(0, 1), labels.repeat_interleave(views)
    )
    return loss


@cache
def _metric_learning(name: str, temperature: float) -> Any:
    from pytorch_metric_learning import losses

    return getattr(losses, name)(temperature=temperature)
