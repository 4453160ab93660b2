"""Short runs on the digits, in this process or as the command, and what they leave."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from processes import Command

FASTCL = Path(sys.executable).parent / "fastcl"
OPTIONS = ("--data=digits", "--width=4", "--batch-size=256", "--limit=512")
SMALL = {"data": "digits", "width": 4, "batch_size": 256, "limit": 512}


def start(out: Path, method: str, *options: str, ranks: int = 1) -> Command:
    devices = [f"--devices={ranks}", "--accelerator=cpu"] if ranks > 1 else []
    arguments = ["train", method, *OPTIONS, f"--out={out}", *options, *devices]
    return Command(out.with_name(f"{out.name} said"), *arguments, ranks=ranks)


def finish(run: Command) -> None:
    status, errors = run.wait()
    assert status == 0, errors


def wait_for_epoch(run: Command, epoch: int) -> None:
    for line in run.lines():
        if line.startswith(f"epoch {epoch}/"):
            return
    raise AssertionError(f"ended before epoch {epoch}: {run.wait()}")


def metrics(out: Path) -> str:
    return (out / "metrics.csv").read_text()


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
