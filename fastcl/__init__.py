"""Contrastive losses as fused kernels: exact, in linear memory, one import away."""

from fastcl.backends.choice import show_config, use_backend
from fastcl.losses.clip import clip_loss
from fastcl.losses.info_nce import InfoNCE, info_nce
from fastcl.losses.mochi import MochiDraws, mochi_loss
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.plain.barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from fastcl.losses.plain.club import club_bound
from fastcl.losses.plain.negative_cosine import negative_cosine
from fastcl.losses.plain.pair_margin import pair_margin_loss
from fastcl.losses.plain.vicreg import VICRegLoss, vicreg_loss
from fastcl.losses.sup_con import SupConLoss, sup_con
from fastcl.memory.momentum import momentum_update_
from fastcl.memory.queue import NegativeQueue
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats, similarity_stats
from fastcl.similarity.topk import similarity_topk
from fastcl.version import __version__

__all__ = [
    "BarlowTwinsLoss",
    "InfoNCE",
    "MochiDraws",
    "NegativeQueue",
    "PairRule",
    "SimilarityStats",
    "SupConLoss",
    "VICRegLoss",
    "__version__",
    "barlow_twins_loss",
    "clip_loss",
    "club_bound",
    "info_nce",
    "mochi_loss",
    "momentum_update_",
    "negative_cosine",
    "nt_xent",
    "pair_margin_loss",
    "show_config",
    "similarity_stats",
    "similarity_topk",
    "sup_con",
    "use_backend",
    "vicreg_loss",
]
