"""Finds and loads the native CPU extension."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from fastcl.similarity.checks import check_choice

_LEVELS = {
    "x86_64": ("generic", "avx2", "avx512", "avx512_bf16", "amx"),
    "aarch64": ("generic", "neon"),
}
ISA_LEVELS = _LEVELS.get(platform.machine(), ("generic",))

_LIBRARY = Path(__file__).parents[1] / "_native.abi3.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return "the native extension was not built (reinstall with FASTCL_BUILD=cpu to see why)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the native extension does not load: {error}"
    return None


_missing = _load()


def missing_reason() -> str | None:
    """Why the native extension cannot be used, or None."""
    return _missing


def describe() -> list[str]:
    """What the native extension is and which instruction set it runs on."""
    if _missing is not None:
        return []
    best, used = isa_levels()
    levels = ", ".join(ISA_LEVELS[: best + 1])
    return [f"cpu kernels: {ISA_LEVELS[used]} (this machine has {levels}), {torch.get_num_threads()} threads"]


def isa_levels() -> tuple[int, int]:
    """The best instruction set this machine has and the one in use, as indices of ISA_LEVELS."""
    best, used = torch.ops.fastcl_native.isa_levels()
    return best, used


def force_isa(level: str) -> None:
    """Run the CPU kernels on the named instruction set; for tests and measurements.

    Raises:
        ValueError: an unknown level, or one this machine does not have.
    """
    check_choice("level", level, ISA_LEVELS[: isa_levels()[0] + 1])
    torch.ops.fastcl_native.force_isa(ISA_LEVELS.index(level))
