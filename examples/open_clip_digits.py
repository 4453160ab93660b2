"""open_clip's loss on digits and their English names.

python examples/open_clip_digits.py
"""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastcl.integrations.open_clip import ClipLoss  # was: from open_clip import ClipLoss

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelled(names: tuple[str, ...]) -> Tensor:
    """Which letters stand where, (names, 5 * 26)."""
    letters = torch.zeros(len(names), 5, 26)
    for row, name in zip(letters, names, strict=True):
        for place, letter in enumerate(name):
            row[place, ord(letter) - ord("a")] = 1
    return letters.flatten(1)


def main(steps: int = 300) -> float:
    """Train on four fifths of the images; returns the zero-shot accuracy on the others."""
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(targets)
    train, test = torch.randperm(len(images)).split(len(images) * 4 // 5)
    image_encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    text_encoder = nn.Sequential(nn.Linear(5 * 26, 128), nn.ReLU(), nn.Linear(128, 64))
    logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    parameters = [*image_encoder.parameters(), *text_encoder.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    criterion, names = ClipLoss(), spelled(NAMES)
    for _ in range(steps):
        shuffled = train[torch.randperm(len(train))]
        chosen = torch.stack([shuffled[labels[shuffled] == digit][0] for digit in range(10)])
        image_features = normalize(image_encoder(images[chosen]), dim=1)
        text_features = normalize(text_encoder(names), dim=1)
        loss = criterion(image_features, text_features, logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = normalize(image_encoder(images[test]), dim=1) @ normalize(text_encoder(names), dim=1).T
    accuracy = float((scores.argmax(1) == labels[test]).float().mean())
    print(f"zero-shot accuracy among ten names: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
