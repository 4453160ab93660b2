"""Bounds of mutual information from a critic ``<f_i, g_j>``: what contrastive losses maximize.

Poole et al. 2019, https://arxiv.org/abs/1905.06922.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.similarity.checks import check_pair
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, log_count, masked_logsumexp, row_dot, softplus
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import similarity_stats


def info_nce_bound(f: Tensor, g: Tensor) -> Tensor:
    """InfoNCE's lower bound, ``log N - mean(LSE_i - l_ii)``, at most log N.

    van den Oord et al. 2018, https://arxiv.org/abs/1807.03748.

    Args:
        f: (N, D), any floating dtype; the critic of a pair is ``l_ij = <f_i, g_j>``, rows as they are.
        g: (N, D), same dtype; pairs (i, i) are drawn together, (i, j) independently.

    Returns:
        (), float64 for float64 inputs, else float32. The (N, N) critic is never stored.

    Raises:
        ValueError: shapes or devices that differ.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    critic = _critic(f, g)
    return log_count(f.shape[0], critic.joint) - softplus(critic.lse_others - critic.joint).mean()


def nwj_bound(f: Tensor, g: Tensor) -> Tensor:
    """The lower bound of Nguyen, Wainwright and Jordan: ``mean(l_ii) - mean_{i != j} exp(l_ij - 1)``.

    Nguyen et al. 2010, https://arxiv.org/abs/0809.0853. With one row the second term is 0.

    Args:
        f: (N, D), as :func:`fastcl.info_nce_bound` takes it.
        g: (N, D), same dtype.

    Returns:
        (), float64 for float64 inputs, else float32.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce_bound`.
    """
    critic = _critic(f, g)
    return critic.joint.mean() - (_log_mean_of_others(critic) - 1).exp()


def donsker_varadhan_bound(f: Tensor, g: Tensor) -> Tensor:
    """The lower bound of Donsker and Varadhan: ``mean(l_ii) - log(mean_{i != j} exp(l_ij))``.

    As in MINE, Belghazi et al. 2018, https://arxiv.org/abs/1801.04062. With one row the second term is 0.

    Args:
        f: (N, D), as :func:`fastcl.info_nce_bound` takes it.
        g: (N, D), same dtype.

    Returns:
        (), float64 for float64 inputs, else float32.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce_bound`.
    """
    critic = _critic(f, g)
    log_mean = _log_mean_of_others(critic)
    return critic.joint.mean() - log_mean.masked_fill(log_mean == -torch.inf, 0.0)


class _Critic(NamedTuple):
    joint: Tensor  # (N,): l_ii
    lse_others: Tensor  # (N,): log-sum-exp of l_ij over j != i


def _critic(f: Tensor, g: Tensor) -> _Critic:
    f, g = check_pair("f", f, "g", g)
    dtype = compute_dtype(f.dtype)  # rows enter twice, and their gradients should round once
    f, g = anchored(f).to(dtype), anchored(g).to(dtype)
    numbers = torch.arange(f.shape[0], device=f.device)
    others = similarity_stats(f, g, rule=PairRule(exclude=(numbers, numbers)))
    return _Critic(row_dot(f, g), others.lse_neg)


def _log_mean_of_others(critic: _Critic) -> Tensor:
    """``log(mean_{i != j} exp(l_ij))``; -inf with zero gradient where there is no such pair."""
    count = critic.joint.shape[0]
    lse = critic.lse_others[None]
    return masked_logsumexp(lse, lse != -torch.inf)[0] - log_count(count * (count - 1), lse)
