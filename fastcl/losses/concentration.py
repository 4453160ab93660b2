"""How tight clusters are, as temperatures: the mean distance to the prototype, less for large clusters.

Li et al. 2021, https://arxiv.org/abs/2005.04966.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.losses.prototype import check_assigned
from fastcl.similarity.checks import check_matrix, check_number, check_same, in_one_dtype
from fastcl.similarity.numerics import unit_rows

_LOW, _HIGH = 0.1, 0.9  # quantiles that concentrations are clamped to


@torch.no_grad()
def concentration(
    features: Tensor,
    assigned: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.2,
    smoothing: float = 10.0,
) -> Tensor:
    """PCL's concentrations: a temperature per prototype for :func:`fastcl.prototype_nce`.

    Of a cluster of n features v around c: ``phi = sum(|v - c|) / (n * log(n + smoothing))``. Clusters of
    fewer than 2 features take the largest phi; all are clamped to their 10th and 90th percentile and scaled
    to the mean ``temperature``. Li et al. 2021, section 3.3, https://arxiv.org/abs/2005.04966.

    Args:
        features: (N, D), any floating dtype; normalized inside.
        assigned: (N,) integers, the prototype of each feature.
        prototypes: (K, D), same dtype; normalized inside.
        temperature: the mean of the result.
        smoothing: at least 0; the larger, the less a cluster's size matters.

    Returns:
        (K,), float64 for float64 inputs, else float32; without gradient. Where all distances are 0 each is
        ``temperature``.

    Raises:
        ValueError, TypeError: as :func:`fastcl.prototype_nce`; temperature or smoothing that are not numbers.
    """
    check_matrix("features", features)
    check_matrix("prototypes", prototypes)
    check_same("prototypes", prototypes, "features", features, dtype=False)
    assigned = check_assigned(assigned, features, prototypes)
    if not prototypes.shape[0]:
        raise ValueError(f"prototypes must have at least one row, got shape {tuple(prototypes.shape)}")
    temperature = check_number("temperature", temperature)
    smoothing = check_number("smoothing", smoothing, 0.0)
    features, prototypes = in_one_dtype(unit_rows(features), unit_rows(prototypes))
    distances = torch.linalg.vector_norm(features - prototypes[assigned], dim=1)
    zeros = distances.new_zeros(prototypes.shape[0], dtype=torch.float64)
    sums = zeros.index_put((assigned,), distances.double(), accumulate=True)
    counts = zeros.index_put((assigned,), torch.ones_like(distances, dtype=torch.float64), accumulate=True)
    lone = counts < 2
    phi = (sums / (counts * (counts + smoothing).log())).masked_fill(lone, 0.0)
    phi = torch.where(lone, phi.max(), phi)
    low, high = (phi.quantile(q) for q in (_LOW, _HIGH))
    phi = phi.clamp(low, high)
    mean = phi.mean()
    return (temperature * torch.where(mean == 0, 1.0, phi / mean)).to(distances.dtype)
