"""Texts as hashed pieces of words; WordNet's words and definitions, which come with timm."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcl.train.data.pairs import MemoryPairs, PairSource
from fastcl.train.settings import DefinitionSettings

PIECES = 2**15  # how many ids there are; 0 is none
WORDS = 16  # of a text, at most
_PIECES_OF_A_WORD = 24
_HELD_OUT = 2000


def tokenize(texts: Sequence[str]) -> Tensor:
    """Texts as the pieces of their words: each word with its ends marked, its trigrams, its letters.

    A word that was never seen is then known by its pieces. Bojanowski et al. 2017,
    https://arxiv.org/abs/1607.04606.

    Args:
        texts: N of them; capitals are as small letters.

    Returns:
        (N, L, P) int32, the hashed pieces of up to 16 words, 0 where there are no more; every text has a
        word, if only an empty one, and every word a piece.
    """
    split = [re.findall(r"\w+", text.lower())[:WORDS] or [""] for text in texts]
    places = {word: i for i, word in enumerate(dict.fromkeys(chain([None], *split)))}
    table = torch.zeros(len(places), _PIECES_OF_A_WORD, dtype=torch.int32)
    for word, place in islice(places.items(), 1, None):
        pieces = _pieces(str(word))
        table[place, : len(pieces)] = torch.tensor(pieces, dtype=torch.int32)
    longest = max(map(len, split))
    return table[torch.tensor([[*map(places.get, words)] + [0] * (longest - len(words)) for words in split])]


def _pieces(word: str) -> list[int]:
    marked = f"<{word}>"
    pieces = [marked, *(marked[i : i + 3] for i in range(len(marked) - 2)), *word]
    return [zlib.crc32(x.encode()) % (PIECES - 1) + 1 for x in pieces[:_PIECES_OF_A_WORD]]


@dataclass(frozen=True, eq=False)
class DefinitionSource(PairSource):
    """Definitions to train on, with their words or with themselves.

    Attributes:
        known: the definitions of ``train``, as texts.
        words: the held-out definitions' words, as texts: of one meaning, separated by commas.
        definitions: the held-out definitions, as texts.
    """

    known: Sequence[str]
    words: Sequence[str]
    definitions: Sequence[str]


def load_definitions(settings: DefinitionSettings) -> DefinitionSource:
    """WordNet's nouns that are classes of ImageNet; 2,000 definitions with their words are held out."""
    pairs = read_definitions()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [pairs[i] for i in order[:_HELD_OUT]]
    words, definitions = zip(*(pairs[i] for i in order[_HELD_OUT:][: settings.limit]), strict=True)
    second = tokenize(definitions)
    first = tokenize(words) if settings.supervised else second
    train = MemoryPairs(first, second, torch.full((len(second),), -1))
    return DefinitionSource(train, [nn.Identity()] * 2, definitions, *zip(*held_out, strict=True))


def read_definitions() -> list[tuple[str, str]]:
    """Words of one meaning and their definition; of meanings with the same definition, the first."""
    spec = find_spec("timm")  # importing it would import torchvision
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "_info"
    words, definitions = (
        dict(
            line.split("\t", 1)
            for line in (folder / f"imagenet_synset_to_{name}.txt").read_text().splitlines()
        )
        for name in ("lemma", "definition")
    )
    by_definition = {definitions[synset]: words[synset] for synset in reversed(words)}
    return sorted((word, definition) for definition, word in by_definition.items())
