"""What tests/ and bench/ share: a grid of cases, the losses in plain PyTorch, and the error budget.

A result is right when its error against float64 is at most twice plain PyTorch's own error in the
same dtype, plus a floor of a few units in the last place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.backends import native, triton
from fastcl.similarity.numerics import compute_dtype
from fastcl.similarity.rules import PairRule
from fastcl.similarity.stats import SimilarityStats

# FASTCL_TEST_DEVICE=cuda tests the GPU's backends, TRITON_INTERPRET=1 Triton's kernels on the CPU
DEVICE = torch.device(os.environ.get("FASTCL_TEST_DEVICE", "cpu"))
INTERPRETED = triton.is_interpreted()
# Triton leaves float64 to other backends
IN_FLOAT64 = DEVICE.type == "cpu" and not INTERPRETED
WIDEST = torch.float64 if IN_FLOAT64 else torch.float32
DTYPES = (*{WIDEST: None, torch.float32: None}, torch.float16, torch.bfloat16)

# queries, keys, components
SHAPES = (
    (1, 1, 1),
    (2, 2, 2),
    (63, 64, 65),
    (64, 65, 63),
    (65, 63, 64),
    (64, 64, 64),
    (140, 200, 123) if INTERPRETED else (252, 507, 123),
)

# random: independent rows         peaked: every row has near copies on the other side
# collapsed: all rows are equal    all-excluded: no pair takes part
# duplicate-ids: few distinct ids, negative and beyond 32 bits, so that many pairs match
KINDS = ("random", "peaked", "collapsed", "all-excluded", "duplicate-ids")

BUDGET_ULPS = 4.0


def backends() -> tuple[str, ...]:
    """The backends under test."""
    if INTERPRETED:
        return ("triton",)
    if DEVICE.type == "cuda":
        return ("reference", "chunked", "triton")
    built = native.missing_reason() is None
    return ("reference", "chunked", "cpu") if built else ("reference", "chunked")


class Case(NamedTuple):
    """Inputs of one call in the widest dtype under test, with ids for both sides."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    key: Tensor  # (M, D)
    labels: tuple[Tensor, Tensor]  # (N,) and (M,)
    ids: tuple[Tensor, Tensor]  # (N,) and (M,)

    def rule(self) -> PairRule:
        """Equal labels are positive, equal ids excluded."""
        return PairRule(positive=self.labels, exclude=self.ids)


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device under test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_case(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Case:
    """One of :data:`KINDS` with N queries, M keys and D components; ``shape`` is (N, M, D)."""
    n, m, d = shape
    source = generator(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=source, dtype=torch.float64)

    def draw(values: Tensor, count: int) -> Tensor:
        return values[torch.randint(len(values), (count,), generator=source)]

    query, positive, key = normal(n), normal(n), normal(m)
    if kind == "peaked":
        positive = query + 0.01 * positive
        key = query[torch.arange(m) % max(n, 1)] + 0.1 * key
    elif kind == "collapsed":
        row = normal(1)
        query, positive, key = row.repeat(n, 1), row.repeat(n, 1), row.repeat(m, 1)
    classes = torch.arange(max(1, n // 4))
    labels = draw(classes, n), draw(classes, m)
    ids = torch.arange(n), torch.arange(m)
    if kind == "all-excluded":
        ids = torch.full((n,), 7), torch.full((m,), 7)
    elif kind == "duplicate-ids":
        values = torch.tensor([-1, 3, 3 + (1 << 32), -(1 << 62)])
        labels, ids = (draw(values, n), draw(values, m)), (draw(values, n), draw(values, m))
    return Case(query.to(WIDEST), positive.to(WIDEST), key.to(WIDEST), labels, ids)


def dense_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE as people write it: normalize, matmul, cross-entropy."""
    query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    if negative_keys is None:
        targets = torch.arange(query.shape[0], device=query.device)
        return F.cross_entropy(query @ positive_key.T / temperature, targets, reduction=reduction)
    negative_keys = F.normalize(negative_keys, dim=-1)
    positive = (query * positive_key).sum(dim=1, keepdim=True)
    if negative_mode == "paired":
        negative = (query[:, None] @ negative_keys.mT).squeeze(1)
    else:
        negative = query @ negative_keys.T
    logits = torch.cat([positive, negative], dim=1) / temperature
    targets = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, targets, reduction=reduction)


def dense_nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean"
) -> Tensor:
    """NT-Xent as people write it: one (2N, 2N) matrix, its diagonal masked, cross-entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=-1)
    rows = torch.arange(z.shape[0], device=z.device)
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, rows.roll(z1.shape[0]), reduction=reduction)


def dense_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """CLIP's loss as people write it: the mean of two cross-entropies."""
    if normalize:
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * (image_features @ text_features.T)
    targets = torch.arange(logits.shape[0], device=logits.device)
    by_image = F.cross_entropy(logits, targets, reduction=reduction)
    return (by_image + F.cross_entropy(logits.T, targets, reduction=reduction)) / 2


def dense_sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    variant: str = "out",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """SupCon as people write it: log-probabilities of all pairs, averaged over the positive ones."""
    if features.dim() == 2:
        features = features[:, None]
    samples, views, _ = features.shape
    if mask is None:
        ids = torch.arange(samples, device=features.device) if labels is None else labels
        mask = ids[:, None] == ids
    contrast = torch.cat(features.unbind(1))
    if normalize:
        contrast = F.normalize(contrast, dim=-1)
    anchor = contrast if contrast_mode == "all" else contrast[:samples]
    itself = torch.eye(contrast.shape[0], dtype=torch.bool, device=features.device)[: anchor.shape[0]]
    positive = mask.bool().repeat(anchor.shape[0] // max(samples, 1), views) & ~itself
    logits = (anchor @ contrast.T / temperature).masked_fill(itself, -torch.inf)
    log_prob = logits.log_softmax(dim=1)
    count = positive.sum(dim=1).to(log_prob.dtype)
    if variant == "out":
        losses = -log_prob.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp_min(1)
    else:
        losses = count.clamp_min(1).log() - _logsumexp(log_prob, positive)
    losses = torch.where(count > 0, losses, 0.0)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def dense_stats(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    rule: PairRule | None = None,
    normalize: bool = False,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    columns: bool = False,
) -> SimilarityStats:
    """Similarity statistics from the whole matrix, in the dtype of the inputs."""
    rule = rule or PairRule()
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = scale * (query @ key.T)
    if key_scale is not None:
        logits = logits * key_scale
    if key_bias is not None:
        logits = logits + key_bias
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    excluded = nothing if rule.exclude is None else rule.exclude[0][:, None] == rule.exclude[1]
    matching = nothing if rule.positive is None else rule.positive[0][:, None] == rule.positive[1]
    negative, positive = ~excluded & ~matching, ~excluded & matching
    rows = _dense_rows(logits, negative, positive)
    return replace(rows, columns=_dense_rows(logits.T, negative.T, positive.T)) if columns else rows


def _dense_rows(logits: Tensor, negative: Tensor, positive: Tensor) -> SimilarityStats:
    negatives = F.pad(logits.detach().masked_fill(~negative, -torch.inf), (0, 1), value=-torch.inf)
    return SimilarityStats(
        lse_neg=_logsumexp(logits, negative),
        lse_pos=_logsumexp(logits, positive),
        pos_sum=logits.masked_fill(~positive, 0.0).sum(dim=1),
        pos_count=positive.sum(dim=1).to(logits.dtype),
        max_neg=negatives.amax(dim=1),
    )


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    # a row without pairs is -inf with zero gradient, where torch's logsumexp alone would give NaN
    empty = ~mask.any(dim=1, keepdim=True)
    kept = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
    return F.pad(kept, (0, 1), value=-torch.inf).logsumexp(dim=1).masked_fill(empty[:, 0], -torch.inf)


def value_and_grads(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``function`` returns for fresh leaves of ``inputs``, and their gradients.

    Outputs that are not 0-d are weighted by 1, 1.5, 2, 1, ... before they are summed: weights that
    every dtype holds exactly. Outputs without gradient are left out of the sum.
    """
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    returned = function(*leaves)
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    live = [output for output in outputs if output.requires_grad]
    weights = [1 + 0.5 * (torch.arange(x.numel(), device=x.device) % 3).reshape(x.shape).to(x) for x in live]
    grads = torch.autograd.grad(live, leaves, weights, allow_unused=True, materialize_grads=True)
    return tuple(output.detach() for output in outputs), grads


def assert_within_budget(
    got: Tensor,
    exact: Tensor,
    baseline: Tensor,
    *,
    unit: float = 1.0,
    ulps: float = BUDGET_ULPS,
    name: str = "result",
) -> None:
    """Assert that ``got`` is as near to ``exact`` as plain PyTorch is, within twice its error.

    Checked for the largest element error and for the L2 norm of the error. Where ``exact`` is not
    finite, or too large for the dtype, ``got`` must be the same. The floor is ``ulps`` units in the
    last place of the largest element, and of ``unit`` in the dtype sums are formed in: almost nothing
    of a sum may be left.

    Args:
        got: the result under test.
        exact: the same in float64.
        baseline: plain PyTorch's result in the dtype under test.
        unit: the size of the terms that cancel: the largest logit for a loss, or the size a
            gradient has when nothing cancels.
        ulps: the floor.
        name: what the message calls the result.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    rounded = exact.to(got.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(got[~finite], rounded[~finite], equal_nan=True)
    wanted = exact.double().masked_fill(~finite, 0.0)
    error = (got.double() - wanted).masked_fill(~finite, 0.0)
    assert error.isfinite().all(), f"{name}: not finite where the exact result is: {got}"
    base_error = (baseline.double() - wanted).masked_fill(~finite | ~baseline.isfinite(), 0.0)

    dtype = torch.finfo(got.dtype)
    floor = dtype.smallest_normal * dtype.eps + ulps * torch.finfo(compute_dtype(got.dtype)).eps * unit
    rows = wanted.numel() // wanted.shape[-1] if wanted.dim() > 1 else wanted.numel()
    norms = (
        ("largest element", torch.inf, floor + ulps * dtype.eps * wanted.abs().max().item()),
        ("L2 norm", 2, rows**0.5 * floor + ulps * dtype.eps * wanted.norm().item()),
    )
    for norm_name, order, norm_floor in norms:
        measured, theirs = (torch.linalg.vector_norm(e, order).item() for e in (error, base_error))
        assert measured <= 2 * theirs + norm_floor, (
            f"{name}: {norm_name} of the error is {measured:.3g}, PyTorch's {theirs:.3g}, "
            f"floor {norm_floor:.3g}, largest value {wanted.abs().max().item():.3g}"
        )
