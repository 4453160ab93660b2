"""SigLIP: each image-text pair is classified by itself, ``softplus(-z (l + bias))``, z = 1 on the diagonal.

Zhai et al. 2023, https://arxiv.org/abs/2303.15343.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import ids_of_rows
from fastcl.losses._scope import check_scope
from fastcl.similarity.checks import check_pair, check_scalar
from fastcl.similarity.logistic import logistic_loss
from fastcl.similarity.rules import PairRule


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss: rows ``sum_j softplus(-z_ij (logit_scale * cosine_ij + logit_bias))``.

    Zhai et al. 2023, https://arxiv.org/abs/2303.15343.

    Args:
        image_features: (N, D), any floating dtype.
        text_features: (N, D), same dtype; row i belongs to image i.
        logit_scale: already exponentiated; a finite number, or a tensor of one element.
        logit_bias: a finite number, or a tensor of one element.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean' over images, 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own.

    Returns:
        The loss, () or (N,) with 'none'.

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`.
    """
    check_scope(reduction, group, False)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    image_features, text_features = check_pair(
        "image_features", image_features, "text_features", text_features
    )
    ids = ids_of_rows(image_features.shape[0], group, image_features.device)
    return logistic_loss(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        PairRule(positive=(ids, ids)),
        normalize=normalize,
        reduction=reduction,
        group=group,
    )


class SigLIPLoss(nn.Module):
    """:func:`fastcl.siglip_loss` as a module, without parameters: scale and bias are the model's.

    Args:
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'.
    """

    def __init__(self, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.normalize = normalize
        self.reduction = reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
    ) -> Tensor:
        """The loss of (N, D) features, as :func:`fastcl.siglip_loss`."""
        return siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            reduction=self.reduction,
        )
