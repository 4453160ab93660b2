"""Contrastive losses as fused kernels: exact, in linear memory, one import away."""

from fastcl.dispatch import show_config, use_backend
from fastcl.losses import clip_loss, info_nce, nt_xent, sup_con
from fastcl.modules import InfoNCE, SupConLoss
from fastcl.rules import PairRule
from fastcl.similarity import similarity_stats, similarity_topk
from fastcl.stats import SimilarityStats
from fastcl.version import __version__

__all__ = [
    "InfoNCE",
    "PairRule",
    "SimilarityStats",
    "SupConLoss",
    "__version__",
    "clip_loss",
    "info_nce",
    "nt_xent",
    "show_config",
    "similarity_stats",
    "similarity_topk",
    "sup_con",
    "use_backend",
]
