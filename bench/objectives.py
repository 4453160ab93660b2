"""Objectives as one writes them in plain PyTorch, with the matrix of similarities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _similarities(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both views' logits (2N, 2N), which are of other samples, and the positives' (2N,)."""
    z = F.normalize(torch.cat([z1, z2]))
    logits = z @ z.T / temperature
    samples = torch.arange(z1.shape[0], device=z.device).repeat(2)
    others = samples[:, None] != samples
    positive = (F.normalize(z1) * F.normalize(z2)).sum(dim=1).repeat(2) / temperature
    return logits, others, positive


def decoupled_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Yeh et al. 2022."""
    logits, others, positive = _similarities(z1, z2, temperature)
    return (logits.masked_fill(~others, -torch.inf).logsumexp(dim=1) - positive).mean()


def hard_negative_loss(
    z1: Tensor, z2: Tensor, temperature: float, beta: float = 1.0, tau_plus: float = 0.1
) -> Tensor:
    """Robinson et al. 2021."""
    logits, others, positive = _similarities(z1, z2, temperature)
    count = logits.shape[0] - 2
    negatives = logits[others].view(-1, count).exp()
    weights = negatives**beta
    reweighted = (weights * negatives).sum(dim=1) / weights.mean(dim=1)
    positive = positive.exp()
    ng = (reweighted - tau_plus * count * positive) / (1 - tau_plus)
    ng = ng.clamp_min(count * math.exp(-1 / temperature))
    return -(positive / (positive + ng)).log().mean()


def prototype_nce(query: Tensor, prototypes: Tensor, assigned: Tensor, temperature: float) -> Tensor:
    """Li et al. 2021."""
    return F.cross_entropy(F.normalize(query) @ F.normalize(prototypes).T / temperature, assigned)


def triplet_loss(anchor: Tensor, positive: Tensor, margin: float) -> Tensor:
    """Schroff et al. 2015, semi-hard."""
    distances = _squared_distances(F.normalize(anchor), F.normalize(positive))
    near = distances.diagonal()
    farther = distances > near[:, None]
    farther.fill_diagonal_(False)
    mined = distances.masked_fill(~farther, torch.inf).amin(dim=1)
    return (near - mined + margin).clamp_min(0).where(farther.any(dim=1), 0.0).mean()


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Hermans et al. 2017."""
    rows = F.normalize(features)
    distances = _squared_distances(rows, rows)
    same = labels[:, None] == labels
    positives = same.clone().fill_diagonal_(False)
    farthest = distances.masked_fill(~positives, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    both = positives.any(dim=1) & ~same.all(dim=1)
    return (farthest - nearest + margin).clamp_min(0)[both].mean()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Of unit rows."""
    return 2 - 2 * x @ y.T
