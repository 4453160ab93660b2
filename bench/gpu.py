"""A GPU's first measurement, within minutes: ``python -m bench.gpu FOLDER``.

Every case by fastcl, by plain PyTorch, by the same compiled and by the packages of ``bench.rivals``:
milliseconds of the loss and its gradients, peak memory beyond the inputs, the gradients' distance from those
of float32, the share of the matrix rate measured in the same run, the time as a CUDA graph, and the host's.
What fails is written down and stops nothing; what there is no time for is named. FOLDER receives gpu.json
and gpu.md after every row, and at the end, also when it is told to end, gpu.png.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcl
from bench import machine
from bench.cases import COMPILE, FASTCL, LOSSES, PLAIN, Case, Step, step_of
from bench.rivals import RIVALS
from bench.timing import rounds_within, seconds

# products of the whole similarity matrix that a loss and its gradients cannot do without
FLOOR_PRODUCTS = {"nt_xent": 2, "sup_con": 2, "clip_loss": 4, "info_nce": 4, "siglip_loss": 3, "moco": 2}
_SECONDS, _PLAIN_BYTES = 0.5, 24 << 30  # per row; above them a matrix of all pairs is not made
_LONG = 0.5  # seconds: such a step has no launches to hide
_MOST_PAIRS = 1 << 36  # of the dtypes after the first

CASES = (
    Case("nt_xent", 256, 128),
    Case("nt_xent", 32_768, 512),
    Case("clip_loss", 32_768, 512),
    Case("moco", 256, 128, keys=65_536),
    Case("siglip_loss", 65_536, 512),
    Case("info_nce", 16_384, 256),
    Case("sup_con", 4096, 128, classes=1000),
    Case("nt_xent", 4096, 128),
    Case("clip_loss", 1024, 512),
    Case("mochi", 256, 128, keys=65_536),
    Case("info_nce", 16_384, 1024),
    Case("nt_xent", 1 << 19, 128),
)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Row:
    """What one side of a case took; ``failed`` says why the rest is missing."""

    case: str
    side: str
    failed: str | None = None
    ms: float | None = None
    quartiles: tuple[float, float] | None = None
    graph_ms: float | None = None  # replayed as a CUDA graph; None where it could not be captured
    host_us: float | None = None  # until the call returns, the GPU's work aside
    peak_mib: float | None = None  # beyond the inputs
    gradient_error: float | None = None  # against float32 inputs on 'chunked', in the L2 norm
    teraflops: float | None = None  # of the floor's products
    share: float | None = None  # of the matrix rate


def matrix_teraflops(dtype: torch.dtype, device: str, edge: int) -> float:
    """What a library's square product reaches."""
    x = torch.randn(edge, edge, device=device).to(dtype)
    _, median, _ = _times(_synchronized(partial(torch.mm, x, x), device))
    return 2 * edge**3 / median / 1e12


def measure(case: Case, side: str, function: Callable[..., Tensor], matrix_rate: float) -> Row:
    """One row; raises what the call raises."""
    arguments = case.arguments()
    run = step_of(case, function, arguments)
    on_gpu = case.device != "cpu"
    error = _gradient_error(case, run())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    low, median, high = _times(run)
    teraflops = FLOOR_PRODUCTS.get(case.loss, 0) * 2 * case.pairs * case.dim / median / 1e12
    return Row(
        case.name,
        side,
        ms=1e3 * median,
        quartiles=(1e3 * low, 1e3 * high),
        graph_ms=_graph_ms(case, function, arguments)
        if on_gpu and side == FASTCL and median < _LONG
        else None,
        host_us=_host_us(case, function, arguments) if side == FASTCL else None,
        peak_mib=peak if on_gpu else None,
        gradient_error=error,
        teraflops=teraflops or None,
        share=teraflops / matrix_rate if teraflops else None,
    )


def _times(run: Callable[[], object]) -> tuple[float, float, float]:
    """Quartiles of the seconds."""
    rounds = [seconds(run) for _ in range(rounds_within(_SECONDS, [run]))]
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return low, median, high


def _synchronized(run: Callable[[], object], device: str) -> Callable[[], None]:
    def call() -> None:
        run()
        if device != "cpu":
            torch.accelerator.synchronize()

    return call


def _gradient_error(case: Case, results: tuple[Tensor, ...]) -> float | None:
    """None where float32 rows would not fit."""
    if case.loss == "mochi" or case.pairs > 1 << 32:
        return None
    exact_case = replace(case, dtype=torch.float32)
    rounded = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.arguments()]
    leaves = [
        x.detach().requires_grad_(y.requires_grad) if isinstance(y, Tensor) else y
        for x, y in zip(rounded, case.arguments(), strict=True)
    ]
    with fastcl.use_backend("chunked"):
        exact = step_of(exact_case, LOSSES[case.loss].fastcl, tuple(leaves))()
    got, true = (torch.cat([x.flatten().double() for x in part[1:3]]) for part in (results, exact))
    return float((got - true).norm() / true.norm())


