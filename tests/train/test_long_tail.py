"""Long tails: how classes are cut and measured, and the methods for them against their papers' formulas."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

from fastcl.train import KCL, TSC, Batch, Optimization, prepare
from fastcl.train.data.sources import long_tailed
from fastcl.train.evaluate.features import Features
from fastcl.train.evaluate.linear import evaluate_long_tail
from fastcl.train.methods.tsc import spread

SGD = Optimization("sgd", lr=0.01)
SMALL = {"width": 4, "batch_size": 64, "dim": 8, "queue_size": 64}
unit = nn.functional.normalize


class TestData:
    def test_classes_shrink_exponentially_from_the_first_to_the_last(self) -> None:
        labels = torch.arange(5).repeat(400)[torch.randperm(2000)]
        chosen = long_tailed(labels, None, 100)
        assert labels[chosen].bincount().tolist() == [400, 126, 40, 12, 4]
        assert chosen.equal(chosen.sort().values)
        for label in range(5):
            members = (labels == label).nonzero()[:, 0]
            kept = chosen[labels[chosen] == label]
            assert kept.equal(members[: len(kept)]), "the first of each class"
        assert long_tailed(labels[chosen], None, 100).equal(torch.arange(len(chosen))), "once is enough"
        assert long_tailed(labels, 1000, 10)[-1] < 2000
        assert labels[long_tailed(labels, 1000, 10)].bincount().tolist() == [200, 112, 63, 35, 20]

    def test_a_tail_without_images_is_refused(self, tmp_path: Path) -> None:
        for labels in (
            torch.arange(4).repeat(50),
            torch.full((100,), -1),
            torch.zeros(100, dtype=torch.int64),
        ):
            with pytest.raises(ValueError, match="imbalance must leave an image of each of several classes"):
                long_tailed(labels, None, 100)
        with pytest.raises(ValueError, match=r"got 1000 for 10 .*, the first of 142 images"):
            prepare("supcon", out=tmp_path, imbalance=1000, **{"width": 4})

    def test_only_the_training_images_are_cut(self, tmp_path: Path) -> None:
        source = prepare("supcon", out=tmp_path, imbalance=10, width=4).source
        assert source.train.labels.bincount().tolist()[::9] == [142, 14]
        assert source.bank.labels.equal(source.train.labels)
        assert min(source.test.labels.bincount()) > 30


class TestMetrics:
    def test_thirds_of_the_classes_by_their_number_of_images(self) -> None:
        """Features that tell every class but two, of which each is taken for the other."""
        labels = torch.arange(7).repeat(20)
        values = 5 * torch.eye(7)[labels]
        wrong = labels.clone()
        wrong[labels == 1], wrong[labels == 6] = 6, 1
        counts = torch.tensor([9, 80, 30, 20, 90, 40, 5])  # many: 4, 1; few: 6, 0
        found = evaluate_long_tail(
            Features(values, labels, torch.arange(140)), Features(values, wrong, torch.arange(140)), counts
        )
        assert found == {"linear_many": 0.5, "linear_medium": 1.0, "linear_few": 0.5}

    def test_the_classifier_of_a_long_tail_is_balanced(self) -> None:
        """Of two classes on one line, 98 to 2: unweighted, the border lies beyond the rare class's mean."""
        values = torch.cat([torch.randn(980, 1), torch.randn(20, 1) + 2])
        labels = (torch.arange(1000) >= 980).long()
        test = Features(torch.tensor([[0.6], [1.4]]), torch.tensor([0, 1]), torch.arange(2))
        train = Features(values, labels, torch.arange(1000))
        found = evaluate_long_tail(train, test, labels.bincount())
        assert (found["linear_many"], found["linear_few"]) == (1.0, 1.0)

    def test_a_runs_metrics_have_them(self, tmp_path: Path) -> None:
        prepare("kcl", out=tmp_path, epochs=1, imbalance=10, **SMALL).fit()
        with (tmp_path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            assert all(0 <= float(row[f"linear_{part}"]) <= 1 for part in ("many", "medium", "few"))


def made(method: Any, **options: Any) -> tuple[Any, Tensor, Tensor, Batch]:
    torch.manual_seed(0)
    options = {"dim": 4, "queue_size": 8, "bn_splits": 1, "temperature": 0.1, "optimization": SGD} | options
    module = method(nn.Identity(), 4, nn.Identity(), **options)
    module.queue.ids.copy_(torch.tensor([0, 1, 2, 0, 1, 2, 0, -1]))
    query, key = torch.randn(2, 4, 4)
    return module, query, key, Batch([query], torch.tensor([0, 1, 2, 3]))


class TestKCL:
    def test_positives_are_drawn_of_the_same_class_and_never_the_own_key(self) -> None:
        module, *_ = made(KCL, n_positives=3)
        labels = torch.tensor([0, 1, 2, 3])
        seen = [set(), set(), set(), set()]
        for _ in range(30):
            found, weights = module.positives(labels)
            assert found[:, 0].tolist() == [0, 1, 2, 3]
            for i, row in enumerate(found[:, 1:].tolist()):
                seen[i].update(row)
            torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
        assert seen == [{4, 7, 10}, {5, 8, -1}, {6, 9, -1}, {-1}]

    def test_the_loss_is_the_mean_over_the_positives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, query, key, batch = made(KCL, n_positives=3)
        found = module.positives(batch.labels)
        monkeypatch.setattr(module, "positives", lambda labels: found)
        logits = unit(query) @ unit(torch.cat([key, module.queue.keys])).T / 0.1
        each = [-logits[i].log_softmax(0)[found[0][i][found[0][i] >= 0]].mean() for i in range(4)]
        torch.testing.assert_close(module.loss((query,), (key,), batch), torch.stack(each).mean())

    def test_the_queue_knows_the_labels(self) -> None:
        module, query, key, batch = made(KCL)
        module.after_loss((query,), (key,), batch)
        assert module.queue.ids[:4].tolist() == [0, 1, 2, 3]


class TestTSC:
    def test_points_are_far_apart(self) -> None:
        points = spread(5, 8)
        simplex = points @ points.T
        torch.testing.assert_close(simplex, 1.25 * torch.eye(5) - 0.25, atol=1e-3, rtol=0)

    def test_classes_take_the_points_that_are_nearest_all_together(self) -> None:
        module, *_ = made(TSC, classes=4, centres_from_epoch=0)
        order = torch.tensor([2, 0, 3, 1])
        labels = torch.arange(4).repeat(3)
        values = module.points[order][labels] + 0.1 * torch.randn(12, 4)
        module.begin_epoch(iter([Features(values, labels, torch.arange(12))]))
        assert module.centres.equal(module.points[order])

    def test_the_point_is_one_more_positive_of_its_own_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, query, key, batch = made(TSC, classes=4, n_positives=3, centre_weight=0.7)
        drawn = KCL.positives(module, batch.labels)
        monkeypatch.setattr(KCL, "positives", lambda *_: drawn)
        plain = module.loss((query,), (key,), batch)
        module.centres = module.points.roll(1, 0)
        keys = torch.cat([key, module.queue.keys, module.centres])
        logits = (unit(query) @ unit(keys).T / 0.1).log_softmax(1)
        each = [-logits[i][drawn[0][i][drawn[0][i] >= 0]].mean() - 0.7 * logits[i][12 + i] for i in range(4)]
        torch.testing.assert_close(module.loss((query,), (key,), batch), torch.stack(each).mean())
        assert not plain.isclose(torch.stack(each).mean())

    def test_it_trains_from_the_first_epoch_with_points_on(self, tmp_path: Path) -> None:
        run = prepare(
            "tsc", out=tmp_path, epochs=2, centres_from_epoch=1, evaluate_every=0, imbalance=10, **SMALL
        )
        run.fit()
        assert run.method.centres is not None
        assert run.method.centres.shape == (10, 8)
