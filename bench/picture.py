"""The picture: time and peak memory of nt_xent against the batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.cases import FASTCL

_LOSS, _DIM, _DTYPE = "nt_xent", 128, "float32"
_OURS, _THEIRS, _INK, _GRID = "#0b6e4f", "#b5532a", "#333333", "#e4e4e4"
_MEMORY_FLOOR = 1 << 20  # bytes; below it a measurement is mostly the measurement

Points = list[tuple[int, float]]


def series(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of fastcl that differ in batch size only, in its order."""
    wanted = (FASTCL, _LOSS, _DIM, _DTYPE)
    fixed = ("side", "loss", "dim", "dtype")
    return sorted((e for e in entries if tuple(e[k] for k in fixed) == wanted), key=lambda e: int(e["rows"]))


def draw(entries: list[dict[str, Any]], machine: str, path: Path) -> bool:
    """Draw the picture; False if there are not two batch sizes to draw."""
    ours = series(entries)
    if len(ours) < 2:
        return False
    compared = [e for e in ours if e["versus_plain"]]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(
        left,
        "Time of one step",
        [(e["rows"], 1e3 * e["seconds"]["median"]) for e in ours],
        [(e["rows"], e["versus_plain"]["plain_ms"]) for e in compared],
        _time_label,
        base=10,
    )
    _panel(
        right,
        "Peak memory of one step",
        _visible([(e["rows"], e["peak_bytes"]) for e in ours]),
        _visible([(e["rows"], e["versus_plain"]["plain_peak_bytes"]) for e in compared]),
        _memory_label,
        base=4,
    )
    figure.suptitle(
        f"NT-Xent, loss and gradients, D = {_DIM}, {_DTYPE}\n", x=0.01, ha="left", weight="bold", color=_INK
    )
    figure.text(0.01, 0.93, machine, ha="left", va="center", size=9, color="#777777")
    figure.savefig(path, dpi=160)
    return True


def _panel(
    axes: Axes,
    title: str,
    ours: Points,
    theirs: Points,
    label: Callable[[float, object], str],
    base: int,
) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    # the lines rise, so there is room above the upper one's left and below the lower one's right
    for points, color, name, offset, anchor in (
        (theirs, _THEIRS, "plain PyTorch", (-8, 5), "right"),
        (ours, _OURS, "fastcl", (9, -12), "left"),
    ):
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linewidth=2)
        middle = points[len(points) // 2]
        axes.annotate(
            name, middle, xytext=offset, textcoords="offset points", ha=anchor, color=color, weight="bold"
        )
    axes.margins(y=0.1)
    sizes = sorted({size for size, _ in ours + theirs})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(label))
    axes.yaxis.set_major_locator(LogLocator(base=base, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(colors=_INK, labelsize=9, which="both", length=0)
    axes.tick_params(axis="x", rotation=30 if len(sizes) > 6 else 0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aaaaaa")
    axes.set_title(title, loc="left", size=11, color=_INK)
    axes.set_xlabel("batch size B (2B rows)", color=_INK)


def _visible(points: Points) -> Points:
    return [(size, count) for size, count in points if count >= _MEMORY_FLOOR]


def _time_label(ms: float, _: object) -> str:
    return f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms"


def _memory_label(count: float, _: object) -> str:
    return f"{count / 2**30:g} GiB" if count >= 2**30 else f"{count / 2**20:g} MiB"
