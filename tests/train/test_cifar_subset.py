"""The benchmarks of the trainers: their commands can be run, their tables are right."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastcl.train")

from bench import accuracy, pairs
from fastcl.train.methods import METHODS
from fastcl.train.options import parse


@pytest.mark.parametrize("method", accuracy.IMAGES)
def test_a_command_has_options_that_its_method_takes(method: str, tmp_path: Path) -> None:
    fastcl, train, name, *options = accuracy.command(method, 3, Path("digits"), tmp_path)
    assert (fastcl, train, name) == ("fastcl", "train", method)
    recipe = METHODS[method]
    settings = recipe.settings(**{**recipe.defaults("small"), **parse(method, options)})
    assert (settings.limit, settings.arch, settings.seed, settings.out) == (12000, "resnet8", 3, tmp_path)


def test_the_long_tails_table_has_the_thirds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LONG_TAIL_RESULTS", tmp_path)
    head = "epoch,knn_top1,linear_many,linear_medium,linear_few"
    (tmp_path / "kcl-2.csv").write_text(f"{head}\n0,0.25,0.1,0.1,0.1\n8,0.5,0.75,0.625,0.375\n")
    accuracy.report_long_tail()
    assert "| kcl-2 | 0.750 | 0.625 | 0.375 | 0.500 |" in (tmp_path / "README.md").read_text().splitlines()
    for method in accuracy.LONG_TAIL_METHODS:
        _, _, name, *options = accuracy.command(method, 0, Path("digits"), tmp_path, accuracy.LONG_TAIL)
        assert (parse(name, options)["imbalance"], parse(name, options)["limit"]) == ("100", "50000")


def test_the_table_has_what_training_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    (tmp_path / "byol-0.csv").write_text("epoch,knn_top1\n0,0.25\n1,\n2,0.375\n")
    (tmp_path / "moco-v3-1.csv").write_text("epoch,knn_top1\n0,0.25\n1,0.2\n")
    accuracy.report()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| byol-0 | 2 | 0.250 | 0.375 | +0.125 | 0.10 |" in lines
    assert "| moco-v3-1 | 1 | 0.250 | 0.200 | -0.050 | 0.05 |" in lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", pairs.RUNS)
def test_a_run_on_pairs_has_options_that_its_method_takes(name: str, tmp_path: Path) -> None:
    fastcl, train, method, *options = pairs.command(name, tmp_path)
    assert (fastcl, train) == ("fastcl", "train")
    recipe = METHODS[method]
    (kind,) = recipe.settings.kinds
    assert recipe.settings(**{**recipe.defaults(kind), **parse(method, options)}).out == tmp_path


def test_the_table_of_pairs_has_every_measure_and_the_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "RESULTS", tmp_path)
    (tmp_path / "clip.csv").write_text("epoch,zero_shot_fonts\n0,0.002\n1,0.25\n")
    (tmp_path / "simcse.csv").write_text("epoch,recall_10,tfidf_recall_10\n0,0.25,0.5\n1,0.75,0.5\n")
    pairs.report()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| clip | zero_shot_fonts | 0.002 | 0.250 |" in lines
    assert "| simcse | recall_10 | 0.250 | 0.750 |" in lines
    assert "| tfidf | recall_10 | | 0.500 |" in lines
    assert "fastcl train simcse --epochs=3 --out=runs/simcse" in lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
