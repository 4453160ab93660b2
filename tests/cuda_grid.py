"""The CUDA backend on the host: its kernels run on CPU tensors, a thread per warp."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

import fastcl
from fastcl.backends.registry import BACKENDS
from fastcl.testing.host import host_ops

ROOMY = 1 << 30  # bytes of shared memory


class Grid:
    """What the kernels are given: how many blocks may live at once, and their shared memory."""

    def __init__(self):
        self.blocks, self.shared_bytes = 6, ROOMY

    def one_positive(self, *arguments):
        return host_ops().one_positive(*arguments, self.blocks, self.shared_bytes)

    def sup_con(self, *arguments):
        return host_ops().sup_con(*arguments, self.blocks, self.shared_bytes)

    def mix_negatives(self, *arguments):
        return host_ops().mix_negatives(*arguments, self.blocks, self.shared_bytes)

    def enqueue(self, *arguments):
        host_ops().enqueue(*arguments, self.blocks)


@contextmanager
def in_place_of_the_cpu(monkeypatch):
    """Puts the CUDA backend in the place of the CPU's, and its kernels' runs on the host in theirs."""
    grid = Grid()
    losses, others = (torch.library.Library(name, "IMPL") for name in ("fastcl", "fastcl_native"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden
        losses.impl("one_positive", grid.one_positive, "CPU", allow_override=True)
        losses.impl("sup_con", grid.sup_con, "CPU", allow_override=True)
    others.impl("mix_negatives", grid.mix_negatives, "CPU")
    others.impl("enqueue", grid.enqueue, "CPU")
    cpu = BACKENDS["cpu"]
    on_the_host = replace(
        BACKENDS["cuda"],
        name="cpu",
        missing=cpu.missing,
        unsupported_reasons=cpu.unsupported_reasons,
        auto=True,
    )
    monkeypatch.setitem(BACKENDS, "cpu", on_the_host)
    with fastcl.use_backend("cpu"):
        yield grid
    losses._destroy()
    others._destroy()
