"""The arithmetic of sentence-transformers' MultipleNegativesRankingLoss, of every direction and mode."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastcl.integrations._peer import peer
from fastcl.losses.info_nce import info_nce
from fastcl.similarity.numerics import logaddexp, row_dot, softplus, unit_rows
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats, similarity_stats

with peer("sentence-transformers>=6.2,<7"):
    from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank


def fuses(loss: Any, embeddings: list[Tensor]) -> bool:
    """Whether ``ranking_loss`` says the same as the original for this loss and these embeddings."""
    is_product = loss.similarity_fct in (cos_sim, dot_score)
    return is_product and not isinstance(loss.scale, Tensor) and not any(x.is_sparse for x in embeddings)


def ranking_loss(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """What ``loss``, a MultipleNegativesRankingLoss, makes of queries, documents and negatives, (N, D)."""
    hardness = loss.hardness_strength if loss.hardness_mode else 0.0
    simple = {*loss.directions} == {"query_to_doc"} and not (hardness or loss.gather_across_devices)
    if simple and len(embeddings) == 2:  # one op for all
        query, doc = embeddings
        return info_nce(query, doc, temperature=1 / loss.scale, normalize=loss.similarity_fct is cos_sim)
    count, scale = len(embeddings[0]), loss.scale
    offset = get_rank() * count if loss.gather_across_devices else 0
    if loss.gather_across_devices:
        embeddings = [all_gather_with_grad(x) for x in embeddings]
    queries, *docs = (unit_rows(x, loss.similarity_fct is cos_sim) for x in embeddings)
    ids = torch.arange(len(queries), device=queries.device)

    def own(rows: Tensor) -> Tensor:
        return rows if len(rows) == count else rows[offset : offset + count]

    def others(rows: Tensor, keys: Tensor, factor: float = scale) -> SimilarityStats:
        key_ids = ids if len(keys) == len(ids) else ids.repeat(len(docs))
        return similarity_stats(rows, keys, scale=factor, rule=PairRule(exclude=(own(ids), key_ids)))

    query, doc, every_doc = own(queries), own(docs[0]), torch.cat(docs) if docs[1:] else docs[0]
    of_others = 0.0 if loss.hardness_mode == "hard_negatives" else hardness
    share = scale / (scale + of_others)  # hardness is a constant: the rest of a logit is differentiated
    found = others(_damped(query, share), _damped(every_doc, share), scale + of_others)
    if docs[1:]:
        cosines = torch.stack([row_dot(query, own(x)) for x in docs[1:]], dim=1)
        of_own = 0.0 if loss.hardness_mode == "in_batch_negatives" else hardness
        found = found.join(negatives=scale * cosines + of_own * cosines.detach())
    sums = [found.lse_neg]
    if "query_to_query" in loss.directions:
        sums.append(others(query, queries).lse_neg)
    if "doc_to_query" in loss.directions:
        sums.append(others(doc, queries).lse_neg)
    if "doc_to_doc" in loss.directions:
        sums.append(others(doc, every_doc).lse_neg)
    positive = scale * row_dot(query, doc)
    if loss.partition_mode == "per_direction":
        return torch.stack([softplus(x - positive).mean() for x in sums]).mean()
    excess = reduce(logaddexp, sums) - positive
    # towards the queries the positive is once more among the others
    return softplus(softplus(excess) if "doc_to_query" in loss.directions else excess).mean()


def _damped(x: Tensor, share: float) -> Tensor:
    """``x`` with a share of its gradient."""
    return x if share == 1 else torch.lerp(x.detach(), x, share)
