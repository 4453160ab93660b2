"""The methods, as a script of one's own uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcl.cli import main

pytest.importorskip("fastcl.train")  # makes torchvision importable

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from fastcl.train import MoCHi, MoCo, Optimization, SimCLR, SupCon, make_encoder, prepare
from fastcl.train.checkpoints import read_initial


def noisy(images: torch.Tensor) -> torch.Tensor:
    return images + 0.1 * torch.randn_like(images)


@pytest.mark.parametrize("method", [SimCLR, SupCon, MoCo, MoCHi])
def test_methods_serve_a_script_of_ones_own(method: type, tmp_path: Path) -> None:
    encoder, features = make_encoder("resnet8", 8, width=4, in_channels=1)
    options = {"queue_size": 32, "bn_splits": 2} if issubclass(method, MoCo) else {}
    module = method(encoder, features, noisy, dim=8, optimization=Optimization("sgd", lr=0.01), **options)
    before = [parameter.clone() for parameter in encoder.parameters()]
    batches = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), batch_size=16)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(module, batches)
    assert not any(a.equal(b) for a, b in zip(before, encoder.parameters(), strict=True))


class TestMoCo:
    def moco(self, **options: object) -> MoCo:
        encoder, features = make_encoder("resnet8", 8, width=4, in_channels=1)
        return MoCo(encoder, features, noisy, dim=8, queue_size=32, bn_splits=1, **options)

    def test_the_key_encoder_starts_as_the_query_encoder_and_has_no_gradient(self) -> None:
        moco = self.moco()
        query, key = moco.query_encoder.state_dict(), moco.key_encoder.state_dict()
        assert all(key[name].equal(x) for name, x in query.items())
        assert not any(parameter.requires_grad for parameter in moco.key_encoder.parameters())

    def test_it_loads_the_official_layout(self, tmp_path: Path) -> None:
        source, target = self.moco(), self.moco()
        checkpoint = tmp_path / "moco.pth.tar"
        torch.save({"state_dict": official_layout(source)}, checkpoint)
        target.load_moco(read_initial(checkpoint))
        loaded = target.state_dict()
        assert all(loaded[name].equal(x) for name, x in source.state_dict().items())

    def test_an_initial_checkpoint_that_does_not_fit_is_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = tmp_path / "moco.pth.tar"
        torch.save({"state_dict": official_layout(self.moco())}, checkpoint)
        with pytest.raises(SystemExit):
            main(["train", "moco", f"--init={checkpoint}", "--width=8", f"--out={tmp_path / 'out'}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"init must fit this run, {checkpoint} does not" in line
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, checkpoint)
        with pytest.raises(ValueError, match="nor in MoCo's official layout"):
            prepare("moco", init=checkpoint, out=tmp_path / "out")


def official_layout(moco: MoCo) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {
        "module.queue": moco.queue.keys.T,
        "module.queue_ptr": torch.tensor([3]),
    }
    moco.queue.pointer.fill_(3)
    for side, encoder in (("q", moco.query_encoder), ("k", moco.key_encoder)):
        for name, x in encoder.state_dict().items():
            part, rest = name.split(".", 1)
            state[f"module.encoder_{side}.{'fc.' if part == '1' else ''}{rest}"] = x
    return state
