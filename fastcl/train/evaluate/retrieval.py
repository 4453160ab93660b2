"""How often a word finds its definition among 2,000, beside how often shared words alone find it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from fastcl.train.data.texts import DefinitionSource, tokenize
from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.features import rows_of
from fastcl.train.settings import DefinitionSettings

_CUTS = (1, 10)
_TFIDF: dict[str, dict[str, Any]] = {
    "tfidf": {},
    "tfidf_trigrams": {"analyzer": "char_wb", "ngram_range": (3, 3)},
}


class Retrieval(Evaluation):
    """Words look for their definitions, neither of which was trained on.

    Every rank measures all of it: it takes about a second.

    Args:
        source: the words and the definitions.
        settings: of the run.
    """

    measures = ("recall_1", "recall_10")
    rare = ("tfidf_recall_1", "tfidf_recall_10", "tfidf_trigrams_recall_1", "tfidf_trigrams_recall_10")
    lines: ClassVar[Mapping[str, str]] = {
        "recall_1": "nearest definition",
        "recall_10": "nearest ten definitions",
        "tfidf_recall_10": "TF-IDF, nearest ten",
        "tfidf_trigrams_recall_10": "TF-IDF of trigrams,\nnearest ten",
    }

    def __init__(self, source: DefinitionSource, settings: DefinitionSettings) -> None:
        self.source = source
        self.sides = tokenize(source.words), tokenize(source.definitions)

    def measure(self, network: nn.Module, device: torch.device, *, thorough: bool) -> dict[str, float]:
        """The recalls by name; with ``thorough`` those of TF-IDF, too."""
        words, definitions = (
            nn.functional.normalize(rows_of(side, texts, device), dim=1)
            for side, texts in zip(network.children(), self.sides, strict=True)
        )
        found = recall(words @ definitions.T)
        return found | (self._tfidf if thorough else {})

    @cached_property
    def _tfidf(self) -> dict[str, float]:
        return tfidf(self.source)  # of the texts only: the same before and after training

    def draw(self, network: nn.Module, device: torch.device, folder: Path, title: str) -> list[str]:
        """Nothing."""
        return []


def recall(similarity: Tensor) -> dict[str, float]:
    """The shares of rows whose own column is the largest, and among the largest ten.

    Of equal ones, its place is the middle one.
    """
    own = similarity.diagonal()[:, None]
    before = (similarity > own).sum(dim=1) + ((similarity == own).sum(dim=1) - 1) / 2
    return {f"recall_{cut}": (before <= cut - 1).double().mean().item() for cut in _CUTS}


def tfidf(source: DefinitionSource) -> dict[str, float]:
    """:func:`recall` of TF-IDF vectors, of words and of words' trigrams, weighted by all definitions."""
    found: dict[str, float] = {}
    for name, options in _TFIDF.items():
        vectorizer = TfidfVectorizer(**options).fit([*source.known, *source.definitions])
        words, definitions = map(vectorizer.transform, (source.words, source.definitions))
        similarity = torch.from_numpy((words @ definitions.T).toarray())
        found |= {f"{name}_{measure}": value for measure, value in recall(similarity).items()}
    return found
