"""Predicts what ``bench.gpu`` will measure of fastcl, on cards that need not be here.

``python -m bench.predict`` writes bench/results/predicted.json and .md: for every case in bfloat16 and every
card a band of times, from the instructions that the kernels compile to, the bytes they move and published
rates (:mod:`bench.cost`, :mod:`bench.cards`). ``--grade gpu.json`` holds a measurement against them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench import aot, cost, gpu, steps
from bench.cards import CARDS, Card
from bench.cases import FASTCL, Case
from bench.machine_code import Code
from bench.steps import Pass, Product, Work
from fastcl.kernels import stats

RESULTS = Path(__file__).parent / "results"
GOALS = {"nt_xent-32768x512": ("H200", 0.45), "clip_loss-32768x512": ("H200", 0.55)}  # of the matrix rate
_LARGER_CHUNKS = 1 << 28  # products at a time

_HEAD = (
    "**Predicted, never measured.** A loss and its gradients in bfloat16. `python -m bench.predict` counts "
    "the instructions of the kernels' machine code (Triton {triton}) and the bytes they move, and divides by "
    "published rates: `bench/cost.py` says how the band comes about, `bench/cards.py` what is published and "
    "what is assumed. Floor: the products that the loss cannot do without, at the rate of a library's large "
    "product; share: floor / time, from high to low. GPU alone: likely, as a CUDA graph. Host: Python and "
    "launches, which a step waits for where they take longer. `python -m bench.predict --grade gpu.json` "
    "holds a measurement against this."
)

_ON_GOALS = (
    "Shares of the matrix rate, in the floor's products, as the step is and as it would be, each change "
    "on top of those before it. Not likely: the likely time misses the goal. Not met: the low one does too."
)

Works = dict[str, Counter[Work]]


def cases() -> list[Case]:
    """The GPU's cases in the first dtype that it measures."""
    return [replace(case, dtype=torch.bfloat16, device="cuda") for case in gpu.CASES]


def is_goal(case: str) -> bool:
    return any(case.startswith(goal) for goal in GOALS)


def compiled_works(target: str, only: str) -> tuple[Works, Works]:
    """Of the cases whose name holds ``only``; and of those with a goal, with larger chunks.

    From here on this process compiles for ``target``.
    """
    aot.compile_as_on(target)
    codes: dict[Any, Code] = {}

    def code_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Code:
        form = aot.form_of(kernel, args, options)
        if form not in codes:
            codes[form], _, _ = aot.read(target, kernel.warmup(*args, grid=grid, **options))
        return codes[form]

    chosen = [case for case in cases() if only in case.name]
    works = {case.name: steps.of_case(case, target, code_of) for case in chosen}
    with patch.object(stats, "_CHUNK_ELEMENTS", _LARGER_CHUNKS):
        larger = {case.name: steps.of_case(case, target, code_of) for case in chosen if is_goal(case.name)}
    return works, larger


def without_sums(case: Case, work: Counter[Work]) -> Counter[Work]:
    """Where the library's products add to the gradients: nothing is divided or added after them."""
    products = {(x.m, x.n) for x in work if isinstance(x, Product)}
    sizes = {scale * 4 * m * n + scalar for m, n in products for scale in (2, 3) for scalar in (0, 4)}
    kept = {x: n for x, n in work.items() if not (isinstance(x, Pass) and x.memory in sizes and n > 2)}
    return Counter(kept)


def symmetric(case: Case, work: Counter[Work]) -> Counter[Work]:
    """And where the forward pass of one side with itself forms half of the products."""
    work = without_sums(case, work)
    if case.loss == "nt_xent":
        for x in [x for x in work if isinstance(x, Product) and x.k == case.dim]:
            work[x] -= work[x] // 4  # as many are formed again by the backward pass
    return work


def row(case: Case, card: Card, work: Counter[Work]) -> dict[str, Any]:
    """What ``bench.gpu`` will say of fastcl, and where the prediction comes from."""
    found = cost.of_step(card, work)
    step = found.step()
    flops = gpu.FLOOR_PRODUCTS.get(case.loss, 0) * 2 * case.pairs * case.dim
    predicted = gpu.Row(
        case.name,
        FASTCL,
        ms=1e3 * step.likely,
        quartiles=(1e3 * step.low, 1e3 * step.high),
        graph_ms=1e3 * found.gpu.likely,
        host_us=1e6 * found.host.likely,
        teraflops=flops / step.likely / 1e12 if flops else None,
        share=flops / step.likely / card.matrix if flops else None,
    )
    return asdict(predicted) | {
        "card": card.name,
        "floor_ms": 1e3 * flops / card.matrix if flops else None,
        "graph_quartiles": (1e3 * found.gpu.low, 1e3 * found.gpu.high),
        "launches": sum(work.values()),
        "limits": {name: round(share, 3) for name, share in list(found.limits.items())[:4]},
    }


