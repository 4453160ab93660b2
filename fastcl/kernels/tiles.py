"""Tile shapes: an explicit table per architecture, kernel, dtype and width; nothing is tuned at run time.

``python -m bench.tiles`` writes the table anew.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")
MAX_WIDTH = 256  # wider rows are multiplied by the library
WIDTHS = (64, 128, 256)
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Tile(NamedTuple):
    """How a kernel's work is cut, and the compiler's options for it."""

    block_m: int  # own rows
    block_n: int  # other rows
    block_k: int  # components per product, 0: all of them
    num_warps: int
    num_stages: int


INTERPRETED = Tile(64, 64, 0, 4, 1)


def block_width(width: int) -> int:
    """Components as kernels hold them: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@functools.cache
def tile(kernel: str, architecture: str, dtype: torch.dtype, width: int) -> Tile:
    """The tile of a kernel of the table, say 'gradient', for rows of up to 256 components."""
    if architecture == "interpreter":
        return INTERPRETED
    table = json.loads(TABLE.read_text())
    entry = table.get(architecture, table["sm_80"])[kernel][DTYPE_NAMES[dtype]]
    return Tile(*entry[str(next(w for w in WIDTHS if width <= w))])


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's architecture as the table has it."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
