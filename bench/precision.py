"""NT-Xent by dtype and float32 matmul precision: ``python -m bench.precision``.

For each the time against plain PyTorch's in the same dtype and setting, on all threads and on one;
the errors against float64; and the arithmetic achieved, two products of the whole similarity matrix,
as a share of what a bare loop over one tile's product reaches on the same units in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info

from bench import machine
from bench.cases import FASTCL, LOSSES, PLAIN, Case, Step, step, step_of
from bench.timing import Paired, paired, rounds_within, seconds
from fastcl.similarity.numerics import matmul_precision_level
from fastcl.testing.host import host_ops

_SIZES = ((256, 128), (1024, 128), (4096, 128), (1024, 512))
_MODES = (
    (torch.float32, "highest"),
    (torch.float32, "high"),
    (torch.float32, "medium"),
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
)
_SECONDS = 5.0
_TILE, _REPEATS = 192, 400
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One size in one mode. Errors are relative, the gradients' in the L2 norm."""

    size: str
    dtype: str
    precision: str
    parts: int  # of the operands: 0 float32 units, 1 bfloat16, 2 float32 split into two bfloat16
    times: Paired
    alone_ms: float  # without plain PyTorch in between, as the next
    one_thread_ms: float
    gigaflops: float
    bare_gigaflops: float
    loss_error: float
    gradient_error: float
    plain_gradient_error: float

    @property
    def share(self) -> float:
        return self.gigaflops / self.bare_gigaflops


def bare_gigaflops(dim: int, parts: int) -> float:
    """What the tile product alone reaches on all threads; split operands count as one product."""
    rows = torch.randn(_TILE, dim)

    def run() -> None:
        host_ops().repeat_logits(rows, parts, _REPEATS)

    best = min(seconds(run) for _ in range(rounds_within(0.5, [run])))
    return 2 * _TILE**2 * dim * _REPEATS * torch.get_num_threads() / best / 1e9


def measure(rows: int, dim: int, dtype: torch.dtype, precision: str) -> Row:
    case = Case("nt_xent", rows, dim, dtype=dtype)
    torch.set_float32_matmul_precision(precision)
    ours, plain = step(case, FASTCL), step(case, PLAIN)
    arguments = tuple(x.detach().double().requires_grad_() for x in case.arguments())
    exact = step_of(case, LOSSES[case.loss].function(PLAIN), arguments)()
    loss_error, gradient_error = _errors(ours, exact)
    parts = host_ops().operand_parts(case.arguments()[0], matmul_precision_level())
    times = paired(plain, ours, _SECONDS)
    bare = bare_gigaflops(dim, parts)
    threads = torch.get_num_threads()
    alone = _alone_ms(ours)
    torch.set_num_threads(1)
    one_thread = _alone_ms(ours)
    torch.set_num_threads(threads)
    return Row(
        size=f"{rows}x{dim}",
        dtype=str(dtype).removeprefix("torch."),
        precision=precision,
        parts=parts,
        times=times,
        alone_ms=alone,
        one_thread_ms=one_thread,
        gigaflops=2 * 2 * case.pairs * dim / times.ms / 1e6,
        bare_gigaflops=bare,
        loss_error=loss_error,
        gradient_error=gradient_error,
        plain_gradient_error=_errors(plain, exact)[1],
    )


def _alone_ms(run: Step) -> float:
    return 1e3 * statistics.median(seconds(run) for _ in range(rounds_within(_SECONDS / 3, [run])))


def _errors(run: Step, exact: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    loss, *gradients = (x.double() for x in run())
    true_loss, *true_gradients = exact
    got, true = torch.cat(gradients), torch.cat(true_gradients)
    return abs(loss / true_loss - 1).item(), ((got - true).norm() / true.norm()).item()


_COLUMNS = (
    *("size", "dtype", "precision", "products on", "plain, ms", "fastcl, ms", "faster by"),
    *("1 thread, ms", "all threads gain", "GFLOP/s", "bare", "share"),
    *("loss error", "gradient error", "plain's"),
)
_UNITS = {0: "float32", 1: "bfloat16", 2: "float32 as 3 bfloat16 products"}


def markdown(rows: list[Row], described: dict[str, object], commit: str, split_gigaflops: float) -> str:
    lines = [
        "# NT-Xent by dtype and precision",
        "",
        f"{described['cpu']}, {described['threads']} threads. Commit {commit}.",
        *(f"{line}." for line in described["kernels"]),  # type: ignore[attr-defined]
        "",
        *(f"{line}" for line in (__doc__ or "").splitlines()[2:]),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * 4 + "|--:" * (len(_COLUMNS) - 4) + "|",
    ]
    for row in rows:
        low, high = row.times.ratio_quartiles
        cells = [
            row.size,
            row.dtype,
            row.precision if row.dtype == "float32" else "-",
            _UNITS[row.parts],
            f"{row.times.plain_ms:.2f}",
            f"{row.times.ms:.2f}",
            f"**{row.times.ratio:.2f}x** ({low:.2f} to {high:.2f})",
            f"{row.one_thread_ms:.2f}",
            f"{row.one_thread_ms / row.alone_ms:.2f}x",
            f"{row.gigaflops:.0f}",
            f"{row.bare_gigaflops:.0f}",
            f"{row.share:.0%}",
            f"{row.loss_error:.0e}",
            f"{row.gradient_error:.1e}",
            f"{row.plain_gradient_error:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if split_gigaflops:
        lines += [
            "",
            "Bare, in the GFLOP/s of the one product they make: "
            f"3 bfloat16 products {split_gigaflops:.0f}, so 6 about {split_gigaflops / 2:.0f}.",
        ]
    return "\n".join(lines) + "\n"


def _all() -> Iterator[Row]:
    for rows, dim in _SIZES:
        for dtype, precision in _MODES:
            yield measure(rows, dim, dtype, precision)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/precision-COMMIT.json")
    arguments = parser.parse_args()
    described = machine.describe()
    rows = []
    for row in _all():
        rows.append(row)
        print(f"{row.size} {row.dtype} {row.precision}: {row.times.ratio:.2f}x, {row.share:.0%}", flush=True)
    torch.set_float32_matmul_precision("highest")
    has_units = host_ops().operand_parts(torch.empty(0, dtype=torch.bfloat16), 0)
    split = bare_gigaflops(128, 2) if has_units else 0.0
    commit = get_commit_info()["id"][:10]  # type: ignore[no-untyped-call]
    text = markdown(rows, described, commit, split)
    out = arguments.out or _RESULTS / f"precision-{commit[:7]}.json"
    table = [{**asdict(row), "share": row.share} for row in rows]
    out.write_text(
        json.dumps(
            {"machine": described, "commit": commit, "split_gigaflops": split, "rows": table}, indent=1
        )
        + "\n"
    )
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
