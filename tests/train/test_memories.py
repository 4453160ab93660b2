"""The methods with a memory of all images, against their papers' formulas; images cut into patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import make_tree
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

import torch.distributed as dist

from fastcl.train import CMC, CPC, PIRL, Batch, InstDisc, Optimization, make_encoder, prepare
from fastcl.train.data.photos import lightness_and_colour, normalize
from fastcl.train.methods.instances import Instances
from fastcl.train.methods.patches import jigsaw, patches

SGD = Optimization("sgd", lr=0.01)
SMALL = {"width": 4, "batch_size": 128, "limit": 256, "evaluate_every": 0, "dim": 8}
INDICES = torch.tensor([3, 1, 11, 0])
unit = nn.functional.normalize


def memory(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Instances, Tensor, Tensor]:
    """A memory of 12 samples, 4 queries, and the negatives that are drawn, some of them the queries' own."""
    torch.manual_seed(0)
    instances = Instances(12, 5, momentum=0.5, **options)
    drawn = torch.tensor([5, 3, 7, 0, 9, 2])
    monkeypatch.setattr(torch, "randint", lambda size, shape, **_: drawn)
    return instances, torch.randn(4, 5), drawn


class TestInstances:
    def test_softmax_over_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for noise in (0, 12):
            instances, query, _ = memory(monkeypatch, loss="softmax", noise=noise)
            logits = unit(query) @ instances.bank.keys.T / 0.1
            exact = nn.functional.cross_entropy(logits, INDICES)
            torch.testing.assert_close(instances(query, INDICES, 0.1), exact)

    def test_softmax_over_those_drawn_leaves_an_images_own_row_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        instances, query, drawn = memory(monkeypatch, loss="softmax", noise=6)
        each = []
        for row, index in zip(unit(query), INDICES, strict=True):
            others = instances.bank.keys[drawn[drawn != index]]
            logits = torch.cat([instances.bank.keys[index][None], others]) @ row / 0.1
            each.append(-logits.log_softmax(0)[0])
        torch.testing.assert_close(instances(query, INDICES, 0.1), torch.stack(each).mean())

    def test_nce_keeps_the_first_batchs_constant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        instances, query, drawn = memory(monkeypatch, loss="nce", noise=6)
        z = 12 * (unit(query) @ instances.bank.keys[drawn].T / 0.1).exp().mean()
        for given in (query, torch.randn(4, 5)):
            own = ((unit(given) * instances.bank.keys[INDICES]).sum(1) / 0.1).exp() / z
            others = (unit(given) @ instances.bank.keys[drawn].T / 0.1).exp() / z
            noise = 6 / 12
            told = (own / (own + noise)).log() + (noise / (others + noise)).log().sum(1)
            torch.testing.assert_close(instances(given, INDICES, 0.1), -told.mean())
            assert instances.log_z.isclose(z.log())

    def test_a_row_moves_towards_its_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        instances, query, _ = memory(monkeypatch, loss="nce", noise=6)
        before = instances.bank.keys.clone()
        instances.update(query, INDICES)
        exact = before.index_copy(0, INDICES, unit(0.5 * before[INDICES] + 0.5 * unit(query)))
        torch.testing.assert_close(instances.bank.keys, exact)

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(ValueError, match="noise must be at least 1 for loss 'nce', got 0"):
            Instances(12, 5, loss="nce", noise=0, momentum=0.5)
        with pytest.raises(ValueError, match="loss must be one of 'nce', 'softmax', got 'l2'"):
            Instances(12, 5, loss="l2", noise=1, momentum=0.5)


