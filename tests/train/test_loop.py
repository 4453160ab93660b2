"""What the loop gives every method: indices, features before an epoch, any views, schedules, any samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

import torch.distributed as dist
from lightning.pytorch import Trainer
from processes import on_every_rank
from torch.utils.data import DataLoader, TensorDataset

import fastcl
from fastcl.train import (
    BYOL,
    HCSC,
    PCL,
    TSC,
    BarlowTwins,
    Batch,
    Cosine,
    DeepCluster,
    MoCo,
    MoCoV3,
    Optimization,
    SimCLR,
    SimSiam,
    SupCon,
    VICReg,
    make_encoder,
    prepare,
)
from fastcl.train.evaluate.features import Features, stream
from fastcl.train.methods.siamese import Siamese

SMALL = {"width": 4, "batch_size": 256, "limit": 512}
SGD = Optimization("sgd", lr=0.01)
QUEUE = {"queue_size": 32, "bn_splits": 1}


def fit(method: nn.Module, samples: Any, folder: Path, epochs: int = 1) -> None:
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(method, samples)


class TestIndices:
    def test_a_step_knows_its_samples(self, tmp_path: Path) -> None:
        run = prepare("simclr", out=tmp_path, epochs=1, **SMALL)
        seen, loss = [], run.method.loss

        def recorded(embedded: Any, targets: Any, batch: Batch) -> Tensor:
            assert batch.labels.equal(run.source.train.labels[batch.indices])
            seen.extend(batch.indices.tolist())
            return loss(embedded, targets, batch)

        run.method.loss = recorded
        run.fit()
        assert sorted(seen) == list(range(512))


class Remembering(SimSiam):
    """Keeps what it is given before each epoch."""

    def begin_epoch(self, features: Iterator[Features]) -> None:
        parts = list(features)
        assert max(len(part.labels) for part in parts) <= 512
        self.given = [*getattr(self, "given", []), parts]


def test_an_epoch_begins_with_the_features_of_all_training_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare("simsiam", out=tmp_path, epochs=2, **(SMALL | {"limit": 700}))
    run.method.__class__ = Remembering
    run.fit()
    first, second = run.method.given
    assert len(first) == 2, "700 images, at most 512 at a time"
    assert torch.cat([part.indices for part in first]).tolist() == list(range(700))
    assert torch.cat([part.labels for part in first]).equal(run.source.train.labels)
    encoder = run.method.encoder.eval()
    with torch.no_grad():
        trained = encoder(run.source.train.images[:8])
    assert second[0].values.shape == (512, trained.shape[1])
    assert not any(x.values[:8].allclose(trained, atol=1e-4) for x in (first[0], second[0]))
    assert run.method.encoder.training is False


class TestOwnScript:
    """Methods that want the training features, under a Trainer that nothing has prepared."""

    METHODS: ClassVar[dict[str, Any]] = {
        "pcl": lambda *a, **o: PCL(*a, clusters=(2, 3), cluster_from_epoch=0, samples=32, **QUEUE, **o),
        "hcsc": lambda *a, **o: HCSC(*a, clusters=(3, 2), cluster_from_epoch=0, samples=32, **QUEUE, **o),
        "deepcluster": lambda *a, **o: DeepCluster(*a, clusters=3, samples=32, **o),
        "tsc": lambda *a, **o: TSC(*a, classes=4, centres_from_epoch=0, **QUEUE, **o),
    }

    def made(self, name: str) -> tuple[Any, DataLoader[Any]]:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
        method = self.METHODS[name](encoder, 6, lambda x: x + 0.1 * torch.randn(1), dim=4, optimization=SGD)
        samples = TensorDataset(torch.randn(32, 1, 4, 4), torch.arange(32) % 4, torch.arange(32))
        return method, DataLoader(samples, batch_size=16)

    @pytest.mark.parametrize("name", METHODS)
    def test_without_the_features_of_all_samples_nothing_is_trained(self, name: str, tmp_path: Path) -> None:
        method, samples = self.made(name)
        with pytest.raises(ValueError, match=f"{type(method).__name__} needs the features of all training"):
            fit(method, samples, tmp_path)

    @pytest.mark.parametrize("name", METHODS)
    def test_with_them_an_epoch_begins_by_them(self, name: str, tmp_path: Path) -> None:
        method, samples = self.made(name)
        seen: list[int] = []

        def features(network: nn.Module, device: torch.device) -> Iterator[Features]:
            for part in stream(network, samples, nn.Identity(), device):
                seen.extend(part.indices.tolist())
                yield part

        method.training_features = features
        fit(method, samples, tmp_path, epochs=2)
        assert seen == [*range(32)] * 2

    @pytest.mark.parametrize("name", ["pcl", "deepcluster"])
    def test_one_cluster_is_none(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="clusters must be at least 2, got"):
            prepare(name, out=tmp_path, clusters="1", **SMALL)


class TestViews:
    sizes = (8, 8, 4, 4)

    def crops(self) -> list[Any]:
        return [lambda x, size=size: x[..., :size, :size] + 0.1 * torch.randn(1) for size in self.sizes]

    def encoder(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @pytest.mark.parametrize("method", [BYOL, SimSiam, SimCLR, SupCon, MoCo])
    def test_every_method_takes_more_views_of_other_sizes(self, method: Any, tmp_path: Path) -> None:
        options = {"queue_size": 32, "bn_splits": 1} if method is MoCo else {}
        options |= {"hidden": 8} if method in (BYOL, SimSiam) else {}
        module = method(self.encoder(), 6, self.crops(), dim=8, optimization=SGD, **options)
        samples = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), batch_size=16)
        before = module.encoder[0].weight.clone()
        fit(module, samples, tmp_path)
        assert not before.equal(module.encoder[0].weight)

    def test_each_view_is_compared_with_each_of_the_first_two(self) -> None:
        compared: list[tuple[int, int]] = []

        class Recording(Siamese):
            def compare(self, online: Tensor, target: Tensor) -> Tensor:
                compared.append((int(online[0, 0]), int(target[0, 0])))
                return online.mean()

        views = tuple(torch.full((2, 3), float(i)) for i in range(4))
        batch = Batch(views)
        plain = Recording(nn.Identity(), nn.Identity(), projector=nn.Identity(), optimization=SGD)
        plain.loss(views, (), batch)
        assert compared == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
        compared.clear()
        followed = Recording(
            nn.Linear(3, 3), nn.Identity(), projector=nn.Identity(), momentum=0.9, optimization=SGD
        )
        followed.loss(views, views[:2], batch)
        assert compared == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]

    def test_views_of_one_size_are_one_batch_for_simclr_only(self) -> None:
        calls: list[tuple[int, ...]] = []

        class Encoder(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                calls.append(tuple(x.shape))
                return x.flatten(1)[:, :6]

        views = [torch.randn(5, 1, size, size) for size in self.sizes]
        SimCLR(Encoder(), 6, self.crops(), dim=8, optimization=SGD).embed(views)
        assert calls == [(10, 1, 8, 8), (10, 1, 4, 4)]
        calls.clear()
        SimSiam(Encoder(), 6, self.crops(), dim=8, hidden=4, optimization=SGD).embed(views)
        assert calls == [(5, 1, 8, 8)] * 2 + [(5, 1, 4, 4)] * 2


class TestSiamese:
    """The losses against the papers' formulas, from the method's own networks."""

    def module(self, method: Any, **options: Any) -> Siamese:
        torch.manual_seed(0)
        views = [lambda x: x, lambda x: x.flip(1)]
        return method(nn.Linear(6, 6), 6, views, dim=4, hidden=8, optimization=SGD, **options)

    def loss(self, module: Siamese) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        samples = torch.randn(16, 6)
        batch = module.on_after_batch_transfer((samples,), 0)
        loss = module.loss(module.embed(batch.views), module.targets(batch.views), batch)
        z = [module.projector(module.encoder(view)) for view in batch.views]
        return loss, z, [module.predictor(x) for x in z]

    def test_simsiam(self) -> None:
        module = self.module(SimSiam)
        loss, z, p = self.loss(module)
        z = [x.detach() for x in z]
        exact = -(torch.cosine_similarity(p[0], z[1]) + torch.cosine_similarity(p[1], z[0])).mean() / 2
        assert loss.isclose(exact)
        found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        exact_grads = torch.autograd.grad(exact, list(module.parameters()), allow_unused=True)
        for x, y in zip(found, exact_grads, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)

    def test_byol_is_the_squared_distance_to_the_slow_copy_both_ways(self) -> None:
        module = self.module(BYOL, momentum=0.5)
        assert module.slow_copy is not None
        with torch.no_grad():
            for parameter in module.slow_copy.parameters():
                parameter.add_(1.0)
        slow = [x.clone() for x in module.slow_copy.parameters()]
        fast = list(module.network.parameters())
        loss, _, p = self.loss(module)
        for now, before, trained in zip(module.slow_copy.parameters(), slow, fast, strict=True):
            assert now.allclose((before + trained) / 2)
            assert not now.requires_grad
        unit = nn.functional.normalize
        torch.manual_seed(0)
        samples = torch.randn(16, 6)
        targets = [module.slow_copy(x) for x in (samples, samples.flip(1))]
        p = [module.predictor(module.projector(module.encoder(x))) for x in (samples, samples.flip(1))]
        batch = module.on_after_batch_transfer((samples,), 0)
        loss = module.loss(tuple(p), tuple(targets), batch)
        exact = sum((unit(x) - unit(y)).square().sum(1).mean() for x, y in zip(p, targets[::-1], strict=True))
        assert loss.isclose(exact)

    def test_byol_can_have_projections_without_a_common_mean(self) -> None:
        module, samples = self.module(BYOL, final_norm=True), torch.randn(16, 6)
        assert module.slow_copy is not None
        for network in (module.network, module.slow_copy):
            torch.testing.assert_close(network(samples).mean(dim=0), torch.zeros(4), atol=1e-6, rtol=0)
        assert module.projector[-1].weight is None

    def test_moco_v3_is_the_cross_entropy_of_both_directions(self) -> None:
        module = self.module(MoCoV3, momentum=0.9, temperature=0.2)
        samples = torch.randn(16, 6)
        batch = module.on_after_batch_transfer((samples,), 0)
        embedded, targets = module.embed(batch.views), module.targets(batch.views)
        exact = torch.tensor(0.0)
        for q, k in zip(embedded, targets[::-1], strict=True):
            logits = nn.functional.normalize(q) @ nn.functional.normalize(k).T / 0.2
            exact = exact + 2 * 0.2 * nn.functional.cross_entropy(logits, torch.arange(16))
        assert module.loss(embedded, targets, batch).isclose(exact)

    def test_simclr_has_other_losses(self) -> None:
        z = tuple(torch.randn(8, 4) for _ in range(2))
        for name, exact in (
            ("nt_xent", fastcl.nt_xent(*z, 0.3)),
            ("decoupled", fastcl.decoupled_loss(*z, 0.3)),
            ("hard_negative", fastcl.hard_negative_loss(*z, 0.3)),
        ):
            module = SimCLR(nn.Identity(), 4, nn.Identity(), temperature=0.3, loss=name, optimization=SGD)
            assert module.loss(z, (), Batch(z)).isclose(exact), name
        with pytest.raises(ValueError, match="loss must be one of 'nt_xent'"):
            SimCLR(nn.Identity(), 4, nn.Identity(), loss="l2")

    def test_the_patch_embedding_of_a_transformer_is_frozen(self) -> None:
        encoder, features = make_encoder("vit_tiny", 16)
        assert features == 128
        module = MoCoV3(encoder, features, nn.Identity(), hidden=8, optimization=SGD)
        trained = {name for name, x in module.named_parameters() if x.requires_grad}
        frozen = {name for name, x in module.encoder.named_parameters() if not x.requires_grad}
        assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
        assert "encoder.blocks.3.attn.qkv.weight" in trained
        assert not any(name.startswith("slow_copy") for name in trained)


def losses_are_those_of_all_ranks_rows(group: dist.ProcessGroup) -> None:
    z = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2)]
    rank = dist.get_rank()
    own = [x[4 * rank : 4 * rank + 4].clone().requires_grad_() for x in z]
    whole = [x.clone().requires_grad_() for x in z]
    for method, exact in (
        (VICReg, fastcl.vicreg_loss(*whole)),
        (BarlowTwins, fastcl.barlow_twins_loss(*whole)),
        (SimCLR, fastcl.nt_xent(*whole, 0.1)),
    ):
        module = method(nn.Identity(), 4, nn.Identity(), dim=4, optimization=SGD)
        loss = module.loss(tuple(own), (), Batch(tuple(own)))
        torch.testing.assert_close(loss, exact)
        found = torch.autograd.grad(loss, own)
        for x, y in zip(found, torch.autograd.grad(exact, whole), strict=True):
            # what DistributedDataParallel averages: the sum over both ranks' losses
            torch.testing.assert_close(x / 2, y[4 * rank : 4 * rank + 4])


def test_the_batch_of_a_loss_is_that_of_all_processes(tmp_path: Path) -> None:
    on_every_rank((losses_are_those_of_all_ranks_rows,), 2, tmp_path)


class TestSchedules:
    def test_momentum_temperature_and_weight_decay_move_as_asked(self, tmp_path: Path) -> None:
        options = {"temperature": 0.5, "temperature_end": 0.1, "momentum": 0.9, "momentum_end": 1.0}
        run = prepare(
            "moco", out=tmp_path, epochs=2, weight_decay_end=0.2, weight_decay=0.0, **options, **SMALL
        )
        found, contrast = [], run.method.contrast

        def recorded(query: Tensor, key: Tensor) -> Tensor:
            (group,) = run.method.optimizers().optimizer.param_groups
            found.append((run.method.temperature, run.method.momentum, group["weight_decay"]))
            return contrast(query, key)

        run.method.contrast = recorded
        run.fit()
        temperatures, momenta, decays = zip(*found, strict=True)
        risen = [0, 0.1464466, 0.5, 0.8535534]  # (1 - cos(pi * step / 4)) / 2
        assert temperatures == pytest.approx([0.5 - 0.4 * x for x in risen])
        assert momenta == pytest.approx([0.9 + 0.1 * x for x in risen])
        assert decays == pytest.approx([0.2 * x for x in risen])

    def test_a_cosine_goes_from_its_start_to_its_end(self) -> None:
        assert [Cosine(2.0, 1.0).at(x) for x in (0, 0.5, 1)] == pytest.approx([2, 1.5, 1])


class TestOtherSamples:
    """Sentences as rows of token ids with a mask, in a dict."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 6)

        def forward(self, text: dict[str, Tensor]) -> Tensor:
            kept = text["mask"][..., None]
            return (self.words(text["ids"]) * kept).sum(1) / kept.sum(1).clamp_min(1)

    def masked(self, text: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**text, "mask": text["mask"] & (torch.rand(text["mask"].shape) < 0.8)}

    @pytest.mark.parametrize("method", [SimCLR, SimSiam, BYOL])
    def test_batches_that_are_not_images(self, method: Any, tmp_path: Path) -> None:
        ids = torch.randint(50, (64, 7))
        texts = [({"ids": x, "mask": torch.ones(7, dtype=torch.bool)},) for x in ids]
        module = method(self.Encoder(), 6, self.masked, dim=8, optimization=SGD)
        before = module.encoder.words.weight.clone()
        fit(module, DataLoader(texts, batch_size=16), tmp_path)
        assert not before.equal(module.encoder.words.weight)

    def test_supcon_without_labels_says_so(self, tmp_path: Path) -> None:
        module = SupCon(nn.Flatten(), 4, lambda x: x, dim=8, optimization=SGD)
        with pytest.raises(ValueError, match=r"SupCon needs batches \(samples, labels\), got no labels"):
            fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4), tmp_path)
