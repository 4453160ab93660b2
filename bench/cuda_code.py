"""The machine code of the CUDA kernels in the built extension: a line per kernel and target, and a check.

Fails where a kernel spills registers or lacks its tensor-core instructions. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastcl.backends import cuda
from fastcl.backends.base import WholeLoss
from fastcl.losses.families.many_positives import ManyPositives
from fastcl.losses.families.one_positive import BATCH, VIEWS, OnePositive

LIBRARY = Path("fastcl/_native.abi3.so")
TABLE = Path("bench/results/cuda-code.md")
TARGETS = ("sm_80", "sm_90a")
TYPES = {"float": "float32", "c10::Half": "float16", "c10::BFloat16": "bfloat16"}
# each kernel, and the tensor-core instruction it lives from
KERNELS = {
    **{
        f"one_launch<{rows}, {cells}, {loss}>": instruction
        for rows, instruction in (
            ("float32", "HMMA.1688.F32.TF32"),
            ("float16", "HMMA.16816.F32"),
            ("bfloat16", "HMMA.16816.F32.BF16"),
        )
        for cells in {rows: None, "float32": None}
        for loss in ("OnePositiveLoss", "SupConLoss")
    },
    **{
        f"{kernel}<{rows}, {keys}>": None
        for kernel in ("enqueue", "mix_negatives")
        for rows in TYPES.values()
        for keys in TYPES.values()
    },
}
# blocks that live at once, bytes of shared memory of each
DEVICES = {"A100": (108, 163 << 10), "H100, H200": (132, 227 << 10)}

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TENSOR_CORE = re.compile(r"\bHMMA[.\w]*")


class Code(NamedTuple):
    """One kernel for one target."""

    target: str
    kernel: str
    registers: int
    stack_bytes: int
    local_accesses: int  # loads and stores of spilled registers
    instructions: int
    tensor_core: dict[str, int]

    def faults(self) -> list[str]:
        """What is wrong with it."""
        faults = []
        if self.stack_bytes or self.local_accesses:
            faults.append(
                f"{self.stack_bytes} bytes of stack, {self.local_accesses} accesses to local memory"
            )
        expected = KERNELS[self.kernel]
        if expected is not None and expected not in self.tensor_core:
            faults.append(f"no {expected}")
        return faults

    def line(self) -> str:
        """Its row of the table."""
        cores = ", ".join(f"{count} {name}" for name, count in sorted(self.tensor_core.items()))
        spills = f"{self.stack_bytes} B, {self.local_accesses}"
        cells = (self.target, self.kernel, str(self.registers), spills, str(self.instructions), cores)
        return f"| {' | '.join(cells)} |"


def tool_environment() -> dict[str, str]:
    """The process's, with the folders on its PATH where cuobjdump and nvdisasm may be."""
    folders = [os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return {**os.environ, "PATH": os.pathsep.join(folders)}


def dump(library: Path, *options: str) -> str:
    """What cuobjdump prints."""
    environment = tool_environment()
    tool = shutil.which("cuobjdump", path=environment["PATH"])
    if tool is None:
        sys.exit("bench.cuda_code needs cuobjdump, of the CUDA toolkit or of the package 'triton'")
    return subprocess.run(
        [tool, *options, str(library)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def kernel_name(symbol: str) -> str:
    """``one_launch<float32>`` and the like."""
    demangled = subprocess.run(["c++filt", symbol], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"(\w+)<([^<>]+)>\(", demangled)
    if found is None:
        return symbol
    names = (TYPES.get(name, name.rpartition("::")[2]) for name in found[2].split(", "))
    return f"{found[1]}<{', '.join(names)}>"


def read(library: Path, target: str) -> list[Code]:
    """The kernels that ``library`` holds for ``target``."""
    listing = dump(library, "-sass", "-arch", target)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.DOTALL))
    codes = []
    for symbol, registers, stack, *_ in _RESOURCES.findall(dump(library, "-res-usage", "-arch", target)):
        name, body = kernel_name(symbol), bodies.get(symbol, "")
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+([^;]+);", body, re.MULTILINE)
        cores = _TENSOR_CORE.findall("\n".join(instructions))
        local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in instructions)
        counts = {core: cores.count(core) for core in set(cores)}
        codes.append(Code(target, name, int(registers), int(stack), local, len(instructions), counts))
    return sorted(codes, key=lambda code: code.kernel)


def one_positive(layout: int, samples: int, dtype: torch.dtype) -> OnePositive:
    """A loss of that size, without memory."""
    rows = torch.empty(samples, 1, dtype=dtype, device="meta")
    return OnePositive(rows, rows, None, rows, layout=layout)


def sup_con(rows: int, dtype: torch.dtype) -> ManyPositives:
    """As :func:`one_positive`."""
    features = torch.empty(rows, 1, dtype=dtype, device="meta")
    return ManyPositives(features, None, features, features)


# what a batch is counted in, and the loss of one
LOSSES: dict[str, Callable[[int, torch.dtype], WholeLoss]] = {
    "nt_xent, samples": partial(one_positive, VIEWS),
    "info_nce, clip_loss, samples": partial(one_positive, BATCH),
    "sup_con, rows": sup_con,
}


def largest(
    loss: Callable[[int, torch.dtype], WholeLoss], dtype: torch.dtype, device: tuple[int, int]
) -> int:
    """The largest batch whose similarity matrix stays on the chip."""
    size = 0
    for step in (1 << bit for bit in range(16, -1, -1)):
        if cuda.fits(loss(size + step, dtype), *device):
            size += step
    return size


def limits() -> list[str]:
    """A line per device: the largest batch of each loss, in float32 and in half precision."""
    lines = []
    for name, device in DEVICES.items():
        cells = [
            f"{largest(loss, torch.float32, device)} / {largest(loss, torch.float16, device)}"
            for loss in LOSSES.values()
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def table(codes: list[Code]) -> str:
    """The committed page."""
    return "\n".join(
        [
            "# Machine code of the CUDA kernels",
            "",
            "Written by `make cuda-code` from the extension that `FASTCL_BUILD=cuda` builds. Spills: bytes",
            "of stack, and instructions that access them. None of this has run on a GPU.",
            "",
            "| target | kernel | registers | spills | instructions | tensor-core instructions |",
            "|---|---|--:|--:|--:|---|",
            *(code.line() for code in codes),
            "",
            "Each block keeps its square of the similarity matrix in shared memory, so the device limits",
            "the batch, in float32 / half precision:",
            "",
            f"| device | {' | '.join(LOSSES)} |",
            f"|---|{'--:|' * len(LOSSES)}",
            *limits(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_code", description=__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the built extension")
    library = parser.parse_args().library
    if not cuda.is_built():
        sys.exit("bench.cuda_code needs an extension with CUDA kernels: build it with FASTCL_BUILD=cuda")
    codes = [code for target in TARGETS for code in read(library, target)]
    text = table(codes)
    print(text)
    TABLE.write_text(text)
    found = {(code.target, code.kernel) for code in codes}
    faults = [f"{code.kernel} for {code.target}: {fault}" for code in codes for fault in code.faults()]
    faults += [f"{k} for {t}: not there" for t in TARGETS for k in KERNELS if (t, k) not in found]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
