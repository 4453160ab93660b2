"""InfoNCE: ``softplus(lse_neg - l_pos)``, the cross-entropy of picking each query's positive key.

van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; with a queue of negatives it is MoCo's loss,
He et al. 2020, https://arxiv.org/abs/1911.05722.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from fastcl.distributed.gather import group_reduce, reduce
from fastcl.losses._scope import check_scope, loss_of, lse_neg_of, paired_loss_of
from fastcl.losses.families.one_positive import BATCH, NEGATIVES, PAIRED, OnePositive
from fastcl.memory.queue import NegativeQueue
from fastcl.similarity.checks import (
    check_choice,
    check_matrix,
    check_pair,
    check_same,
    check_same_count,
    in_one_dtype,
    inverse_scalar,
)
from fastcl.similarity.numerics import logaddexp
from fastcl.similarity.rules import check_ids


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | NegativeQueue | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    query_ids: Tensor | None = None,
    normalize: bool = True,
    in_batch: bool = False,
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
        normalize: divide rows by their L2 norm first; False: all are used as they are.
        in_batch: besides ``negative_keys`` the other queries' positives are negatives too, as in supervised
            SimCSE, Gao et al. 2021, https://arxiv.org/abs/2104.08821.
        group: a ``torch.distributed`` process group. The loss is that of the whole batch, all ranks' rows in
            rank order; each rank passes its own, and may pass any number. Without ``negative_keys``, and
            with ``in_batch``, all ranks' positives are negatives; so are all ranks' unpaired
            ``negative_keys``. Paired ones and a queue (the same on every rank) serve their rank's queries
            only. All ranks make the same calls, with gradients for the same inputs; second derivatives
            raise.
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
    check_scope(reduction, group, ring)
    query, positive_key = check_pair("query", query, "positive_key", positive_key)
    paired = isinstance(negative_keys, Tensor) and negative_mode == "paired"
    of_this_rank = paired or isinstance(negative_keys, NegativeQueue)
    if group is not None and of_this_rank and not in_batch:
        own = "none" if reduction == "none" else "sum"
        losses = info_nce(
            query,
            positive_key,
            negative_keys,
            temperature,
            own,
            negative_mode,
            query_ids=query_ids,
            normalize=normalize,
        )
        return group_reduce(losses, query.shape[0], reduction, group)
    scale = inverse_scalar("temperature", temperature, query, per_row=True)
    args = OnePositive(
        query, positive_key, None, scale, layout=BATCH, normalize=normalize, reduction=reduction
    )
    if isinstance(negative_keys, NegativeQueue):
        args = _with_queue(args, negative_keys, query_ids)
    elif query_ids is not None:
        raise ValueError("query_ids excludes negatives by id, but negative_keys carries no ids")
    elif negative_keys is not None:
        args = _with_negatives(args, negative_keys, paired)
    if paired and not in_batch:
        return paired_loss_of(_with_scaled_rows(args))
    if negative_keys is None or not in_batch:
        return loss_of(_with_scaled_rows(args), group, ring)
    args = _with_scaled_rows(args.in_compute_dtype())
    if paired:
        lse_neg = args.paired_lse()
    else:
        lse_neg = lse_neg_of(args) if of_this_rank else lse_neg_of(args, group, ring)
    if in_batch:
        lse_neg = logaddexp(lse_neg, lse_neg_of(_batch_of(args), group, ring))
    return reduce(args.losses_of(lse_neg), reduction, group)


class InfoNCE(nn.Module):
    """:func:`fastcl.info_nce` as a module; a drop-in for ``info_nce.InfoNCE``.

    Args:
        temperature: as :func:`fastcl.info_nce` takes it.
        reduction: 'mean', 'sum' or 'none'.
        negative_mode: 'unpaired' or 'paired'.
        normalize: divide rows by their L2 norm first.
        in_batch: the other queries' positives are negatives besides the given ones.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        normalize: bool = True,
        in_batch: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.normalize = normalize
        self.in_batch = in_batch

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | NegativeQueue | None = None
    ) -> Tensor:
        """The loss of query (N, D) and positive_key (N, D), as :func:`fastcl.info_nce`."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
            normalize=self.normalize,
            in_batch=self.in_batch,
        )


def _with_scaled_rows(args: OnePositive) -> OnePositive:
    return args.with_scaled_rows() if args.scale.dim() else args


def _with_negatives(args: OnePositive, negatives: Tensor, paired: bool) -> OnePositive:
    check_matrix("negative_keys", negatives, 3 if paired else 2)
    check_same("negative_keys", negatives, "query", args.query)
    query, positive = args.query, args.positive
    assert positive is not None
    if negatives.dtype != query.dtype:
        query, positive, negatives = in_one_dtype(query, positive, negatives)
    if paired:
        check_same_count("negative_keys", negatives, "query", query)
    return args._replace(
        query=query,
        positive=positive,
        negatives=negatives,
        layout=PAIRED if paired else NEGATIVES,
        normalize_negatives=args.normalize,
    )


def _with_queue(args: OnePositive, queue: NegativeQueue, query_ids: Tensor | None) -> OnePositive:
    check_same("negative_keys.keys", queue.keys, "query", args.query, dtype=False)
    negative_ids = None
    if query_ids is not None:
        if queue.ids is None:
            raise ValueError("query_ids was given, but the queue was made without with_ids=True")
        query_ids = check_ids("query_ids", query_ids, args.query)
        negative_ids = check_ids("negative_keys.ids", queue.ids, queue.keys)
    return args._replace(
        negatives=queue.keys,
        query_ids=query_ids,
        negative_ids=negative_ids,
        layout=NEGATIVES,
        normalize_negatives=False,
    )


def _batch_of(args: OnePositive) -> OnePositive:
    """The same queries among all positives, without the given negatives."""
    return args._replace(negatives=None, query_ids=None, negative_ids=None, layout=BATCH)
