"""sentence-transformers with fastcl's loss: the first line of a docstring finds the rest of it.

python examples/sentence_transformers_pairs.py
"""

from __future__ import annotations

import importlib
import inspect
from itertools import chain

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer

import fastcl
from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss  # was: .losses

# next to a CPU torch after the adapter, which makes torchvision importable
# isort: off
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

# isort: on

MODULES: tuple[str, ...] = (
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "email.message",
    "logging",
    "os",
    "pathlib",
    "random",
)
MODULES += (
    "shutil",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "threading",
    "unittest",
    "zipfile",
)


def docstrings() -> list[tuple[str, str]]:
    """First lines and rests of the standard library's docstrings."""
    pairs = {}
    for module in map(importlib.import_module, MODULES):
        classes = [found for _, found in inspect.getmembers(module, inspect.isclass)]
        for _, found in chain(inspect.getmembers(module), *map(inspect.getmembers, classes)):
            first, _, rest = (
                (inspect.getdoc(found) or "").partition("\n") if callable(found) else ("", "", "")
            )
            if len(first) > 20 and len(rest) > 40:
                pairs[first] = rest.strip()
    return list(pairs.items())


def recall(model: SentenceTransformer, pairs: list[tuple[str, str]], k: int) -> float:
    """How often a first line's own rest is among the ``k`` nearest."""
    first, rest = (model.encode(list(side), convert_to_tensor=True) for side in zip(*pairs, strict=True))
    _, nearest = fastcl.similarity_topk(first, rest, k, normalize=True)
    return float((nearest == torch.arange(len(pairs))[:, None]).any(1).float().mean())


def main(epochs: int = 30) -> tuple[float, float]:
    """Train on four fifths of the pairs; returns recall@10 on the others, before and after."""
    torch.manual_seed(0)
    pairs = docstrings()
    order = torch.randperm(len(pairs)).tolist()
    test, train = ([pairs[i] for i in part] for part in (order[: len(pairs) // 5], order[len(pairs) // 5 :]))
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.train_from_iterator(chain(*train), WordLevelTrainer(special_tokens=["[UNK]"]))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=128)], device="cpu")
    criterion = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = recall(model, test, 10)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(128):
            sides = zip(*(train[i] for i in batch), strict=True)
            loss = criterion([model.preprocess(list(side)) for side in sides], torch.empty(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = recall(model, test, 10)
    print(f"recall@10 on {len(test)} docstrings: {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
