"""Which unit of a GPU each instruction of a program keeps busy: counted inside its loop, and outside it.

Reads what ``nvdisasm`` prints of a cubin and the assembly of an AMD program. An instruction under a predicate
counts as executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NVIDIA_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_AMD_LINE = re.compile(r"^\t([a-z]\w+)\s*(.*)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"(\.L\w+)")


class Instruction(NamedTuple):
    """A mnemonic and its operands."""

    name: str
    operands: str


class Counts(NamedTuple):
    """What one warp, or one wavefront, executes; memory per lane."""

    issued: int = 0  # instructions
    fp32: int = 0  # additions and products
    integer_products: int = 0
    alu: int = 0  # other integers, comparisons, selections, moves
    special: int = 0  # exp2, logarithms, reciprocals, conversions; on AMD integer products too
    shared: int = 0  # words of 4 bytes to or from shared memory or another lane
    loaded: int = 0  # bytes from global memory to registers
    copied: int = 0  # to shared memory, without waiting
    stored: int = 0
    waits: int = 0  # loads to registers, which somebody waits for
    barriers: int = 0
    mma: int = 0  # multiply-adds of a warp's matrix instructions
    wgmma: int = 0  # of a warpgroup's, a quarter of it


class Code(NamedTuple):
    """What a compiled kernel takes of a processor, and what its warps execute."""

    registers: int = 0  # per lane
    shared: int = 0  # bytes per program
    warps: int = 1  # per program
    loop: Counts = Counts()  # one pass of the loop with the products, else of the longest
    once: Counts = Counts()  # all that is outside it


def count(code: str, amd: bool) -> tuple[Counts, Counts]:
    """Of one pass of the main loop (zeros without one), and of the rest."""
    instructions, loops = _read(code, amd)
    kind = _amd if amd else _nvidia
    counted = [kind(instruction) for instruction in instructions]
    bodies = [range(first, last + 1) for first, last in loops if last > first]
    main = max(bodies, key=lambda body: (_products(counted, body), len(body)), default=range(0))
    outside = (x for i, x in enumerate(counted) if i not in main)
    return _sum(counted[i] for i in main), _sum(outside)


def _products(counted: list[Counts], body: range) -> int:
    return sum(counted[i].mma + counted[i].wgmma for i in body)


def _sum(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, Counts(), strict=True)))


def _read(code: str, amd: bool) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions, and the first and last of each loop."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    loops = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := (_AMD_LINE if amd else _NVIDIA_LINE).match(line):
            instruction = Instruction(match[1], match[2])
            branches = instruction.name.startswith(("BRA", "s_cbranch", "s_branch"))
            target = _TARGET.search(instruction.operands) if branches else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(found)))
            found.append(instruction)
    return found, loops


_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC")
_SHARED = ("SHFL", "LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS")
_CONTROL = ("BRA", "EXIT", "NOP", "CALL", "RET", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE")
_NO_UNIT = (*_CONTROL, "WARPGROUP", "WARPSYNC", "LDC", "S2R", "ERRBAR", "CCTL", "YIELD", "ULDC")


def _nvidia(instruction: Instruction) -> Counts:
    name, *modifiers = instruction.name.split(".")
    if name == "HGMMA":  # HGMMA.64x128x16
        m, n, k = map(int, modifiers[0].split("x"))
        return Counts(issued=1, wgmma=m * n * k // 4)
    if name == "HMMA":  # HMMA.16816: 16 x 8 x 16
        return Counts(issued=1, mma=16 * 8 * (16 if "16816" in modifiers else 8))
    width = next((int(x) // 8 for x in modifiers if x in ("64", "128")), 4)
    width = 2 if "U16" in modifiers else 1 if "U8" in modifiers else width
    if name in ("LDSM", "STSM"):
        width = 4 * int(modifiers[-1] if modifiers[-1].isdigit() else 1)
    words = -(-width // 4) if name in _SHARED else 0
    counts = Counts(issued=1, shared=words)
    if name == "LDGSTS":
        return counts._replace(copied=width)
    if name == "LDG":
        return counts._replace(loaded=width, waits=1)
    if name == "STG":
        return counts._replace(stored=width)
    if name == "BAR":
        return counts._replace(barriers=1)
    if name in ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"):
        return counts._replace(fp32=1)
    if name == "IMAD":
        return counts._replace(integer_products=1)
    if name in _SPECIAL:
        return counts._replace(special=1)
    is_alu = not (name in _SHARED or name in _NO_UNIT or name.startswith("U"))
    return counts._replace(alu=int(is_alu))


def _amd(instruction: Instruction) -> Counts:
    name = re.sub(r"_(e32|e64|dpp|sdwa)$", "", instruction.name)
    counts = Counts(issued=1)
    if product := re.match(r"v_s?mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, product.groups())
        return counts._replace(mma=m * n * k)
    if name == "s_barrier":
        return counts._replace(barriers=1)
    if memory := re.match(r"(?:buffer|global|flat)_(load|store)_(?:dwordx?(\d*)|(\w+))", name):
        width = 4 * int(memory[2] or 1) if memory[3] is None else 1 if "byte" in memory[3] else 2
        if memory[1] == "store":
            return counts._replace(stored=width)
        return counts._replace(loaded=width, waits=1)
    if name.startswith("ds_"):
        bits = re.search(r"_[bu](\d+)", name)
        words = max(1, int(bits[1]) // 32) if bits else 1
        return counts._replace(shared=words * (2 if "2" in name.split("_")[1] else 1))
    if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_", name):
        return counts._replace(special=1)
    if re.match(r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|fmaak|fmamk|mac)_f32", name):
        return counts._replace(fp32=1)
    return counts._replace(alu=int(name.startswith("v_")))
