"""What a step of a case does on a GPU that need not be here: kernels and their grids, products, other passes.

The step runs on tensors without data, by the host code that would run on the GPU; what it launches is written
down instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcl
from bench import aot
from bench.cases import LOSSES, Case, step_of
from bench.machine_code import Code
from fastcl.backends.registry import BACKENDS
from fastcl.kernels.device.tile import Side
from fastcl.ops import schema

_WALKS = (
    "statistics",
    "logistic",
    "attend",
    "gradient",
    "loss_gradient",
)  # a loop over the other side's tiles
_NO_WORK = ("empty", "new_empty", "empty_like", "detach", "alias", "_unsafe_view")


class Kernel(NamedTuple):
    """A launch of one of fastcl's kernels."""

    name: str
    passes: tuple[int, ...]  # of the main loop, by each program
    memory: int  # bytes of the tensors it takes, each counted once
    pairs: int  # of the similarity matrix that it looks at
    code: Code


class Product(NamedTuple):
    """A matrix product by the library: (m, k) by (k, n), float32 out."""

    m: int
    n: int
    k: int
    itemsize: int

    @property
    def memory(self) -> int:
        return self.itemsize * self.k * (self.m + self.n) + 4 * self.m * self.n


class Pass(NamedTuple):
    """An operation of torch over whole tensors."""

    name: str
    memory: int  # bytes read and written


Work = Kernel | Product | Pass
CodeOf = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Code]


def of_case(case: Case, target: str, code_of: CodeOf) -> Counter[Work]:
    """What a loss and its gradients launch on ``target``, and how often.

    ``code_of``: a kernel's machine code, from kernel, grid, arguments and options.
    """
    found: Counter[Work] = Counter()
    arguments = replace(case, device="meta").arguments()
    run = step_of(replace(case, device="cpu"), LOSSES[case.loss].fastcl, arguments)
    with _stood_in(target, found, code_of), fastcl.use_backend("triton"), _Passes(found):
        run()
    return found


@contextmanager
def _stood_in(target: str, found: Counter[Work], code_of: CodeOf) -> Iterator[None]:
    """The Triton backend takes tensors without data, and writes down in ``found`` what it would launch."""

    def launched(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if 0 not in grid:
            found[_kernel(kernel, grid, args, options, code_of(kernel, grid, args, options))] += 1

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        found[Product(a.shape[0], b.shape[1], a.shape[1], a.itemsize)] += 1
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    willing = replace(BACKENDS["triton"], missing=lambda: None, unsupported_reasons=lambda request: [])
    with patch.dict(BACKENDS, {"triton": willing}), aot.stood_in(target, launched, multiplied):
        yield


def _kernel(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], code: Code
) -> Kernel:
    name, named = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False))
    programs = prod(grid)
    passes, pairs = (_trips(args, options),) * programs, 0
    if "BLOCK_N" in options:
        own, other = named["own"].count, named["other"].count
        pairs = own * other
        if name in _WALKS:
            passes = tuple(_tiles(grid, other, options))
        elif code.loop.issued:
            raise ValueError(f"{name} loops over tiles: how often is not known here")
    if options.get("TRIANGLE"):
        pairs //= 2
    if named.get("matrix") is not None:  # the rows are not read then
        args = tuple(x._replace(rows=None) if isinstance(x, Side) else x for x in args)
    return Kernel(name, passes, _memory(args), pairs, code)


def _tiles(grid: tuple[int, ...], others: int, options: dict[str, Any]) -> Iterator[int]:
    """How many tiles each program visits, as ``tile.split_of`` says, in the order of the programs."""
    blocks, splits = (*grid, 1)[:2]
    tiles_of_all = ceil(others / options["BLOCK_N"])
    for split in range(splits):
        for block in range(blocks):
            first = block * options["BLOCK_M"] // options["BLOCK_N"] if options.get("TRIANGLE") else 0
            share = ceil((tiles_of_all - first) / splits)
            start = first + split * share
            yield max(0, min(start + share, tiles_of_all) - start)


def _trips(args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """About how often a kernel without tiles goes round its loops: over slots, or over components."""
    slots: int = sum(x.slots for x in _partials(args))
    slots_at_once, width, width_at_once = (int(options.get(name, 1)) for name in ("SLOTS", "D", "BLOCK_D"))
    return max(1, ceil(slots / slots_at_once), ceil(width / width_at_once))


def _partials(args: tuple[Any, ...]) -> Iterator[Any]:
    for x in args:
        if isinstance(x, tuple):
            if hasattr(x, "slots"):
                yield x
            yield from _partials(x)


def _memory(x: Any) -> int:
    distinct = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t.numel() * t.itemsize
        for t in tree_leaves(x)
        if isinstance(t, Tensor)
    }
    return sum(distinct.values())


class _Passes(TorchDispatchMode):
    """Writes down torch's operations; fastcl's own run as they would on the GPU."""

    def __init__(self, found: Counter[Work]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        space, name = func.name().split(".")[0].split("::")
        with self:
            if space == "fastcl":
                return getattr(schema, f"_{name}")(*args, **kwargs)
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if name not in _NO_WORK and not func.is_view and (memory := _memory((args, result))):
            self._found[Pass(name, memory)] += 1
        return result
