"""Contrastive losses as fused kernels: exact, in linear memory, one import away."""

from fastcl.backends.choice import show_config, use_backend
from fastcl.distributed.gather import reduce, row_ids
from fastcl.losses.alignment import alignment
from fastcl.losses.bounds import donsker_varadhan_bound, info_nce_bound, nwj_bound
from fastcl.losses.clip import clip_loss
from fastcl.losses.concentration import concentration
from fastcl.losses.decoupled import DecoupledLoss, decoupled_loss
from fastcl.losses.hard_negative import HardNegativeLoss, hard_negative_loss
from fastcl.losses.info_nce import InfoNCE, info_nce
from fastcl.losses.jsd import jsd_loss
from fastcl.losses.mochi import MochiDraws, mochi_loss
from fastcl.losses.nce import NCELoss, nce_loss
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.plain.barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from fastcl.losses.plain.club import club_bound
from fastcl.losses.plain.negative_cosine import negative_cosine
from fastcl.losses.plain.pair_margin import pair_margin_loss
from fastcl.losses.plain.vicreg import VICRegLoss, vicreg_loss
from fastcl.losses.prototype import prototype_nce
from fastcl.losses.siglip import SigLIPLoss, siglip_loss
from fastcl.losses.sup_con import SupConLoss, sup_con
from fastcl.losses.triplet import TripletLoss, batch_hard_triplet_loss, triplet_loss
from fastcl.losses.uniformity import uniformity
from fastcl.losses.weighted_info_nce import weighted_info_nce
from fastcl.memory.bank import MemoryBank
from fastcl.memory.k_means import k_means
from fastcl.memory.momentum import momentum_update_
from fastcl.memory.queue import NegativeQueue
from fastcl.similarity.logistic import similarity_logistic
from fastcl.similarity.rules import PairRule
from fastcl.similarity.soft_targets import sinkhorn, soft_cross_entropy
from fastcl.similarity.stats import SimilarityStats, similarity_stats
from fastcl.similarity.topk import similarity_topk
from fastcl.version import __version__

__all__ = [
    "BarlowTwinsLoss",
    "DecoupledLoss",
    "HardNegativeLoss",
    "InfoNCE",
    "MemoryBank",
    "MochiDraws",
    "NCELoss",
    "NegativeQueue",
    "PairRule",
    "SigLIPLoss",
    "SimilarityStats",
    "SupConLoss",
    "TripletLoss",
    "VICRegLoss",
    "__version__",
    "alignment",
    "barlow_twins_loss",
    "batch_hard_triplet_loss",
    "clip_loss",
    "club_bound",
    "concentration",
    "decoupled_loss",
    "donsker_varadhan_bound",
    "hard_negative_loss",
    "info_nce",
    "info_nce_bound",
    "jsd_loss",
    "k_means",
    "mochi_loss",
    "momentum_update_",
    "nce_loss",
    "negative_cosine",
    "nt_xent",
    "nwj_bound",
    "pair_margin_loss",
    "prototype_nce",
    "reduce",
    "row_ids",
    "show_config",
    "siglip_loss",
    "similarity_logistic",
    "similarity_stats",
    "similarity_topk",
    "sinkhorn",
    "soft_cross_entropy",
    "sup_con",
    "triplet_loss",
    "uniformity",
    "use_backend",
    "vicreg_loss",
    "weighted_info_nce",
]
