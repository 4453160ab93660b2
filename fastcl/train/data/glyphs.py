"""Images of characters, drawn with the fonts that come with matplotlib, and the characters' Unicode names."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from fastcl.train.data.digits import warped
from fastcl.train.data.pairs import MemoryPairs, PairSource
from fastcl.train.data.texts import tokenize
from fastcl.train.settings import GlyphSettings

SIDE = 32  # of an image, pixels
NAMES = 500  # among which an image's is to be found
_FONT_SIZE, _BASELINE = 22, 23  # pixels
_TRAINED, _HELD_OUT = "DejaVu", "STIX"  # families; cm*'s codes are TeX's, LastResort shows no characters


class Glyphs(NamedTuple):
    """Images of characters.

    Attributes:
        images: (N, 1, 32, 32) uint8.
        rasters: (N,) int64, the same for images that are the same, pixel by pixel.
        codes: (N,) int64, the characters' code points.
        classes: (N,) int64; characters that have the same raster in some font are of one class.
        held_out: (N,) bool, of a font that is not trained on.
    """

    images: Tensor
    rasters: Tensor
    codes: Tensor
    classes: Tensor
    held_out: Tensor

    def at(self, chosen: Tensor) -> Glyphs:
        """Those at the chosen places."""
        return Glyphs(*(x[chosen] for x in self))


@dataclass(frozen=True, eq=False)
class Task:
    """Images whose names are to be found among 500.

    Attributes:
        images: (N, 1, 32, 32) uint8.
        labels: (N,) int64, the places of their names.
        names: of as many classes: each is that of the class' first character.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str]


@dataclass(frozen=True, eq=False)
class GlyphSource(PairSource):
    """Glyphs and their names to train on.

    Attributes:
        tasks: 'fonts', characters that are trained on, in fonts that are not; 'characters', others, in fonts
            that are trained on. No image of theirs is trained on.
    """

    tasks: Mapping[str, Task]


def load_glyphs(settings: GlyphSettings) -> GlyphSource:
    """DejaVu's glyphs but for 500 classes of characters, held out as all of STIX's fonts are."""
    train, tests = split(read_glyphs())
    order = torch.randperm(len(train.codes), generator=torch.Generator().manual_seed(0))
    train = train.at(order[: settings.limit])
    names = tokenize([unicodedata.name(chr(code)) for code in train.codes.tolist()])
    pairs = MemoryPairs(train.images, names, train.classes)
    augment: list[Callable[[Tensor], Tensor]] = [
        partial(distorted, strength=settings.distortion),
        nn.Identity(),
    ]
    return GlyphSource(pairs, augment, {name: _task(glyphs) for name, glyphs in tests.items()})


@cache
def read_glyphs() -> Glyphs:
    """Every named character of the fonts, but blank ones, font by font."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, codes, held_out = [], [], []
    for path in sorted(folder.glob("*.ttf")):
        if path.name.startswith((_TRAINED, _HELD_OUT)):
            font = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
            for code in FT2Font(str(path)).get_charmap():
                if unicodedata.name(chr(code), "") and (image := _drawn(chr(code), font)).any():
                    images.append(image)
                    codes.append(code)
                    held_out.append(path.name.startswith(_HELD_OUT))
    ids: dict[bytes, int] = {}
    rasters = [ids.setdefault(image.tobytes(), len(ids)) for image in images]
    drawn = torch.from_numpy(np.stack(images)[:, None])
    return Glyphs(drawn, *map(torch.tensor, (rasters, codes, _alike(rasters, codes), held_out)))


def split(glyphs: Glyphs) -> tuple[Glyphs, dict[str, Glyphs]]:
    """Glyphs to train on; and those of :attr:`GlyphSource.tasks`.

    Classes are drawn with a seed of their own, so that they are the same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    unseen = _drawn_classes(glyphs.classes[~glyphs.held_out], generator)
    of_unseen = torch.isin(glyphs.classes, unseen)
    train = glyphs.at(~glyphs.held_out & ~of_unseen)
    new = ~torch.isin(glyphs.rasters, train.rasters)
    fonts = glyphs.at(glyphs.held_out & torch.isin(glyphs.classes, train.classes) & new)
    tests = {
        "fonts": fonts.at(torch.isin(fonts.classes, _drawn_classes(fonts.classes, generator))),
        "characters": glyphs.at(~glyphs.held_out & of_unseen),
    }
    for test in tests.values():
        assert not torch.isin(test.rasters, train.rasters).any()
    return train, tests


def distorted(images: Tensor, strength: float) -> Tensor:
    """Random views of glyphs, float in [0, 1]: warped, bolder or lighter, and at strength 0 as they are."""
    images = images.float() / 255
    if strength == 0:
        return images
    warps = warped(
        images, turn=10 * strength, shear=0.2 * strength, scale=0.25 * strength, shift=0.1 * strength
    )
    weight = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(-strength, strength)
    sign = weight.sign()
    strokes = sign * max_pool2d(sign * warps, 3, 1, 1)  # bolder, or lighter where the sign is -1
    return warps + weight.abs() * (strokes - warps)


def _drawn(character: str, font: ImageFont.FreeTypeFont) -> NDArray[Any]:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, _BASELINE), character, fill=255, font=font, anchor="ms")
    return np.asarray(image)


def _alike(rasters: Sequence[int], codes: Sequence[int]) -> list[int]:
    """The classes: characters that share a raster are of one, and so are those that share a character."""
    apart = max(codes) + 1
    ends = (codes, [apart + raster for raster in rasters])
    nodes = apart + max(rasters) + 1
    shared = coo_array((np.ones(len(codes)), ends), shape=(nodes, nodes))
    component = connected_components(shared, directed=False)[1]
    return [int(component[code]) for code in codes]


def _drawn_classes(classes: Tensor, generator: torch.Generator) -> Tensor:
    present: Tensor = classes.unique()
    return present[torch.randperm(len(present), generator=generator)[:NAMES]]


def _task(glyphs: Glyphs) -> Task:
    classes, labels = glyphs.classes.unique(return_inverse=True)
    first = torch.full_like(classes, 2**31).scatter_reduce_(0, labels, glyphs.codes, "amin")
    names = [unicodedata.name(chr(code)) for code in first.tolist()]
    return Task(glyphs.images, labels, names)
