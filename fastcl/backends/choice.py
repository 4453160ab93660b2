"""Which backend serves a call: each declares what it cannot do, 'auto' takes the first that can."""

from __future__ import annotations

import platform
import warnings
from types import TracebackType

import torch

from fastcl.backends import native
from fastcl.backends.base import Backend, Request
from fastcl.backends.registry import BACKENDS
from fastcl.similarity.checks import check_choice
from fastcl.similarity.transforms import is_transformed
from fastcl.version import __version__

_NAMES = (*BACKENDS, "auto")

_selected = "auto"
_warned = False


class use_backend:  # noqa: N801  (a function that is also a context manager)
    """Select the backend of every following call, or of the calls inside a ``with`` block.

    The selection is the process's, not a thread's: threads whose ``with`` blocks overlap disturb each
    other, and should pass ``backend=`` where a function takes it.

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
            _require_present(BACKENDS[name])
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
        return BACKENDS["reference"]
    if name == "auto":
        name = _selected
    if name == "auto":
        for backend in BACKENDS.values():
            # missing() last: to look for a package that is not there costs more than a small loss
            if backend.auto and not backend.unsupported_reasons(request) and backend.missing() is None:
                break
        if backend.name == "chunked" and request.device.type == "cpu":
            _warn_if_native_missing()
        return backend
    backend = BACKENDS[name]
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
    lines = [
        f"fastcl {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"selected backend: {_selected}",
    ]
    for backend in BACKENDS.values():
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
