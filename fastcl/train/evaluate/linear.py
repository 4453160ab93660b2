"""How often a linear classifier on the features tells an image's label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastcl.train.evaluate.features import Features, stratified, take


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
    train = take(train, stratified(train.labels, share, torch.Generator().manual_seed(0)))
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


def evaluate_linear(bank: Features, queries: Features) -> Mapping[str, float]:
    """The accuracies of linear classifiers from all, a tenth and a hundredth of the labels, by name."""
    return {
        "linear_top1": linear_top1(bank, queries),
        "linear_top1_10percent": linear_top1(bank, queries, share=0.1),
        "linear_top1_1percent": linear_top1(bank, queries, share=0.01),
    }
