"""SupCon, said once for every backend: all samples of a row's class are its positives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.numerics import logaddexp, matmul_precision_level, softplus
from fastcl.problem import Problem


class SupCon(NamedTuple):
    """Arguments of one loss, in the order of the op's schema as far as it goes.

    Row i of the queries is row i of the keys: it takes no part in its own loss.
    """

    query: Tensor  # (N, D)
    key: Tensor | None  # (M, D); None: the queries
    scale: Tensor  # ()
    query_labels: Tensor  # (N,) int64
    key_labels: Tensor | None  # (M,) int64; None: the queries'
    normalize: bool
    variant: str  # 'out', 'in'
    reduction: str
    positive_table: Tensor | None  # (B, B) bool, of labels: as in Problem; the op takes none

    def problem(self) -> Problem:
        """The statistics call that the loss is made of."""
        key = self.query if self.key is None else self.key
        ids = torch.arange(key.shape[0], device=key.device)
        return Problem(
            self.query,
            key,
            self.scale,
            key_bias=None,
            key_scale=None,
            positive_query=self.query_labels,
            positive_key=self.query_labels if self.key_labels is None else self.key_labels,
            positive_table=self.positive_table,
            exclude_query=ids[: self.query.shape[0]],
            exclude_key=ids,
            normalize=self.normalize,
            columns=False,
            symmetric=self.key is None and self.positive_table is None,
            precision=matmul_precision_level(),
        )

    def losses(self, lse_neg: Tensor, lse_pos: Tensor, pos_sum: Tensor, pos_count: Tensor) -> Tensor:
        """The loss of each row from its statistics; 0 for a row without positives."""
        count = pos_count.clamp_min(1)
        if self.variant == "out":
            losses = logaddexp(lse_neg, lse_pos) - pos_sum / count
        else:
            lse_pos = lse_pos.masked_fill(pos_count == 0, 0.0)  # two infinities would differ by NaN
            losses = softplus(lse_neg - lse_pos) + count.log()
        return torch.where(pos_count > 0, losses, 0.0)
