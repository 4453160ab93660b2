"""What an evaluation is to a run: columns of its table, lines of its picture, and pictures of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fastcl.train.evaluate.features import Features


class Evaluation(ABC):
    """Measures what a method trains, on data that it was not trained on; called on every rank alike.

    Attributes:
        measures: the names of what is measured each time.
        rare: of what is measured before and after training only.
        lines: what the picture of a run's curves calls them; those of them that a run ends with printing.
        possible: whether there is anything to evaluate on.
    """

    measures: ClassVar[tuple[str, ...]]
    rare: tuple[str, ...] = ()
    lines: ClassVar[Mapping[str, str]]
    possible = True

    @abstractmethod
    def measure(self, network: nn.Module, device: torch.device, *, thorough: bool) -> dict[str, float]:
        """The measures of a method's ``evaluated`` network, by name; the rare ones if ``thorough``."""

    @abstractmethod
    def draw(self, network: nn.Module, device: torch.device, folder: Path, title: str) -> list[str]:
        """Write pictures of what the network does into ``folder``; their names."""

    def training_features(self, network: nn.Module, device: torch.device) -> Iterator[Features]:
        """Features of the training samples, this rank's share, a batch at a time.

        Raises:
            NotImplementedError: methods for such data do not ask for them.
        """
        raise NotImplementedError
