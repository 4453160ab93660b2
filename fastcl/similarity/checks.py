"""Argument checks with messages that name the argument, what was expected and what came."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import FLOAT_DTYPES, INTEGER_DTYPES

_ONE_ELEMENT = "a number or a tensor of one element"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless ``reduction`` is 'none', 'mean' or 'sum'."""
    check_choice("reduction", reduction, ("none", "mean", "sum"))


def check_matrix(name: str, x: Tensor, dims: int | tuple[int, ...] = 2) -> None:
    """Raise unless ``x`` is a floating tensor with the given number of dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    allowed = (dims,) if isinstance(dims, int) else dims
    if x.dim() not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {expected} dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless ``x`` has the width, device and (if asked, outside autocast) dtype of ``other``."""
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must have the same number of components, "
            f"got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype and not _under_autocast(x.device):
        raise TypeError(f"{name} must have dtype {other.dtype} like {other_name}, got {x.dtype}")


def _under_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes, which differ under autocast only."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(dtype) for x in tensors)


def check_same_count(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have the same number of samples."""
    if x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} and {other_name} must have the same number of samples, "
            f"got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in one dtype; raise unless they are floating (N, D) tensors of one shape, dtype and device."""
    check_matrix(name, x)
    check_matrix(other_name, other)
    check_same_count(other_name, other, name, x)
    check_same(other_name, other, name, x)
    if x.dtype != other.dtype:
        x, other = in_one_dtype(x, other)
    return x, other


def check_vector(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless ``x`` is a floating (M,) tensor beside the (M, D) tensor ``like``."""
    check_matrix(name, x, 1)
    if x.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name} must have one value per key: expected ({like.shape[0]},) for keys of shape "
            f"{tuple(like.shape)}, got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the keys, got {x.device}")


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float; raise unless it is a finite number, ``low <= value < high``."""
    number = _finite(name, value, "a number")
    if not low <= number < high:
        expected = f"at least {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be {expected}, got {value}")
    return number


def check_scalar(name: str, value: float | Tensor) -> None:
    """Raise unless ``value`` is what :func:`scalar` takes; a tensor is not read."""
    if not isinstance(value, Tensor):
        _finite(name, value)
    elif value.numel() != 1:
        raise ValueError(f"{name} must be {_ONE_ELEMENT}, got shape {tuple(value.shape)}")


def scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a 0-d tensor beside ``like``: float64, or float32 beside GPU float inputs.

    A number must be finite; a tensor of one element is never read, and an infinite one becomes NaN.
    """
    if isinstance(value, Tensor):
        return _nan_unless_finite(_beside(name, value, like))
    number = _finite(name, value)
    if abs(number) > _largest_scale(like):
        raise ValueError(f"{name} must be at most {_largest_scale(like):.1e} in size here, got {value}")
    return _as_tensor(number, like)


def inverse_scalar(name: str, value: float | Tensor, like: Tensor, *, per_row: bool = False) -> Tensor:
    """``1 / value`` as :func:`scalar` gives it; a number must not be zero, a tensor's zero becomes NaN.

    With ``per_row`` a value of shape (N, 1) beside (N, D) keeps its shape.
    """
    if isinstance(value, Tensor):
        value = _beside(name, value, like, per_row)
        if value.dim():  # a row's infinite temperature is a mistake like its zero
            value = _nan_unless_finite(value)
        return _nan_unless_finite(value.reciprocal())
    number = _finite(name, value)
    if number == 0:
        raise ValueError(f"{name} must not be zero, got {value}")
    if abs(number) < 1 / _largest_scale(like):
        raise ValueError(f"{name} must be at least {1 / _largest_scale(like):.1e} in size here, got {value}")
    return _as_tensor(1.0 / number, like)


def _beside(name: str, value: Tensor, like: Tensor, per_row: bool = False) -> Tensor:
    if not (value.is_floating_point() or value.dtype in INTEGER_DTYPES):
        raise TypeError(f"{name} must be a floating or an integer tensor, got {value.dtype}")
    if value.device != like.device and value.device.type != "cpu":
        raise ValueError(f"{name} must be on {like.device} or the CPU, got {value.device}")
    is_per_row = per_row and value.dim() == 2 and value.shape == (like.shape[0], 1)
    if value.dim() and not is_per_row:
        if value.numel() != 1:
            raise ValueError(_wrong_shape(name, value, like, per_row))
        value = value.reshape(())
    return anchored(value).to(device=like.device, dtype=_scalar_dtype(like), non_blocking=True)


def _wrong_shape(name: str, value: Tensor, like: Tensor, per_row: bool) -> str:
    rows = like.shape[0]
    text = f"{name} must be {_ONE_ELEMENT}"
    if not per_row:
        return f"{text}, got shape {tuple(value.shape)}"
    text += f", or of shape ({rows}, 1): one per row; got shape {tuple(value.shape)}"
    if value.shape == (rows,):
        text += ", by which info-nce-pytorch would divide columns instead of rows"
    return text


def _largest_scale(like: Tensor) -> float:
    """What the compute dtype of such rows holds, also in the kernels' units of log2(e)."""
    return torch.finfo(torch.float64 if like.dtype == torch.float64 else torch.float32).max / 2


def _as_tensor(number: float, like: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a product, so that a number that changes is an input of the graph
        return torch.ones((), dtype=_scalar_dtype(like), device=like.device) * number
    return torch.full((), number, dtype=_scalar_dtype(like), device=like.device)


def _scalar_dtype(like: Tensor) -> torch.dtype:
    wide = like.device.type == "cpu" or like.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def _nan_unless_finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=math.nan, posinf=math.nan, neginf=math.nan)


def _finite(name: str, value: float, expected: str = _ONE_ELEMENT) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # which a graph's symbolic numbers can be asked
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
