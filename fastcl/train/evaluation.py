"""How good an encoder's features are: nearest neighbours and linear classifiers on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastcl


class Features(NamedTuple):
    """Features (N, F) of labelled images and their labels (N,), int64."""

    values: Tensor
    labels: Tensor


@torch.no_grad()
def embed(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalize: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Features:
    """The features of batches of images, in evaluation mode, on ``device``."""
    was_training = encoder.training
    encoder.eval()
    values, labels = [], []
    for images, classes in batches:
        values.append(encoder(normalize(images.to(device, non_blocking=True))).float())
        labels.append(classes.to(device))
    encoder.train(was_training)
    return Features(torch.cat(values), torch.cat(labels))


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
    chosen = (_stratified(bank.labels, 0.0, generator) for _ in range(draws))
    return sum(knn_top1(_take(bank, part), queries, k=1) for part in chosen) / draws


def linear_top1(
    train: Features, test: Features, *, share: float = 1.0, weight_decay: float = 1e-3, steps: int = 100
) -> float:
    """Share of test features that a linear classifier gets right which was fitted to the train features.

    Multinomial logistic regression on standardized features by L-BFGS.

    Args:
        train: what it is fitted to.
        test: what it is measured on.
        share: of the training labels that is used, the same of every class, at least one each.
        weight_decay: half of this times the squared weights is added to the mean loss.
        steps: of L-BFGS, at most.
    """
    train = _take(train, _stratified(train.labels, share, torch.Generator().manual_seed(0)))
    mean, std = train.values.mean(dim=0), train.values.std(dim=0, correction=0).clamp_min(1e-6)
    x, queries = (train.values - mean) / std, (test.values - mean) / std
    classes = int(torch.maximum(train.labels.max(), test.labels.max())) + 1
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, train.labels)
        loss = loss + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    predicted = (queries @ weight.detach().T + bias.detach()).argmax(dim=1)
    return (predicted == test.labels).double().mean().item()


def evaluate_neighbours(bank: Features, queries: Features, k: int) -> Mapping[str, float]:
    """The nearest-neighbour accuracies, by name."""
    return {"knn_top1": knn_top1(bank, queries, k=k), "knn_top1_few": knn_top1_few(bank, queries)}


def evaluate_linear(bank: Features, queries: Features) -> Mapping[str, float]:
    """The accuracies of linear classifiers from all, a tenth and a hundredth of the labels, by name."""
    return {
        "linear_top1": linear_top1(bank, queries),
        "linear_top1_10percent": linear_top1(bank, queries, share=0.1),
        "linear_top1_1percent": linear_top1(bank, queries, share=0.01),
    }


def _take(features: Features, chosen: Tensor) -> Features:
    return Features(features.values[chosen], features.labels[chosen])


def _stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random indices of ``share`` of each class, at least one."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(share * len(members)))])
    return torch.cat(chosen)
