"""How long a step's work takes on a card, as a band: from counted instructions and bytes, published rates.

A processor (an SM, a CU) has several units: tensor cores, vector units, exp2's, shared memory, the way to the
L2. One pass of a kernel's loop keeps each busy for some cycles; memory is one more unit, of the whole card.

- low: the units overlap perfectly. A pass takes as long as its busiest unit, no processor idles at the end,
  what fits the cache is there, and the clock is the highest.
- high: within a program nothing overlaps. A pass takes the sum over the units; a wait for memory is hidden by
  the processor's other programs only, the last wave takes as long as a full one, all data come from memory,
  and the clock is what matrix products leave of it.
- likely: within a program loads to registers, products and the rest follow one another; in each the units
  overlap, since the instructions are independent. n programs share the processor, each in its own phase;
  warps that meet at no barrier count as programs. A pass takes ``busiest + (phases + wait - busiest) / n``:
  the pessimistic balanced-job bound of n customers in a closed queueing network (Zahorjan et al. 1982).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from bench.cards import Card
from bench.machine_code import Code, Counts
from bench.steps import Kernel, Pass, Product, Work

_BARRIER = 20  # cycles: the latency of shared memory
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 128, 256  # of a program of the library's products
_LEAST_DEPTH = 512  # components of each program where several share a tile of the product
_SCHEDULERS = 4  # of a processor
_PRODUCTS, _REST = "tensor cores", ("vector units", "exp2", "shared memory")
_RESERVED = 1024  # bytes of shared memory that each program costs besides


class Band(NamedTuple):
    """Seconds."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Band:
        return Band(*(factor * x for x in self))


class Cost(NamedTuple):
    """Of one step."""

    gpu: Band
    host: Band
    limits: dict[str, float]  # shares of the likely time on the GPU, by what takes it

    def step(self) -> Band:
        """Until the GPU is waited for: the host runs ahead where it can."""
        return Band(*(max(x) + y for *x, y in zip(self.gpu, self.host, _SYNCHRONIZATION, strict=True)))


def total(bands: Sequence[Band]) -> Band:
    return Band(*map(sum, zip(*bands, strict=True))) if bands else Band(0.0, 0.0, 0.0)


# On the GPU from a kernel's end to the next one's work: assumed, 2 to 5 us are usual in traces.
_START = Band(1e-6, 2.5e-6, 5e-6)
# On the host. Triton 3.9's binder takes 9 to 22 us for these kernels on a Xeon, without the driver's part; an
# op with its gradient 84 to 178 us. Torch's operations, and waiting for the GPU: assumed.
_HOST = {Kernel: Band(12e-6, 25e-6, 40e-6), Product: Band(4e-6, 8e-6, 15e-6), Pass: Band(3e-6, 5e-6, 10e-6)}
_HOST_STEP = Band(84e-6, 130e-6, 178e-6)
_SYNCHRONIZATION = Band(2e-6, 8e-6, 20e-6)


def of_step(card: Card, work: Counter[Work]) -> Cost:
    gpu, host, limits = [], [_HOST_STEP], Counter[str]()
    for item, times in work.items():
        band, limit = of_work(card, item)
        band = total([band, _START]).times(times)
        gpu.append(band)
        host.append(_HOST[type(item)].times(times))
        limits[limit] += band.likely  # type: ignore[assignment]
    whole = total(gpu)
    return Cost(whole, total(host), {name: x / whole.likely for name, x in limits.most_common()})


def of_work(card: Card, item: Work) -> tuple[Band, str]:
    """Seconds, and what limits it."""
    if isinstance(item, Kernel):
        return _of_kernel(card, item)
    if isinstance(item, Product):
        return _of_product(card, item), "products"
    reads = {"topk": Band(2, 9, 33)}.get(item.name, Band(1, 1, 1))  # int64 in steps of 8 or 2 bits
    return Band(*(x * y for x, y in zip(_of_memory(card, item.memory), reads, strict=True))), "other passes"


def _of_memory(card: Card, size: int) -> Band:
    """Of bytes that are read or written once."""
    beyond = max(0.0, size - card.cache)
    likely = size if 2 * size > card.cache else 0.0
    return Band(beyond / card.memory, likely / card.copied, size / card.copied)


