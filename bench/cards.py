"""GPUs as their makers and others publish them: rates per clock and processor (SM, CU), caches, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Card:
    """A multiply-add counts once."""

    name: str
    target: str
    processors: int
    clocks: tuple[float, float, float]  # Hz: the highest, that of the published peak, under matrix products
    matrix: float  # FLOP/s of a large bfloat16 product by the library
    matrix_source: str
    mma: float  # multiply-adds of a warp's matrix instructions
    wgmma: float  # of a warpgroup's
    fp32: float  # lanes
    alu: float  # lanes; 0: the unit is that of fp32
    special: float  # lanes
    l2: float  # bytes
    cache: float  # bytes of the last level
    memory: float  # bytes/s, published
    copied: float  # bytes/s that a copy reaches, counting what is read and written
    waits: tuple[float, float]  # cycles, for the L2 and for memory
    registers: int = 65536  # of 4 bytes
    shared: int = 228 << 10  # bytes
    warps: int = 64  # at most
    lanes: int = 32


_SAME_SHARE = "assumed, with the H100's share of the peak"
_HERE = "8192 x 8192 x 8192 on random data, measured on one"

# Processors, peaks, caches, memory, registers, shared memory, the L2's bytes per clock: NVIDIA's white papers
# on the A100's and the H100's architecture, the data sheets of A100, H100 and H200. The clock of the peak is
# peak / (2 processors mma). fp32, integers, exp2, shared memory per clock: CUDA C++ Programming Guide, table
# 'Throughput of Native Arithmetic Instructions'. Waits: doi:10.1016/j.ultsonch.2023.106546, table 3.
A100 = Card(
    name="A100",
    target="sm_80",
    processors=108,
    clocks=(1.41e9, 1.41e9, 0.81 * 1.41e9),
    matrix=0.81 * 312e12,
    matrix_source=_SAME_SHARE,
    mma=1024,
    wgmma=1024,
    fp32=64,
    alu=64,
    special=16,
    l2=5120 / 108,
    cache=40e6,
    memory=2.039e12,
    copied=0.9 * 2.039e12,  # the others' share
    waits=(200, 400),
    shared=164 << 10,
)
# A warp's own matrix instructions reach 62% of a warpgroup's: Luo et al. 2024, arXiv:2402.13499. Copies,
# products and the highest clock were seen on one H100 80GB HBM3 and on one H200.
H100 = replace(
    A100,
    name="H100",
    target="sm_90",
    processors=132,
    clocks=(1.98e9, 1.83e9, 798 / 989.4 * 1.83e9),
    matrix=798e12,
    matrix_source=_HERE,
    mma=0.62 * 2048,
    wgmma=2048,
    fp32=128,
    l2=5120 / 132,
    cache=50e6,
    memory=3.35e12,
    copied=3.0e12,
    shared=228 << 10,
)
H200 = replace(
    H100,
    name="H200",
    clocks=(1.98e9, 1.83e9, 788 / 989.4 * 1.83e9),
    matrix=788e12,
    cache=60e6,
    memory=4.8e12,
    copied=4.3e12,
)
# AMD's white paper on CDNA 3, the MI300X data sheet, the guide to the instruction set (exp2 at a quarter of
# the rate). Independent measurements report products at 45% of the peak and copies at 81% of the bandwidth.
# Waits: assumed, from plots by Chips and Cheese.
MI300X = Card(
    name="MI300X",
    target="gfx942",
    processors=304,
    clocks=(2.1e9, 2.1e9, 0.6 * 2.1e9),
    matrix=0.45 * 1307.4e12,
    matrix_source="45% of the peak, as independent measurements report",
    mma=1024,
    wgmma=1024,
    fp32=64,
    alu=0,
    special=16,
    l2=2048 / 38,
    cache=256e6,
    memory=5.3e12,
    copied=0.81 * 5.3e12,
    waits=(500, 1500),
    registers=131072,
    shared=64 << 10,
    warps=32,
    lanes=64,
)
CARDS = {card.name: card for card in (A100, H100, H200, MI300X)}
