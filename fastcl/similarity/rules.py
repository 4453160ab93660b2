"""The pair rule: which pairs are excluded, positive or negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcl.similarity.numerics import INTEGER_DTYPES
from fastcl.similarity.transforms import is_readable

Ids = tuple[Tensor, Tensor]
PairSet = Ids | Tensor  # equal ids, or a mask
PairSets = tuple[PairSet, ...]


@dataclass(frozen=True, eq=False)
class PairRule:
    """Sorts every (query, key) pair into excluded, positive or negative.

    A pair is *excluded* iff ``exclude``, ``within`` or ``exclude_keys`` says so, else *positive* iff it is
    in ``positive``, else *negative*. Without a rule every pair is negative.

    A set of pairs is said by ids, ``(query_ids, key_ids)``, integer tensors of shapes (N,) and (M,): the
    pairs whose ids are equal; by a mask, a bool tensor (N, M), read a tile at a time; or by a list of
    such, of which any one suffices.

    Args:
        positive: a set of pairs, or None.
        exclude: a set of pairs that take no part, or None.
        within: ids; pairs whose ids differ take no part.
        exclude_keys: (N, k) int64, indices of keys that take no part in that row; -1 is padding.

    Raises:
        TypeError: ids that are not integer tensors, masks that are not bool, indices that are not int64.
        ValueError: ids that are not one-dimensional, masks and indices that are not two-dimensional.
    """

    positive: Any = None
    exclude: Any = None
    _: KW_ONLY
    within: Any = None
    exclude_keys: Tensor | None = None
    positive_sets: PairSets = field(init=False, repr=False)
    exclude_sets: PairSets = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("positive", "exclude"):
            given = getattr(self, name)
            sets = _pair_sets(f"rule.{name}", given)
            object.__setattr__(self, f"{name}_sets", sets)
            if given is not None:
                one = isinstance(given, Tensor) or _is_pair(given)
                object.__setattr__(self, name, sets[0] if one else list(sets))
        if self.within is not None:
            object.__setattr__(self, "within", _ids_pair("rule.within", self.within))
        if self.exclude_keys is not None:
            _check_index_matrix("rule.exclude_keys", self.exclude_keys)

    def is_symmetric(self) -> bool:
        """Whether both sides carry the same id tensors, and nothing else is said."""
        sets = (*self.positive_sets, *self.exclude_sets, *(() if self.within is None else (self.within,)))
        return self.exclude_keys is None and all(
            isinstance(pairs, tuple) and pairs[0] is pairs[1] for pairs in sets
        )

    def check_against(self, query: Tensor, key: Tensor, every_key: int | None = None) -> None:
        """Raise ValueError unless the rule fits the (N, D) query and (M, D) key.

        ``every_key``: how many keys masks and ``exclude_keys`` are of, where these are a shard of them.
        """
        count = key.shape[0] if every_key is None else every_key
        for name in ("positive", "exclude"):
            for pairs in getattr(self, f"{name}_sets"):
                _check_set(f"rule.{name}", pairs, query, key, count)
        if self.within is not None:
            _check_set("rule.within", self.within, query, key, count)
        if self.exclude_keys is not None:
            check_key_indices("rule.exclude_keys", self.exclude_keys, query, count)

    def fields(self) -> dict[str, Any]:
        """What a statistics call takes of the rule: see :class:`fastcl.similarity.problem.Problem`."""
        exclude, exclude_more = _first_ids(self.exclude_sets)
        positive, positive_more = (
            _first_ids(self.positive_sets) if len(self.positive_sets) == 1 else (None, self.positive_sets)
        )
        return {
            **_sides("positive", positive),
            **_sides("exclude", exclude),
            **_sides("within", self.within),
            "exclude_keys": self.exclude_keys,
            "positive_more": flattened(positive_more),
            "exclude_more": flattened(exclude_more),
        }


def flattened(sets: PairSets) -> tuple[Tensor, ...]:
    """The tensors of several sets, one after the other, as an op takes them."""
    return tuple(x for pairs in sets for x in (pairs if isinstance(pairs, tuple) else (pairs,)))


def unflattened(tensors: Sequence[Tensor]) -> PairSets:
    """Of what :func:`flattened` gives: a one-dimensional tensor is followed by its keys' ids."""
    sets, rest = [], list(tensors)
    while rest:
        first = rest.pop(0)
        sets.append((first, rest.pop(0)) if first.dim() == 1 else first)
    return tuple(sets)


def _first_ids(sets: PairSets) -> tuple[Ids | None, PairSets]:
    """The first set said by ids, which every kernel knows, and the others."""
    for i, pairs in enumerate(sets):
        if isinstance(pairs, tuple):
            return pairs, (*sets[:i], *sets[i + 1 :])
    return None, sets


