"""The options that every run has, and their defaults by kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from fastcl.train.ranges import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Several,
    Temperature,
    checked,
)

SMALL_CROP_MIN = 0.05  # share of an image


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The options of every run; what has no default here or in the subclass has the recipe's.

    Values may be of the option's type or, as on the command line, texts.

    Raises:
        ValueError: a value that an option cannot have.

    Attributes:
        kinds: the kinds of data that a method with these options can be trained on.
    """

    kinds: ClassVar[tuple[str, ...]]

    data: Annotated[str, "What is trained on."]
    out: Annotated[Path, "Folder for the results, created if needed."] = Path("runs/latest")
    resume: Annotated[
        bool, "Go on from the last checkpoint in the output folder, if there is one; epochs may have grown."
    ] = False
    overwrite: Annotated[bool, "Replace an older run in the output folder."] = False
    init: Annotated[
        Path | None,
        "Checkpoint to start from, of fastcl train or in MoCo's official layout: all of it for the same "
        "method, else the encoder.",
    ] = None
    dim: Annotated[Several, "Width of the projection, on which the loss is computed."]
    epochs: Annotated[PositiveInt, "Passes over the training samples."]
    batch_size: Annotated[PositiveInt, "Samples per step, over all processes."]
    encode_chunk: Annotated[
        PositiveInt | None,
        "Samples per process that are encoded at a time, so that larger batches fit; null: all.",
    ] = None
    optimizer: Annotated[str, "'lars', 'sgd' or 'adamw', with a cosine schedule."]
    lr: Annotated[PositiveFloat, "Highest learning rate, per 256 samples of the batch."]
    weight_decay: Annotated[NonNegativeFloat, "Weight decay, at the start."]
    weight_decay_end: Annotated[NonNegativeFloat | None, "At the end; null: constant."] = None
    warmup_epochs: Annotated[
        NonNegativeInt, "Epochs in which the learning rate rises; not if there are no more."
    ]
    evaluate_every: Annotated[NonNegativeInt, "Epochs between evaluations; 0: none, not even at the end."]
    accelerator: Annotated[str, "Lightning's: 'auto', 'cpu', 'gpu'."] = "auto"
    devices: Annotated[PositiveInt, "Processes on this machine, each on a device of its own."] = 1
    num_nodes: Annotated[
        PositiveInt, "Machines, each with as many processes; start one on each with torchrun."
    ] = 1
    precision: Annotated[str, "Lightning's: '32-true', 'bf16-mixed', '16-mixed'."] = "32-true"
    seed: Annotated[int, Range(0, 2**32 - 1), "Seed of the initial weights, the batches and the views."] = 0

    def __post_init__(self) -> None:
        types = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            value = checked(field.name, types[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.num_nodes

    @classmethod
    def for_data(cls) -> type[RunSettings]:
        """The class with the options of all methods for the same kinds of data: the one that names them."""
        return next(base for base in cls.__mro__ if "kinds" in vars(base))


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The options of methods for images."""

    kinds = ("digits", "small", "large")

    data: Annotated[
        str,
        "Images: 'digits', 'cifar10', 'fashion-mnist'; a folder with train/ and test/ or val/ that hold a "
        "folder of images per class, or any tree of images without labels; a folder with Fashion-MNIST's "
        "IDX files.",
    ] = "digits"
    arch: Annotated[
        str,
        "Encoder: resnet18, 34, 50, 101, 152, wide_resnet50_2, vit_small, vit_base; resnet8, 14, 20 and "
        "vit_tiny for tiny images.",
    ]
    width: Annotated[
        PositiveInt, "Channels of the first stage of resnet8, 14 and 20; a quarter of vit_tiny's."
    ] = 32
    image_size: Annotated[
        Several | None,
        "Side of the images (not for digits); null: up to 64 pixels the images' own, 224 for larger ones.",
    ] = None
    crop_min: Annotated[ClosedUnitInterval, "Smallest share of an image in a crop (not for digits)."]
    jitter: Annotated[NonNegativeFloat, "Strength of the colour jitter (not for digits)."]
    blur: Annotated[bool, "Blur half of the views (not for digits)."]
    small_crops: Annotated[
        NonNegativeInt, "Views besides the usual two, of a small part of the image (not for digits)."
    ] = 0
    small_crop_size: Annotated[Several | None, "Side of those; null: 3/7 of the image's."] = None
    small_crop_max: Annotated[
        float,
        Range(SMALL_CROP_MIN, 1),
        f"Largest share of an image in those; the smallest is {SMALL_CROP_MIN}.",
    ] = 0.14
    neighbours: Annotated[PositiveInt, "Neighbours that vote in the nearest-neighbour evaluation."]
    limit: Annotated[
        PositiveInt | None,
        "At most this many training images and as many test images, evenly of all classes.",
    ] = None
    imbalance: Annotated[
        PositiveInt,
        "Training images of the first class for each one of the last: classes are cut to a long tail, "
        "exponentially; 1: not cut.",
    ] = 1
    workers: Annotated[NonNegativeInt, "Worker processes that read images over 64 pixels, per process."] = 8
    max_unreadable: Annotated[NonNegativeInt, "Unreadable image files to skip before giving up."] = 10
    download_dir: Annotated[Path, "Folder for downloads of 'cifar10' and 'fashion-mnist'."] = Path("data")


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(Settings):
    """Those of methods whose loss has a temperature."""

    temperature: Annotated[Temperature, "Temperature of the loss, at the start."]
    temperature_end: Annotated[Temperature | None, "At the end; null: constant."] = None


@dataclass(frozen=True, kw_only=True)
class TextSettings(RunSettings):
    """The options of methods with an encoder of texts."""

    width: Annotated[PositiveInt, "Width of the text transformer, a multiple of 4."] = 128
    layers: Annotated[PositiveInt, "Layers of the text transformer."] = 1
    dropout: Annotated[ClosedUnitInterval, "Dropout of the text transformer."] = 0.1
    word_dropout: Annotated[
        ClosedUnitInterval, "Dropout of whole words, rather than of their components."
    ] = 0.0
    piece_std: Annotated[
        PositiveFloat, "Standard deviation of the vectors of words' pieces at the start."
    ] = 1.0
    limit: Annotated[PositiveInt | None, "At most this many training samples."] = None


@dataclass(frozen=True, kw_only=True)
class GlyphSettings(TextSettings):
    """The options of methods for images of characters and their names."""

    kinds = ("glyphs",)

    data: Annotated[str, "'glyphs': the characters of matplotlib's fonts and their Unicode names."] = "glyphs"
    channels: Annotated[PositiveInt, "Channels of the first convolution of the glyphs' encoder."] = 32
    distortion: Annotated[ClosedUnitInterval, "Strength of the glyphs' random changes; 0: none."] = 0.5


@dataclass(frozen=True, kw_only=True)
class DefinitionSettings(TextSettings):
    """The options of methods for words and their definitions."""

    kinds = ("definitions",)

    data: Annotated[
        str, "'definitions': WordNet's, of the nouns among ImageNet's classes, from timm's files."
    ] = "definitions"
    supervised: Annotated[
        bool, "Pairs of a word and its definition, rather than of a definition and itself."
    ] = False


# the kinds of data, and the defaults for each that methods have in common
KINDS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        **{"arch": "resnet8", "dim": 64, "temperature": 0.3, "epochs": 40, "batch_size": 128},
        **{"optimizer": "adamw", "lr": 4e-3, "weight_decay": 1e-4, "warmup_epochs": 0},
        **{"crop_min": 1.0, "jitter": 0.0, "blur": False, "neighbours": 1, "evaluate_every": 2},
    },
    "small": {
        **{"arch": "resnet50", "dim": 128, "epochs": 200, "batch_size": 512, "warmup_epochs": 10},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False, "neighbours": 200, "evaluate_every": 10},
    },
    "large": {"arch": "resnet50", "dim": 128, "neighbours": 200, "evaluate_every": 10},
    "glyphs": {
        **{"dim": 128, "epochs": 7, "batch_size": 256, "warmup_epochs": 1, "evaluate_every": 2},
        **{"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-2},
        **{"word_dropout": 0.1, "piece_std": 0.05},
    },
    "definitions": {
        **{"dim": 128, "epochs": 8, "batch_size": 256, "warmup_epochs": 1, "evaluate_every": 1},
        **{"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-2},
    },
}
