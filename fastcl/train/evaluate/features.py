"""What an encoder makes of images, each rank its share, and how ranks bring the shares together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import gather_rows

BATCH = 512  # samples that are encoded at a time


class Features(NamedTuple):
    """Features (N, F) of images; their labels (N,), -1 for none; their places (N,) in the data set."""

    values: Tensor
    labels: Tensor
    indices: Tensor


def stream(
    encoder: nn.Module,
    batches: Iterable[tuple[Any, Tensor, Tensor]],
    normalize: Callable[[Any], Any],
    device: torch.device,
) -> Iterator[Features]:
    """The features of each batch of (images, labels, indices), in evaluation mode, on ``device``."""
    for images, labels, indices in batches:
        was_training = encoder.training
        encoder.eval()
        with torch.no_grad():
            values = encoder(normalize(images.to(device, non_blocking=True))).float()
        encoder.train(was_training)
        yield Features(values, labels.to(device), indices.to(device))


def joined(parts: Iterable[Features]) -> Features:
    """The features of several batches in one piece."""
    values, labels, indices = zip(*parts, strict=True)
    return Features(torch.cat(values), torch.cat(labels), torch.cat(indices))


def rows_of(network: nn.Module, samples: Tensor, device: torch.device) -> Tensor:
    """What ``network`` makes of the samples, (N, D), all of them on every rank."""
    places = torch.arange(len(samples)).split(BATCH)
    batches = ((samples[part], part, part) for part in places)
    return joined(stream(network, batches, nn.Identity(), device)).values


def gathered(own: Features) -> Features:
    """The features of all ranks, in the order of the data set."""
    if not dist.is_initialized():
        return own
    rows = Features(*(gather(x) for x in own))
    return take(rows, rows.indices.argsort())


def gather(rows: Tensor) -> Tensor:
    """All ranks' rows, of which ranks may have different numbers, in rank order."""
    if not dist.is_initialized():
        return rows
    world = dist.group.WORLD
    assert world is not None
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return gather_rows(rows, [int(count) for count in counts], world)


def summed(*tensors: Tensor) -> None:
    """Add up each tensor over the ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def take(features: Features, chosen: Tensor) -> Features:
    """The features at the positions ``chosen``."""
    return Features(*(x[chosen] for x in features))


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random positions of ``share`` of each class, at least one."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(share * len(members)))])
    return torch.cat(chosen)
