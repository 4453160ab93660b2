"""Every method on a subset of CIFAR-10, a few minutes each: ``python -m bench.accuracy FOLDER``.

FOLDER holds CIFAR-10 as train/ and test/ with a folder of images per class. 12,000 of its training images at
16 pixels train a resnet8. Each run's metrics.csv goes to bench/results/cifar10-subset, from which a table and
a picture of all curves are made anew. With --long-tail, SupCon, KCL and TSC learn from classes cut to 1:100.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastcl.train.methods import METHODS

IMAGES = [name for name, method in METHODS.items() if "small" in method.recipe]
RESULTS = Path(__file__).parent / "results" / "cifar10-subset"
LONG_TAIL_RESULTS = RESULTS.with_name("cifar10-long-tail")
SHARED = (
    *("--limit=12000", "--image-size=16", "--arch=resnet8", "--epochs=8", "--batch-size=256"),
    *("--optimizer=adamw", "--lr=2e-3", "--weight-decay=1e-4", "--warmup-epochs=1", "--evaluate-every=2"),
)
OWN = {
    "simclr": ("--batch-size=128", "--lr=3e-3", "--temperature=0.2"),
    "moco": ("--batch-size=128", "--lr=3e-3", "--queue-size=4096", "--momentum=0.99", "--crop-min=0.5"),
    "mochi": ("--queue-size=4096", "--momentum=0.99", "--mix-from-epoch=3"),
    "byol": (
        *("--epochs=10", "--evaluate-every=5", "--batch-size=64", "--lr=5e-3", "--dim=128", "--hidden=512"),
        *("--crop-min=0.5", "--momentum=0.9", "--momentum-end=0.99", "--final-norm"),
    ),
    "simsiam": ("--epochs=10", "--batch-size=64", "--lr=5e-3", "--dim=512", "--hidden=128", "--crop-min=0.5"),
    "vicreg": ("--dim=512", "--hidden=512"),
    "barlow-twins": ("--dim=512", "--hidden=512"),
    "moco-v3": ("--dim=128", "--hidden=512"),
    "swav": (
        *("--epochs=12", "--evaluate-every=6", "--warmup-epochs=0", "--batch-size=64", "--lr=8e-3"),
        *("--hidden=512", "--small-crops=0", "--crop-min=0.5", "--prototypes=500"),
        *("--target-temperature=0.025", "--queue-size=512", "--queue-from-epoch=1"),
    ),
    "inst-disc": ("--loss=softmax", "--noise=0", "--temperature=0.2", "--batch-size=64"),
    "pirl": ("--loss=softmax", "--noise=0", "--temperature=0.2", "--batch-size=64"),
    "cmc": ("--loss=softmax", "--noise=0", "--temperature=0.1", "--width=16", "--batch-size=64"),
    "cpc": ("--width=16",),
    "dino": (
        *("--batch-size=128", "--lr=3e-3", "--dim=128", "--hidden=512", "--small-crops=0", "--crop-min=0.5"),
        *("--prototypes=128", "--balance=sinkhorn", "--target-temperature=0.03"),
        *("--momentum=0.95", "--momentum-end=0.99"),
    ),
    "pcl": ("--queue-size=4096", "--momentum=0.99", "--clusters=100,200,400", "--cluster-from-epoch=3"),
    "hcsc": ("--queue-size=4096", "--momentum=0.99", "--clusters=400,200,100", "--cluster-from-epoch=3"),
    "deepcluster": (
        *("--epochs=10", "--evaluate-every=5", "--batch-size=64", "--lr=8e-3"),
        *("--dim=32", "--clusters=100"),
    ),
    "kcl": ("--queue-size=4096", "--momentum=0.99"),
    "tsc": ("--queue-size=4096", "--momentum=0.99", "--centres-from-epoch=3", "--centre-weight=0.1"),
}
BOUNDS = {"simclr": 0.10, "moco": 0.10, "byol": 0.10, "swav": 0.10}
OTHERS_BOUND = 0.05
LONG_TAIL = ("--limit=50000", "--imbalance=100")
LONG_TAIL_METHODS = ("supcon", "kcl", "tsc")
LONG_TAIL_COLUMNS = ("linear_many", "linear_medium", "linear_few", "knn_top1")


def main() -> None:
    """Train, copy the metrics, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=IMAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--long-tail", action="store_true")
    given = parser.parse_args()
    options, results = (LONG_TAIL, LONG_TAIL_RESULTS) if given.long_tail else ((), RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    for method in given.methods or (LONG_TAIL_METHODS if given.long_tail else IMAGES):
        for seed in given.seeds:
            train(method, seed, given.folder, results, options)
    report_long_tail() if given.long_tail else report()


def command(method: str, seed: int, folder: Path, out: Path, options: Sequence[str] = ()) -> list[str]:
    """What is typed for one run."""
    return [
        *("fastcl", "train", method, f"--data={folder}", *SHARED, *OWN.get(method, ()), *options),
        *(f"--seed={seed}", f"--out={out}"),
    ]


def train(method: str, seed: int, folder: Path, results: Path, options: Sequence[str]) -> None:
    """One run; an interrupted one goes on."""
    out = Path("runs") / results.name / f"{method}-{seed}"
    run(command(method, seed, folder, out, options), out, results / f"{method}-{seed}.csv")


def run(command: Sequence[str], out: Path, metrics: Path) -> None:
    """A command that trains into ``out``, or goes on there; its metrics are copied."""
    fastcl, *arguments = command
    subprocess.run([Path(sys.executable).with_name(fastcl), *arguments, "--resume"], check=True)
    shutil.copy(out / "metrics.csv", metrics)


def report() -> None:
    """The table and the picture of all runs in :data:`RESULTS`."""
    runs = read(RESULTS)
    text = ["| method, seed | epochs | knn_top1 untrained | trained | gain | bound |", "|---|" + 5 * "--:|"]
    for name, rows in runs.items():
        before, after = (float(rows[place]["knn_top1"]) for place in (0, -1))
        bound = BOUNDS.get(name.rpartition("-")[0], OTHERS_BOUND)
        epochs, gain = rows[-1]["epoch"], f"{after - before:+.3f}"
        text.append(f"| {name} | {epochs} | {before:.3f} | {after:.3f} | {gain} | {bound:.2f} |")
    table = "\n".join(text) + "\n"
    print(table)
    example = command("METHOD", 0, Path("FOLDER"), Path("OUT"))
    (RESULTS / "README.md").write_text(f"```sh\n{' '.join(example)}  # and METHOD's own\n```\n\n{table}")
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots(), runs, "knn_top1", "nearest-neighbour accuracy")
    figure.suptitle("CIFAR-10 subset, resnet8")
    figure.savefig(RESULTS / "curves.png", dpi=120)


