"""MoCHi's loss as a record: MoCo with synthetic hard negatives, mixed by ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Mochi(NamedTuple):
    """Arguments of one MoCHi loss, in the order of the op's schema."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    scale: Tensor  # ()
    keys: Tensor  # (M, D) unit rows, of any floating dtype
    first: Tensor  # (N, n_mix) int64 ranks
    second: Tensor  # (N, n_mix) int64 ranks
    alpha: Tensor  # (N, n_mix)
    partner: Tensor  # (N, n_query_mix) int64 ranks
    beta: Tensor  # (N, n_query_mix)
    n_hard: int


MOCHI_INPUTS = Mochi._fields.index("keys")  # the first ones, which may need a gradient
