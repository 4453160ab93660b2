"""The pictures of a run: its curves, and its features in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.manifold import TSNE

from fastcl.train.evaluate.features import Features

Row = dict[str, float]
_POINTS = 2000
_NAMED = 20  # classes that a legend has room for
_PAIRS = ("alignment", "uniformity", "center", "residual")


def draw_curves(rows: Sequence[Row], measures: Mapping[str, str], picture: Path, title: str) -> None:
    """Draw the loss, the ``measures`` and what pairs of views are like over the epochs."""
    figure = curves(rows, measures, title)
    figure.savefig(picture, dpi=150)


def curves(rows: Sequence[Row], measures: Mapping[str, str], title: str) -> Figure:
    """The figure of :func:`draw_curves`."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    loss, accuracy, pairs = figure.subplots(1, 3)
    _lines(loss, rows, {"loss": "training loss"})
    loss.set(title="Training loss", ylabel="loss")
    _lines(accuracy, rows, measures)
    accuracy.set(title="Accuracy on the test data", ylabel="accuracy", ylim=(0, 1.02))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _lines(pairs, rows, {name: name for name in _PAIRS})
    pairs.set(title="Pairs of views")
    for axes in (loss, accuracy, pairs):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not loss and axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title, fontweight="bold")
    return figure


def _lines(axes: Axes, rows: Sequence[Row], names: Mapping[str, str]) -> None:
    for name, label in names.items():
        found = [(row["epoch"], row[name]) for row in rows if name in row]
        if found:
            epochs, values = zip(*found, strict=True)
            axes.plot(epochs, values, ".-", label=f"{label}:\n{values[0]:.3f} → {values[-1]:.3f}")


def draw_embedding(features: Features, classes: Sequence[str], picture: Path, title: str) -> None:
    """Draw up to 2,000 features in two dimensions by t-SNE, coloured by class, in one colour without."""
    embedding(features, classes, title).savefig(picture, dpi=150)


def embedding(features: Features, classes: Sequence[str], title: str) -> Figure:
    """The figure of :func:`draw_embedding`."""
    chosen = evenly(len(features.labels))
    directions = torch.nn.functional.normalize(features.values.cpu()[chosen], dim=1)
    labels = features.labels.cpu()[chosen].numpy()
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(directions.numpy())
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    if 0 < len(classes) <= _NAMED:
        colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
        for label, name in enumerate(classes):
            x, y = points[labels == label].T
            axes.scatter(x, y, s=8, color=colours(label), label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    else:
        axes.scatter(points[:, 0], points[:, 1], s=8, c=labels, cmap="turbo")
    axes.set(title=title, xticks=[], yticks=[])
    return figure


def evenly(count: int) -> torch.Tensor:
    """Positions of up to 2,000 of ``count`` rows."""
    return torch.linspace(0, count - 1, min(_POINTS, count)).long()
