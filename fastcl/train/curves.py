"""The picture of a training run, drawn from its metrics file."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a row lacks what was not measured."""
    with path.open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value != ""} for row in csv.DictReader(file)
        ]


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw the loss and the nearest-neighbour accuracies over the epochs."""
    rows = read_metrics(metrics)
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, knn_axes = figure.subplots(1, 2)
    trained = rows[1:]
    loss_axes.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], color="tab:red")
    loss_axes.set(title="Training loss", ylabel="NT-Xent loss")
    for name, label, color in (
        ("knn_top1", "all training labels", "tab:blue"),
        ("knn_top1_few", "one label per class", "tab:orange"),
    ):
        values = [row[name] for row in rows]
        knn_axes.plot(epochs, values, color=color, label=f"{label}: {values[0]:.3f} → {values[-1]:.3f}")
        knn_axes.axhline(values[0], color=color, linestyle=":", linewidth=1)
    knn_axes.set(title="Nearest-neighbour accuracy on the test images", ylabel="accuracy", ylim=(0, 1.02))
    knn_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    knn_axes.legend(loc="lower right", title="neighbours among (dotted: untrained)")
    for axes in (loss_axes, knn_axes):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(picture, dpi=150)
