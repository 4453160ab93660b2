"""The losses: each a few lines over similarity statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcl import dispatch, distributed, ops
from fastcl.checks import (
    check_choice,
    check_matrix,
    check_pair,
    check_reduction,
    check_same,
    check_same_count,
    in_one_dtype,
    inverse_scalar,
    scalar,
)
from fastcl.compiled import anchored
from fastcl.numerics import (
    compute_dtype,
    inverse_norms,
    product,
    reduce,
    row_dot,
    softplus,
    unit_rows,
    without_autocast,
)
from fastcl.one_positive import BATCH, NEGATIVES, PAIRS, VIEWS, OnePositive
from fastcl.queue import NegativeQueue
from fastcl.rules import check_ids
from fastcl.similarity import problem_stats
from fastcl.sup_con import SupCon
from fastcl.transforms import is_readable


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | NegativeQueue | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    query_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """InfoNCE: cross-entropy of picking each query's positive key among its negatives.

    A drop-in for ``info_nce.info_nce`` (PyPI ``info-nce-pytorch``): rows are L2-normalized and
    similarities divided by the temperature. van den Oord et al. 2018, https://arxiv.org/abs/1807.03748.

    Args:
        query: (N, D), float64, float32, float16 or bfloat16.
        positive_key: (N, D), same dtype.
        negative_keys: None: the other queries' positives are the negatives; (M, D) with 'unpaired';
            (N, M, D) with 'paired'; or a :class:`fastcl.NegativeQueue`, whose keys are used in place: not
            normalized again, not copied, without gradient, in their own dtype.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its
            gradient, or one of shape (N, 1): a temperature per row.
        reduction: 'mean', 'sum' or 'none'.
        negative_mode: 'unpaired' or 'paired'.
        query_ids: (N,) integers; the queue's keys with the same id are excluded.
        group: a ``torch.distributed`` process group. The loss is that of the whole batch, all ranks' rows in
            rank order; each rank passes its own, and may pass any number. Without ``negative_keys`` all
            ranks' positives are negatives; so are all ranks' unpaired ``negative_keys``. Paired ones and a
            queue (the same on every rank) serve their rank's queries only. All ranks make the same
            calls, with gradients for the same inputs; second derivatives raise.
        ring: with ``group``, pass keys from rank to rank instead of gathering them: never more than two
            ranks' keys in memory, the same result.

    Returns:
        The loss, () or (N,) with 'none'; float64 for float64 inputs, else float32. With ``group``, 'mean'
        and 'sum' return the whole batch's loss on every rank and 'none' this rank's rows. Gradients are
        those of the sum over ranks of what each returned: averaged over ranks, as DistributedDataParallel
        does, those of 'mean' and 'sum' are one process's on the whole batch.

    Raises:
        ValueError: shapes that do not fit, an unknown mode or reduction, a bad temperature; ``ring``
            without ``group``; rows not equally wide on all ranks.
        TypeError: dtypes that are not floating, or differ outside autocast; a ``group`` that is none, or
            not of this rank.
        RuntimeError: ``ring`` under the backend 'reference'.
    """
    check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
    check_reduction(reduction)
    distributed.check_group(group, ring)
    query, positive_key = check_pair("query", query, "positive_key", positive_key)
    paired = negative_keys is not None and negative_mode == "paired"
    if group is not None and (paired or isinstance(negative_keys, NegativeQueue)):
        own = "none" if reduction == "none" else "sum"
        losses = info_nce(
            query, positive_key, negative_keys, temperature, own, negative_mode, query_ids=query_ids
        )
        return distributed.group_reduce(losses, query.shape[0], reduction, group)
    scale = inverse_scalar("temperature", temperature, query, per_row=True)
    if isinstance(negative_keys, NegativeQueue):
        return _queue_info_nce(query, positive_key, negative_keys, scale, reduction, query_ids)
    if query_ids is not None:
        raise ValueError("query_ids excludes negatives by id, but negative_keys carries no ids")
    if negative_keys is None:
        return _one_positive(
            OnePositive(query, positive_key, None, scale, None, None, BATCH, True, True, reduction),
            group,
            ring,
        )
    check_matrix("negative_keys", negative_keys, 3 if paired else 2)
    check_same("negative_keys", negative_keys, "query", query)
    if negative_keys.dtype != query.dtype:
        query, positive_key, negative_keys = in_one_dtype(query, positive_key, negative_keys)
    if paired:
        check_same_count("negative_keys", negative_keys, "query", query)
        return _paired_info_nce(query, positive_key, negative_keys, scale, reduction)
    return _one_positive(
        OnePositive(query, positive_key, negative_keys, scale, None, None, NEGATIVES, True, True, reduction),
        group,
        ring,
    )


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """NT-Xent, SimCLR's loss: each of the 2N views must find its other view among all others.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709.

    Args:
        z1: (N, D) embeddings of the first views, any floating dtype; normalized inside.
        z2: (N, D) embeddings of the second views, same dtype.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (2N,) with 'none' (first all of z1, then all of z2).

    Raises:
        ValueError, TypeError: as :func:`info_nce`.
    """
    check_reduction(reduction)
    distributed.check_group(group, ring)
    z1, z2 = check_pair("z1", z1, "z2", z2)
    scale = inverse_scalar("temperature", temperature, z1)
    args = OnePositive(z1, z2, None, scale, None, None, VIEWS, True, True, reduction)
    return _one_positive(args, group, ring)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """CLIP's symmetric loss: images find their texts, texts their images, averaged.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    Args:
        image_features: (N, D), any floating dtype.
        text_features: (N, D), same dtype.
        logit_scale: the factor of the logits, already exponentiated: a finite number or a tensor of one
            element, which then receives its gradient.
        normalize: divide rows by their L2 norm first; False if they are unit rows already.
        reduction: 'mean', 'sum' or 'none'.
        group: the loss is that of all ranks' rows, each rank passing its own, as in :func:`info_nce`.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (N,) with 'none': the mean of both directions.

    Raises:
        ValueError, TypeError: as :func:`info_nce`.
    """
    check_reduction(reduction)
    distributed.check_group(group, ring)
    image_features, text_features = check_pair(
        "image_features", image_features, "text_features", text_features
    )
    scale = scalar("logit_scale", logit_scale, image_features)
    return _one_positive(
        OnePositive(
            image_features, text_features, None, scale, None, None, PAIRS, normalize, normalize, reduction
        ),
        group,
        ring,
    )


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    variant: str = "out",
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """Supervised contrastive loss: all samples of an anchor's class are its positives.

    Khosla et al. 2020, https://arxiv.org/abs/2004.11362. Without labels and mask it is SimCLR's loss.

    Args:
        features: (B, V, D), V views of each sample, or (N, D); any floating dtype.
        labels: (B,) integers; equal labels are positives.
        mask: (B, B), ``mask[i, j]`` non-zero where sample j is a positive of sample i; may be asymmetric.
        temperature: a finite non-zero number, or a tensor of one element, which then receives its gradient.
        base_temperature: the loss is scaled by ``temperature / base_temperature``; None: not scaled.
        contrast_mode: 'all': every view is an anchor; 'one': the first view only.
        variant: 'out': mean of log-probabilities; 'in': log of their mean probability.
        normalize: divide rows by their L2 norm first.
        reduction: 'mean', 'sum' or 'none'. An anchor without positives contributes 0 and is counted.
        group: the loss is that of all ranks' rows, each rank passing its own, with or without
            labels, as in :func:`info_nce`; not with ``mask``.
        ring: with ``group``, pass keys from rank to rank instead of gathering them.

    Returns:
        The loss, () or (anchors,) with 'none', view-major.

    Raises:
        ValueError: both labels and mask, or mask and group; shapes that do not fit; unknown modes; a bad
            temperature; (N, D) without labels and mask; on the CPU, a mask with values other than 0 and 1;
            and as :func:`info_nce`.
        TypeError: features that are not floating; labels that are not integers.
        RuntimeError: a mask under a backend other than 'chunked' and 'reference'.
    """
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("variant", variant, ("out", "in"))
    check_reduction(reduction)
    distributed.check_group(group, ring)
    check_matrix("features", features, (2, 3))
    if labels is not None and mask is not None:
        raise ValueError("labels and mask cannot both be given")
    if labels is None and mask is None and features.dim() == 2:
        raise ValueError(
            "features must be views (B, V, D), or come with labels or a mask: rows of shape "
            f"{tuple(features.shape)} alone have no positives"
        )
    if mask is not None and group is not None:
        raise ValueError("mask says nothing about other ranks' samples: with group, give labels or neither")
    if base_temperature is not None and not base_temperature > 0:
        raise ValueError(f"base_temperature must be positive, got {base_temperature}")
    scale = inverse_scalar("temperature", temperature, features)
    args = _sup_con_arguments(
        anchored(features), labels, mask, scale, contrast_mode, variant, normalize, reduction
    )
    loss = _sup_con(args, group, ring, labelled=labels is not None)
    if base_temperature is not None and (
        features.shape[0] or group is not None
    ):  # the mean of no rows is NaN
        loss = loss * (scale * base_temperature).reciprocal().to(loss.dtype)
    return loss


def _sup_con_arguments(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    contrast_mode: str,
    variant: str,
    normalize: bool,
    reduction: str,
) -> SupCon:
    samples, views = features.shape[0], features.shape[1] if features.dim() == 3 else 1
    rows = (
        features.transpose(0, 1).flatten(0, 1) if features.dim() == 3 else features
    )  # [V * B, D], view-major
    table = None
    sample_ids = torch.arange(samples, device=features.device)
    if mask is not None:
        table = _positive_table(mask, samples, features)
    elif labels is not None:
        if isinstance(labels, Tensor) and labels.dim() == 1 and labels.shape[0] != samples:
            raise ValueError(
                f"labels must have one label per sample: expected ({samples},) for features of shape "
                f"{tuple(features.shape)}, got {tuple(labels.shape)}"
            )
        sample_ids = check_ids("labels", labels, features)
    every_id = sample_ids.repeat(views)
    if contrast_mode == "all" or views == 1:
        return SupCon(rows, None, scale, every_id, None, normalize, variant, reduction, table)
    return SupCon(
        rows[:samples], rows, scale, every_id[:samples], every_id, normalize, variant, reduction, table
    )


def _sup_con(args: SupCon, group: dist.ProcessGroup | None, ring: bool, labelled: bool) -> Tensor:
    if group is not None:
        stats = distributed.group_stats(args.problem(), group, ring, labelled=labelled)
    else:
        backend = dispatch.choose(dispatch.Request.of_loss(args))
        if backend.serves_whole(args):
            return ops.sup_con(args)
        stats = problem_stats(args.problem(), backend=backend.name)
    losses = args.losses(stats.lse_neg, stats.lse_pos, stats.pos_sum, stats.pos_count)
    if group is not None:
        return distributed.group_reduce(losses, losses.shape[0], args.reduction, group)
    return reduce(losses, args.reduction)


def _positive_table(mask: Tensor, samples: int, features: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != (samples, samples):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must have shape ({samples}, {samples}) for features of shape "
            f"{tuple(features.shape)}, got {got}"
        )
    if mask.device != features.device:
        raise ValueError(f"mask must be on {features.device} like features, got {mask.device}")
    table = mask != 0
    if is_readable(mask) and not torch.equal(mask, table.to(mask.dtype)):
        raise ValueError("mask must hold zeros and ones only: weighted positives are not supported")
    return table


def _one_positive(args: OnePositive, group: dist.ProcessGroup | None = None, ring: bool = False) -> Tensor:
    if args.scale.dim():
        args = args.with_scaled_rows()
    if group is not None:
        return distributed.one_positive(args, group, ring)
    backend = dispatch.choose(dispatch.Request.of_loss(args))
    if backend.serves_whole(args):
        return ops.one_positive(args, backend.name)
    args = args.in_compute_dtype()
    stats = problem_stats(args.problem(), args.layout == PAIRS, backend.name)
    return args.loss(stats.lse_neg, None if stats.columns is None else stats.columns.lse_neg)


def _queue_info_nce(
    query: Tensor,
    positive: Tensor,
    queue: NegativeQueue,
    scale: Tensor,
    reduction: str,
    query_ids: Tensor | None,
) -> Tensor:
    check_same("negative_keys.keys", queue.keys, "query", query, dtype=False)
    negative_ids = None
    if query_ids is not None:
        if queue.ids is None:
            raise ValueError("query_ids was given, but the queue was made without with_ids=True")
        query_ids = check_ids("query_ids", query_ids, query)
        negative_ids = check_ids("negative_keys.ids", queue.ids, queue.keys)
    return _one_positive(
        OnePositive(
            query, positive, queue.keys, scale, query_ids, negative_ids, NEGATIVES, True, False, reduction
        )
    )


def _paired_info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor, reduction: str
) -> Tensor:
    """Each row has its own negatives: their logits are D times smaller than the input, plain torch serves."""
    with without_autocast(query.device):
        query, positive = unit_rows(anchored(query)), unit_rows(anchored(positive))
        negatives = anchored(negatives).to(compute_dtype(negatives.dtype))
        scale = scale.to(query.dtype)
        dots = product(negatives, query[:, :, None]).squeeze(-1)  # [N, M]
        lse_neg = (scale * dots * inverse_norms(negatives).squeeze(-1)).logsumexp(dim=1)
        return reduce(softplus(lse_neg - scale.flatten() * row_dot(query, positive)), reduction)
