"""SimCLR in a training loop of plain PyTorch: only the loss is fastcl's.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastcl


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image twice, shifted by up to a pixel and with noise."""

    def view() -> Tensor:
        down, right = (int(shift) for shift in torch.randint(-1, 2, (2,)))
        shifted = images.reshape(-1, 8, 8).roll((down, right), dims=(1, 2)).flatten(1)
        return shifted + 0.2 * torch.randn_like(shifted)

    return view(), view()


def accuracy_from_ten_labels(features: Tensor, labels: Tensor) -> float:
    """Each image gets the label of the nearest of ten labelled ones, one per class; the mean of 20 draws."""
    generator, hits = torch.Generator().manual_seed(0), []
    for _ in range(20):
        shuffled = torch.randperm(len(labels), generator=generator)
        known = torch.stack([shuffled[labels[shuffled] == label][0] for label in range(10)])
        _, nearest = fastcl.similarity_topk(features, features[known], 1, normalize=True)
        hits.append((nearest[:, 0] == labels).float().mean())
    return float(torch.stack(hits).mean())


def main(epochs: int = 20) -> tuple[float, float]:
    """Train, and return the accuracy before and after."""
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(targets)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    projector = nn.Sequential(nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=1e-3)
    with torch.no_grad():
        before = accuracy_from_ten_labels(encoder(images), labels)
    for _ in range(epochs):
        for batch in images[torch.randperm(len(images))].split(256):
            first, second = two_views(batch)
            loss = fastcl.nt_xent(projector(encoder(first)), projector(encoder(second)), temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        after = accuracy_from_ten_labels(encoder(images), labels)
    print(f"accuracy from ten labels: {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
