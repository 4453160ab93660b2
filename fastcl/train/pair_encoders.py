"""Encoders of the sides of pairs: of glyphs a few convolutions, of texts a small transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcl.train.data.glyphs import SIDE, GlyphSource
from fastcl.train.data.texts import PIECES, WORDS, DefinitionSource
from fastcl.train.settings import DefinitionSettings, GlyphSettings

_HEADS = 4
_DROPOUT = 0.2  # of the glyphs' features


class TextEncoder(nn.Module):
    """Texts as :func:`~fastcl.train.data.texts.tokenize` has them, (N, L, P), to features (N, width).

    A word is the mean of its pieces' vectors. A text is the mean of what the transformer makes of its words,
    each with a learned weight: some words say little.

    Args:
        width: of the features, a multiple of 4.
        layers: of the transformer, which normalizes before each part of a layer.
        dropout: in it, and of the words.
        word_dropout: of whole words, instead; 0: none.
        piece_std: standard deviation of the pieces' vectors at the start; a small one lets pieces that were
            never seen say little.

    Raises:
        ValueError: another width.
    """

    def __init__(
        self, width: int, layers: int, dropout: float, word_dropout: float = 0.0, piece_std: float = 1.0
    ) -> None:
        super().__init__()
        if width % _HEADS != 0:
            raise ValueError(f"width must be a multiple of {_HEADS}, got {width}")
        self.pieces = nn.EmbeddingBag(PIECES, width, mode="mean", padding_idx=0)
        self.pieces.weight.data *= piece_std
        self.places = nn.Parameter(0.02 * torch.randn(WORDS, width))
        self.dropout = nn.Dropout1d(word_dropout) if word_dropout else nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, _HEADS, 2 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.weight = nn.Linear(width, 1)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, texts: Tensor) -> Tensor:
        """The features of ``texts``."""
        texts = texts[:, : int((texts[..., 0] != 0).sum(dim=1).amax())]
        words = self.pieces(texts.flatten(0, 1)).unflatten(0, texts.shape[:2]) + self.places[: texts.shape[1]]
        none = texts[..., 0] == 0
        words = self.transformer(self.dropout(words), src_key_padding_mask=none)
        weights = self.weight(words).masked_fill(none[..., None], -torch.inf).softmax(dim=1)
        features: Tensor = (weights * words).sum(dim=1)
        return features


def encode_glyphs(source: GlyphSource, settings: GlyphSettings) -> tuple[nn.ModuleList, tuple[int, int]]:
    """Untrained encoders of glyphs and of names, and the widths of their features."""
    glyphs, features = _convolutions(settings.channels)
    texts, width = encode_definitions(source, settings)
    return nn.ModuleList([glyphs, texts]), (features, width)


def encode_definitions(
    source: DefinitionSource | GlyphSource, settings: DefinitionSettings | GlyphSettings
) -> tuple[nn.Module, int]:
    """An untrained encoder of texts, and the width of its features."""
    encoder = TextEncoder(
        settings.width, settings.layers, settings.dropout, settings.word_dropout, settings.piece_std
    )
    return encoder, settings.width


def _convolutions(channels: int) -> tuple[nn.Module, int]:
    """Images (N, 1, 32, 32), float in [0, 1], to features; where something is in an image matters."""
    layers: list[nn.Module] = []
    before = 1
    for after, stride in ((channels, 2), (2 * channels, 2), (2 * channels, 1), (4 * channels, 2)):
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        before = after
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(_DROPOUT))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, before * (SIDE // 8) ** 2
