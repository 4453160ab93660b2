"""Triplet losses: a positive should be nearer than a mined negative, by a margin.

Schroff et al. 2015, https://arxiv.org/abs/1503.03832; Hermans et al. 2017, https://arxiv.org/abs/1703.07737.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import gather_rows, group_sum, ids_of_rows, reduce, row_counts
from fastcl.losses._scope import check_scope
from fastcl.similarity.checks import (
    check_choice,
    check_matrix,
    check_number,
    check_pair,
    check_same,
    in_one_dtype,
)
from fastcl.similarity.numerics import row_dot, unit_rows, without_autocast
from fastcl.similarity.rules import PairRule, check_ids
from fastcl.similarity.topk import similarity_topk

_ROUNDING = 8  # of a similarity of unit rows, in units of its dtype's precision


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative_keys: Tensor | None = None,
    *,
    margin: float = 0.2,
    mining: str = "semi_hard",
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``max(0, d_pos - d_neg + margin)`` of unit rows' squared distances, with one mined negative each.

    FaceNet, Schroff et al. 2015, https://arxiv.org/abs/1503.03832. A zero row's squared distances are 2.

    Args:
        anchor: (N, D), any floating dtype; normalized inside.
        positive: (N, D), same dtype.
        negative_keys: (M, D), or None: the other rows' positives.
        margin: a finite number, at least 0.
        mining: 'hard': the nearest negative; 'semi_hard': the nearest that is farther than the positive,
            by more than rounding.
        reduction: 'mean', 'sum' or 'none'. A row without such a negative gives 0 and is counted.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`;
            the negatives are all ranks'.

    Returns:
        The loss, () or (N,) with 'none'.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`; an unknown mining; a bad margin.
    """
    check_scope(reduction, group, False)
    check_choice("mining", mining, ("semi_hard", "hard"))
    margin = check_number("margin", margin, 0.0)
    anchor, positive = check_pair("anchor", anchor, "positive", positive)
    ids = ids_of_rows(anchor.shape[0], group, anchor.device)
    if negative_keys is not None:
        check_matrix("negative_keys", negative_keys)
        check_same("negative_keys", negative_keys, "anchor", anchor)
        if negative_keys.dtype != anchor.dtype:
            anchor, positive, negative_keys = in_one_dtype(anchor, positive, negative_keys)
    with without_autocast(anchor.device):
        x, y = unit_rows(anchor), unit_rows(positive)
        keys, key_ids = y if negative_keys is None else unit_rows(negative_keys), ids
        if group is not None:
            counts = row_counts(keys, group)
            keys = gather_rows(keys, counts, group)
            key_ids = gather_rows(ids, counts, group) if negative_keys is None else ids
        rule = PairRule() if negative_keys is not None else PairRule(exclude=(ids, key_ids))
        # a key as far as the positive is not farther by what products are rounded
        below = (
            row_dot(x, y).detach() - _ROUNDING * torch.finfo(x.dtype).eps if mining == "semi_hard" else None
        )
        _, nearest = similarity_topk(x, keys, 1, rule=rule, below=below)
        losses = (_distance(x, y) - _distance_to(x, keys, nearest[:, 0]) + margin).clamp_min(0)
        return reduce(losses.where(nearest[:, 0] >= 0, 0.0), reduction, group)


class TripletLoss(nn.Module):
    """:func:`fastcl.triplet_loss` as a module.

    Args:
        margin: a finite number, at least 0.
        mining: 'semi_hard' or 'hard'.
        reduction: 'mean', 'sum' or 'none'.
    """

    def __init__(self, margin: float = 0.2, mining: str = "semi_hard", reduction: str = "mean") -> None:
        super().__init__()
        self.margin = margin
        self.mining = mining
        self.reduction = reduction

    def forward(self, anchor: Tensor, positive: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """The loss of (N, D) anchors and positives, as :func:`fastcl.triplet_loss`."""
        options = {"margin": self.margin, "mining": self.mining, "reduction": self.reduction}
        return triplet_loss(anchor, positive, negative_keys, **options)  # type: ignore[arg-type]


def batch_hard_triplet_loss(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``max(0, d_pos - d_neg + margin)``: each row's farthest positive and nearest negative in the batch.

    Squared distances between unit rows; a zero row's are 2. Hermans et al. 2017,
    https://arxiv.org/abs/1703.07737.

    Args:
        features: (N, D), any floating dtype; normalized inside.
        labels: (N,) integers; rows of equal labels are each other's positives.
        margin: a finite number, at least 0.
        reduction: 'mean' over the rows that have both, 'sum' or 'none' (0 for the others).
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.

    Returns:
        The loss, () or (N,) with 'none'; the mean over no rows is 0.

    Raises:
        ValueError, TypeError: as :func:`fastcl.sup_con`; a bad margin.
    """
    check_scope(reduction, group, False)
    check_matrix("features", features)
    margin = check_number("margin", margin, 0.0)
    labels = check_ids("labels", labels, features)
    ids = ids_of_rows(features.shape[0], group, features.device)
    with without_autocast(features.device):
        x = unit_rows(features)
        keys, key_labels, key_ids = x, labels, ids
        if group is not None:
            counts = row_counts(x, group)
            keys, key_labels, key_ids = (gather_rows(rows, counts, group) for rows in (x, labels, ids))
        rule = PairRule(positive=(labels, key_labels), exclude=(ids, key_ids))
        farthest = similarity_topk(x, keys, 1, rule=rule, among="positive", largest=False)[1][:, 0]
        nearest = similarity_topk(x, keys, 1, rule=rule, among="negative")[1][:, 0]
        both = (farthest >= 0) & (nearest >= 0)
        losses = (_distance_to(x, keys, farthest) - _distance_to(x, keys, nearest) + margin).clamp_min(0)
        losses = losses.where(both, 0.0)
        if reduction != "mean":
            return reduce(losses, reduction, group)
        total = torch.stack([losses.sum(), both.sum().to(losses.dtype)])
        total = total if group is None else group_sum(total, group)
        return total[0] / total[1].clamp_min(1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared, of unit rows; a zero row is as far from all as an orthogonal one, as it is ranked."""
    zeros = (a == 0).all(dim=1).to(a.dtype) + (b == 0).all(dim=1).to(a.dtype)
    return (a - b).square().sum(dim=1) + zeros


def _distance_to(rows: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    """Squared distances to the chosen keys; where -1 was chosen, to a row of zeros."""
    padded = torch.cat([keys, keys.new_zeros(1, keys.shape[1])])
    return _distance(rows, padded.index_select(0, chosen.where(chosen >= 0, keys.shape[0])))
