"""lightly's SimCLR with fastcl's loss: one import is another.

python examples/lightly_simclr.py
"""

from __future__ import annotations

import torch
from plain_loop import accuracy_from_ten_labels, two_views
from sklearn.datasets import load_digits
from torch import nn

from fastcl.integrations.lightly import NTXentLoss  # was: from lightly.loss import NTXentLoss

# next to a CPU torch after the adapter, which makes torchvision importable
# isort: off
from lightly.models.modules import SimCLRProjectionHead

# isort: on


def main(epochs: int = 20) -> tuple[float, float]:
    """Train, and return the accuracy before and after."""
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(targets)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    head = SimCLRProjectionHead(64, 64, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    with torch.no_grad():
        before = accuracy_from_ten_labels(encoder(images), labels)
    for _ in range(epochs):
        for batch in images[torch.randperm(len(images))].split(256):
            first, second = two_views(batch)
            loss = criterion(head(encoder(first)), head(encoder(second)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        after = accuracy_from_ten_labels(encoder(images), labels)
    print(f"accuracy from ten labels: {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
