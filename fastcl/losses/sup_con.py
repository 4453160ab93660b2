"""SupCon: ``LSE - pos_sum / pos_count`` ('out') or ``LSE - lse_pos + log(pos_count)`` ('in').

Khosla et al. 2020, https://arxiv.org/abs/2004.11362.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.losses._scope import check_scope, loss_of
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.similarity.checks import check_choice, check_matrix, inverse_scalar
from fastcl.similarity.compiled import anchored
from fastcl.similarity.rules import check_ids
from fastcl.similarity.transforms import is_readable


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    variant: str = "out",
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """Supervised contrastive loss: all samples of an anchor's class are its positives.

    Khosla et al. 2020, https://arxiv.org/abs/2004.11362. Without labels and mask it is SimCLR's loss.

    Args:
        features: (B, V, D), V views of each sample, or (N, D); any floating dtype.
        labels: (B,) integers; equal labels are positives.
        mask: (B, B), ``mask[i, j]`` non-zero where sample j is a positive of sample i; may be asymmetric.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        base_temperature: the loss is scaled by ``temperature / base_temperature``; None: not scaled.
        contrast_mode: 'all': every view is an anchor; 'one': the first view only.
        variant: 'out': mean of log-probabilities; 'in': log of their mean probability.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'. An anchor without positives contributes 0 and is counted.
        group: the loss is that of all ranks' rows, each rank passing its own, with or without
            labels, as in :func:`fastcl.info_nce`; not with ``mask``.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (anchors,) with 'none', view-major.

    Raises:
        ValueError: both labels and mask, or mask and group; shapes that do not fit; unknown modes; a bad
            temperature; (N, D) without labels and mask; on the CPU, a mask with values other than 0 and 1;
            and as :func:`fastcl.info_nce`.
        TypeError: features that are not floating; labels that are not integers.
        RuntimeError: a mask under a backend that takes none.
    """
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("variant", variant, ("out", "in"))
    check_scope(reduction, group, ring)
    check_matrix("features", features, (2, 3))
    if labels is not None and mask is not None:
        raise ValueError("labels and mask cannot both be given")
    if labels is None and mask is None and features.dim() == 2:
        raise ValueError(
            "features must be views (B, V, D), or come with labels or a mask: rows of shape "
            f"{tuple(features.shape)} alone have no positives"
        )
    if mask is not None and group is not None:
        raise ValueError("mask says nothing about other ranks' samples: with group, give labels or neither")
    if base_temperature is not None and not base_temperature > 0:
        raise ValueError(f"base_temperature must be positive, got {base_temperature}")
    scale = inverse_scalar("temperature", temperature, features)
    options = {"normalize": normalize, "variant": variant, "reduction": reduction}
    args = _arguments(anchored(features), labels, mask, scale, contrast_mode, options)
    loss = loss_of(args, group, ring, labelled=labels is not None)
    is_number = features.shape[0] or group is not None  # the mean of no rows is NaN
    if base_temperature is not None and is_number:
        loss = loss * (scale * base_temperature).reciprocal().to(loss.dtype)
    return loss


class SupConLoss(nn.Module):
    """:func:`fastcl.sup_con` as a module; a drop-in for SupContrast's ``SupConLoss``.

    Features are not normalized, as they are not there. Khosla et al. 2020,
    https://arxiv.org/abs/2004.11362.

    Args:
        temperature: a finite non-zero number.
        contrast_mode: 'all' or 'one'.
        base_temperature: the loss is scaled by ``temperature / base_temperature``.
    """

    def __init__(
        self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The mean loss of features (B, V, ...), trailing dimensions flattened, as :func:`fastcl.sup_con`.

        Args:
            features: (B, V, ...), any floating dtype.
            labels: (B,) or (B, 1) integers.
            mask: (B, B) of zeros and ones.

        Raises:
            ValueError: features with fewer than 3 dimensions, and as :func:`fastcl.sup_con`.
        """
        if features.dim() < 3:
            raise ValueError(
                f"features must have at least 3 dimensions (B, V, ...), got shape {tuple(features.shape)}"
            )
        return sup_con(
            features.flatten(2),
            labels.flatten() if labels is not None else None,
            mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            normalize=False,
        )


def _arguments(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    contrast_mode: str,
    options: dict[str, Any],
) -> ManyPositives:
    samples, views, rows = features.shape[0], 1, features
    if features.dim() == 3:
        views, rows = features.shape[1], features.transpose(0, 1).flatten(0, 1)  # [V * B, D], view-major
    table = None
    sample_ids = torch.arange(samples, device=features.device)
    if mask is not None:
        table = _positive_mask(mask, samples, features)
    elif labels is not None:
        if isinstance(labels, Tensor) and labels.dim() == 1 and labels.shape[0] != samples:
            raise ValueError(
                f"labels must have one label per sample: expected ({samples},) for features of shape "
                f"{tuple(features.shape)}, got {tuple(labels.shape)}"
            )
        sample_ids = check_ids("labels", labels, features)
    every_id = sample_ids.repeat(views)
    if contrast_mode == "all" or views == 1:
        return ManyPositives(rows, None, scale, every_id, positive_mask=table, **options)
    anchors = rows[:samples]
    anchor_ids = every_id[:samples]
    return ManyPositives(anchors, rows, scale, anchor_ids, every_id, positive_mask=table, **options)


def _positive_mask(mask: Tensor, samples: int, features: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != (samples, samples):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must have shape ({samples}, {samples}) for features of shape "
            f"{tuple(features.shape)}, got {got}"
        )
    if mask.device != features.device:
        raise ValueError(f"mask must be on {features.device} like features, got {mask.device}")
    if mask.dtype == torch.bool:
        return mask
    table = mask != 0
    if is_readable(mask) and not torch.equal(mask, table.to(mask.dtype)):
        raise ValueError("mask must hold zeros and ones only: weighted positives are not supported")
    return table
