"""What a training run leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import prepare
from fastcl.train.data.loader import Loader
from fastcl.train.evaluate.features import joined, stream
from fastcl.train.evaluate.neighbours import knn_top1
from fastcl.train.methods import METHODS

SMALL = ("train", "simclr", "--data", "digits", "--width", "4", "--batch-size", "256")
HEADER = (
    "epoch,loss,knn_top1,knn_top1_few,contrastive_top1,alignment,uniformity,center,residual,"
    "linear_top1,linear_top1_10percent,linear_top1_1percent"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run") / "made" / "by the run"
    main([*SMALL, "--epochs=2", "--out", str(folder)])
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestRun:
    def test_the_metrics_have_a_row_for_the_untrained_encoder_and_one_per_epoch(self, out: Path) -> None:
        assert (out / "metrics.csv").read_text().splitlines()[0] == HEADER
        assert [row["epoch"] for row in rows(out)] == ["0", "1", "2"]

    def test_the_untrained_encoder_has_accuracies_and_no_loss(self, out: Path) -> None:
        first = rows(out)[0]
        assert first["loss"] == ""
        assert 0.1 < float(first["knn_top1_few"]) < float(first["knn_top1"]) < 1

    def test_the_loss_falls(self, out: Path) -> None:
        first, second = (float(row["loss"]) for row in rows(out)[1:])
        assert second < first

    def test_linear_classifiers_are_measured_before_training_and_at_the_end(self, out: Path) -> None:
        first, *between, last = rows(out)
        names = ("linear_top1_1percent", "linear_top1_10percent", "linear_top1")
        assert all(row[name] == "" for row in between for name in names)
        for row in (first, last):
            shares = [float(row[name]) for name in names]
            assert 0.1 < shares[0] < shares[1] < shares[2] < 1

    def test_the_checkpoint_restores_the_encoder(self, out: Path, tmp_path: Path) -> None:
        weights = torch.load(out / "simclr.ckpt", weights_only=True)["state_dict"]
        run = prepare("simclr", out=tmp_path, width=4, seed=1)
        run.method.load_state_dict(weights)
        bank, queries = (
            joined(
                stream(
                    run.method.encoder,
                    Loader(images, 512, run.source.unreadable),
                    run.source.normalize,
                    torch.device("cpu"),
                )
            )
            for images in (run.source.bank, run.source.test)
        )
        top1 = float(rows(out)[-1]["knn_top1"])
        assert knn_top1(bank, queries, k=1) == pytest.approx(top1, abs=1 / len(queries.labels))

    def test_the_pictures_are_pngs(self, out: Path) -> None:
        for name in ("curves.png", "embedding.png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")

    def test_tensorboard_has_the_metrics_the_steps_epoch_0_and_the_options(self, out: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(out / "tensorboard")).Reload()
        found = set(events.Tags()["scalars"])
        assert {"loss", "knn_top1", "alignment", "residual", "step/loss", "step/learning_rate"} <= found
        accuracies = events.Scalars("linear_top1")
        assert [event.step for event in accuracies] == [0, 9]
        assert accuracies[0].value == pytest.approx(float(rows(out)[0]["linear_top1"]))
        assert [event.step for event in events.Scalars("step/loss")] == list(range(10))
        told = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"batch_size" in told
        assert events.Scalars("final/loss")[0].value == pytest.approx(float(rows(out)[-1]["loss"]))

    def test_the_parts_of_a_step_are_recorded(self, out: Path) -> None:
        times = json.loads((out / "times.json").read_text())
        assert list(times) == ["data", "forward", "loss", "backward", "optimizer"]
        assert all(0 < milliseconds < 10_000 for milliseconds in times.values())

    def test_the_same_seed_gives_the_same_run_and_overwrites_the_older_results(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = [], []
        for kept in (first, second):
            main([*SMALL, "--epochs", "1", "--out", str(tmp_path), "--overwrite"])
            kept.extend(rows(tmp_path))
        assert first == second
        assert len(first) == 2
        output = capsys.readouterr().out.splitlines()[-6:]
        assert output[0].startswith("epoch 1/1  loss ")
        assert output[1].startswith("knn_top1 ")
        assert "->" in output[2]
        assert output[3].startswith("linear_top1 ")
        assert output[4].startswith("a step took ")
        assert str(tmp_path / "metrics.csv") in output[5]

    def test_options_may_come_from_a_file_and_a_run_leaves_its_own(self, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text(f"width: 4\nepochs: 1\nbatch_size: 700\nout: {tmp_path / 'run'}\n")
        main(["train", "supcon", "--config", str(config)])
        first = rows(tmp_path / "run")
        main(["train", "supcon", "--config", str(tmp_path / "run" / "config.yaml"), "--overwrite"])
        assert rows(tmp_path / "run") == first
        assert len(first) == 2


FEW = {"out": None, "arch": "resnet8", "width": 4, "epochs": 1, "batch_size": 64, "dim": 32, "hidden": 32}
FEW |= {"queue_size": 256, "n_hard": 64, "n_mix": 16, "n_query_mix": 8, "mix_from_epoch": 0}
FEW |= {"prototypes": 16, "small_crops": 0, "cluster_from_epoch": 0, "noise": 64, "centres_from_epoch": 0}
CLUSTERS = {"pcl": (20, 10), "hcsc": (20, 10), "deepcluster": 20}


def options(method: str, **others: object) -> dict[str, object]:
    known = METHODS[method].defaults("digits")
    given = {"clusters": CLUSTERS.get(method), **FEW, **others}
    return {name: value for name, value in given.items() if name in known}


ON_DIGITS = [
    (name, "digits")
    for name, method in METHODS.items()
    if "digits" in method.recipe and not method.trainer.needs_colours
]
# those that make views of their own, and one each that keeps rows, clusters and classes
ON_COLOURS = [
    (name, "cifar")
    for name in ("simclr", "cmc", "pirl", "cpc", "swav", "dino", "moco", "inst-disc", "pcl", "supcon")
]


@pytest.mark.parametrize(("method", "data"), ON_DIGITS + ON_COLOURS)
def test_every_method_trains(method: str, data: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = "digits" if data == "digits" else str(request.getfixturevalue("cifar"))
    own = {"limit": 256} if data == "digits" else {"limit": 512, "image_size": 16}
    prepare(method, **options(method, data=folder, out=tmp_path, **own)).fit()
    _, trained = rows(tmp_path)
    assert -1 <= float(trained["loss"]) < (100 if method in ("vicreg", "barlow-twins", "tsc") else 20)
    assert -4 <= float(trained["uniformity"]) <= 0
    assert 0 <= float(trained["alignment"]) <= 4
    assert 0 <= float(trained["contrastive_top1"]) <= 1
    assert float(trained["linear_top1"]) > 0.1
    center, residual = float(trained["center"]), float(trained["residual"])
    assert center**2 + residual**2 < 1.001, "of unit rows; equal to 1 for residuals of one length"
    assert (tmp_path / f"{method}.ckpt").is_file()
