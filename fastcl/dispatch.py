"""Which backend serves a call: each declares what it cannot do, 'auto' takes the first that can."""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from fastcl import cuda, native
from fastcl.checks import check_choice
from fastcl.one_positive import OnePositive
from fastcl.problem import Mochi
from fastcl.sup_con import SupCon
from fastcl.transforms import is_transformed

WholeLoss = OnePositive | SupCon


@dataclass(frozen=True)
class Request:
    """What a call asks of a backend."""

    device: torch.device
    dtype: torch.dtype
    dense_mask: bool = False
    loss: WholeLoss | None = None  # where a loss is asked for that a backend may compute as a whole
    enqueue: bool = False  # where a queue's step is
    mochi: Mochi | None = None  # where MoCHi's loss is

    @classmethod
    def of_loss(cls, args: WholeLoss) -> Request:
        dense_mask = isinstance(args, SupCon) and args.positive_table is not None
        return cls(args.query.device, args.query.dtype, dense_mask, args)

    @classmethod
    def of_enqueue(cls, x: Tensor) -> Request:
        return cls(x.device, x.dtype, enqueue=True)

    @classmethod
    def of_mochi(cls, args: Mochi) -> Request:
        return cls(args.query.device, args.query.dtype, mochi=args)

    @classmethod
    def of(cls, x: Tensor, dense_mask: bool = False) -> Request:
        return cls(x.device, x.dtype, dense_mask)


@dataclass(frozen=True)
class Backend:
    """A backend's name, why it is missing here (None if it is not), and what it cannot do.

    ``whole_losses``: the losses that it computes, with their gradients, in one op.
    ``note``: what a reader of :func:`show_config` should know of it.
    ``auto``: whether 'auto' may choose it.
    """

    name: str
    missing: Callable[[], str | None]
    unsupported_reasons: Callable[[Request], list[str]]
    whole_losses: tuple[type[WholeLoss], ...] = ()
    note: str = ""
    auto: bool = True

    def serves_whole(self, loss: WholeLoss) -> bool:
        """Whether one op is all of ``loss``, which must be reduced then."""
        return loss.reduction != "none" and isinstance(loss, self.whole_losses)


def _cpu_reasons(request: Request) -> list[str]:
    reasons = []
    if request.device.type != "cpu":
        reasons.append(f"inputs are on {request.device}, it takes CPU tensors")
    if request.dense_mask:
        reasons.append("a dense mask is served by 'chunked' only")
    return reasons


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if torch.cuda.is_available() or triton_is_interpreted():
        return None
    return "no GPU is visible to torch (on the CPU the kernels run under TRITON_INTERPRET=1 only)"


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_reasons(request: Request) -> list[str]:
    reasons = []
    wanted = "cpu" if triton_is_interpreted() else "cuda"
    if request.device.type != wanted:
        reasons.append(f"inputs are on {request.device}, it takes {wanted} tensors")
    if request.dtype == torch.float64:
        reasons.append("float64 is served by 'chunked' on a GPU")
    if request.dense_mask:
        reasons.append("a dense mask is served by 'chunked' only")
    return reasons


def _anything(request: Request) -> list[str]:
    return []


def _nothing_missing() -> str | None:
    return None


# in the order 'auto' tries them; 'reference' is last and so never chosen
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            cuda.missing_reason,
            cuda.unsupported_reasons,
            whole_losses=(OnePositive, SupCon),
            note=cuda.NOTE,
            auto=False,
        ),
        Backend(
            "triton",
            _triton_missing,
            _triton_reasons,
            whole_losses=(OnePositive,),
            note="float64 and dense masks go to 'chunked'; its speed is not measured yet",
        ),
        Backend("cpu", native.missing_reason, _cpu_reasons, whole_losses=(OnePositive, SupCon)),
        Backend("chunked", _nothing_missing, _anything),
        Backend("reference", _nothing_missing, _anything),
    )
}
_NAMES = (*_BACKENDS, "auto")

_selected = "auto"
_warned = False


class use_backend:  # noqa: N801  (a function that is also a context manager)
    """Select the backend of every following call, or of the calls inside a ``with`` block.

    Args:
        name: 'reference', 'chunked', 'cpu', 'triton', 'cuda', or 'auto' (the default: the first
            that supports the inputs).

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available here; the message says why. A selected backend
            that does not support a later call's inputs raises there: nothing falls back silently.
    """

    def __init__(self, name: str) -> None:
        global _selected
        check_choice("backend", name, _NAMES)
        if name != "auto":
            _require_present(_BACKENDS[name])
        self._previous = _selected
        _selected = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _selected
        _selected = self._previous


def choose(request: Request, name: str = "auto") -> Backend:
    """The backend for ``request``; an explicit ``name`` wins over :class:`use_backend`'s.

    Where ``torch.func`` or forward mode differentiates the call, it is the dense formula.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend is not available or cannot serve the request.
    """
    check_choice("backend", name, _NAMES)
    if is_transformed():
        return _BACKENDS["reference"]
    if name == "auto":
        name = _selected
    if name == "auto":
        for backend in _BACKENDS.values():
            # missing() last: to look for a package that is not there costs more than a small loss
            if backend.auto and not backend.unsupported_reasons(request) and backend.missing() is None:
                break
        if backend.name == "chunked" and request.device.type == "cpu":
            _warn_if_native_missing()
        return backend
    backend = _BACKENDS[name]
    _require_present(backend)
    reasons = backend.unsupported_reasons(request)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


def _warn_if_native_missing() -> None:
    global _warned
    reason = native.missing_reason()
    if reason is not None and not _warned:
        _warned = True
        warnings.warn(f"fastcl: CPU tensors are served by 'chunked', which is slower: {reason}", stacklevel=5)


def _require_present(backend: Backend) -> None:
    reason = backend.missing()
    if reason is not None:
        raise RuntimeError(f"backend {backend.name!r} is not available: {reason}")


def describe() -> str:
    """What is available here, line by line."""
    import fastcl

    lines = [
        f"fastcl {fastcl.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"selected backend: {_selected}",
    ]
    for backend in _BACKENDS.values():
        reason = backend.missing()
        status = "available" if reason is None else f"not available: {reason}"
        lines.append(f"  {backend.name:10} {status}{backend.note and f' ({backend.note})'}")
    lines.extend(f"  {line}" for line in native.describe())
    return "\n".join(lines)


def show_config() -> str:
    """Print, and return, which backends are available here and why the others are not."""
    text = describe()
    print(text)
    return text
