"""A run's pictures take longer than these tests' runs: only the run of a whole module draws them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastcl.train import run
from fastcl.train.evaluate import evaluation


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(values: object, names: Sequence[str], picture: Path, title: str) -> None:
        picture.touch()

    monkeypatch.setattr(evaluation, "draw_embedding", nothing)
    monkeypatch.setattr(run, "draw_curves", nothing)
