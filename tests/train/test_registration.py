"""A method is one file: what that file registers is offered, explained and trained."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import methods, prepare
from fastcl.train.methods import METHODS
from fastcl.train.methods.base import Method
from fastcl.train.methods.registry import register

TOY = """
from dataclasses import dataclass
from typing import Annotated

from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.methods.base import Method, projection_head
from fastcl.train.methods.registry import register
from fastcl.train.ranges import PositiveFloat
from fastcl.train.settings import ContrastiveSettings


@dataclass(frozen=True, kw_only=True)
class ToySettings(ContrastiveSettings):
    pull: Annotated[PositiveFloat, "How strongly the views attract each other."]


@register(
    "toy-method",
    "views attract each other (Nobody 2020)",
    settings=ToySettings,
    recipe={
        "digits": {"pull": 2.5},
        "small": {"pull": 3.0, "temperature": 0.5, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0},
        "large": {
            **{"pull": 3.0, "temperature": 0.5, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0},
            **{"epochs": 10, "batch_size": 256, "warmup_epochs": 0},
            **{"crop_min": 0.2, "jitter": 0.4, "blur": False},
        },
    },
)
class Toy(Method):
    def __init__(self, encoder, features, augment, *, dim, temperature, optimization, pull):
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = projection_head(features, dim, batch_norm=True)
        self.pull = pull
        self.schedule(temperature=temperature)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.extend(batch.indices.tolist())
        z1, z2 = (self.projector(self.encoder(view)) for view in batch.views)
        loss = self.pull * (z1 - z2).square().mean() / self.temperature
        self.record(loss, lambda: measure_pairs(z1, z2))
        return loss
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a method whose file lies in the folder of the methods, as far as Python can tell."""
    folder, before = tmp_path / "methods", dict(METHODS)
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    methods.discover()
    yield "toy-method"
    METHODS.clear()
    METHODS.update(before)
    del sys.modules["fastcl.train.methods.toy"]


def test_it_trains_and_resumes_with_its_own_options(toy: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["train", toy, "--width=4", "--batch-size=256", "--limit=512", "--epochs=1", f"--out={out}"]
    main([*arguments, "--pull=4"])
    with (out / "metrics.csv").open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["loss"]) > 0
    assert "pull: 4.0" in (out / "config.yaml").read_text().splitlines()
    assert "projector.0.weight" in torch.load(out / "toy-method.ckpt", weights_only=True)["state_dict"]
    options = {"width": 4, "batch_size": 256, "limit": 512, "epochs": 1, "out": out, "resume": True}
    assert prepare(toy, **options, pull=4.0).resumes
    with pytest.raises(ValueError, match=r"pull must be 4.0 as in .*toy-method.ckpt to resume it, got 2.5"):
        prepare(toy, **options)


def test_the_help_lists_it_and_its_options(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["toy-method", "views attract each other (Nobody 2020)"] in listed
    with pytest.raises(SystemExit):
        main(["train", toy, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "How strongly the views attract each other. (digits: 2.5, small: 3.0, large: 3.0)" in said
    with pytest.raises(SystemExit):
        main(["train", toy, "--pull=-1"])
    assert "pull" in capsys.readouterr().err


class TestRefused:
    recipe = METHODS["simclr"].recipe

    def test_a_name_that_is_taken(self) -> None:
        with pytest.raises(ValueError, match="name must be new, moco is MoCo"):
            register("moco", "a second one", recipe=self.recipe)(Method)

    def test_a_recipe_without_a_kind_of_data(self) -> None:
        with pytest.raises(ValueError, match="recipe must be for digits, small, large, got digits"):
            register("half", "for digits only", recipe={"digits": {}})(Method)

    def test_a_recipe_that_lacks_an_option_or_gives_an_unknown_one(self) -> None:
        small = self.recipe["small"]
        for changed, said in (
            ({name: small[name] for name in small if name != "lr"}, r"lacks \['lr'\]"),
            (small | {"magic": 1}, r"unknown \['magic'\]"),
        ):
            recipe = self.recipe | {"small": changed}
            with pytest.raises(ValueError, match=f"recipe for small .*{said}"):
                register("half", "not all of it", settings=METHODS["simclr"].settings, recipe=recipe)(Method)
        assert "half" not in METHODS
