"""The pictures of a run: its curves, and its features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.manifold import TSNE

from fastcl.train.evaluate.features import Features

Row = dict[str, float]
_POINTS = 2000


def draw_curves(rows: Sequence[Row], picture: Path, title: str) -> None:
    """Draw the loss and the nearest-neighbour accuracies over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, knn_axes = figure.subplots(1, 2)
    loss_axes.plot(*_measured(rows, "loss"), color="tab:red")
    loss_axes.set(title="Training loss", ylabel="loss")
    for name, label, color in (
        ("knn_top1", "all training labels", "tab:blue"),
        ("knn_top1_few", "one label per class", "tab:orange"),
    ):
        epochs, values = _measured(rows, name)
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


def _measured(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    found = [(row["epoch"], row[name]) for row in rows if name in row]
    return [epoch for epoch, _ in found], [value for _, value in found]


def draw_embedding(features: Features, picture: Path, title: str) -> None:
    """Draw up to 2,000 features in two dimensions by t-SNE, coloured by label."""
    chosen = torch.linspace(0, len(features.labels) - 1, min(_POINTS, len(features.labels))).long()
    directions = torch.nn.functional.normalize(features.values.cpu()[chosen], dim=1)
    labels = features.labels.cpu()[chosen]
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(directions.numpy())
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        points[:, 0], points[:, 1], c=labels.numpy(), cmap="tab10" if labels.max() < 10 else "turbo", s=8
    )
    axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(picture, dpi=150)