def markdown(predicted: dict[str, Any]) -> str:
    """The rows as a table per card, and what becomes of the goals."""
    lines = ["# Predicted times on GPUs", "", _HEAD.format(triton=predicted["triton"])]
    for name, described in predicted["cards"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{described['matrix_teraflops']:.0f} TFLOP/s: {described['source']}.",
            "",
        ]
        lines += _table([x for x in predicted["rows"] if x["card"] == name])
    return "\n".join([*lines, "", *_goals(predicted)]) + "\n"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = (
        "case",
        "floor, us",
        "low",
        "likely",
        "high",
        "GPU alone",
        "host",
        "share",
        "what takes the time",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|--:" * (len(columns) - 2) + "|---|"
    for x in rows:
        times = (x["floor_ms"], x["quartiles"][0], x["ms"], x["quartiles"][1], x["graph_ms"])
        cells = ["" if ms is None else f"{1e3 * ms:.0f}" for ms in times]
        waits = x["host_us"] > 1e3 * x["graph_ms"]
        limits = ", ".join(f"{name} {share:.0%}" for name, share in list(x["limits"].items())[:3])
        cells += [f"{x['host_us']:.0f}", _share(x), f"{'the host; on the GPU ' if waits else ''}{limits}"]
        yield f"| {x['case'].removesuffix('-bfloat16-cuda')} | {' | '.join(cells)} |"


def _share(x: dict[str, Any]) -> str:
    if x["share"] is None:
        return ""
    low, high = (x["share"] * x["ms"] / ms for ms in reversed(x["quartiles"]))
    return f"{x['share']:.0%} ({low:.0%} to {high:.0%})"


def _goals(predicted: dict[str, Any]) -> Iterator[str]:
    yield from ("## Goals", "", _ON_GOALS, "")
    yield f"| goal | share | {' | '.join(name for name in predicted['what_if'])} | as it is |"
    yield "|---|--:" + "|--:" * len(predicted["what_if"]) + "|---|"
    for goal, (card, share) in GOALS.items():
        versions = [
            next((x for x in rows if x["card"] == card and x["case"].startswith(goal)), None)
            for rows in (predicted["rows"], *predicted["what_if"].values())
        ]
        if versions[0] is None:
            continue
        best = versions[0]["share"] * versions[0]["ms"] / versions[0]["quartiles"][0]
        verdict = "met" if versions[0]["share"] >= share else "not likely" if best >= share else "not met"
        cells = [_share(x) for x in versions if x is not None]
        yield f"| {goal} on {card}: {share:.0%} | {' | '.join(cells)} | {verdict} |"


def predict(only: str = "") -> dict[str, Any]:
    """All rows of the cases whose name holds ``only``."""
    targets = sorted({card.target for card in CARDS.values()})
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn")) as pool:
        jobs = {target: pool.submit(compiled_works, target, only) for target in targets}
        found = {target: job.result() for target, job in jobs.items()}
    chosen = {case.name: case for case in cases()}

    def rows(version: int, change: Callable[[Case, Counter[Work]], Counter[Work]]) -> list[dict[str, Any]]:
        return [
            row(chosen[name], card, change(chosen[name], work))
            for card in CARDS.values()
            for name, work in found[card.target][version].items()
        ]

    return {
        "triton": triton.__version__,
        "cards": {
            name: {"matrix_teraflops": card.matrix / 1e12, "source": card.matrix_source}
            for name, card in CARDS.items()
        },
        "rows": rows(0, lambda case, work: work),
        "what_if": {
            f"chunks of 2^{_LARGER_CHUNKS.bit_length() - 1} products": rows(1, lambda case, work: work),
            "and sums by the library": rows(1, without_sums),
            "and a symmetric forward pass": rows(1, symmetric),
        },
    }


def grade(measured: dict[str, Any], predicted: dict[str, Any], card: str | None = None) -> Iterator[str]:
    """Lines that hold fastcl's measured rows against the predicted ones of the same card.

    Raises:
        ValueError: no prediction for the card that was measured.
    """
    gpu_name = str(measured["machine"].get("gpu"))
    card = card or next((name for name in predicted["cards"] if name in gpu_name), None)
    if card not in predicted["cards"]:
        raise ValueError(f"no prediction for {card or gpu_name}: expected one of {list(predicted['cards'])}")
    rows = {x["case"]: x for x in predicted["rows"] if x["card"] == card}
    yield f"{card}: milliseconds, predicted and measured"
    columns = ("case", "", "low", "likely", "high", "measured", "measured / likely", "")
    yield "{:40} {:5} {:>9} {:>9} {:>9} {:>9} {:>17}  {}".format(*columns)
    verdicts = []
    for found in measured["rows"]:
        x = rows.get(found["case"])
        if found["side"] != FASTCL or x is None:
            continue
        bands = {"ms": x["quartiles"], "graph_ms": x["graph_quartiles"]}
        for key, (low, high) in bands.items():
            time = found.get(key)
            if time is None:
                continue
            verdicts.append("in the band" if low <= time <= high else "faster" if time < low else "slower")
            cells = " ".join(f"{number:9.3f}" for number in (low, x[key], high, time))
            yield f"{x['case']:40} {key.removesuffix('_ms'):5} {cells} {time / x[key]:17.2f}  {verdicts[-1]}"
    yield f"{verdicts.count('in the band')} of {len(verdicts)} in the band"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument(
        "-k", default="", metavar="NAME", help="only cases whose name holds this; writes nothing"
    )
    parser.add_argument("--grade", type=Path, metavar="GPU.JSON", help="what bench.gpu measured")
    parser.add_argument("--card", choices=CARDS, help="with --grade, where the name of the GPU does not tell")
    chosen = parser.parse_args()
    if chosen.grade:
        known = json.loads((RESULTS / "predicted.json").read_text())
        try:
            print(*grade(json.loads(chosen.grade.read_text()), known, chosen.card), sep="\n")
        except ValueError as error:
            sys.exit(f"bench.predict: {error}")
        return
    found = predict(chosen.k)
    print(markdown(found))
    if not chosen.k:
        (RESULTS / "predicted.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "predicted.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
