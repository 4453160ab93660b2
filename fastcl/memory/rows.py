"""What is stored of rows at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_unit_rows(size: int, dim: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Random unit rows (size, dim); an ordinary tensor under inference mode too, as training may follow.

    Raises:
        ValueError: a size or dim below 1.
        TypeError: a size or dim that is no whole number.
    """
    for name, value in (("size", size), ("dim", dim)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    with torch.inference_mode(False):
        return nn.functional.normalize(torch.randn(size, dim, device=device), dim=1).to(dtype)
