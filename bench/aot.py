"""Compiles every Triton kernel for GPUs that need not be here, and reads the machine code.

``python -m bench.aot`` prints a line per kernel and target: registers, spilled bytes, shared memory,
tensor-core instructions, and what a warp executes in one pass of the main loop, or in all
without one. It fails on a spill, and where a product is formed without tensor-core instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import kernel_calls, machine_code
from bench.machine_code import Code
from fastcl.kernels import launch, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_s?mfma)")
_EXECUTED = ("issued", "fp32", "int", "sfu", "words")  # instructions by unit; words of shared memory
_PLAIN_PRODUCT = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked")


class Row(NamedTuple):
    """What one kernel became on one target."""

    target: str
    kernel: str
    call: str
    tile: str
    code: Code
    spilled: int  # bytes per thread
    tensor_core: int  # instructions in the code, 0 where a product goes without
    needs_tensor_core: bool

    def failed(self) -> bool:
        """Whether the machine code is not what it must be, or cannot be launched."""
        too_large = self.code.shared > _SHARED_LIMIT[self.target]
        return self.spilled > 0 or too_large or (self.needs_tensor_core and self.tensor_core == 0)


def compile_for(target: str, names: Sequence[str], only: Container[str] | None = None) -> list[Row]:
    """Compile what calls would launch on ``target``, each form once; all kernels or ``only`` those named."""
    launched: list[tuple[Any, ...]] = []

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    compile_as_on(target)
    rows: dict[Any, Row] = {}
    with stood_in(target, lambda *args, **options: launched.append((*args, options)), multiplied):
        for call in (call for call in kernel_calls.calls() if call.name in names):
            launched.clear()
            call.run()
            for kernel, grid, *args, options in launched:
                form = form_of(kernel, args, options)
                if form not in rows and (only is None or kernel.fn.__name__ in only):
                    compiled = kernel.warmup(*args, grid=grid, **options)
                    rows[form] = _row(target, call, kernel, options, compiled)
    return list(rows.values())


@contextmanager
def stood_in(
    target: str, launched: Callable[..., None], multiplied: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """The kernels' host code takes this for ``target``; what it launches and multiplies goes to these."""
    precision = "ieee" if target.startswith("gfx") else "tf32x3"  # of float32 products
    with (
        patch.object(launch, "launch", launched),
        patch.object(launch, "matmul", multiplied),
        patch.object(launch, "input_precision", lambda device: precision),
        patch.object(tiles, "architecture", lambda device: target),
    ):
        yield


def compile_as_on(target: str) -> None:
    """From here on this process compiles for ``target``."""
    device = list(TARGETS).index(target)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGETS[target],
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
        )
    )


def form_of(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """What tells one machine code from another."""
    return kernel.fn.__name__, repr(options), _form(tuple(args))


def _form(x: Any) -> Any:
    """What the compiler sees of an argument."""
    if isinstance(x, (tuple, list)):
        return tuple(map(_form, x))
    if isinstance(x, int):
        return "one" if x == 1 else x % 16 == 0
    return x.dtype if isinstance(x, torch.Tensor) else type(x)


def _row(target: str, call: kernel_calls.Call, kernel: Any, options: dict[str, Any], compiled: Any) -> Row:
    code, spilled, text = read(target, compiled)
    tile = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options)
    every_product = not _PLAIN_PRODUCT.search(compiled.asm["ttgir"])
    return Row(
        target,
        kernel.fn.__name__,
        call.name,
        f"{tile} {code.warps}w" if tile else "",
        code,
        spilled,
        len(_TENSOR_CORES.findall(text)) if every_product else 0,
        "tt.dot" in compiled.asm["ttir"],
    )


def read(target: str, compiled: Any) -> tuple[Code, int, str]:
    """A compiled kernel's code, the bytes it spills per thread, and its text."""
    amd = target.startswith("gfx")
    registers, spilled, text = (_read_amd if amd else _read_nvidia)(compiled.asm)
    code = Code(
        registers, compiled.metadata.shared, compiled.metadata.num_warps, *machine_code.count(text, amd)
    )
    return code, spilled, text


def _read_nvidia(asm: Any) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, code


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _read_amd(asm: Any) -> tuple[int, int, str]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    return field("vgpr_count"), field("private_segment_fixed_size"), code


def table(targets: list[str], calls: list[kernel_calls.Call]) -> Iterator[Row]:
    """All rows, as they are ready."""
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        names = [call.name for call in calls]
        jobs = [pool.submit(compile_for, target, names) for target in targets]
        for job in jobs:
            yield from job.result()


def _executed(code: Code) -> tuple[int, ...]:
    part = code.loop if code.loop.issued else code.once
    return part.issued, part.fp32, part.alu + part.integer_products, part.special, part.shared


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument("-k", default="", metavar="NAME", help="only calls whose name holds this")
    arguments = parser.parse_args()
    calls = [call for call in kernel_calls.calls() if arguments.k in call.name]
    heads = ("target", "kernel", "call", "tile", "regs", "spill", "shared", "mma", *_EXECUTED)
    print("{:7} {:16} {:34} {:14} {:>4} {:>5} {:>7} {:>4} {:>6} {:>5} {:>5} {:>4} {:>5}".format(*heads))
    failed = 0
    for row in table(arguments.target or list(TARGETS), calls):
        failed += row.failed()
        print(
            f"{row.target:7} {row.kernel:16} {row.call:34} {row.tile:14} {row.code.registers:4} "
            f"{row.spilled:5} {row.code.shared:7} {row.tensor_core:4} "
            "{:6} {:5} {:5} {:4} {:5}".format(*_executed(row.code))
            + "  FAILED" * row.failed(),
            flush=True,
        )
    wrong = f"{failed} kernels spill registers or miss tensor-core instructions"
    print(wrong if failed else "no spill, and tensor-core instructions wherever there are products")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
