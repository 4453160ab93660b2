"""What the adapters share: how the library is imported, and in which dtype its losses are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def peer(requirement: str) -> Iterator[None]:
    """Around the imports of a library: says how to install it where it is missing.

    Raises:
        ModuleNotFoundError: it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        message = f"no {missing} here: pip install '{requirement}'"
        raise ModuleNotFoundError(message, name=missing) from error


def in_dtype_of(rows: Tensor, loss: Tensor) -> Tensor:
    """``loss`` in the dtype of the ``rows`` it was made of, but under autocast, where it stays wide."""
    return loss if torch.is_autocast_enabled(rows.device.type) else loss.to(rows.dtype)
