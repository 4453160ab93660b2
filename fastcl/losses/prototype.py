"""The loss over prototypes: ``softplus(lse_neg - l_assigned)``, each prototype with its own temperature.

Li et al. 2021, https://arxiv.org/abs/2005.04966.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.losses._scope import loss_of
from fastcl.losses.families.one_positive import ASSIGNED, OnePositive
from fastcl.similarity.checks import (
    check_matrix,
    check_reduction,
    check_same,
    check_vector,
    in_one_dtype,
    inverse_scalar,
)
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import compute_dtype, reduce, row_dot, softplus, unit_rows
from fastcl.similarity.rules import PairRule, check_ids, check_range
from fastcl.similarity.stats import similarity_stats


def prototype_nce(
    query: Tensor,
    prototypes: Tensor,
    assigned: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    bias: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of picking each query's prototype among all, ProtoNCE's term.

    The logits are ``<query[i], prototypes[k]> / temperature[k] + bias[k]``. Li et al. 2021 (PCL),
    https://arxiv.org/abs/2005.04966; with trained prototypes Wang et al. 2017 (NormFace),
    https://arxiv.org/abs/1704.06369; with one per sample Wu et al. 2018 (Inst-Disc),
    https://arxiv.org/abs/1805.01978.

    Args:
        query: (N, D), any floating dtype.
        prototypes: (K, D), same dtype.
        assigned: (N,) integers, the prototype of each query.
        temperature: a finite non-zero number, or a tensor of one element, or (K,): one per prototype, as
            :func:`fastcl.concentration` gives them. A tensor receives its gradient.
        bias: (K,), added to the logits of each prototype; receives its gradient.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        The loss, () or (N,) with 'none'; float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes or devices that do not fit; a bad temperature; on the CPU, prototypes assigned that
            are not there.
        TypeError: dtypes that are not floating, or differ outside autocast; assigned that are not integers.
    """
    check_reduction(reduction)
    check_matrix("query", query)
    check_matrix("prototypes", prototypes)
    check_same("prototypes", prototypes, "query", query)
    if prototypes.dtype != query.dtype:
        query, prototypes = in_one_dtype(query, prototypes)
    assigned = check_assigned(assigned, query, prototypes)
    scale = _inverse_temperature(temperature, prototypes)
    if bias is None and not scale.dim():
        args = OnePositive(
            query,
            None,
            prototypes,
            scale,
            assigned,
            layout=ASSIGNED,
            normalize=normalize,
            normalize_negatives=normalize,
            reduction=reduction,
        )
        return loss_of(args)
    names = torch.arange(prototypes.shape[0], device=prototypes.device)
    dtype = compute_dtype(query.dtype)  # rows enter twice, and their gradients should round once
    query, prototypes = anchored(query).to(dtype), anchored(prototypes).to(dtype)
    key_scale = scale if scale.dim() else None
    if bias is not None:
        check_vector("bias", bias, prototypes)
        bias = anchored(bias).to(dtype)
    lse_neg = similarity_stats(
        query,
        prototypes,
        scale=1.0 if scale.dim() else scale,
        rule=PairRule(exclude=(assigned, names)),
        normalize=normalize,
        key_bias=bias,
        key_scale=key_scale,
    ).lse_neg
    own_scale = (scale if key_scale is None else key_scale.index_select(0, assigned)).to(dtype)
    own = unit_rows(prototypes.index_select(0, assigned), normalize)
    logit = own_scale * row_dot(unit_rows(query, normalize), own)
    if bias is not None:
        logit = logit + bias.index_select(0, assigned)
    return reduce(softplus(lse_neg - logit), reduction)


def check_assigned(assigned: Tensor, rows: Tensor, prototypes: Tensor) -> Tensor:
    """``assigned`` as int64; raise unless it names one of the (K, D) prototypes for each row (N, D)."""
    assigned = check_ids("assigned", assigned, rows)
    check_range("assigned", assigned, prototypes.shape[0], "prototypes")
    return assigned


def _inverse_temperature(temperature: float | Tensor, prototypes: Tensor) -> Tensor:
    """0-d or (K,)."""
    if not isinstance(temperature, Tensor) or temperature.numel() == 1:
        return inverse_scalar("temperature", temperature, prototypes)
    if temperature.shape != prototypes.shape[:1]:
        raise ValueError(
            f"temperature must be a number, a tensor of one element or of shape ({prototypes.shape[0]},): "
            f"one per prototype; got shape {tuple(temperature.shape)}"
        )
    return inverse_scalar("temperature", temperature[:, None], prototypes, per_row=True)[:, 0]
