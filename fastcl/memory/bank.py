"""A memory bank: one slowly moving unit row per sample.

Wu et al. 2018, https://arxiv.org/abs/1805.01978.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcl.memory.rows import random_unit_rows
from fastcl.similarity.checks import check_matrix
from fastcl.similarity.numerics import FLOAT_DTYPES, unit_rows
from fastcl.similarity.rules import check_ids, check_range


class MemoryBank(nn.Module):
    """One unit row per sample of the data, moved towards the sample's newest feature.

    Wu et al. 2018 (Inst-Disc), https://arxiv.org/abs/1805.01978; of PIRL, CMC and CRD too. A buffer only,
    so that it moves, saves and loads with the module that holds it. Nothing here waits for the device.

    Args:
        size: how many samples.
        dim: the width of their rows.
        momentum: the share of the old row in the new one, 0 to 1.
        dtype: of the stored rows, any floating one.
        device: where they live.

    Attributes:
        keys: (size, dim), unit rows, random at the start.

    Raises:
        ValueError: a size or dim below 1, a momentum outside 0 to 1.
        TypeError: a dtype that is not floating.
    """

    keys: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
        self.momentum = momentum
        self.register_buffer("keys", random_unit_rows(size, dim, dtype, device))

    @property
    def size(self) -> int:
        """How many samples have a row."""
        return self.keys.shape[0]

    @property
    def dim(self) -> int:
        """The width of the rows."""
        return self.keys.shape[1]

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """``keys[i] = unit(momentum * keys[i] + (1 - momentum) * unit(feature))`` for each index.

        An index that is named more than once takes its last feature only. A row whose mixture is zero stays.

        Args:
            indices: (N,) integers, 0 to size - 1.
            features: (N, dim), any floating dtype; normalized inside.

        Raises:
            ValueError: a wrong length, width or device; on the CPU, indices out of range.
            TypeError: features that are not floating, indices that are not integers.
        """
        check_matrix("features", features)
        if features.shape[1] != self.dim:
            raise ValueError(
                f"features must have shape (N, {self.dim}) like the bank's, got {tuple(features.shape)}"
            )
        if features.device != self.keys.device:
            raise ValueError(f"features must be on {self.keys.device} like the bank, got {features.device}")
        indices = check_ids("indices", indices, features)
        check_range("indices", indices, self.size)
        ordered, order = indices.sort(stable=True)
        last = order[torch.searchsorted(ordered, indices, right=True) - 1]
        old, new = unit_rows(self.keys[indices], normalize=False), unit_rows(features)[last]
        mixed = self.momentum * old + (1.0 - self.momentum) * new
        mixed = torch.where(mixed.any(dim=1, keepdim=True), mixed, old)
        # rows that are written more than once are all the same
        self.keys.index_copy_(0, indices, unit_rows(mixed).to(self.keys.dtype))

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return f"size={self.size}, dim={self.dim}, momentum={self.momentum}, dtype={self.keys.dtype}"