def _of_product(card: Card, item: Product) -> Band:
    """Where tiles are fewer than processors, the library lets several programs share one, at best."""
    flops = 2 * item.m * item.n * item.k
    tiles = ceil(item.m / _ROWS_AT_ONCE) * ceil(item.n / _COLUMNS_AT_ONCE)
    shares = max(1, min(card.processors // tiles, item.k // _LEAST_DEPTH))
    filled = tiles * shares / (card.processors * ceil(tiles * shares / card.processors))
    small_tiles = ceil(item.m / 64) * ceil(item.n / 64)
    filled_alone = min(filled, small_tiles / card.processors)
    memory = _of_memory(card, item.memory + (8 * item.m * item.n * shares if shares > 1 else 0))
    best, filled_time, alone = (flops / card.matrix / x for x in (1.0, filled, filled_alone))
    return Band(
        max(best, memory.low),
        max(filled_time, memory.likely) + min(filled_time, memory.likely) / 2,  # two tiles per processor
        alone + memory.high,
    )


def _of_kernel(card: Card, kernel: Kernel) -> tuple[Band, str]:
    """The busiest processor's programs, and the card's memory."""
    programs, code = len(kernel.passes), kernel.code
    sharing = min(resident(card, code), ceil(programs / card.processors))
    wait = card.waits[kernel.memory > card.cache] * (code.loop.waits > 0) + _BARRIER * code.loop.barriers
    loop, unit = _cycles(card, code.loop, code.warps, sharing, wait)
    once, unit_once = _cycles(card, code.once, code.warps, sharing, sum(card.waits))
    passes, share = sum(kernel.passes), programs / card.processors
    most, waves = _busiest(kernel.passes, card.processors, sharing)
    cycles = (
        passes / card.processors * loop.low + share * once.low,
        most * loop.likely + ceil(share) * once.likely,
        max(most, waves * max(kernel.passes)) * loop.high + waves * once.high,
    )
    compute = Band(*(x / clock for x, clock in zip(cycles, card.clocks, strict=True)))
    memory = _of_memory(card, kernel.memory)
    band = Band(
        max(compute.low, memory.low),
        max(compute.likely, memory.likely) + min(compute.likely, memory.likely) / sharing,
        compute.high + memory.high,
    )
    in_loop = most * loop.likely > ceil(share) * once.likely
    limit = "memory" if memory.likely > compute.likely else unit if in_loop else unit_once
    return band, f"{kernel.name} ({limit})"


def resident(card: Card, code: Code) -> int:
    """Programs that share a processor."""
    registers = 8 * ceil(code.registers / 8) * card.lanes * code.warps
    by_shared = card.shared // (code.shared + _RESERVED)
    return max(1, min(card.registers // max(1, registers), by_shared, card.warps // code.warps))


def units(card: Card, counts: Counts, warps: int) -> dict[str, float]:
    """Cycles that one program keeps each unit of its processor busy."""
    lanes = card.lanes * warps
    floats = counts.fp32 + counts.integer_products * card.fp32 / 64
    vector = max(counts.issued * warps / _SCHEDULERS, lanes * floats / card.fp32)
    vector = max(vector, lanes * (counts.alu / card.alu if card.alu else (floats + counts.alu) / card.fp32))
    return {
        _PRODUCTS: warps * (counts.mma / card.mma + counts.wgmma / card.wgmma),
        _REST[0]: vector,
        _REST[1]: lanes * counts.special / card.special,
        _REST[2]: lanes * 4 * counts.shared / 128,
        "L2": lanes * (counts.loaded + counts.copied + counts.stored) / card.l2,
    }


def _cycles(card: Card, counts: Counts, warps: int, sharing: int, wait: float) -> tuple[Band, str]:
    """Of a processor, for one program's pass."""
    busy = units(card, counts, warps)
    busiest, unit = max((cycles, unit) for unit, cycles in busy.items())
    to_registers = card.lanes * warps * counts.loaded / card.l2
    phases = to_registers + busy[_PRODUCTS] + max(busy[unit] for unit in _REST)
    customers = sharing * max(1, warps // _SCHEDULERS) if counts.barriers == 0 else sharing
    likely = busiest + max(0.0, phases + wait - busiest) / customers
    return Band(busiest, likely, sum(busy.values()) + wait / sharing), unit


def _busiest(passes: Sequence[int], processors: int, sharing: int) -> tuple[int, int]:
    """Passes of the busiest processor, and its programs if every wave were a full one."""
    waves = sharing * ceil(len(passes) / (processors * sharing))
    if len(passes) <= processors * sharing:  # all start at once, in turn
        return max(sum(passes[i::processors]) for i in range(min(processors, len(passes)))), waves
    if len(set(passes)) == 1:
        return ceil(len(passes) / processors) * passes[0], waves
    loads = [0] * processors
    for count in passes:
        heapq.heapreplace(loads, loads[0] + count)
    return max(loads), waves
