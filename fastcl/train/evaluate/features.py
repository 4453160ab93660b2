"""What an encoder makes of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


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


def take(features: Features, chosen: Tensor) -> Features:
    """The features at the indices ``chosen``."""
    return Features(features.values[chosen], features.labels[chosen])


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random indices of ``share`` of each class, at least one."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(share * len(members)))])
    return torch.cat(chosen)
