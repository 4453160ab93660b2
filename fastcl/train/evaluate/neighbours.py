"""How often the nearest neighbours of an image tell its label."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import fastcl
from fastcl.train.evaluate.features import Features, stratified, take


def knn_top1(bank: Features, queries: Features, *, k: int = 200, temperature: float = 0.07) -> float:
    """Share of queries that get their label when their ``k`` nearest bank entries, by cosine, vote.

    A neighbour's vote weighs ``exp(cosine / temperature)``. Wu et al. 2018, https://arxiv.org/abs/1805.01978.
    """
    similarity, nearest = fastcl.similarity_topk(
        queries.values, bank.values, min(k, len(bank.labels)), normalize=True
    )
    votes = similarity.new_zeros(len(similarity), int(bank.labels.max()) + 1)
    votes.scatter_add_(1, bank.labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
    return (votes.argmax(dim=1) == queries.labels).double().mean().item()


def knn_top1_few(bank: Features, queries: Features, *, draws: int = 20) -> float:
    """:func:`knn_top1` with one bank entry per class, averaged over draws that are always the same."""
    generator = torch.Generator().manual_seed(0)
    chosen = (stratified(bank.labels, 0.0, generator) for _ in range(draws))
    return sum(knn_top1(take(bank, part), queries, k=1) for part in chosen) / draws


def evaluate_neighbours(bank: Features, queries: Features, k: int) -> Mapping[str, float]:
    """The nearest-neighbour accuracies, by name."""
    return {"knn_top1": knn_top1(bank, queries, k=k), "knn_top1_few": knn_top1_few(bank, queries)}
