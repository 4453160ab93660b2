"""The losses as modules, with the constructors of the packages they replace."""

from __future__ import annotations

from torch import Tensor, nn

from fastcl.losses import info_nce, sup_con
from fastcl.queue import NegativeQueue


class InfoNCE(nn.Module):
    """:func:`fastcl.info_nce` as a module; a drop-in for ``info_nce.InfoNCE``.

    Args:
        temperature: as :func:`fastcl.info_nce` takes it.
        reduction: 'mean', 'sum' or 'none'.
        negative_mode: 'unpaired' or 'paired'.
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | NegativeQueue | None = None
    ) -> Tensor:
        """The loss of query (N, D) and positive_key (N, D), as :func:`fastcl.info_nce`."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


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
