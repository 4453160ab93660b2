"""NT-Xent, SimCLR's loss: ``softplus(lse_neg - l_pos)`` over both views' rows.

Chen et al. 2020, https://arxiv.org/abs/2002.05709.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastcl.losses._scope import check_scope, loss_of
from fastcl.losses.families.one_positive import VIEWS, OnePositive
from fastcl.similarity.checks import check_pair, inverse_scalar


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """NT-Xent, SimCLR's loss: each of the 2N views must find its other view among all others.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709.

    Args:
        z1: (N, D) embeddings of the first views, any floating dtype; normalized inside.
        z2: (N, D) embeddings of the second views, same dtype.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`fastcl.info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (2N,) with 'none' (first all of z1, then all of z2).

    Raises:
        ValueError, TypeError: as :func:`fastcl.info_nce`.
    """
    check_scope(reduction, group, ring)
    z1, z2 = check_pair("z1", z1, "z2", z2)
    scale = inverse_scalar("temperature", temperature, z1)
    return loss_of(OnePositive(z1, z2, None, scale, layout=VIEWS, reduction=reduction), group, ring)