def report_long_tail() -> None:
    """The table of all runs in :data:`LONG_TAIL_RESULTS`."""
    text = [
        f"| method, seed | {' | '.join(LONG_TAIL_COLUMNS)} |",
        "|---" * (1 + len(LONG_TAIL_COLUMNS)) + "|",
    ]
    for name, rows in read(LONG_TAIL_RESULTS).items():
        text.append(f"| {name} | {' | '.join(f'{float(rows[-1][x]):.3f}' for x in LONG_TAIL_COLUMNS)} |")
    table = "\n".join(text) + "\n"
    print(table)
    example = " ".join(command("METHOD", 0, Path("FOLDER"), Path("OUT"), LONG_TAIL))
    (LONG_TAIL_RESULTS / "README.md").write_text(f"```sh\n{example}  # and METHOD's own\n```\n\n{table}")


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of the runs whose metrics are in ``folder``, by name."""
    runs = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            runs[path.stem] = list(csv.DictReader(file))
    return runs


def draw(axes: Axes, runs: Mapping[str, list[dict[str, str]]], measure: str, label: str) -> None:
    """A line per run over the epochs; the seeds of a method share a colour, the best method comes first."""
    lines: dict[str, list[list[tuple[int, float]]]] = {}
    for name, rows in runs.items():
        if found := [(int(row["epoch"]), float(row[measure])) for row in rows if row.get(measure)]:
            lines.setdefault(re.sub(r"-\d+$", "", name), []).append(found)
    best = sorted(lines, key=lambda method: lines[method][0][-1][1], reverse=True)
    for rank, method in enumerate(best):
        for seed, line in enumerate(lines[method]):
            epochs, values = zip(*line, strict=True)
            colour, dashes = colormaps["tab20"](rank % 20), "-" if rank < 20 else "--"
            label_once = None if seed else method
            axes.plot(epochs, values, marker=".", color=colour, linestyle=dashes, label=label_once)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")


if __name__ == "__main__":
    main()