def a_memory_is_the_same_on_every_rank(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    instances, alone = (Instances(12, 5, loss="nce", noise=6, momentum=0.5) for _ in range(2))
    alone.bank.keys.copy_(instances.bank.keys)
    query = torch.randn(4, 5)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    instances.update(query[own], INDICES[own])
    alone.bank.update(INDICES, query)
    assert instances.bank.keys.equal(alone.bank.keys)
    torch.manual_seed(dist.get_rank())  # other negatives
    instances(query[own], INDICES[own], 0.1)
    constants = [torch.empty(()) for _ in range(2)]
    dist.all_gather(constants, instances.log_z)
    assert constants[0].isfinite()
    assert constants[0] == constants[1]


def test_inst_disc_adds_the_distance_from_the_own_row() -> None:
    options = {"samples": 12, "dim": 5, "loss": "softmax", "noise": 0, "optimization": SGD}
    plain, proximal = (
        InstDisc(nn.Identity(), 5, nn.Identity(), proximal=weight, **options) for weight in (0, 3)
    )
    proximal.load_state_dict(plain.state_dict())
    z, batch = (torch.randn(4, 5),), Batch((), None, INDICES)
    apart = (unit(z[0]) - plain.instances.bank.keys[INDICES]).square().sum(1).mean()
    torch.testing.assert_close(proximal.loss(z, (), batch), plain.loss(z, (), batch) + 3 * apart)


@pytest.mark.parametrize("options", [{"loss": "softmax", "noise": 0}, {"loss": "softmax", "noise": 99}])
def test_inst_disc_trains_by_softmax_too(options: dict[str, Any], tmp_path: Path) -> None:
    run = prepare("inst-disc", out=tmp_path, epochs=1, **options, **SMALL)
    before = run.method.instances.bank.keys.clone()
    run.fit()
    assert (run.method.instances.bank.keys != before).any(dim=1).all(), "every image was seen"


def test_batches_without_indices_are_refused() -> None:
    module = InstDisc(nn.Identity(), 5, nn.Identity(), samples=12, optimization=SGD)
    with pytest.raises(ValueError, match=r"InstDisc needs batches \(samples, labels, indices\), got no ind"):
        module.training_step(Batch(tuple(torch.randn(2, 4, 5))), 0)


class TestPIRL:
    def test_image_and_jigsaw_find_the_images_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = PIRL(nn.Flatten(), 1, nn.Identity(), samples=12, dim=5, noise=0, grid=2, optimization=SGD)
        z, batch = tuple(torch.randn(2, 4, 5)), Batch((), None, INDICES)
        exact = [
            nn.functional.cross_entropy(unit(x) @ module.instances.bank.keys.T / 0.07, INDICES) for x in z
        ]
        torch.testing.assert_close(module.loss(z, (), batch), (exact[0] + exact[1]) / 2)
        before = module.instances.bank.keys.clone()
        module.after_loss(z, (), batch)
        moved = unit(0.5 * before[INDICES] + 0.5 * unit(z[0]))
        torch.testing.assert_close(module.instances.bank.keys[INDICES], moved)

    def test_a_jigsaw_has_a_part_of_every_cell_in_any_order(self) -> None:
        cells = torch.arange(9.0).reshape(1, 1, 3, 3).repeat_interleave(5, 2).repeat_interleave(5, 3)
        images = torch.cat([cells, cells + 10, cells + 20])
        cut = jigsaw(images, 3)
        assert cut.shape == (3, 9, 1, 4, 4)
        of_cells = cut.flatten(2).amax(2)
        assert of_cells.equal(cut.flatten(2).amin(2)), "a patch is of one cell"
        torch.testing.assert_close(
            of_cells.sort(1).values, torch.arange(9.0) + 10 * torch.arange(3.0)[:, None]
        )
        assert not of_cells[0].equal(of_cells[1] - 10)
        with pytest.raises(ValueError, match="grid must be at most the images' side, got 16 for"):
            jigsaw(images, 16)


class TestCMC:
    def test_lightness_and_colours_are_the_halves_of_lab(self) -> None:
        from kornia.color import rgb_to_lab

        images = torch.rand(2, 3, 4, 4)
        lightness, colours = lightness_and_colour(normalize(images))
        lab = rgb_to_lab(images)
        torch.testing.assert_close(lightness[:, 0], lab[:, 0] / 50 - 1, atol=1e-4, rtol=0)
        torch.testing.assert_close(colours[:, 1:], lab[:, 1:] / 100, atol=1e-4, rtol=0)
        assert not lightness[:, 1:].any()
        assert not colours[:, 0].any()

    def test_each_half_finds_the_other_in_its_memory(self) -> None:
        options = {"samples": 12, "dim": 5, "loss": "softmax", "noise": 0, "optimization": SGD}
        module = CMC(nn.Identity(), 5, nn.Identity(), **options)
        z, batch = tuple(torch.randn(4, 4, 5)), Batch((), None, INDICES)
        of_lightness, of_colours = (memory.bank.keys for memory in module.memories)
        exact = 0.0
        for a, b in (z[:2], z[2:]):
            for query, keys in ((a, of_colours), (b, of_lightness)):
                exact = exact + nn.functional.cross_entropy(unit(query) @ keys.T / 0.07, INDICES) / 2
        torch.testing.assert_close(module.loss(z, (), batch), exact)
        before = [of_lightness.clone(), of_colours.clone()]
        module.after_loss(z, (), batch)
        for found, old, x in zip(module.memories, before, z, strict=False):
            moved = unit(0.5 * old[INDICES] + 0.5 * unit(x))
            torch.testing.assert_close(found.bank.keys[INDICES], moved)

    def test_both_networks_are_evaluated(self) -> None:
        encoder, features = make_encoder("resnet8", 8, width=4)
        module = CMC(encoder, features, nn.Identity(), samples=12, optimization=SGD).eval()
        images = normalize(torch.rand(2, 3, 8, 8))
        halves = lightness_and_colour(images)
        exact = torch.cat([module.encoder(halves[0]), module.colour_encoder(halves[1])], 1)
        torch.testing.assert_close(module.evaluated(images), exact)

    def test_grey_images_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data must have colours for cmc, digits has none"):
            prepare("cmc", out=tmp_path, **SMALL)
        folder = make_tree(tmp_path / "tree", 16)
        prepare("cmc", data=str(folder), out=tmp_path / "out", **(SMALL | {"batch_size": 8}))


class TestCPC:
    def module(self, **options: Any) -> CPC:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
        return CPC(encoder, 6, nn.Identity(), dim=5, grid=3, steps=2, optimization=SGD, **options)

    def test_a_patch_is_found_by_what_is_above_it(self) -> None:
        module, views = self.module(), torch.randn(2, 4, 1, 8, 8)
        embedded = module.embed(views)
        assert [x.shape for x in embedded] == [(2 * 4 * 3, 3, 5)] * 2
        total = torch.tensor(0.0)
        for k, step in enumerate(module.predictors, 1):
            queries, keys = embedded[0][:, :-k].reshape(-1, 5), embedded[1][:, k:].reshape(-1, 5)
            logits = step(queries) @ keys.T
            total = total + nn.functional.cross_entropy(logits, torch.arange(len(keys))) / 2
        torch.testing.assert_close(module.loss(embedded, (), Batch(views)), total)

    def test_a_context_depends_on_the_rows_above_only(self) -> None:
        module, images = self.module(), torch.randn(1, 1, 8, 8)
        changed = images.clone()
        changed[..., 6:, :] += 1  # the last row of patches is of pixels 4 to 7
        (before, _), (after, latents) = (module.embed([x]) for x in (images, changed))
        torch.testing.assert_close(before[:, :2], after[:, :2])
        assert not before[:, 2].isclose(after[:, 2]).any()
        corner = module.projector(module.encoder(changed[..., :4, 4:]))
        torch.testing.assert_close(latents[2, 0], corner[0])

    def test_the_mean_over_patches_is_evaluated(self) -> None:
        module, images = self.module(), torch.randn(3, 1, 8, 8)
        cut = patches(images, 4, 2)
        assert cut.shape == (3, 3, 3, 1, 4, 4)
        assert cut[2, 1, 2].equal(images[2, :, 2:6, 4:8])
        exact = torch.stack([module.encoder(x) for x in cut.flatten(1, 2)]).mean(1)
        torch.testing.assert_close(module.evaluated(images), exact)

    def test_more_steps_than_rows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="steps must be fewer than the 3 rows of patches, got 3"):
            prepare("cpc", out=tmp_path, steps=3, **SMALL)
