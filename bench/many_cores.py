"""The CPU's tasks on more cores than there are: ``python -m bench.many_cores`` writes a table.

No time is predicted, only which share of that many cores is left once tasks wait for their turns and for the
last of a pass. A task takes as long as its multiply-adds; memory and launches cost nothing here.
"""

from __future__ import annotations

import argparse
import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fastcl
from bench.timing import paired
from fastcl.testing.host import host_ops

OUT = Path(__file__).parent / "results" / "many-cores.md"
CORES = (2, 4, 8, 16, 32, 64)
WIDTH = 128
_BLOCK = 256  # rows of an owner, and of a pass over the keys


@dataclass(frozen=True)
class Task:
    """What one core does at a time.

    Attributes:
        pairs: of rows; how many multiply-adds it takes is in proportion to them.
        sums: what it adds to, which tasks before it in the list must have left.
    """

    pairs: float
    sums: tuple[int, ...] = ()


def planned(queries: int, keys: int, *, symmetric: bool, products: float) -> list[Task]:
    """A pass over all tiles, each adding to the sums of both its sides."""
    table = host_ops().plan(torch.empty(0), queries, keys, symmetric).tolist()
    return [Task(pairs * products, tuple({query, key})) for query, key, pairs in table]


def owned(rows: int, keys: int, *, products: float) -> list[Task]:
    """A pass in which a block of rows meets all keys and adds to its own sums only."""
    blocks = -(-rows // _BLOCK)
    return [Task(keys * rows / blocks * products)] * blocks


def over_keys(queries: int, keys: int, *, products: float) -> list[Task]:
    """A pass over the keys for blocks of queries, in parts of the keys."""
    parts = host_ops().parts_of_keys(torch.empty(0), queries, keys)
    blocks = -(-queries // _BLOCK)
    return [Task(queries * keys / (parts * blocks) * products)] * (parts * blocks)


def makespan(tasks: Iterable[Task], cores: int) -> float:
    """When the last core is done: each takes the next of the list and waits until its sums are left."""
    free = [0.0] * cores
    left: dict[int, float] = {}
    for task in tasks:
        start = max(heapq.heappop(free), *(left.get(x, 0.0) for x in task.sums), 0.0)
        end = start + task.pairs
        left.update(dict.fromkeys(task.sums, end))
        heapq.heappush(free, end)
    return max(free)


def schedules() -> Iterator[tuple[str, str, float, Sequence[Sequence[Task]]]]:
    """Case, schedule, multiply-adds of the fewest products there are, and the tasks of each pass."""
    for batch in (256, 1024, 4096):
        rows = 2 * batch
        case, least = f"nt_xent {batch:,}", 2.0 * rows * rows
        forward = planned(rows, rows, symmetric=True, products=1)
        backward = planned(rows, rows, symmetric=True, products=3)
        yield case, "in turns (used)", least, (forward, backward)
        yield case, "rows' owners", least, (forward, owned(rows, rows, products=2))
    for batch in (1024, 4096):
        passes = [planned(batch, batch, symmetric=False, products=products) for products in (1, 3)]
        yield f"clip {batch:,}", "in turns (used)", 4.0 * batch**2, passes
        owners = [owned(batch, batch, products=products) for products in (1, 1, 2, 2)]
        yield f"clip {batch:,}", "rows' owners", 4.0 * batch**2, owners
    queue = over_keys(256, 65_536, products=2)
    yield "moco 256 x 65,536", "parts of the keys (used)", 2.0 * 256 * 65_536, (queue,)
    passes = [planned(256, 65_536, symmetric=False, products=products) for products in (1, 3)]
    yield "statistics 256 x 65,536", "in turns (used)", 4.0 * 256 * 65_536, passes


def measured() -> Iterator[str]:
    """How many times as fast as one thread all of this machine's are."""
    threads = os.cpu_count() or 1
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4096, WIDTH, generator=generator, requires_grad=True) for _ in range(2))
    queue = torch.randn(65_536, WIDTH, generator=generator)

    def step(loss: Callable[[], torch.Tensor], count: int) -> None:
        torch.set_num_threads(count)
        loss().backward()

    cases: dict[str, Callable[[], torch.Tensor]] = {
        "nt_xent 1,024": lambda: fastcl.nt_xent(query[:1024], key[:1024], 0.1),
        "nt_xent 4,096": lambda: fastcl.nt_xent(query, key, 0.1),
        "clip 4,096": lambda: fastcl.clip_loss(query, key, torch.tensor(10.0)),
        "moco 256 x 65,536": lambda: fastcl.info_nce(query[:256], key[:256], queue, temperature=0.1),
    }
    for case, loss in cases.items():
        both = paired(partial(step, loss, 1), partial(step, loss, threads), budget=10)
        yield f"| {case} | {threads} threads: {both.ratio:.2f} times as fast as one |"


def table() -> str:
    """Of all schedules: the share of as many cores that is used for the fewest products."""
    text = [
        f"| case | schedule | {' | '.join(f'{n} cores' for n in CORES)} |",
        "|---|---|" + len(CORES) * "--:|",
    ]
    for case, name, least, passes in schedules():
        shares = [least / (cores * sum(makespan(tasks, cores) for tasks in passes)) for cores in CORES]
        text.append(f"| {case} | {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(text)


def main() -> None:
    """Write the table to bench/results/many-cores.md."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = "\n".join(["", "| measured, 128 components | |", "|---|---|", *measured(), ""])
    OUT.write_text(f"# More cores than there are\n\n{table()}\n{found}")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
