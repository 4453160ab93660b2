"""How often a word finds its definition among 2,000, beside how often shared words alone find it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from fastcl.train.data.texts import DefinitionSource, tokenize
from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.features import rows_of
from fastcl.train.settings import DefinitionSettings

_CUTS = (1, 10)


class Retrieval(Evaluation):
    """Words look for their definitions, neither of which was trained on.

    Every rank measures all of it: it takes about a second.

    Args:
        source: the words and the definitions.
        settings: of the run.
    """

    measures = ("recall_1", "recall_10")
    rare = ("tfidf_recall_1", "tfidf_recall_10")
    lines = {  # noqa: RUF012
        "recall_1": "nearest definition",
        "recall_10": "nearest ten definitions",
        "tfidf_recall_1": "TF-IDF, nearest",
        "tfidf_recall_10": "TF-IDF, nearest ten",
    }

    def __init__(self, source: DefinitionSource, settings: DefinitionSettings) -> None:
        self.source = source

    def measure(self, network: nn.Module, device: torch.device, *, thorough: bool) -> dict[str, float]:
        """The recalls by name; with ``thorough`` those of TF-IDF, too."""
        sides = (self.source.words, self.source.definitions)
        words, definitions = (
            nn.functional.normalize(rows_of(side, tokenize(texts), device), dim=1)
            for side, texts in zip(network.children(), sides, strict=True)
        )
        found = recall(words @ definitions.T)
        return {
            **found,
            **({f"tfidf_{name}": x for name, x in tfidf(self.source).items()} if thorough else {}),
        }

    def draw(self, network: nn.Module, device: torch.device, folder: Path, title: str) -> list[str]:
        """Nothing."""
        return []


def recall(similarity: Tensor) -> Mapping[str, float]:
    """The shares of rows whose own column is the largest, and among the largest ten.

    Of equal ones, its place is the middle one.
    """
    own = similarity.diagonal()[:, None]
    before = (similarity > own).sum(dim=1) + ((similarity == own).sum(dim=1) - 1) / 2
    return {f"recall_{cut}": (before <= cut - 1).double().mean().item() for cut in _CUTS}


def tfidf(source: DefinitionSource) -> Mapping[str, float]:
    """:func:`recall` of TF-IDF vectors, over the words of all definitions."""
    vectorizer = TfidfVectorizer().fit([*source.known, *source.definitions])
    words, definitions = map(vectorizer.transform, (source.words, source.definitions))
    return recall(torch.from_numpy((words @ definitions.T).toarray()))
