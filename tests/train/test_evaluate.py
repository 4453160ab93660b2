"""What is measured of an encoder: neighbours, linear classifiers, pairs of views."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("fastcl.train")

from fastcl.train.evaluate.features import Features, stream, take
from fastcl.train.evaluate.linear import linear_top1
from fastcl.train.evaluate.neighbours import evaluate_neighbours, knn_top1
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.evaluate.pictures import curves, embedding


def features(values: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(values, labels, torch.arange(len(labels)))


class TestEvaluation:
    bank = features(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]), torch.tensor([5, 7, 9]))

    def test_a_query_has_the_label_of_the_entry_with_the_largest_cosine(self) -> None:
        queries = torch.tensor([[9.0, 1.0], [1.0, 2.0], [-1.0, -1e-3], [2.0, 1.9]])
        assert knn_top1(self.bank, features(queries, torch.tensor([5, 7, 9, 7])), k=1) == 0.75

    def test_near_neighbours_outvote_many_far_ones(self) -> None:
        bank = features(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([1, 0, 0]))
        query = features(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        assert knn_top1(bank, query, k=3, temperature=0.07) == 1
        assert knn_top1(bank, query, k=3, temperature=10.0) == 0

    def test_few_labels_are_one_per_class_and_always_the_same_draws(self) -> None:
        # class 0 has one entry where its query is and one opposite it, nearer to class 1's
        bank = features(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        query = features(torch.tensor([[1.0, 0.1]]), torch.tensor([0]))
        found = evaluate_neighbours([bank], bank.labels, query, 1)
        assert found["knn_top1"] == knn_top1(bank, query, k=1) == 1
        assert 0.2 < found["knn_top1_few"] < 0.8
        assert found == evaluate_neighbours([bank], bank.labels, query, 1)

    def test_a_bank_in_parts_gives_what_the_whole_one_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastcl.train.evaluate.neighbours._ROWS", 30)
        labels = torch.arange(200) % 4
        values = torch.randn(200, 4) + 1.5 * nn.functional.one_hot(labels, 4)
        bank, query = features(values[:150], labels[:150]), features(values[150:], labels[150:])
        parts = [take(bank, torch.arange(start, min(start + 20, 150))) for start in range(0, 150, 20)]
        found = evaluate_neighbours(parts, bank.labels, query, 70)
        assert found == evaluate_neighbours([bank], bank.labels, query, 70)
        assert found["knn_top1"] == knn_top1(bank, query, k=70)
        assert 0.5 < found["knn_top1"] < 1

    def test_a_linear_classifier_separates_what_is_separable(self) -> None:
        torch.manual_seed(0)
        labels = torch.arange(200) % 4
        values = torch.randn(200, 4) + 12 * nn.functional.one_hot(labels, 4)
        train, test = features(values[:100], labels[:100]), features(values[100:], labels[100:])
        assert linear_top1(train, test) == 1
        assert linear_top1(train, test, share=0.01) > 0.9, "one label per class"
        assert linear_top1(train, features(test.values, test.labels.roll(1))) == 0

    def test_embedding_leaves_the_encoder_in_training_mode_and_unchanged(self) -> None:
        encoder = nn.BatchNorm1d(2)
        list(stream(encoder, [self.bank], nn.Identity(), torch.device("cpu")))
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
        across = (
            ((query * key).sum(1) > (query @ key.T).masked_fill(~others, -2).max(1).values).float().mean()
        )
        assert measure_pairs(query, key, across=True)["contrastive_top1"] == across
        center = query.mean(0)
        assert measured["center"].isclose(center.norm(), atol=1e-6)
        assert measured["residual"].isclose((query - center).norm(dim=1).mean(), atol=1e-6)

    def test_collapsed_queries_are_their_center(self) -> None:
        measured = measure_pairs(torch.ones(8, 4), torch.randn(8, 4))
        assert measured["center"].isclose(torch.tensor(1.0))
        assert measured["residual"] < 1e-6


class TestPictures:
    rows = tuple(
        {"epoch": epoch, "loss": 3.0 - epoch, "knn_top1": 0.1 * epoch, "alignment": 1.0, "center": 0.5}
        for epoch in range(4)
    )

    def test_curves_have_whole_epochs_and_legends_beside_them(self) -> None:
        figure = curves(self.rows, {"knn_top1": "neighbours"}, "title")
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert all(float(tick).is_integer() for tick in axes.get_xticks())
        boxes = [axes.get_legend().get_window_extent() for axes in figure.axes[1:]]
        for axes, box in zip(figure.axes[1:], boxes, strict=True):
            assert box.x0 >= axes.get_window_extent().x1
        names = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
        assert [name.split(":")[0] for name in names] == ["alignment", "center"]

    def test_the_embedding_names_the_classes(self) -> None:
        drawn = features(torch.randn(30, 4), torch.arange(30) % 3)
        axes = embedding(drawn, ("cat", "dog", "wolf"), "title").axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cat", "dog", "wolf"]
        assert embedding(drawn, (), "title").axes[0].get_legend() is None
