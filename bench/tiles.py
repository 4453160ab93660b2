"""Writes the Triton kernels' tile table: ``python -m bench.tiles``.

Without a GPU the first of the candidates that compiles to code without spills is taken, for every
architecture of :mod:`bench.aot`. With ``--measure`` the fastest of those on this machine's GPU is,
and only its architecture's part of the table is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from triton.testing import do_bench

from bench import aot, kernel_calls
from fastcl.kernels import tiles
from fastcl.kernels.tiles import Tile

# larger tiles first; float32 products are cut along the components too
_HALF = (
    Tile(128, 64, 0, 8, 3),
    Tile(64, 64, 0, 4, 3),
    Tile(64, 64, 0, 4, 2),
    Tile(64, 32, 0, 4, 2),
    Tile(64, 32, 0, 8, 2),
    Tile(32, 32, 0, 4, 2),
    Tile(32, 32, 0, 8, 1),
    Tile(16, 32, 0, 4, 1),
)
_FLOAT32 = (
    Tile(64, 64, 32, 4, 2),
    Tile(64, 32, 32, 4, 2),
    Tile(64, 32, 32, 8, 2),
    Tile(32, 32, 32, 4, 2),
    Tile(32, 32, 32, 8, 1),
    Tile(16, 32, 32, 4, 1),
    Tile(16, 16, 16, 4, 1),
)
# the table's kernels, and the functions that are launched with their tiles
FUNCTIONS = {
    "statistics": {"statistics", "rank", "logistic"},
    "attend": {"attend"},
    "gradient": {"gradient", "loss_gradient"},
    "soft_targets": {"soft_cross_entropy"},
    "soft_gradient": {"soft_gradient"},
}


def candidates(dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles to try, in order of preference."""
    return _FLOAT32 if dtype == torch.float32 else _HALF


def clean(architecture: str, kernel: str, dtype: torch.dtype, width: int) -> list[Tile]:
    """The candidates whose code neither spills nor lacks tensor-core instructions."""
    return [tile for tile in candidates(dtype) if _compiles(architecture, kernel, dtype, width, tile)]


def first_clean(architecture: str, kernel: str, dtype: torch.dtype, width: int) -> Tile:
    """The first of them."""
    for tile in candidates(dtype):
        if _compiles(architecture, kernel, dtype, width, tile):
            return tile
    raise RuntimeError(f"no tile for {kernel}, {dtype}, {width} components on {architecture}")


def _compiles(architecture: str, kernel: str, dtype: torch.dtype, width: int, tile: Tile) -> bool:
    tiles.tile = lambda *arguments: tile  # type: ignore[assignment]
    names = [call.name for call in _calls(dtype, width)]
    return not any(row.failed() for row in aot.compile_for(architecture, names, FUNCTIONS[kernel]))


def _calls(dtype: torch.dtype, width: int) -> Iterator[kernel_calls.Call]:
    ending = f"{tiles.DTYPE_NAMES[dtype]} D={width}"
    return (call for call in kernel_calls.calls() if call.name.endswith(ending))


def fastest(architecture: str, kernel: str, dtype: torch.dtype, width: int, tried: list[Tile]) -> Tile:
    """Of the tiles tried, that with which the calls take the least time on this GPU, all together."""

    def milliseconds(tile: Tile) -> float:
        usual = tiles.tile
        tiles.tile = lambda name, *rest: tile if name == kernel else usual(name, *rest)  # type: ignore[assignment]
        torch.set_default_device("cuda")
        total = sum(do_bench(call.run, return_mode="median") for call in _calls(dtype, width))
        tiles.tile = usual
        return float(total)

    return min(tried, key=milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="time the candidates on this machine's GPU")
    arguments = parser.parse_args()
    table = json.loads(tiles.TABLE.read_text()) if tiles.TABLE.exists() else {}
    here = tiles.architecture(torch.device("cuda", 0)) if arguments.measure else None
    wanted = [
        (architecture, kernel, dtype, width)
        for architecture in ([here] if here else aot.TARGETS)
        for kernel in FUNCTIONS
        for dtype in tiles.DTYPE_NAMES
        for width in tiles.WIDTHS
    ]
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        if here:
            found = pool.map(clean, *zip(*wanted, strict=True))
            chosen: Iterator[Tile] = (fastest(*key, tried) for key, tried in zip(wanted, found, strict=True))
        else:
            chosen = pool.map(first_clean, *zip(*wanted, strict=True))
        for (architecture, kernel, dtype, width), tile in zip(wanted, chosen, strict=True):
            name = tiles.DTYPE_NAMES[dtype]
            table.setdefault(architecture, {}).setdefault(kernel, {}).setdefault(name, {})[str(width)] = tile
            print(architecture, kernel, name, f"D={width}", tile, flush=True)
    tiles.TABLE.write_text(_dumps(table))


def _dumps(table: dict[str, dict[str, dict[str, dict[str, Tile]]]]) -> str:
    """JSON with a tile per line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\[\s+([^\]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
