"""What an option may be: its values are converted and checked here, whoever gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; above ``low`` only if ``open``."""

    low: float
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"between {self.low} and {self.high}"
        return f"{'above' if self.open else 'at least'} {self.low}"


PositiveInt = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open=True)]
Temperature = Annotated[float, Range(1e-6)]  # less would weigh float32's rounding of cosines
NonNegativeFloat = Annotated[float, Range(0)]
ClosedUnitInterval = Annotated[float, Range(0, 1)]
PositiveInts = Annotated[tuple[int, ...], Range(1)]

_KINDS = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"},
    tuple: "whole numbers such as 20,10",
}
_ACCEPTED: dict[Any, tuple[type, ...]] = {
    int: (Integral, str),
    float: (Real, str),
    bool: (bool, str),
    str: (str, Path),
    Path: (str, Path),
    tuple: (str, int, list, tuple),
}
_TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


def described(option: Any) -> str:
    """The line of help in an option's type."""
    return str(option.__metadata__[-1])


def checked(name: str, option: Any, value: Any) -> Any:
    """``value``, as it came from the command line, a YAML file or Python, as the option's type has it.

    Args:
        name: of the option.
        option: its type, annotated with a :class:`Range` and a line of help.
        value: given for it.

    Raises:
        ValueError: it cannot be that.
    """
    kinds = _kinds(option)
    if value is None or (NoneType in kinds and value in ("null", "None", "none")):
        if NoneType in kinds:
            return None
        raise ValueError(f"{name} must be {_KINDS[kinds[0]]}, got nothing")
    try:
        result = _converted(kinds[0], value)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{name} must be {_KINDS[kinds[0]]}, got {value!r}") from None
    for bounds in _ranges(option):
        if any(x not in bounds for x in (result if isinstance(result, tuple) else [result])):
            raise ValueError(f"{name} must be {bounds}, got {result}")
    return result


def is_flag(option: Any) -> bool:
    """Whether the option is either true or false."""
    return _kinds(option) == [bool]


def _kinds(option: Any) -> list[Any]:
    if get_origin(option) is Annotated:
        return _kinds(get_args(option)[0])
    if get_origin(option) in (Union, UnionType):
        return [kind for inner in get_args(option) for kind in _kinds(inner)]
    return [get_origin(option) or option]


def _ranges(option: Any) -> list[Range]:
    if get_origin(option) is Annotated:
        own = [note for note in option.__metadata__ if isinstance(note, Range)]
        return own + _ranges(get_args(option)[0])
    return [bounds for inner in get_args(option) for bounds in _ranges(inner)]


def _converted(kind: Any, value: Any) -> Any:
    if not isinstance(value, _ACCEPTED[kind]) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    if isinstance(value, (str, list, tuple)) and not value:
        raise ValueError
    if kind is bool:
        return _TRUTHS[str(value).lower()]
    if kind is tuple:
        several = value.split(",") if isinstance(value, str) else value
        return tuple(_converted(int, x) for x in (several if isinstance(several, Sequence) else [several]))
    result = kind(value)
    if kind is float and not math.isfinite(result):
        raise ValueError
    return result
