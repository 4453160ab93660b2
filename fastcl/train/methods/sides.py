"""What the methods for samples with two sides share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Method, Rows


class TwoSided(Method):
    """The views are the sides of a sample, such as an image and its text; each has its network."""

    @property
    def evaluated(self) -> nn.ModuleList:
        """The network of each side, to (N, D): encoder and projection."""
        raise NotImplementedError

    def embed(self, views: Sequence[Any]) -> Rows:
        return tuple(network(view) for network, view in zip(self.evaluated, views, strict=True))

    def pairs(self, embedded: Rows, targets: Rows) -> dict[str, Tensor]:
        return measure_pairs(embedded[0], embedded[1], across=True)
