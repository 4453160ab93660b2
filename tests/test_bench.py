"""The benchmarks' own check, at sizes that take no time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_metric_learning")

from bench import gpu, picture, report
from bench.agreement import assert_agreement
from bench.cases import CASES, COMPILE, FASTCL, LOSSES, PLAIN, PYPI, Case, step
from bench.grid import CELLS, failed
from bench.memory import peak_bytes
from bench.timing import Paired, paired

_SMALL = [
    replace(case, rows=24, dim=16, keys=case.keys and 40, classes=case.classes and 5)
    for case in {case.loss: case for case in CASES.values()}.values()
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", _SMALL, ids=lambda case: case.loss)
def test_fastcl_agrees_with_the_plain_baseline(case: Case, dtype: torch.dtype) -> None:
    assert_agreement(replace(case, dtype=dtype))


@pytest.mark.parametrize(
    "case", [case for case in _SMALL if LOSSES[case.loss].pypi], ids=lambda case: case.loss
)
def test_the_package_from_pypi_computes_the_same(case: Case) -> None:
    case = replace(case, dtype=torch.float64)
    # pytorch-metric-learning adds 1e-6 where it takes logarithms and divides
    torch.testing.assert_close(step(case, PYPI)(), step(case, PLAIN)(), rtol=1e-4, atol=1e-6)


def test_agreement_rejects_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LOSSES["clip_loss"]
    wrong = replace(loss, fastcl=lambda *args: loss.fastcl(*args) + 1e-3 * args[0].mean())
    monkeypatch.setitem(LOSSES, "clip_loss", wrong)
    case = Case("clip_loss", 24, 16)
    with pytest.raises(AssertionError, match="clip_loss"):
        assert_agreement(case)


def test_peak_memory_is_that_of_the_similarity_matrix() -> None:
    case = CASES["nt_xent-1024x128"]
    matrix = 4 * case.pairs
    assert 2 * matrix < peak_bytes(case.name, PLAIN) < 12 * matrix


def test_paired_takes_the_median_of_the_ratios() -> None:
    result = Paired.of([0.4, 0.3, 0.4], [0.1, 0.1, 0.4])
    assert (result.plain_ms, result.ms) == pytest.approx((400, 100))
    assert result.ratio == pytest.approx(3)
    assert result.ratio_quartiles == pytest.approx((2, 3.5))
    assert result.ratio_of_minima == pytest.approx(3)


_TINY = [
    c for c in CELLS if c.name.startswith(("similarity_topk-8x", "similarity_stats-rule-8x", "mochi-8x"))
]


@pytest.mark.parametrize("cell", _TINY, ids=lambda cell: cell.name)
def test_cells_of_the_grid_run(cell) -> None:
    assert 1 <= len(cell.measured(seconds=0.0)) <= 3


def test_a_cell_fails_in_two_runs_of_three() -> None:
    slow, fast = Paired.of([0.4, 0.4, 0.4], [0.5, 0.5, 0.5]), Paired.of([0.4, 0.4, 0.4], [0.4, 0.4, 0.4])
    assert len(CELLS) == 80
    assert [failed(runs) for runs in ([fast], [slow, fast, fast], [slow, fast, slow])] == [False, False, True]


def test_paired_takes_turns() -> None:
    order: list[str] = []
    paired(lambda: order.append("plain"), lambda: order.append("other"), budget=0.0)
    assert order[-6:] == ["plain", "other"] * 3


def _entry(rows: int, side: str, compared: bool = True) -> report.Entry:
    versus = {
        "plain_ms": 30.0,
        "ms": 10.0,
        "ratio": 3.0,
        "ratio_quartiles": [2.5, 3.5],
        "ratio_of_minima": 3.1,
    }
    return {
        "name": f"nt_xent-{rows}x128",
        "loss": "nt_xent",
        "rows": rows,
        "dim": 128,
        "pairs": 4 * rows**2,
        "dtype": "float32",
        "side": side,
        "implementation": {FASTCL: "chunked", PYPI: "some-package"}[side],
        "peak_bytes": 4 << 20,
        "versus_plain": {**versus, "plain_peak_bytes": 64 << 20} if compared else None,
        "seconds": {"min": 0.009, "median": 0.01, "iqr": 0.001, "rounds": 20},
    }


_DATA = {
    "machine_info": {
        "cpu": "A CPU",
        "gpu": None,
        "threads": 2,
        "kernels": [],
        "float32_matmul_precision": "highest",
        "versions": {"torch": "1.0"},
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2020-01-02T03:04:05+00:00",
    "quick": True,
    "load_before": 0.1,
}


def test_report_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [_entry(1024, FASTCL), _entry(1024, PYPI), _entry(2048, FASTCL, compared=False)]
    (tmp_path / "run.json").write_text(json.dumps({**_DATA, "benchmarks": entries}))
    report.write(tmp_path / "run.json")
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "run.md").read_text().strip()
    cells = "30.0 | - | 10.0 (3.00x) | 10.0 | **3.00x** (2.50 to 3.50) | 64.0 MiB | 4.0 MiB"
    assert f"| nt_xent-1024x128 | {cells} |" in text
    assert "| nt_xent-2048x128 | - | - | - | 10.0 | - | - | 4.0 MiB |" in text
    assert "with uncommitted changes" in text
    assert "not reliable" not in text
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_report_says_what_is_noisy() -> None:
    entry = _entry(1024, FASTCL)
    entry["versus_plain"]["ratio_quartiles"] = [1.2, 3.1]
    text = report.markdown({**_DATA, "load_before": 2.0, "benchmarks": [entry]}, None)
    assert "(1.20 to 3.10) noisy |" in text
    assert "not reliable" in text


def test_no_picture_of_a_single_size(tmp_path: Path) -> None:
    assert not picture.draw([_entry(1024, FASTCL)], "A CPU", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: case.name)
def test_a_first_measurement_on_a_gpu_is_rehearsed_without_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_SECONDS", 0.0)
    small = replace(case, rows=8, keys=case.keys and 2048)
    makers = {name: make for name, make in gpu.sides_of(small).items() if name != COMPILE}
    sides = {name: gpu.row(small, name, make, {"float32": 1.0}) for name, make in makers.items()}
    own = sides.pop(FASTCL)
    assert own.failed is None
    assert own.ms is not None
    assert own.gradient_error is None or own.gradient_error < 1e-5
    for rival in set(sides) - {PLAIN}:
        failed = sides[rival].failed
        assert failed is None or "No module named" in failed


def test_the_longest_case_takes_no_more_of_the_gpu_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [case.dtype for case, _, _ in gpu.runs("cuda") if case.rows == 1 << 19]
    assert dtypes == [torch.bfloat16]
    calls = []

    def loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
        calls.append(temperature)
        return (first * second).sum()

    case = Case("nt_xent", 8, 16)
    monkeypatch.setattr(gpu, "_SECONDS", 0.0)
    assert gpu._host_us(case, loss, case.arguments()) > 0
    assert len(calls) == 1


def test_the_script_for_a_gpu_selects_tests() -> None:
    pytest.importorskip("triton")
    script = Path(gpu.__file__).with_suffix(".sh").read_text()
    selected = re.findall(r'(tests/\S+) -k "(.*)"', script)
    for path, expression in selected:
        command = [sys.executable, "-m", "pytest", "--collect-only", path, "-k", expression]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        found = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.count("[triton-") + found.stdout.count("-triton") >= 2
    assert len(selected) == 1


def test_what_a_row_of_the_gpu_lacks_is_said() -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of\nmemory")

    row = gpu.row(gpu.CASES[0], PLAIN, lambda: broken, {"float32": 1.0})
    assert row.failed == "RuntimeError: out of memory"
    found = {
        "machine": {"gpu": "a GPU"},
        "matrix_teraflops": {"bfloat16": 700.0},
        "rows": [asdict(row)],
    }
    assert "| RuntimeError: out of memory |" in gpu.markdown(found)
