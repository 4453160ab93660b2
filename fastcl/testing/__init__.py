"""What tests/ and bench/ share: cases, the losses and their plain PyTorch twins, and the error budget."""

from fastcl.testing.budget import BUDGET_ULPS, assert_within_budget, value_and_grads
from fastcl.testing.cases import (
    DEVICE,
    DTYPES,
    IN_FLOAT64,
    INTERPRETED,
    KINDS,
    SHAPES,
    WIDEST,
    Case,
    backends,
    generator,
    make_case,
)
from fastcl.testing.dense import (
    dense_clip_loss,
    dense_info_nce,
    dense_mochi_loss,
    dense_nt_xent,
    dense_siglip_loss,
    dense_similarity_logistic,
    dense_soft_cross_entropy,
    dense_stats,
    dense_sup_con,
)
from fastcl.testing.losses import LOSSES, MASKED, Loss, example_labels, example_mask

__all__ = [
    "BUDGET_ULPS",
    "DEVICE",
    "DTYPES",
    "INTERPRETED",
    "IN_FLOAT64",
    "KINDS",
    "LOSSES",
    "MASKED",
    "SHAPES",
    "WIDEST",
    "Case",
    "Loss",
    "assert_within_budget",
    "backends",
    "dense_clip_loss",
    "dense_info_nce",
    "dense_mochi_loss",
    "dense_nt_xent",
    "dense_siglip_loss",
    "dense_similarity_logistic",
    "dense_soft_cross_entropy",
    "dense_stats",
    "dense_sup_con",
    "example_labels",
    "example_mask",
    "generator",
    "make_case",
    "value_and_grads",
]
