"""CLIP's loss: ``softplus(lse_neg - l_pos)`` along both axes of the similarity matrix, averaged.

Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastcl.losses._scope import check_scope, loss_of
from fastcl.losses.families.one_positive import PAIRS, OnePositive
from fastcl.similarity.checks import check_pair, scalar


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """CLIP's symmetric loss: images find their texts, texts their images, averaged.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    Args:
        image_features: (N, D), any floating dtype.
        text_features: (N, D), same dtype.
        logit_scale: the factor of the logits, already exponentiated: a finite number or a tensor of one
            element, which then receives its gradient.
        normalize: divide rows by their L2 norm first; False if they are unit rows already.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (N,) with 'none': the mean of both directions.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`.
    """
    check_scope(reduction, group, ring)
    image_features, text_features = check_pair(
        "image_features", image_features, "text_features", text_features
    )
    scale = scalar("logit_scale", logit_scale, image_features)
    args = OnePositive(
        image_features,
        text_features,
        None,
        scale,
        layout=PAIRS,
        normalize=normalize,
        normalize_negatives=normalize,
        reduction=reduction,
    )
    return loss_of(args, group, ring)
