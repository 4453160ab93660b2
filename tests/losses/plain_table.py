"""The objectives in plain torch beside their papers' formulas, written without regard to cost."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fastcl


class Plain(NamedTuple):
    """Called as ``product(*tensors, **options)``, and ``formula`` the same."""

    product: object
    formula: object
    inputs: int = 2
    options: Mapping = MappingProxyType({})
    has_rows: bool = False


def different(count):
    return torch.arange(count) % 3 > 0


def _reduced(losses, reduction):
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def _covariance(z):
    apart = z - z.mean(0)
    return sum(torch.outer(row, row) for row in apart) / max(len(z) - 1, 1)


def _off_diagonal(c):
    return (c * (1 - torch.eye(len(c), dtype=c.dtype))).pow(2).sum()


def vicreg(z1, z2, *, invariance=25.0, variance=25.0, covariance=1.0):
    total = invariance * F.mse_loss(z1, z2)
    for z in (z1, z2):
        c = _covariance(z)
        total = total + variance / 2 * F.relu(1 - (c.diag() + 1e-4).sqrt()).mean()
        total = total + covariance * _off_diagonal(c) / z.shape[1]
    return total


def barlow_twins(z1, z2, *, off_diagonal=5e-3):
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = a.T @ b / len(a)
    return (1 - c.diag()).pow(2).sum() + off_diagonal * _off_diagonal(c)


def negative_cosine(prediction, target, *, reduction="mean"):
    target = target.detach()
    dots = (prediction * target).sum(1)
    return _reduced(-dots / prediction.norm(dim=1) / target.norm(dim=1), reduction)


def pair_margin(x1, x2, *, margin=1.0, reduction="mean"):
    losses = []
    for a, b, apart in zip(x1, x2, different(len(x1)), strict=True):
        d = (a - b).norm()
        losses.append(F.relu(margin - d) ** 2 / 2 if apart else d**2 / 2)
    return _reduced(torch.stack(losses), reduction)


def _pair_margin(x1, x2, **options):
    return fastcl.pair_margin_loss(x1, x2, different(len(x1)), **options)


def club(mean, log_variance, y):
    def log_density(i, j):
        return torch.distributions.Normal(mean[i], (log_variance[i] / 2).exp()).log_prob(y[j]).sum()

    rows = range(len(y))
    each = [log_density(i, i) - torch.stack([log_density(i, j) for j in rows]).mean() for i in rows]
    return torch.stack(each).mean()


PLAIN = {
    "vicreg": Plain(fastcl.vicreg_loss, vicreg),
    "vicreg-weights": Plain(
        fastcl.vicreg_loss, vicreg, options={"invariance": 2.0, "variance": 0.5, "covariance": 30.0}
    ),
    "barlow_twins": Plain(fastcl.barlow_twins_loss, barlow_twins),
    "barlow_twins-weight": Plain(fastcl.barlow_twins_loss, barlow_twins, options={"off_diagonal": 0.7}),
    "negative_cosine": Plain(fastcl.negative_cosine, negative_cosine, has_rows=True),
    "pair_margin": Plain(_pair_margin, pair_margin, options={"margin": 4.0}, has_rows=True),
    "club": Plain(fastcl.club_bound, club, inputs=3),
}
