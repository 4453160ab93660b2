"""``fastcl/_host.so``, which a checkout builds for its tests and benchmarks and no wheel holds.

The CUDA kernels on the host, a thread per warp, and the products of one tile alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parents[1] / "_host.so"


def is_built() -> bool:
    return _LIBRARY.exists()


@cache
def host_ops() -> Any:
    """The ops of csrc/host.

    Raises:
        OSError: the library is not built, or does not load.
    """
    if not is_built():
        raise OSError(f"{_LIBRARY} is not built: python setup.py build_ext --inplace")
    torch.ops.load_library(str(_LIBRARY))
    return torch.ops.fastcl_host