def _sides(name: str, ids: Ids | None) -> dict[str, Tensor | None]:
    query, key = ids or (None, None)
    return {f"{name}_query": query, f"{name}_key": key}


def _pair_sets(name: str, given: Any) -> PairSets:
    if given is None:
        return ()
    if isinstance(given, Tensor) or _is_pair(given):
        return (_pair_set(name, given),)
    if not isinstance(given, (tuple, list)):
        raise TypeError(
            f"{name} must be a pair (query_ids, key_ids), a bool mask, or a list of such, got {given!r}"
        )
    return tuple(_pair_set(name, pairs) for pairs in given)


def _is_pair(given: Any) -> bool:
    def is_set(x: Any) -> bool:
        return isinstance(x, (tuple, list)) or (
            isinstance(x, Tensor) and x.dim() == 2 and x.dtype == torch.bool
        )

    return isinstance(given, (tuple, list)) and len(given) == 2 and not any(map(is_set, given))


def _pair_set(name: str, given: Any) -> PairSet:
    if not isinstance(given, Tensor):
        return _ids_pair(name, given)
    if given.dtype != torch.bool:
        kind = f"a {given.dim()}-dimensional tensor of {given.dtype}"
        raise TypeError(
            f"{name} must be a pair (query_ids, key_ids), a bool mask, or a list of such, got {kind}"
        )
    if given.dim() != 2:
        raise ValueError(f"{name} as a mask must have 2 dimensions, got shape {tuple(given.shape)}")
    return given


def _ids_pair(name: str, ids: Any) -> Ids:
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(f"{name} must be a pair (query_ids, key_ids), got {ids!r}")
    query, key = (check_ids(f"{name} {s}_ids", x) for s, x in zip(("query", "key"), ids, strict=True))
    # the same tensor on both sides stays the same object: that is how symmetry is seen
    return (query, query) if ids[0] is ids[1] else (query, key)


def _check_set(name: str, pairs: PairSet, query: Tensor, key: Tensor, every_key: int) -> None:
    if isinstance(pairs, tuple):
        for side, ids, rows in (("query", pairs[0], query), ("key", pairs[1], key)):
            check_ids(f"{name} {side}_ids", ids, rows)
        return
    expected = (query.shape[0], every_key)
    if pairs.shape != expected:
        raise ValueError(f"{name} as a mask must have shape {expected}, got {tuple(pairs.shape)}")
    _check_device(f"{name} as a mask", pairs, query)


def _check_device(name: str, x: Tensor, rows: Tensor) -> None:
    if x.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device} like its rows, got {x.device}")


def check_key_indices(name: str, indices: Tensor, query: Tensor, keys: int) -> None:
    """Raise unless ``indices`` (N, k) int64 are from -1, which is padding, to the last of so many keys.

    Their values are checked on the CPU only: a GPU would stall.
    """
    _check_index_matrix(name, indices)
    if indices.shape[0] != query.shape[0]:
        raise ValueError(
            f"{name} must have a row per query: expected ({query.shape[0]}, k), got {tuple(indices.shape)}"
        )
    _check_device(name, indices, query)
    check_range(name, indices, keys, "keys", low=-1)


def _check_index_matrix(name: str, indices: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if indices.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(indices.shape)}")


def check_range(name: str, indices: Tensor, count: int, what: str = "", *, low: int = 0) -> None:
    """Raise unless readable ``indices`` are from ``low`` to ``count - 1``, of so many ``what``."""
    if not indices.numel() or not is_readable(indices):
        return
    least, most = (int(x) for x in indices.aminmax())
    if least < low or most >= count:
        # said here only: in a compiled graph a count that is written out would be taken for a constant
        of = f" for {count} {what}" if what else ""
        possible = f"from {low} to {count - 1}" if count > low else "none"
        raise ValueError(f"{name} must be {possible}{of}, got from {least} to {most}")


def check_ids(name: str, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """``ids`` as contiguous int64; checks dtype and, against ``rows`` (N, D), length and device."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGER_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in INTEGER_DTYPES)
        raise TypeError(f"{name} must be an integer tensor ({kinds}), got {got}")
    if ids.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {tuple(ids.shape)}")
    if rows is not None:
        if ids.shape[0] != rows.shape[0]:
            raise ValueError(
                f"{name} must have one id per row: expected ({rows.shape[0]},) for rows of shape "
                f"{tuple(rows.shape)}, got {tuple(ids.shape)}"
            )
        _check_device(name, ids, rows)
    return ids.to(torch.int64).contiguous()


ALL_NEGATIVE = PairRule()


def check_rule(rule: PairRule, query: Tensor, key: Tensor, every_key: int | None = None) -> None:
    """Raise unless ``rule`` is one, and fits as :meth:`PairRule.check_against` says."""
    if not isinstance(rule, PairRule):
        raise TypeError(f"rule must be a PairRule, got {type(rule).__name__}")
    rule.check_against(query, key, every_key)
