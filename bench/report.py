"""Turns the JSON of a run into a Markdown table and a picture: ``python -m bench.report JSON``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import picture
from bench.cases import COMPILE, FASTCL, PYPI

Entry = dict[str, Any]  # one benchmark of the JSON: a case and a side

_NOTHING = "-"
_BUSY_LOAD = 0.5
_NOISY_SPREAD, _NOISY_DIFFERENCE = 1.5, 1.25


def write(results: Path) -> None:
    """Write the Markdown and the PNG next to the JSON, and print the Markdown."""
    data = json.loads(results.read_text())
    drawn = picture.draw(data["benchmarks"], machine_line(data["machine_info"]), results.with_suffix(".png"))
    text = markdown(data, results.with_suffix(".png").name if drawn else None)
    results.with_suffix(".md").write_text(text)
    print(text)


def markdown(data: dict[str, Any], picture_name: str | None) -> str:
    """The whole report; ``data`` is the JSON."""
    entries: list[Entry] = data["benchmarks"]
    sections = [_heading(data), _table(entries)]
    scaling = _scaling(entries)
    if scaling:
        sections.append(scaling)
    if picture_name is not None:
        sections.append(f"![Time and peak memory against batch size]({picture_name})")
    return "\n\n".join(sections) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """The device in one line."""
    device = f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}, {machine['gpu']}" if machine["gpu"] else device


def _heading(data: dict[str, Any]) -> str:
    machine, commit = data["machine_info"], data["commit_info"]
    state = " with uncommitted changes" if commit["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        f"{machine_line(machine)}. Commit {commit['id'][:10]}{state}, {data['datetime'][:10]}.",
        f"{versions}; float32 matmul precision {machine['float32_matmul_precision']!r}.",
        *(f"{line}." for line in machine["kernels"]),
    ]
    if data["quick"]:
        lines.append("A quick run: few rounds, take the figures as rough.")
    if data["load_before"] > _BUSY_LOAD:
        lines.append(
            f"Other work was running (load {data['load_before']:.1f}): the figures are not reliable."
        )
    lines += [
        "",
        "One step is the loss and its gradients. Times are medians in milliseconds. Each side took turns",
        "with plain PyTorch, and `Nx` is plain PyTorch's time divided by the side's, the median over those",
        "rounds: above 1 is faster. In brackets after fastcl's: its quartiles; noisy where they are far",
        "apart or the best rounds tell otherwise. Memory is how far a fresh process grew during one step,",
        "gradients included.",
    ]
    return "\n".join(lines)


def _table(entries: list[Entry]) -> str:
    rows = [
        "| case | plain PyTorch | torch.compile | PyPI | fastcl | fastcl is faster by "
        "| memory, plain PyTorch | memory, fastcl |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    for name in names:
        sides = {entry["side"]: entry for entry in entries if entry["name"] == name}
        ours = sides.get(FASTCL)
        versus = next((entry["versus_plain"] for entry in (ours, *sides.values()) if entry), None)
        cells = [
            name,
            _time(versus["plain_ms"]) if versus else _NOTHING,
            _side_cell(sides.get(COMPILE)),
            _side_cell(sides.get(PYPI)),
            _time(_ms(ours)) if ours else _NOTHING,
            _ratio_cell(ours),
            _memory(versus["plain_peak_bytes"]) if versus else _NOTHING,
            _memory(ours["peak_bytes"]) if ours else _NOTHING,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, *_legend(entries)])


def _legend(entries: list[Entry]) -> list[str]:
    backends = sorted({entry["implementation"] for entry in entries if entry["side"] == FASTCL})
    lines = [f"fastcl's backend: {', '.join(backends)}."] if backends else []
    packages: dict[str, list[str]] = {}
    for entry in entries:
        if entry["side"] == PYPI and entry["loss"] not in packages.setdefault(entry["implementation"], []):
            packages[entry["implementation"]].append(entry["loss"])
    lines += [f"PyPI for {', '.join(losses)}: {package}." for package, losses in packages.items()]
    return ["", *lines] if lines else []


def _scaling(entries: list[Entry]) -> str | None:
    series = picture.series(entries)
    if len(series) < 2:
        return None
    rows = [
        "## Scaling",
        "",
        "nt_xent in float32 alone: if the cost grows with pairs times D, the third column is flat.",
        "",
        "| B | fastcl, ms | ns per pair · D | memory, fastcl |",
        "|--:|--:|--:|--:|",
    ]
    for entry in series:
        per_product = 1e6 * _ms(entry) / (entry["pairs"] * entry["dim"])
        cells = [
            str(entry["rows"]),
            _time(_ms(entry)),
            f"{per_product:.4f}",
            _memory(entry["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _side_cell(entry: Entry | None) -> str:
    if entry is None:
        return _NOTHING
    return f"{_time(_ms(entry))} ({entry['versus_plain']['ratio']:.2f}x)"


def _ratio_cell(entry: Entry | None) -> str:
    if entry is None or entry["versus_plain"] is None:
        return _NOTHING
    low, high = entry["versus_plain"]["ratio_quartiles"]
    cell = f"**{entry['versus_plain']['ratio']:.2f}x** ({low:.2f} to {high:.2f})"
    return f"{cell} noisy" if _noisy(entry["versus_plain"]) else cell


def _noisy(versus: dict[str, Any]) -> bool:
    low, high = versus["ratio_quartiles"]
    difference = versus["ratio_of_minima"] / versus["ratio"]
    return bool(high > _NOISY_SPREAD * low or max(difference, 1 / difference) > _NOISY_DIFFERENCE)


def _ms(entry: Entry) -> float:
    return 1e3 * float(entry["seconds"]["median"])


def _time(ms: float) -> str:
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _memory(count: int) -> str:
    mib = count / 2**20
    return f"{mib:.1f} MiB" if mib < 100 else f"{mib:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", type=Path, help="written by python -m bench.run")
    write(parser.parse_args().json)


if __name__ == "__main__":
    main()
