"""Contrastive losses as fused kernels: exact, in linear memory, one import away."""

from fastcl.dispatch import show_config, use_backend
from fastcl.losses import clip_loss, info_nce, nt_xent, sup_con
from fastcl.mochi import MochiDraws, mochi_loss
from fastcl.modules import InfoNCE, SupConLoss
from fastcl.momentum import momentum_update_
from fastcl.queue import NegativeQueue
from fastcl.rules import PairRule
from fastcl.similarity import similarity_stats, similarity_topk
from fastcl.stats import SimilarityStats
from fastcl.version import __version__

__all__ = [
    "InfoNCE",
    "MochiDraws",
    "NegativeQueue",
    "PairRule",
    "SimilarityStats",
    "SupConLoss",
    "__version__",
    "clip_loss",
    "info_nce",
    "mochi_loss",
    "momentum_update_",
    "nt_xent",
    "show_config",
    "similarity_stats",
    "similarity_topk",
    "sup_con",
    "use_backend",
]