def _work(case: Case, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Step:
    """As ``step_of``, without waiting for the GPU."""
    return step_of(replace(case, device="cpu"), function, arguments)


def _host_us(case: Case, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float:
    run, end = _work(case, function, arguments), time.monotonic() + _SECONDS
    times: list[float] = []
    while len(times) < 20 and (time.monotonic() < end or not times):
        _synchronized(lambda: None, case.device)()
        times.append(seconds(run))
    return 1e6 * statistics.median(times)


def _graph_ms(case: Case, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float | None:
    run, graph, side_stream = _work(case, function, arguments), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(side_stream):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    except Exception:  # of whatever kind: it must not cost the row
        torch.cuda.synchronize()
        return None
    return 1e3 * _times(_synchronized(graph.replay, case.device))[1]


def sides_of(case: Case) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What makes the function of each side, fastcl's first."""
    loss = LOSSES[case.loss]
    sides: dict[str, Callable[[], Callable[..., Tensor]]] = {FASTCL: lambda: loss.fastcl}
    sides |= {name: partial(lambda rival: rival, rival) for name, rival in RIVALS.get(case.loss, {}).items()}
    if 3 * case.pairs * case.dtype.itemsize <= _PLAIN_BYTES:
        sides |= {PLAIN: lambda: loss.plain, COMPILE: lambda: loss.function(COMPILE)}
    return sides


def runs(device: str) -> Iterator[tuple[Case, str, Callable[[], Callable[..., Tensor]]]]:
    """The most wanted first: bfloat16, then the other dtypes; last what takes long to compile."""
    rounds = [(dtype, False) for dtype in _DTYPES] + [(_DTYPES[0], True)]
    for dtype, by_compiler in rounds:
        for listed in CASES:
            case = replace(listed, device=device, dtype=dtype)
            if device == "cpu":
                case = replace(case, rows=min(case.rows, 64), keys=min(case.keys, 2048))
            if dtype != _DTYPES[0] and listed.pairs > _MOST_PAIRS:
                continue
            for side, make in sides_of(case).items():
                if (side == COMPILE) == by_compiler:
                    yield case, side, make


def row(
    case: Case, side: str, make: Callable[[], Callable[..., Tensor]], matrix_rates: dict[str, float]
) -> Row:
    """As :func:`measure`, or why there is nothing to report."""
    try:
        return measure(case, side, make(), matrix_rates[str(case.dtype).removeprefix("torch.")])
    except Exception as error:
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if case.device != "cpu":
        torch.cuda.empty_cache()  # after a matrix that did not fit
    return Row(case.name, side, failed=failed)


def markdown(found: dict[str, Any]) -> str:
    """The rows as a table."""
    described, rows = found["machine"], [Row(**row) for row in found["rows"]]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found["matrix_teraflops"].items())
    lines = ["# On a GPU", "", f"{described['gpu'] or described['cpu']}. Matrix rates, TFLOP/s: {rates}.", ""]
    columns = ("case", "side", "ms", "as a graph", "host, us", "peak, MiB", "error", "TFLOP/s", "share")
    lines += [f"| {' | '.join(columns)} |", "|---|---" + "|--:" * (len(columns) - 2) + "|"]
    for row in rows:
        numbers = (row.ms, row.graph_ms, row.host_us, row.peak_mib)
        cells = [row.case, row.side, *("" if x is None else f"{x:.3g}" for x in numbers)]
        cells.append("" if row.gradient_error is None else f"{row.gradient_error:.1e}")
        cells.append("" if row.teraflops is None else f"{row.teraflops:.3g}")
        cells.append(row.failed or ("" if row.share is None else f"{row.share:.0%}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """How many times as long as fastcl the others take, a group of bars per case."""
    from matplotlib import pyplot

    rows = [Row(**row) for row in found["rows"] if row["ms"] is not None]
    own = {row.case: row.ms for row in rows if row.side == FASTCL and row.ms}
    others = [row for row in rows if row.side != FASTCL and row.case in own and row.ms]
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.22 * len(others)), layout="constrained")
    colours = {side: f"C{i}" for i, side in enumerate(dict.fromkeys(row.side for row in others))}
    axes.barh(
        [f"{row.case}  {row.side}" for row in others],
        [(row.ms or 0) / (own[row.case] or 1) for row in others],
        color=[colours[row.side] for row in others],
    )
    axes.axvline(1, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set(
        xlabel="time, as a multiple of fastcl's",
        xscale="log",
        title=found["machine"]["gpu"] or "a rehearsal without a GPU",
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where gpu.json, gpu.md and gpu.png go")
    parser.add_argument("--device", default="cuda", help="'cpu' rehearses small cases without a GPU")
    parser.add_argument("--seconds", type=float, default=240, help="no row begins after them")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + chosen.seconds
    found: dict[str, Any] = {"machine": machine.describe(), "matrix_teraflops": {}, "rows": []}
    rates = found["matrix_teraflops"]
    for dtype in _DTYPES:
        edge = 256 if chosen.device == "cpu" else 8192
        rates[str(dtype).removeprefix("torch.")] = matrix_teraflops(dtype, chosen.device, edge)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    try:
        for case, side, make in runs(chosen.device):
            late = time.monotonic() > end
            found["rows"].append(
                asdict(Row(case.name, side, failed="no time") if late else row(case, side, make, rates))
            )
            (chosen.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
            (chosen.folder / "gpu.md").write_text(markdown(found))
            print(found["rows"][-1], flush=True)
    finally:
        draw(found, chosen.folder / "gpu.png")


if __name__ == "__main__":
    main()
