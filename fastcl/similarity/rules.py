"""The pair rule: which pairs are excluded, positive or negative, said by key equality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.similarity.numerics import INTEGER_DTYPES

Ids = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PairRule:
    """Sorts every (query, key) pair into excluded, positive or negative.

    A pair is *excluded* iff its exclude-ids are equal, else *positive* iff its positive-ids are
    equal, else *negative*. Without a rule every pair is negative.

    Args:
        positive: ``(query_ids, key_ids)``, integer tensors of shapes (N,) and (M,), or None.
        exclude: the same, for the pairs that take no part.

    Raises:
        TypeError: ids that are not integer tensors.
        ValueError: ids that are not one-dimensional.
    """

    positive: Ids | None = None
    exclude: Ids | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "exclude"):
            ids = getattr(self, name)
            if ids is None:
                continue
            if not isinstance(ids, (tuple, list)) or len(ids) != 2:
                raise TypeError(f"rule.{name} must be a pair (query_ids, key_ids), got {ids!r}")
            sides = (f"rule.{name} query_ids", f"rule.{name} key_ids")
            checked = tuple(check_ids(side, side_ids) for side, side_ids in zip(sides, ids, strict=True))
            # the same tensor on both sides stays the same object: that is how symmetry is seen
            object.__setattr__(self, name, (checked[0], checked[0]) if ids[0] is ids[1] else checked)

    def is_symmetric(self) -> bool:
        """Whether both sides carry the same id tensors."""
        return all(ids is None or ids[0] is ids[1] for ids in (self.positive, self.exclude))

    def check_against(self, query: Tensor, key: Tensor) -> None:
        """Raise ValueError unless every id tensor fits the (N, D) query and (M, D) key."""
        for name in ("positive", "exclude"):
            ids = getattr(self, name)
            if ids is None:
                continue
            for side, side_ids, rows in (("query", ids[0], query), ("key", ids[1], key)):
                check_ids(f"rule.{name} {side}_ids", side_ids, rows)


def check_ids(name: str, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """``ids`` as contiguous int64; checks dtype and, against ``rows`` (N, D), length and device."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGER_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if ids.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {tuple(ids.shape)}")
    if rows is not None:
        if ids.shape[0] != rows.shape[0]:
            raise ValueError(
                f"{name} must have one id per row: expected ({rows.shape[0]},) for rows of shape "
                f"{tuple(rows.shape)}, got {tuple(ids.shape)}"
            )
        if ids.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like its rows, got {ids.device}")
    return ids.to(torch.int64).contiguous()


ALL_NEGATIVE = PairRule()


def check_rule(rule: PairRule, query: Tensor, key: Tensor) -> None:
    """Raise unless ``rule`` is one, and fits the (N, D) query and (M, D) key."""
    if not isinstance(rule, PairRule):
        raise TypeError(f"rule must be a PairRule, got {type(rule).__name__}")
    rule.check_against(query, key)
