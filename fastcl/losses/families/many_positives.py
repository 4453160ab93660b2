"""The family of losses with many positives per row (SupCon), said once for every backend.

All samples of a row's class are its positives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.similarity.fields import Statistics
from fastcl.similarity.forms import any_positive, each_positive
from fastcl.similarity.numerics import matmul_precision_level
from fastcl.similarity.problem import Problem


class ManyPositives(NamedTuple):
    """Arguments of one loss, in the order of the op's schema as far as it goes.

    Row i of the queries is row i of the keys: it takes no part in its own loss.
    """

    query: Tensor  # (N, D)
    key: Tensor | None  # (M, D); None: the queries
    scale: Tensor  # ()
    query_labels: Tensor  # (N,) int64
    key_labels: Tensor | None = None  # (M,) int64; None: the queries'
    positive_mask: Tensor | None = None  # (B, B) bool, of samples, instead of labels; rows are view-major
    normalize: bool = True
    variant: str = "out"  # or 'in'
    reduction: str = "mean"

    @property
    def is_common(self) -> bool:
        """Whether every whole-loss op takes these arguments; those of all forms take them in any case."""
        return self.simple_rule

    @property
    def simple_rule(self) -> bool:
        """Whether :meth:`problem` tests ids only."""
        return self.positive_mask is None

    def in_compute_dtype(self) -> ManyPositives:
        """The loss itself: its rows enter the statistics only, which round their gradients once."""
        return self

    def problem(self) -> Problem:
        """The statistics call that the loss is made of."""
        key = self.query if self.key is None else self.key
        ids = torch.arange(key.shape[0], device=key.device)
        masked = self.positive_mask is not None
        key_labels = self.query_labels if self.key_labels is None else self.key_labels
        return Problem(
            self.query,
            key,
            self.scale,
            positive_query=None if masked else self.query_labels,
            positive_key=None if masked else key_labels,
            positive_more=() if self.positive_mask is None else (self.positive_mask,),
            exclude_query=ids[: self.query.shape[0]],
            exclude_key=ids,
            normalize=self.normalize,
            symmetric=self.key is None and self.positive_mask is None,
            precision=matmul_precision_level(),
        )

    def losses(self, rows: Statistics, columns: Statistics | None) -> Tensor:
        """The loss of each row from the statistics of :meth:`problem`; 0 for a row without positives."""
        if self.variant == "out":
            return each_positive(rows)
        return any_positive(rows) + rows.pos_count.clamp_min(1).log()


# the first ones, which may need a gradient; all before the flags
MANY_POSITIVES_INPUTS = ManyPositives._fields.index("query_labels")
MANY_POSITIVES_TENSORS = ManyPositives._fields.index("normalize")
