"""Checkpoints that runs start from, and those that are exported for torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fastcl.cli import main

pytest.importorskip("fastcl.train")  # makes torchvision importable

import torchvision

from fastcl.train import MoCo, SimCLR, export, make_encoder
from fastcl.train.checkpoints import read_initial


class TestInitial:
    def test_what_no_run_can_start_from_is_said_plainly(self, tmp_path: Path) -> None:
        path = tmp_path / "x.ckpt"
        weights = {"encoder.0.weight": torch.ones(100, 100)}
        torch.save({"state_dict": weights}, path)
        whole = path.read_bytes()
        assert read_initial(path).keys() == weights.keys()
        for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"x.ckpt is not a checkpoint, or a damaged one$"):
                read_initial(path)
        torch.save(weights, path)
        with pytest.raises(ValueError, match=r"not a checkpoint of a run, which holds the weights as its"):
            read_initial(path)
        weights["encoder.0.weight"][3, 4] = torch.nan
        torch.save({"state_dict": weights}, path)
        with pytest.raises(ValueError, match=r"weights that are no finite numbers: 'encoder.0.weight'$"):
            read_initial(path)


class TestExport:
    @pytest.mark.parametrize("size", [32, 224])
    def test_torchvision_loads_it(
        self, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        encoder, features = make_encoder("resnet18", size)
        method = MoCo(encoder, features, nn.Identity(), queue_size=8, bn_splits=2)
        torch.save({"state_dict": method.state_dict()}, tmp_path / "moco.ckpt")
        main(["export", str(tmp_path / "moco.ckpt"), str(tmp_path / "resnet18.pt")])
        said = capsys.readouterr().out
        model = torchvision.models.resnet18()
        if size == 32:
            assert "3x3 stem" in said
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        else:
            assert "standard stem" in said
        model.load_state_dict(torch.load(tmp_path / "resnet18.pt", weights_only=True))
        model.fc = nn.Identity()
        images = torch.randn(2, 3, 64, 64)
        assert model.eval()(images).isclose(encoder.eval()(images), atol=1e-5).all()

    def test_what_cannot_be_exported_is_said_in_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        encoder, features = make_encoder("resnet8", 8, width=4)
        torch.save(
            {"state_dict": SimCLR(encoder, features, nn.Identity()).state_dict()}, tmp_path / "small.ckpt"
        )
        (tmp_path / "text.ckpt").write_text("no checkpoint")
        torch.save({"state_dict": {3: torch.ones(1), "encoder.0.weight": 3}}, tmp_path / "numbers.ckpt")
        os.mkfifo(tmp_path / "pipe")
        cases = (
            ("missing.ckpt", "cannot read the checkpoint"),
            ("text.ckpt", "is not a checkpoint"),
            ("small.ckpt", "holds no encoder of resnet18"),
            ("numbers.ckpt", "is not a checkpoint of a run"),
            ("pipe", "pipe: not a regular file"),
        )
        for name, expected in cases:
            with pytest.raises(SystemExit) as stop:
                main(["export", str(tmp_path / name), str(tmp_path / "out.pt")])
            assert stop.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert expected in line
        assert not (tmp_path / "out.pt").exists()

    def test_neither_the_checkpoint_nor_what_is_no_file_is_replaced(self, tmp_path: Path) -> None:
        encoder, features = make_encoder("resnet18", 32)
        checkpoint = tmp_path / "simclr.ckpt"
        torch.save({"state_dict": SimCLR(encoder, features, nn.Identity()).state_dict()}, checkpoint)
        os.mkfifo(tmp_path / "pipe")  # stands for /dev/null
        for out, said in (
            (checkpoint, "it is the checkpoint"),
            (tmp_path / "pipe", "not a regular file"),
            (tmp_path, "not a regular file"),
            (Path(), "not a regular file"),
        ):
            with pytest.raises(ValueError, match=f"cannot write {out}: {said}"):
                export(str(checkpoint), str(out))
        assert (tmp_path / "pipe").is_fifo()
        assert "state_dict" in torch.load(checkpoint, weights_only=True)
