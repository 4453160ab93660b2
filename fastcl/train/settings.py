"""The options that every run has, and their defaults by kind of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every method has in common; what has no default here has the recipe's."""

    data: Annotated[
        str,
        "Images: 'digits', 'cifar10', 'fashion-mnist', a folder with train/ and test/ that hold a "
        "folder of images per class, or a folder with Fashion-MNIST's IDX files.",
    ] = "digits"
    out: Annotated[Path, "Folder for the results, created if needed; an older run's in it are replaced."] = (
        Path("runs/latest")
    )
    resume: Annotated[bool, "Go on from the last checkpoint in the output folder, if there is one."] = False
    init: Annotated[
        Path | None,
        "Checkpoint in MoCo's official layout to start from: the encoder, for MoCo also heads and queue.",
    ] = None
    arch: Annotated[
        str, "Encoder: resnet18, 34, 50, 101, 152, wide_resnet50_2; resnet8, 14, 20 for tiny images."
    ]
    width: Annotated[PositiveInt, "Channels of the first stage of resnet8, 14 and 20."] = 32
    image_size: Annotated[
        PositiveInt | None, "Side of the images; null: up to 64 pixels the images' own, 224 for larger ones."
    ] = None
    dim: Annotated[PositiveInt, "Width of the projection, on which the loss is computed."]
    temperature: Annotated[PositiveFloat, "Temperature of the loss."]
    epochs: Annotated[PositiveInt, "Passes over the training images."]
    batch_size: Annotated[PositiveInt, "Images per step, over all processes."]
    optimizer: Annotated[str, "'lars', 'sgd' or 'adamw', with a cosine schedule."]
    lr: Annotated[PositiveFloat, "Highest learning rate, per 256 images of the batch."]
    weight_decay: Annotated[NonNegativeFloat, "Weight decay."]
    warmup_epochs: Annotated[NonNegativeInt, "Epochs in which the learning rate rises."]
    crop_min: Annotated[ClosedUnitInterval, "Smallest share of an image in a crop (not for digits)."]
    jitter: Annotated[NonNegativeFloat, "Strength of the colour jitter (not for digits)."]
    blur: Annotated[bool, "Blur half of the views (not for digits)."]
    neighbours: Annotated[PositiveInt, "Neighbours that vote in the nearest-neighbour evaluation."]
    evaluate_every: Annotated[PositiveInt, "Epochs between evaluations."]
    limit: Annotated[
        PositiveInt | None,
        "At most this many training images and as many test images, evenly of all classes.",
    ] = None
    workers: Annotated[NonNegativeInt, "Worker processes that read images over 64 pixels, per process."] = 8
    max_unreadable: Annotated[NonNegativeInt, "Unreadable image files to skip before giving up."] = 10
    download_dir: Annotated[Path, "Folder for downloads of 'cifar10' and 'fashion-mnist'."] = Path("data")
    accelerator: Annotated[str, "Lightning's: 'auto', 'cpu', 'gpu'."] = "auto"
    devices: Annotated[PositiveInt, "Processes, each on a device of its own."] = 1
    precision: Annotated[str, "Lightning's: '32-true', 'bf16-mixed', '16-mixed'."] = "32-true"
    seed: Annotated[NonNegativeInt, "Seed of the initial weights, the batches and the views."] = 0


# the kinds of images, and the defaults for each that methods have in common
KINDS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        **{"arch": "resnet8", "dim": 64, "temperature": 0.3, "epochs": 40, "batch_size": 128},
        **{"optimizer": "adamw", "lr": 4e-3, "weight_decay": 1e-4, "warmup_epochs": 0},
        **{"crop_min": 1.0, "jitter": 0.0, "blur": False, "neighbours": 1, "evaluate_every": 1},
    },
    "small": {
        **{"arch": "resnet50", "dim": 128, "epochs": 200, "batch_size": 512, "warmup_epochs": 10},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False, "neighbours": 200, "evaluate_every": 10},
    },
    "large": {"arch": "resnet50", "dim": 128, "neighbours": 200, "evaluate_every": 10},
}
