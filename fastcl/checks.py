"""Argument checks with messages that name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl.numerics import FLOAT_DTYPES


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


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless ``x`` has the width, device and (if asked) dtype of ``other``."""
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must have the same number of components, "
            f"got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} must have dtype {other.dtype} like {other_name}, got {x.dtype}")


def check_same_count(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have the same number of samples."""
    if x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} and {other_name} must have the same number of samples, "
            f"got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both are floating (N, D) tensors of one shape, dtype and device."""
    check_matrix(name, x)
    check_matrix(other_name, other)
    check_same_count(other_name, other, name, x)
    check_same(other_name, other, name, x)


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


def scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a 0-d tensor beside ``like``: float64, or float32 beside GPU float inputs.

    A number must be finite; a 0-d tensor is never read, and an infinite one becomes NaN.
    """
    if isinstance(value, Tensor):
        return _nan_unless_finite(_beside(name, value, like))
    return torch.full((), _finite(name, value), dtype=_scalar_dtype(like), device=like.device)


def inverse_scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``1 / value`` as :func:`scalar` gives it; a number must not be zero, a tensor's zero becomes NaN."""
    if isinstance(value, Tensor):
        return _nan_unless_finite(_beside(name, value, like).reciprocal())
    number = _finite(name, value)
    if number == 0:
        raise ValueError(f"{name} must not be zero, got {value}")
    return scalar(name, 1.0 / number, like)


def _beside(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    if value.device != like.device and value.device.type != "cpu":
        raise ValueError(f"{name} must be on {like.device} or the CPU, got {value.device}")
    return value.to(device=like.device, dtype=_scalar_dtype(like), non_blocking=True)


def _scalar_dtype(like: Tensor) -> torch.dtype:
    wide = like.device.type == "cpu" or like.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def _nan_unless_finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=math.nan, posinf=math.nan, neginf=math.nan)


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
