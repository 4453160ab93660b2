"""Sums over keys by plain torch, a chunk of rows at a time: linear memory, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcl.backends.base import Request
from fastcl.backends.choice import choose
from fastcl.backends.chunked import row_chunks

OfRows = Callable[[slice], Tensor]


def by_rows(name: str, of_rows: OfRows, query: Tensor, keys: int, backend: str = "auto") -> Tensor:
    """``of_rows`` of every chunk of rows, along the last dimension; formed again in the backward pass.

    Args:
        name: the function, for messages.
        of_rows: (..., n) of a slice of n rows.
        query: (N, D).
        keys: how many a row is compared with.
        backend: 'auto', or a name: 'reference' forms all rows at once.

    Raises:
        RuntimeError: a backend selected by name that has no kernel for it.
    """
    chosen = choose(Request.of_sums(query, name), backend)
    if chosen.name == "reference":
        return of_rows(slice(0, query.shape[0]))
    if not query.shape[0]:
        return of_rows(slice(0, 0))
    parts = []
    for rows in row_chunks(query.shape[0], keys):
        if torch.is_grad_enabled():
            parts.append(checkpoint(of_rows, rows, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(of_rows(rows))
    return torch.cat(parts, dim=-1)
