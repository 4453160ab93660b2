"""A loss of your own over the similarity statistics: exact, in linear memory, with its gradient.

    python examples/own_loss.py

The example: SupCon's numerator, but only negatives of *other* sources compete (say, to keep a model from
telling cameras apart), and each class weighs the same however many rows it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastcl


def across_sources_loss(
    features: Tensor, labels: Tensor, sources: Tensor, temperature: float = 0.1
) -> Tensor:
    """Contrastive loss among rows of different sources, the mean over classes.

    Args:
        features: (N, D), any length.
        labels: (N,) int64; rows of one label are each other's positives.
        sources: (N,) int64; rows of one source never meet, an anchor itself included.
        temperature: divides the cosines.
    """
    rule = fastcl.PairRule(positive=(labels, labels), exclude=(sources, sources))
    stats = fastcl.similarity_stats(features, features, scale=1 / temperature, rule=rule, normalize=True)
    rows = stats.each_positive()  # 0 where a row has no positive
    weights = 1 / torch.bincount(labels)[labels]
    return (rows * weights).sum() / weights.sum()


def dense(features: Tensor, labels: Tensor, sources: Tensor, temperature: float = 0.1) -> Tensor:
    """The same as a matrix, to compare with."""
    unit = torch.nn.functional.normalize(features)
    logits = unit @ unit.T / temperature
    meets = sources[:, None] != sources
    positive = meets & (labels[:, None] == labels)
    log_probabilities = logits - logits.masked_fill(~meets, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    rows = -(log_probabilities.masked_fill(~positive, 0).sum(1) / count.clamp(min=1))
    weights = 1 / torch.bincount(labels)[labels]
    return (rows * weights).sum() / weights.sum()


def main() -> float:
    """Compare values and gradients; returns the largest difference of the gradients."""
    torch.manual_seed(0)
    features = torch.randn(512, 64, requires_grad=True)
    labels, sources = torch.randint(10, (512,)), torch.randint(4, (512,))
    gradients = []
    for loss in (across_sources_loss, dense):
        value = loss(features, labels, sources)
        gradients.append(torch.autograd.grad(value, features)[0])
        print(f"{loss.__name__}: {value.item():.6f}")
    difference = float((gradients[0] - gradients[1]).abs().max())
    print(f"largest difference of the gradients: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
