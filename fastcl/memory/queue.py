"""MoCo's queue of negatives: stored once, used in place, never cloned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import gather_rows, row_counts
from fastcl.memory.rows import random_unit_rows
from fastcl.ops import calls
from fastcl.similarity.checks import check_matrix
from fastcl.similarity.rules import check_ids

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NegativeQueue(nn.Module):
    """The last ``size`` keys, first in first out; the negatives of :func:`fastcl.info_nce`.

    He et al. 2020, https://arxiv.org/abs/1911.05722. Buffers only, so that it moves, saves and loads
    with the module that holds it. Nothing here waits for the device.

    Args:
        size: how many keys.
        dim: their width.
        dtype: of the stored keys: float32, float16 or bfloat16; queries may have another.
        device: where the keys live.
        with_ids: also keep an id per key, so that queries can exclude keys by id.

    Attributes:
        keys: (size, dim), unit rows, random at the start.
        ids: (size,) int64, -1 at the start; None without ``with_ids``.
        pointer: 0-d int64, the row the next key goes to.

    Raises:
        ValueError: a size or dim below 1.
        TypeError: a dtype other than the three.
    """

    keys: Tensor
    ids: Tensor | None
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        with_ids: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        self.register_buffer("keys", random_unit_rows(size, dim, dtype, device))
        with torch.inference_mode(False):  # as the keys are made
            ids = torch.full((size,), -1, dtype=torch.int64, device=device) if with_ids else None
            self.register_buffer("ids", ids)
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def size(self) -> int:
        """How many keys are stored."""
        return self.keys.shape[0]

    @property
    def dim(self) -> int:
        """The width of the keys."""
        return self.keys.shape[1]

    @torch.no_grad()
    def enqueue(
        self, keys: Tensor, ids: Tensor | None = None, *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Normalize ``keys`` and write them over the oldest ones, wrapping around.

        Args:
            keys: (N, dim), any floating dtype, any N (of more than ``size`` the last ones stay). NaN rows
                are written as they come: see :meth:`validate`.
            ids: (N,) integers; needed with ``with_ids``, else not allowed.
            group: gather the keys (and ids) of all ranks, in rank order; ranks may bring different numbers.

        Raises:
            ValueError: a wrong width or device, ids missing, unexpected or of another length.
            TypeError: keys that are not floating, ids that are not integers.
        """
        check_matrix("keys", keys)
        if keys.shape[1] != self.dim:
            raise ValueError(
                f"keys must have shape (N, {self.dim}) like the queue's, got {tuple(keys.shape)}"
            )
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on {self.keys.device} like the queue, got {keys.device}")
        if self.ids is None and ids is not None:
            raise ValueError("ids were given, but this queue was made without with_ids=True")
        if self.ids is not None:
            if ids is None:
                raise ValueError("ids are missing: this queue was made with with_ids=True")
            ids = check_ids("ids", ids, keys)
        if group is not None:
            counts = row_counts(keys, group)
            keys = gather_rows(keys, counts, group)
            ids = None if ids is None else gather_rows(ids, counts, group)
        calls.enqueue(self.keys, self.ids, self.pointer, keys, ids)

    def validate(self) -> None:
        """Check the stored keys; this waits for the device.

        Raises:
            ValueError: keys that hold NaN or infinity; the message names their rows.
        """
        rows = (~torch.isfinite(self.keys).all(dim=1)).nonzero().flatten().tolist()
        if rows:
            shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
            raise ValueError(f"{len(rows)} of {self.size} keys are not finite: rows {shown}")

    def moco_state_dict(self) -> dict[str, Tensor]:
        """Keys and pointer in the official MoCo layout, which has no place for ids; copies.

        Returns:
            ``queue`` (dim, size) float32 and ``queue_ptr`` (1,) int64.
        """
        queue = torch.empty(self.dim, self.size, device=self.keys.device, dtype=torch.float32)
        return {"queue": queue.copy_(self.keys.T), "queue_ptr": self.pointer.reshape(1).clone()}

    def load_moco_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take keys and pointer from a checkpoint in the official MoCo layout.

        Args:
            state_dict: holds ``queue`` (dim, size) and ``queue_ptr`` (1,), under any prefix such as
                ``module.``.

        Raises:
            KeyError: neither is there.
            ValueError: a queue of another shape.
        """
        found = {}
        for name in ("queue", "queue_ptr"):
            matches = [k for k in state_dict if k == name or k.endswith("." + name)]
            if len(matches) != 1:
                raise KeyError(f"expected one entry named {name!r} in the state dict, found {matches}")
            found[name] = state_dict[matches[0]]
        if found["queue"].shape != (self.dim, self.size):
            raise ValueError(
                f"queue must have shape ({self.dim}, {self.size}), got {tuple(found['queue'].shape)}"
            )
        self.keys.copy_(found["queue"].T)
        self.pointer.copy_(found["queue_ptr"].reshape(()))

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return f"size={self.size}, dim={self.dim}, dtype={self.keys.dtype}, with_ids={self.ids is not None}"
