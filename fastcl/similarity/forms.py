"""The forms that losses over the statistics take: functions of each row's numbers, said once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.similarity.fields import Statistics
from fastcl.similarity.numerics import logaddexp, softplus


def any_positive(rows: Statistics) -> Tensor:
    """``softplus(lse_neg - lse_pos)``; 0 without positives. (N,)."""
    # where there are none, as two infinities would differ by NaN
    losses = softplus(rows.lse_neg - rows.lse_pos.masked_fill(rows.pos_count == 0, 0.0))
    return losses.where(rows.pos_count > 0, 0.0)


def each_positive(rows: Statistics) -> Tensor:
    """``logaddexp(lse_neg, lse_pos) - pos_sum / pos_count``; 0 without positives. (N,)."""
    losses = logaddexp(rows.lse_neg, rows.lse_pos) - _mean_positive(rows)
    return losses.where(rows.pos_count > 0, 0.0)


def decoupled(rows: Statistics) -> Tensor:
    """``lse_neg - pos_sum / pos_count``; 0 without positives or without negatives. (N,)."""
    kept = (rows.pos_count > 0) & (rows.lse_neg != -torch.inf)
    return (rows.lse_neg.masked_fill(~kept, 0.0) - _mean_positive(rows)).where(kept, 0.0)


def _mean_positive(rows: Statistics) -> Tensor:
    return rows.pos_sum / rows.pos_count.clamp_min(1)
