"""What is measured of an encoder: neighbours, linear classifiers, pairs of views."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("fastcl.train")

from fastcl.train.evaluate.features import Features, embed
from fastcl.train.evaluate.linear import linear_top1
from fastcl.train.evaluate.neighbours import knn_top1, knn_top1_few
from fastcl.train.evaluate.pairs import measure_pairs


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
