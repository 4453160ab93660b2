"""The parts that the trainers add: batch normalization for MoCo, schedules, evaluation, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastcl.cli import main

pytest.importorskip("fastcl.train")  # makes torchvision importable

import torchvision
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from fastcl.train import MoCHi, MoCo, Optimization, SimCLR, SupCon, make_encoder, prepare
from fastcl.train.batchnorm import SplitBatchNorm2d, encode_shuffled, split_batch_norm
from fastcl.train.checkpoints import read_moco
from fastcl.train.evaluate.features import Features, embed
from fastcl.train.evaluate.linear import linear_top1
from fastcl.train.evaluate.neighbours import knn_top1, knn_top1_few
from fastcl.train.evaluate.pairs import measure_pairs


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
        target.load_moco(read_moco(checkpoint))
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
        with pytest.raises(ValueError, match="not in MoCo's official layout"):
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


class TestBatchNormalization:
    def test_parts_are_normalized_as_if_each_were_a_batch(self) -> None:
        x = torch.randn(8, 3, 5, 5) * torch.arange(1, 9)[:, None, None, None]
        split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        output = split(x)
        for part in range(4):
            assert output[part::4].isclose(plain(x[part::4]), atol=1e-5).all()

    def test_running_statistics_are_the_mean_over_the_parts(self) -> None:
        x = torch.randn(8, 3, 5, 5)
        split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        split(x), plain(x)
        assert split.running_mean.isclose(plain.running_mean, atol=1e-6).all()

    def test_evaluation_and_state_are_the_plain_ones(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
        x = torch.randn(4, 1, 6, 6)
        network(x)
        expected, names = network.eval()(x), list(network.state_dict())
        split_batch_norm(network, 2)
        assert network.eval()(x).equal(expected)
        assert list(network.state_dict()) == names
        assert isinstance(network[1][0], SplitBatchNorm2d)

    def test_a_batch_that_cannot_be_split_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="multiple of bn_splits = 4, got 6 images"):
            SplitBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))

    def test_shuffling_changes_the_company_and_nothing_else(self) -> None:
        x = torch.randn(8, 3, 2, 2)
        assert encode_shuffled(nn.Flatten(), x, seed=1).equal(x.flatten(1))
        parts = SplitBatchNorm2d(3, 4)
        assert not encode_shuffled(parts, x, seed=1).isclose(parts(x)).all()


class TestOptimization:
    def test_the_rate_warms_up_and_falls_to_zero(self) -> None:
        optimizer, schedule = Optimization("sgd", lr=1.0, warmup_epochs=2).configure(nn.Linear(2, 2), 10, 5)
        rates = []
        for _ in range(50):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[0] == pytest.approx(0.1)
        assert rates[:11] == sorted(rates[:11])
        assert max(rates) == rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01

    def test_lars_spares_biases_and_batch_norm(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer, _ = Optimization("lars", lr=1.0, weight_decay=0.1).configure(network, 1, 1)
        decayed = {
            id(parameter): group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert [decayed[id(p)] for p in network.parameters()] == [0.1, 0.0, 0.0, 0.0]


class TestEvaluation:
    bank = Features(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]), torch.tensor([5, 7, 9]))

    def test_a_query_has_the_label_of_the_entry_with_the_largest_cosine(self) -> None:
        queries = torch.tensor([[9.0, 1.0], [1.0, 2.0], [-1.0, -1e-3], [2.0, 1.9]])
        assert knn_top1(self.bank, Features(queries, torch.tensor([5, 7, 9, 7])), k=1) == 0.75

    def test_near_neighbours_outvote_many_far_ones(self) -> None:
        bank = Features(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([1, 0, 0]))
        query = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        assert knn_top1(bank, query, k=3, temperature=0.07) == 1
        assert knn_top1(bank, query, k=3, temperature=10.0) == 0

    def test_few_labels_are_one_per_class_and_always_the_same_draws(self) -> None:
        # class 0 has one entry where its query is and one opposite it, nearer to class 1's
        bank = Features(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        query = Features(torch.tensor([[1.0, 0.1]]), torch.tensor([0]))
        few = knn_top1_few(bank, query)
        assert knn_top1(bank, query, k=1) == 1
        assert 0.2 < few < 0.8
        assert few == knn_top1_few(bank, query)

    def test_a_linear_classifier_separates_what_is_separable(self) -> None:
        torch.manual_seed(0)
        labels = torch.arange(200) % 4
        values = torch.randn(200, 4) + 12 * nn.functional.one_hot(labels, 4)
        train, test = Features(values[:100], labels[:100]), Features(values[100:], labels[100:])
        assert linear_top1(train, test) == 1
        assert linear_top1(train, test, share=0.01) > 0.9, "one label per class"
        assert linear_top1(train, Features(test.values, test.labels.roll(1))) == 0

    def test_embedding_leaves_the_encoder_in_training_mode_and_unchanged(self) -> None:
        encoder = nn.BatchNorm1d(2)
        embed(encoder, [(self.bank.values, self.bank.labels)], nn.Identity(), torch.device("cpu"))
        assert encoder.training
        assert encoder.num_batches_tracked == 0

    def test_pairs_are_measured_as_defined(self) -> None:
        torch.manual_seed(0)
        query = nn.functional.normalize(torch.randn(6, 4), dim=1)
        key = nn.functional.normalize(query + 0.3 * torch.randn(6, 4), dim=1)
        measured = measure_pairs(3 * query, key / 2)
        others = ~torch.eye(6, dtype=torch.bool)
        distances = torch.cdist(query, query).square()[others]
        both = torch.cat([query @ query.T, query @ key.T], dim=1).masked_fill(~others.repeat(1, 2), -2)
        top1 = ((query * key).sum(1) > both.max(1).values).float().mean()
        assert measured["alignment"].isclose((query - key).square().sum(1).mean(), atol=1e-5)
        assert measured["uniformity"].isclose((-2 * distances).exp().mean().log(), atol=1e-5)
        assert measured["contrastive_top1"] == top1


class TestExport:
    @pytest.mark.parametrize("size", [32, 224])
    def test_torchvision_loads_it(
        self, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        encoder, features = make_encoder("resnet18", size)
        method = MoCo(encoder, features, noisy, queue_size=8, bn_splits=2)
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
        torch.save({"state_dict": SimCLR(encoder, features, noisy).state_dict()}, tmp_path / "small.ckpt")
        (tmp_path / "text.ckpt").write_text("no checkpoint")
        cases = (
            ("missing.ckpt", "cannot read the checkpoint"),
            ("text.ckpt", "is not a checkpoint"),
            ("small.ckpt", "holds no encoder of resnet18"),
        )
        for name, expected in cases:
            with pytest.raises(SystemExit) as stop:
                main(["export", str(tmp_path / name), str(tmp_path / "out.pt")])
            assert stop.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert expected in line
        assert not (tmp_path / "out.pt").exists()
