"""A SimCLR step whose encoder sees a chunk at a time: ``python -m bench.large_batch [BATCH] [CHUNK]``.

Prints the peak memory of one step of resnet18 on images of 32 pixels, measured in fresh processes: of the
batch in chunks, of a batch as large as a chunk in one piece, and what the whole batch in one piece would
take by that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

import fastcl
from bench.memory import process_growth
from fastcl.train import cached_step, make_encoder

_ROOT = Path(__file__).parents[1]
_GIB = 2**30


def main() -> None:
    """Measure, in processes of their own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", type=int, nargs="?", default=8192)
    parser.add_argument("chunk", type=int, nargs="?", default=256)
    parser.add_argument("--inside", choices=("whole", "chunks"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        print(growth(given.batch, given.chunk if given.inside == "chunks" else given.batch))
        return
    small = _in_a_process(given.chunk, given.chunk, "whole")
    predicted = small * given.batch / given.chunk
    started = perf_counter()
    chunked = _in_a_process(given.batch, given.chunk, "chunks")
    seconds = perf_counter() - started
    pages = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    print(
        f"resnet18, 32 px, two views, growth of a process in one step:\n"
        f"  {given.chunk} images in one piece: {small / _GIB:.2f} GiB\n"
        f"  {given.batch} images in one piece, by that: {predicted / _GIB:.1f} GiB "
        f"(this machine has {int(pages) / 2**20:.1f} GiB)\n"
        f"  {given.batch} images in chunks of {given.chunk}: {chunked / _GIB:.2f} GiB, in {seconds:.0f} s"
    )


def growth(batch: int, chunk: int) -> int:
    """Bytes by which this process grows in one step; in one piece where ``chunk`` is the batch."""
    torch.manual_seed(0)
    encoder, features = make_encoder("resnet18", 32)
    network = nn.Sequential(encoder, nn.Linear(features, 128))
    views = [torch.randn(batch, 3, 32, 32) for _ in range(2)]

    def embed(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(network(torch.cat(parts)).chunk(2))

    def loss(rows: tuple[Tensor, ...]) -> Tensor:
        return fastcl.nt_xent(rows[0], rows[1], 0.5)

    def step() -> None:
        if chunk == batch:
            loss(embed(tuple(views))).backward()
        else:
            cached_step(embed, list(zip(*(view.split(chunk) for view in views), strict=True)), loss)

    return process_growth(step)


def _in_a_process(batch: int, chunk: int, how: str) -> int:
    command = [sys.executable, "-m", "bench.large_batch", str(batch), str(chunk), "--inside", how]
    return int(subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
