"""How often the nearest neighbours of an image tell its label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import fastcl
from fastcl.train.evaluate.features import Features, gather, gathered, joined, stratified, take

_ROWS = 8192  # of the bank, compared at a time


class Neighbours:
    """The nearest bank entries of each query so far: the bank is never held as a whole.

    Args:
        queries: the features that look for their neighbours, the same on every rank.
        k: how many neighbours.
    """

    def __init__(self, queries: Features, k: int) -> None:
        self.queries = queries
        self.k = k
        self.similarity = queries.values.new_empty(len(queries.values), 0)
        self.labels = queries.labels.new_empty(len(queries.values), 0)

    def add(self, bank: Features) -> None:
        """Compare with more of the bank."""
        similarity, nearest = fastcl.similarity_topk(
            self.queries.values, bank.values, min(self.k, len(bank.values)), normalize=True
        )
        self._keep(similarity, bank.labels[nearest])

    def merge_ranks(self) -> None:
        """Compare with what the other ranks have seen of the bank."""
        similarity, labels = (gather(x.T.contiguous()).T for x in (self.similarity, self.labels))
        self.similarity, self.labels = self.similarity[:, :0], self.labels[:, :0]
        self._keep(similarity, labels)

    def top1(self, temperature: float = 0.07) -> float:
        """Share of queries that get their label when their neighbours vote.

        A neighbour's vote weighs ``exp(cosine / temperature)``. Wu et al. 2018,
        https://arxiv.org/abs/1805.01978.
        """
        votes = self.similarity.new_zeros(len(self.similarity), int(self.labels.max()) + 1)
        weights = ((self.similarity - self.similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, self.labels, weights)
        return (votes.argmax(dim=1) == self.queries.labels).double().mean().item()

    def _keep(self, similarity: Tensor, labels: Tensor) -> None:
        similarity = torch.cat([self.similarity, similarity], dim=1)
        labels = torch.cat([self.labels, labels], dim=1)
        best = similarity.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.similarity, self.labels = similarity.gather(1, best), labels.gather(1, best)


def knn_top1(bank: Features, queries: Features, *, k: int = 200, temperature: float = 0.07) -> float:
    """The accuracy of :class:`Neighbours` with the whole bank at hand."""
    neighbours = Neighbours(queries, k)
    neighbours.add(bank)
    return neighbours.top1(temperature)


def evaluate_neighbours(
    bank: Iterable[Features], labels: Tensor, queries: Features, k: int, *, draws: int = 20
) -> dict[str, float]:
    """The nearest-neighbour accuracies, by name.

    Args:
        bank: this rank's share, a batch at a time.
        labels: (N,) of the whole bank.
        queries: all of them, on every rank.
        k: neighbours that vote.
        draws: of one entry per class, always the same, over which ``knn_top1_few`` is averaged.
    """
    generator = torch.Generator().manual_seed(0)
    few = [stratified(labels, 0.0, generator) for _ in range(draws)]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[torch.cat(few)] = True
    neighbours, kept = Neighbours(queries, k), []
    for part in _in_chunks(bank):
        neighbours.add(part)
        kept.append(take(part, drawn.to(part.indices.device)[part.indices]))
    neighbours.merge_ranks()
    entries = gathered(joined(kept))
    accuracies = [
        knn_top1(take(entries, torch.isin(entries.indices.cpu(), chosen)), queries, k=1) for chosen in few
    ]
    return {"knn_top1": neighbours.top1(), "knn_top1_few": sum(accuracies) / draws}


def _in_chunks(parts: Iterable[Features]) -> Iterator[Features]:
    held: list[Features] = []
    for part in parts:
        held.append(part)
        if sum(len(x.labels) for x in held) >= _ROWS:
            yield joined(held)
            held = []
    if held:
        yield joined(held)
