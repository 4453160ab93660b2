"""The demo trainer and the command line: what a run leaves behind, and what is said when it cannot start."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import simclr
from fastcl.train.data import augment_digits, load
from fastcl.train.evaluation import embed, knn_top1, knn_top1_few

SMALL = ("train", "simclr", "--data", "digits", "--width", "4", "--batch-size", "256")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run") / "made" / "by the run"
    main([*SMALL, "--epochs=2", "--out", str(folder)])
    return folder


def rows(out: Path) -> list[list[str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


class TestRun:
    def test_the_metrics_have_a_row_for_the_untrained_encoder_and_one_per_epoch(self, out: Path) -> None:
        header, *measured = rows(out)
        assert header == ["epoch", "loss", "knn_top1", "knn_top1_few"]
        assert [row[0] for row in measured] == ["0", "1", "2"]

    def test_the_untrained_encoder_has_accuracies_and_no_loss(self, out: Path) -> None:
        _, loss, top1, few = rows(out)[1]
        assert loss == ""
        assert 0.1 < float(few) < float(top1) < 1

    def test_the_loss_falls(self, out: Path) -> None:
        first, second = (float(row[1]) for row in rows(out)[2:])
        assert second < first

    def test_the_checkpoint_restores_the_encoder(self, out: Path, tmp_path: Path) -> None:
        weights = torch.load(out / "simclr.ckpt", weights_only=True)["state_dict"]
        method = simclr(out=tmp_path, width=4, seed=1).method
        method.load_state_dict(weights)
        source = load("digits")
        bank, queries = (embed(method.encoder, part.images) for part in (source.train, source.test))
        top1 = knn_top1(bank, source.train.labels, queries, source.test.labels)
        assert top1 == pytest.approx(float(rows(out)[-1][2]), abs=1 / len(queries))

    def test_the_curves_are_a_png(self, out: Path) -> None:
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_the_same_seed_gives_the_same_run_and_replaces_the_older_results(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = [], []
        for kept in (first, second):
            main([*SMALL, "--epochs", "1", "--out", str(tmp_path)])
            kept.extend(rows(tmp_path))
        assert first == second
        assert len(first) == 3
        output = capsys.readouterr().out.splitlines()[-4:]
        assert output[0].startswith("epoch 1/1  loss ")
        assert output[1].startswith("knn_top1 ")
        assert "->" in output[2]
        assert str(tmp_path / "metrics.csv") in output[3]

    def test_options_may_come_from_a_file(self, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text(f"width: 4\nepochs: 1\nbatch_size: 700\nout: {tmp_path / 'run'}\n")
        main(["train", "simclr", "--config", str(config)])
        assert len(rows(tmp_path / "run")) == 3


class TestDigits:
    def test_a_fifth_of_each_class_is_for_testing(self) -> None:
        source = load("digits")
        train, test = source.train.labels.bincount(), source.test.labels.bincount()
        assert train.sum() + test.sum() == 1797
        assert ((test / (train + test) - 0.2).abs() < 0.01).all()

    def test_views_differ_from_each_other_but_not_in_shape(self) -> None:
        images = load("digits").train.images[:16]
        first, second = augment_digits(images), augment_digits(images)
        assert first.shape == second.shape == images.shape
        assert first.isfinite().all()
        assert not first.isclose(second).all(dim=(1, 2, 3)).any()


class TestNearestNeighbours:
    bank = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])
    bank_labels = torch.tensor([5, 7, 9])

    def test_a_query_has_the_label_of_the_entry_with_the_largest_cosine(self) -> None:
        queries = torch.tensor([[9.0, 1.0], [1.0, 2.0], [-1.0, -1e-3], [2.0, 1.9]])
        labels = torch.tensor([5, 7, 9, 7])
        assert knn_top1(self.bank, self.bank_labels, queries, labels) == 0.75

    def test_with_one_entry_per_class_few_labels_are_all_labels(self) -> None:
        queries, labels = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor([5, 9])
        assert knn_top1_few(self.bank, self.bank_labels, queries, labels) == 0.5

    def test_few_labels_are_one_per_class_and_always_the_same_draws(self) -> None:
        # class 0 has one entry where its query is and one opposite it, nearer to class 1's
        bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        bank_labels, queries, labels = torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.1]]), torch.tensor([0])
        few = knn_top1_few(bank, bank_labels, queries, labels)
        assert knn_top1(bank, bank_labels, queries, labels) == 1
        assert 0.2 < few < 0.8
        assert few == knn_top1_few(bank, bank_labels, queries, labels)

    def test_embedding_leaves_the_encoder_in_training_mode_and_unchanged(self) -> None:
        encoder = torch.nn.BatchNorm1d(2)
        embed(encoder, self.bank)
        assert encoder.training
        assert encoder.num_batches_tracked == 0


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--data", "cats"], "data must be one of 'digits', got 'cats'"),
            (["--arch", "vgg"], "arch must be one of 'resnet8', 'resnet14', 'resnet20', got 'vgg'"),
            (["--batch-size", "5000"], "batch_size must be between 2 and 1437"),
            (["--batch-size", "1"], "batch_size must be between 2 and 1437"),
            (["--epochs", "0"], "epochs"),
            (["--temperature", "warm"], "temperature"),
            (["--nonsense", "1"], "--nonsense"),
            (["--config", "missing.yaml"], "missing.yaml"),
            (["--out", __file__], "out must be a folder to write to"),
        ],
    )
    def test_what_cannot_be_trained_is_said_in_one_line(
        self, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", "--out", str(tmp_path), *arguments])
        assert stop.value.code != 0
        output = capsys.readouterr()
        assert said in output.err
        assert len(output.err.splitlines()) == 1
        assert output.out == ""
        assert not list(tmp_path.iterdir())

    def test_an_unknown_method_is_said_in_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "magic"])
        assert stop.value.code != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "magic" in line
        assert "simclr" in line

    def test_help_lists_every_option_with_its_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", "--help"])
        assert stop.value.code == 0
        output = capsys.readouterr().out
        for option in (
            "data",
            "out",
            "arch",
            "width",
            "dim",
            "epochs",
            "batch_size",
            "temperature",
            "lr",
            "seed",
        ):
            assert f"--{option} " in output
        assert output.count("default:") == 11

    def test_info_says_what_is_available_and_needs_none_of_the_optional_packages(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None, jsonargparse=None, torchvision=None)\n"
            "from fastcl.cli import main; main(['info'])"
        )
        assert done.returncode == 0, done.stderr
        assert "chunked    available" in done.stdout

    def test_a_missing_optional_package_is_said_with_the_command_that_installs_it(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None)\n"
            "from fastcl.cli import main; main(['train', 'simclr'])"
        )
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert "needs lightning" in line
        assert "pip install 'fastcl[train]'" in line
