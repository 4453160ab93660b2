"""How often a linear classifier on the features tells an image's label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcl.train.evaluate.features import Features, gather, stratified, summed, take

_SHARES = {"linear_top1": 1.0, "linear_top1_10percent": 0.1, "linear_top1_1percent": 0.01}
LINEAR = tuple(_SHARES)
LONG_TAIL = ("linear_many", "linear_medium", "linear_few")


def linear_correct(
    train: Features,
    test: Features,
    *,
    share: float = 1.0,
    balanced: bool = False,
    weight_decay: float = 1e-3,
    steps: int = 100,
) -> Tensor:
    """Which test features (N,) a linear classifier gets right that was fitted to the train features.

    Multinomial logistic regression on standardized features by L-BFGS. Ranks add up the loss and its
    gradient in each of its steps.

    Args:
        train: what it is fitted to, this rank's share.
        test: what it is measured on, all of it on every rank.
        share: of the training labels that is used, the same of every class, at least one each.
        balanced: classes weigh alike, however many labels they have.
        weight_decay: half of this times the squared weights is added to the mean loss.
        steps: of L-BFGS, at most.
    """
    train, count = _drawn(train, share)
    mean, std = _moments(train.values, count)
    x, queries = (train.values - mean) / std, (test.values - mean) / std
    labels = gather(train.labels)
    classes = int(torch.maximum(labels.max(), test.labels.max())) + 1
    weights = count / (classes * labels.bincount(minlength=classes).clamp_min(1)) if balanced else None
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        loss = nn.functional.cross_entropy(logits, train.labels, weights, reduction="sum") / count
        loss.backward()
        assert weight.grad is not None
        assert bias.grad is not None
        loss = loss.detach()
        summed(loss, weight.grad, bias.grad)
        weight.grad += weight_decay * weight.detach()
        return loss + 0.5 * weight_decay * weight.detach().square().sum()

    with torch.enable_grad():
        optimizer.step(closure)
    predicted = (queries @ weight.detach().T + bias.detach()).argmax(dim=1)
    return predicted == test.labels


def linear_top1(train: Features, test: Features, *, share: float = 1.0) -> float:
    """The accuracy of :func:`linear_correct`'s classifier."""
    return _mean(linear_correct(train, test, share=share))


def evaluate_linear(bank: Features, queries: Features) -> dict[str, float]:
    """The accuracies of linear classifiers from all, a tenth and a hundredth of the labels, by name."""
    return {name: linear_top1(bank, queries, share=share) for name, share in _SHARES.items()}


def evaluate_long_tail(bank: Features, queries: Features, counts: Tensor) -> dict[str, float]:
    """The accuracies on the thirds of the classes with the most and the fewest training images, by name.

    They are a balanced linear classifier's; a class more or less falls to the middle third.

    Args:
        bank: what it is fitted to, this rank's share.
        queries: what it is measured on, all of it on every rank.
        counts: (classes,) training images of each.
    """
    correct = linear_correct(bank, queries, balanced=True)
    order, third = counts.argsort(descending=True, stable=True), max(1, len(counts) // 3)
    groups = (order[:third], order[third:-third], order[-third:])
    of_groups = [torch.isin(queries.labels, group.to(queries.labels.device)) for group in groups]
    return {name: _mean(correct[of]) for name, of in zip(LONG_TAIL, of_groups, strict=True)}


def _mean(correct: Tensor) -> float:
    return correct.double().mean().item()


def _drawn(own: Features, share: float) -> tuple[Features, int]:
    """This rank's part of the drawn features, and how many all ranks have."""
    indices, labels = gather(own.indices), gather(own.labels)
    order = indices.argsort()
    chosen = stratified(labels[order], share, torch.Generator().manual_seed(0))
    return take(own, torch.isin(own.indices, indices[order][chosen])), len(chosen)


def _moments(own: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean = own.sum(dim=0) / count
    summed(mean)
    variance = (own - mean).square().sum(dim=0) / count
    summed(variance)
    return mean, variance.sqrt().clamp_min(1e-6)
