"""Peak memory of one forward and backward: ``python -m bench.memory CASE SIDE`` prints bytes.

The figure is how far the process grew beyond its size with the inputs in place: every
intermediate, the gradients, and any workspace a library keeps. It is measured in a fresh process,
after a warm-up at a tiny size, and is exact to a few hundred KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.cases import CASES, COMPILE, SIDES, Case, step

_WARM_UP_ROWS, _WARM_UP_KEYS = 32, 64
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 1 << 16  # glibc's malloc.h
_ROOT = Path(__file__).parents[1]


def peak_bytes(case_name: str, side: str) -> int:
    """Peak growth of a fresh process that runs one step of the case."""
    command = [sys.executable, "-m", "bench.memory", case_name, side]
    result = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout)


def measure(case: Case, side: str) -> int:
    """Peak growth of this process, which should not have run a large step before."""
    run = step(case, side)
    if side == COMPILE:  # compiled per shape, so only the same shape warms it up
        run()
    else:
        step(replace(case, rows=_WARM_UP_ROWS, keys=case.keys and _WARM_UP_KEYS), side)()
    return process_growth(run)


def process_growth(run: Callable[[], object]) -> int:
    # tensors straight from the kernel and back: free memory that malloc holds on to would hide growth
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("case", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("side", choices=SIDES)
    arguments = parser.parse_args()
    print(measure(CASES[arguments.case], arguments.side))


if __name__ == "__main__":
    main()
