"""How often an image's name is found among 500, by its nearness to the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastcl
from fastcl.train.data.glyphs import GlyphSource, Task
from fastcl.train.data.texts import tokenize
from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.features import rows_of
from fastcl.train.settings import GlyphSettings

_SHOWN = 6  # glyphs of a task in the picture
_NEAREST = 5  # names beside each


class ZeroShot(Evaluation):
    """Glyphs look for their names. Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.

    Every rank measures all of it: it takes about a second.

    Args:
        source: what is looked for.
        settings: of the run.
    """

    measures = ("zero_shot_fonts", "zero_shot_characters")
    lines: ClassVar[Mapping[str, str]] = {
        "zero_shot_fonts": "fonts held out",
        "zero_shot_characters": "characters held out",
    }

    def __init__(self, source: GlyphSource, settings: GlyphSettings) -> None:
        self.tasks = source.tasks

    def measure(self, network: nn.Module, device: torch.device, *, thorough: bool) -> dict[str, float]:
        """The shares of images whose name is the nearest of 500, by name."""
        return {
            f"zero_shot_{name}": (nearest(network, task, 1, device)[:, 0] == task.labels.to(device))
            .double()
            .mean()
            .item()
            for name, task in self.tasks.items()
        }

    def draw(self, network: nn.Module, device: torch.device, folder: Path, title: str) -> list[str]:
        """Some glyphs of each task with the names nearest to them."""
        figure = examples(
            network, {self.lines[f"zero_shot_{name}"]: x for name, x in self.tasks.items()}, device
        )
        figure.suptitle(title, fontweight="bold")
        figure.savefig(folder / "zero_shot.png", dpi=120)
        return ["zero_shot.png"]


def nearest(network: nn.Module, task: Task, k: int, device: torch.device) -> Tensor:
    """The places (N, k) of the names nearest to each image, the nearest first.

    Args:
        network: one network for images and one for texts, to (N, D).
        task: the images and the names.
        k: how many.
        device: where the networks are.
    """
    images, names = network.children()
    queries = rows_of(images, task.images.float() / 255, device)
    return fastcl.similarity_topk(queries, rows_of(names, tokenize(task.names), device), k, normalize=True)[1]


def examples(network: nn.Module, tasks: Mapping[str, Task], device: torch.device) -> Figure:
    """A column of glyphs per task, each beside its nearest names: the right one in green."""
    figure = Figure(figsize=(6.5 * len(tasks), 1.1 * _SHOWN), layout="constrained")
    grid = figure.subplots(_SHOWN, 2 * len(tasks), width_ratios=[1, 5] * len(tasks))
    for column, (title, task) in enumerate(tasks.items()):
        shown = torch.linspace(0, len(task.labels) - 1, _SHOWN).long()
        chosen = Task(task.images[shown], task.labels[shown], task.names)
        grid[0, 2 * column + 1].set_title(title, loc="left")
        found = nearest(network, chosen, _NEAREST, device).tolist()
        for row, (image, label, names) in enumerate(zip(chosen.images, chosen.labels, found, strict=True)):
            glyph, text = grid[row, 2 * column : 2 * column + 2]
            glyph.imshow(255 - image[0].numpy(), cmap="gray", vmin=0, vmax=255)
            for line, name in enumerate(names):
                colour = "tab:green" if name == label else "black"
                text.text(
                    0, 0.9 - line / _NEAREST, task.names[name].lower(), color=colour, va="top", fontsize=8
                )
            glyph.axis("off")
            text.axis("off")
    return figure
