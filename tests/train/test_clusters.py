"""The methods that cluster all training features before an epoch, against their papers' formulas."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

import torch.distributed as dist

from fastcl.train import HCSC, PCL, Batch, DeepCluster, Optimization, prepare
from fastcl.train.clusters import Clustering, cluster, hierarchy
from fastcl.train.evaluate.features import Features
from fastcl.train.methods.deepcluster import whiten

SGD = Optimization("sgd", lr=0.01)
SMALL = {"width": 4, "batch_size": 128, "limit": 256, "evaluate_every": 0}
unit = nn.functional.normalize


def level(k: int, samples: int = 12) -> Clustering:
    generator = torch.Generator().manual_seed(k)
    prototypes = unit(torch.randn(k, 4, generator=generator))
    assigned = torch.randint(k, (samples,), generator=generator)
    return Clustering(prototypes, assigned, 0.5 + torch.rand(k, generator=generator))


def moco_like(method: Any, **options: Any) -> tuple[Any, Tensor, Tensor, Batch]:
    """The method, a batch of queries, of keys, and which samples they are of."""
    torch.manual_seed(0)
    module = method(
        *(nn.Identity(), 4, nn.Identity()),
        **{"samples": 12, "dim": 4, "queue_size": 16, "bn_splits": 1, "optimization": SGD, **options},
    )
    query, key = torch.randn(2, 6, 4)
    return module, query, key, Batch([query], None, torch.tensor([3, 1, 11, 0, 7, 5]))


def log_softmax_of_first(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[..., 0]


class TestClusters:
    def test_every_sample_is_in_the_cluster_of_its_nearest_prototype(self) -> None:
        values, order = torch.randn(30, 4), torch.randperm(30)
        labels = torch.full((30,), -1)
        parts = [Features(values[i], labels[i], i) for i in order.split(8)]
        for k, found in zip((5, 3), cluster(iter(parts), (5, 3), 30, group=None), strict=True):
            assert found.prototypes.shape == (k, 4)
            assert found.assigned.equal((unit(values) @ found.prototypes.T).argmax(1))
            assert found.temperature.mean().isclose(torch.tensor(1.0))

    def test_a_hierarchy_clusters_the_prototypes_below(self) -> None:
        bottom = level(8)
        levels = hierarchy(bottom, (4, 2))
        assert [len(x.prototypes) for x in levels] == [8, 4, 2]
        for below, above in pairwise(levels):
            parents = (below.prototypes @ above.prototypes.T).argmax(1)
            assert above.assigned.equal(parents[below.assigned])

    def test_a_whitened_feature_has_uncorrelated_components(self) -> None:
        rows = torch.randn(50, 6) @ torch.randn(6, 6) + 3
        for dim, kept in ((4, 4), (9, 6)):
            found = whiten(rows, dim)
            torch.testing.assert_close(found.T.cov(correction=0), torch.eye(kept), atol=1e-3, rtol=0)


def clusters_are_the_same_on_every_rank(group: dist.ProcessGroup) -> None:
    values = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    own = torch.arange(11)[dist.get_rank() :: 2]
    (found,) = cluster([Features(values[own], own, own)], [3], 11, group=group)
    assert found.assigned.equal((unit(values) @ found.prototypes.T).argmax(1))
    both = [torch.empty_like(found.temperature) for _ in range(2)]
    dist.all_gather(both, found.temperature)
    assert both[0].equal(both[1])
    torch.testing.assert_close(whiten(values[own], 4), whiten_alone(values)[own])


def whiten_alone(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(values))
    return centred @ directions / variances.sqrt()


class TestPCL:
    def test_the_loss_is_mocos_and_that_of_the_prototypes(self) -> None:
        module, query, key, batch = moco_like(PCL, clusters=(5, 3))
        q, negatives = unit(query), unit(module.queue.keys)
        plain = -log_softmax_of_first(
            torch.cat([(q * unit(key)).sum(1, keepdim=True), q @ negatives.T], 1) / 0.2
        )
        torch.testing.assert_close(module.loss((query,), (key,), batch), plain.mean())
        module.clusterings = [level(5), level(3)]
        exact = plain.mean()
        for found in module.clusterings:
            logits = q @ found.prototypes.T / (0.2 * found.temperature)
            exact = exact + nn.functional.cross_entropy(logits, found.assigned[batch.indices]) / 2
        torch.testing.assert_close(module.loss((query,), (key,), batch), exact)

    def test_clusters_are_of_the_key_encoders_features_from_an_epoch_on(self, tmp_path: Path) -> None:
        run = prepare("pcl", out=tmp_path, epochs=2, clusters="7,3", cluster_from_epoch=1, dim=8, **SMALL)
        run.fit()
        assert "clusters:\n- 7\n- 3\n" in (tmp_path / "config.yaml").read_text()
        sizes = [found.prototypes.shape for found in run.method.clusterings]
        assert sizes == [(7, 8), (3, 8)]
        assert all(found.assigned.shape == (256,) for found in run.method.clusterings)
        run = prepare("pcl", out=tmp_path / "plain", epochs=1, cluster_from_epoch=1, **SMALL)
        run.fit()
        assert run.method.clusterings == []

    def test_clusters_are_whole_numbers(self, tmp_path: Path) -> None:
        for given in ("7,x", [1.5], "", True):
            with pytest.raises(ValueError, match="clusters must be whole numbers such as 20,10, got"):
                prepare("pcl", out=tmp_path, clusters=given, **SMALL)
        with pytest.raises(ValueError, match=r"clusters must be at least 1, got \(7, 0\)"):
            prepare("pcl", out=tmp_path, clusters=(7, 0), **SMALL)

    def test_more_clusters_than_images_are_refused(self, tmp_path: Path) -> None:
        for method in ("pcl", "hcsc", "deepcluster"):
            with pytest.raises(ValueError, match="at most the number of training images, 256, got 300"):
                prepare(method, out=tmp_path, clusters=300, **SMALL)


class TestHCSC:
    def test_negatives_of_the_querys_cluster_are_dropped_by_chance(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, query, key, batch = moco_like(HCSC, clusters=(5, 3))
        module.clusterings = [level(5), level(3)]
        draws = [torch.rand(6, 16), torch.rand(6, 5), torch.rand(6, 16)]
        monkeypatch.setattr(torch, "rand", lambda *_, **__: iter_draws.pop(0))
        iter_draws = list(draws)
        found = module.loss((query,), (key,), batch)
        assert not iter_draws
        exact = self.exact(module, query, key, batch, draws)
        torch.testing.assert_close(found, exact)

    def exact(self, module: HCSC, query: Tensor, key: Tensor, batch: Batch, draws: list[Tensor]) -> Tensor:
        q, k, queue = unit(query), unit(key), unit(module.queue.keys)
        first, second = module.clusterings
        total = torch.tensor(0.0)
        for i, index in enumerate(batch.indices.tolist()):
            for now, drawn in ((first, draws[0]), (second, draws[2])):
                cluster_of = (queue @ now.prototypes.T / (0.2 * now.temperature)).softmax(1)
                kept = drawn[i] >= cluster_of[:, now.assigned[index]]
                logits = torch.cat([q[i] @ k[i : i + 1].T, queue[kept] @ q[i]]) / 0.2
                total = total - log_softmax_of_first(logits)
            above = (first.prototypes @ second.prototypes.T / (0.2 * second.temperature)).softmax(1)
            for now, kept in (
                (first, draws[1][i] >= above[:, second.assigned[index]]),
                (second, torch.ones(3, dtype=torch.bool)),
            ):
                own = now.assigned[index]
                logits = now.prototypes @ q[i] / (0.2 * now.temperature)
                others = kept & (torch.arange(len(logits)) != own)
                total = total - log_softmax_of_first(torch.cat([logits[own][None], logits[others]]))
        return total / (2 * len(query))

    def test_levels_must_become_smaller(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"clusters must be fewer from level to level, got \(5, 5\)"):
            prepare("hcsc", out=tmp_path, clusters="5,5", **SMALL)


class TestDeepCluster:
    def test_an_image_counts_by_the_inverse_of_its_clusters_size(self) -> None:
        module = DeepCluster(nn.Identity(), 4, nn.Identity(), samples=12, clusters=3, optimization=SGD)
        views = tuple(torch.randn(2, 6, 4))
        batch = Batch(views, None, torch.tensor([3, 1, 11, 0, 7, 5]))
        module.assigned = torch.tensor([0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 1, 2])
        module.sizes = torch.tensor([7, 3, 2])
        weights = [1 / 7, 1 / 3, 1 / 2]
        total = count = 0.0
        for view in views:
            for row, index in zip(view, batch.indices.tolist(), strict=True):
                label = int(module.assigned[index])
                total = total - weights[label] * module.head(row).log_softmax(0)[label]
                count += weights[label]
        torch.testing.assert_close(module.loss(views, (), batch), total / count)

    def test_every_epoch_has_new_clusters_and_a_new_classifier(self, tmp_path: Path) -> None:
        run = prepare("deepcluster", out=tmp_path, epochs=2, clusters=6, **SMALL)
        heads, begin = [], run.method.begin_epoch

        def recorded(features: Any) -> None:
            begin(features)
            optimizer: Any = run.method.optimizers()
            assert not any(parameter in optimizer.state for parameter in run.method.head.parameters())
            heads.append(run.method.head.weight.detach().clone())

        run.method.begin_epoch = recorded
        run.fit()
        assert not heads[0].equal(heads[1])
        assert run.method.sizes.sum() == 256
