"""What depends on the kind of data and not on the method: how it is read, encoded and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastcl.train.data.choice import load_images
from fastcl.train.data.glyphs import load_glyphs
from fastcl.train.data.sources import Source
from fastcl.train.data.texts import load_definitions
from fastcl.train.encoders import make_encoder
from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.evaluation import ImageEvaluation
from fastcl.train.evaluate.retrieval import Retrieval
from fastcl.train.evaluate.zero_shot import ZeroShot
from fastcl.train.pair_encoders import encode_definitions, encode_glyphs
from fastcl.train.settings import DefinitionSettings, GlyphSettings, RunSettings, Settings


@dataclass(frozen=True)
class Domain:
    """A kind of data.

    Attributes:
        load: settings to a source: what is trained and evaluated on. Besides what the others take, it has
            ``train``, a data set for :class:`~fastcl.train.data.loader.Loader`; ``augment``, a function per
            view; ``classes``, the labels' names; ``unreadable``.
        encoder: of a source and settings, untrained; and the width of its features.
        evaluation: on a source, with settings.
    """

    load: Callable[[Any], Any]
    encoder: Callable[[Any, Any], tuple[nn.Module, Any]]
    evaluation: Callable[[Any, Any], Evaluation]


def _encode_images(source: Source, settings: Settings) -> tuple[nn.Module, int]:
    return make_encoder(settings.arch, source.image_size, width=settings.width, in_channels=source.channels)


DOMAINS: Mapping[type[RunSettings], Domain] = {
    Settings: Domain(load_images, _encode_images, ImageEvaluation),
    GlyphSettings: Domain(load_glyphs, encode_glyphs, ZeroShot),
    DefinitionSettings: Domain(load_definitions, encode_definitions, Retrieval),
}
