"""The statistics and a row's state: their order in the tensors that backends exchange, and how they merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.similarity.numerics import logaddexp


class Statistics(NamedTuple):
    """What is known of each row of a similarity matrix, all (N,); packed it is (STATISTICS, N)."""

    lse_neg: Tensor  # log-sum-exp of the logits over negatives, -inf without any
    lse_pos: Tensor  # the same over positives
    pos_sum: Tensor  # sum of the logits over positives
    pos_count: Tensor  # number of positives
    max_neg: Tensor  # largest logit over negatives, -inf without any


class RowState(NamedTuple):
    """Maximum of the logits and sum of ``exp2(logit - maximum)``, in log2 units, all (N,)."""

    neg_max: Tensor
    neg_total: Tensor
    pos_max: Tensor
    pos_total: Tensor


class PositiveSums(NamedTuple):
    """What adds up over positives, all (N,): these fields of the statistics, in this order."""

    pos_sum: Tensor
    pos_count: Tensor


class Measured(NamedTuple):
    """The statistics of the rows and, where asked for, of the columns."""

    rows: Statistics
    columns: Statistics | None


STATISTICS = len(Statistics._fields)
STATE = len(RowState._fields)

# of packed statistics
LSE_NEG, LSE_POS, POS_SUM, POS_COUNT, MAX_NEG = range(STATISTICS)
LSES = slice(LSE_NEG, LSE_POS + 1)  # in the order of MAXIMA
POSITIVE_SUMS = slice(POS_SUM, POS_SUM + len(PositiveSums._fields))
WITHOUT_GRADIENT = ("pos_count", "max_neg")

# of a packed state
NEG_MAX, NEG_TOTAL, POS_MAX, POS_TOTAL = range(STATE)
MAXIMA, TOTALS = slice(0, STATE, 2), slice(1, STATE, 2)  # of the negatives, then of the positives
NEGATIVE_STATE = POS_MAX  # how much of it is known where there are no positives
OF_NEGATIVES, OF_POSITIVES = slice(0, NEGATIVE_STATE), slice(NEGATIVE_STATE, STATE)  # maximum and total

# what is kept of rows while their keys come in turn: the state, then the POSITIVE_SUMS
RUNNING = STATE + len(PositiveSums._fields)
RUNNING_STATE, RUNNING_SUMS = slice(0, STATE), slice(STATE, RUNNING)
RUNNING_SUM, RUNNING_COUNT = range(STATE, RUNNING)


def empty_state(like: Tensor, count: int) -> Tensor:
    """The state (STATE, count) of rows that have seen no key."""
    state = like.new_zeros(STATE, count)
    state[MAXIMA] = -torch.inf
    return state


def no_positive_sums(like: Tensor, count: int) -> Tensor:
    """The POSITIVE_SUMS of rows that have seen no key."""
    return like.new_zeros(RUNNING - STATE, count)


def nothing_seen(like: Tensor, count: int) -> Tensor:
    """State and positive sums (RUNNING, count) of rows that have seen no key."""
    return torch.cat([empty_state(like, count), no_positive_sums(like, count)])


def merge_positive_sums(a: Tensor, b: Tensor) -> Tensor:
    """The POSITIVE_SUMS over two disjoint sets of keys."""
    return a + b


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics over two disjoint sets of keys."""
    return Statistics(
        lse_neg=logaddexp(a.lse_neg, b.lse_neg),
        lse_pos=logaddexp(a.lse_pos, b.lse_pos),
        pos_sum=a.pos_sum + b.pos_sum,
        pos_count=a.pos_count + b.pos_count,
        max_neg=torch.maximum(a.max_neg, b.max_neg),
    )


def unpack(packed: Tensor) -> Statistics:
    """The fields of (STATISTICS, N); those that carry no gradient are cut off from it."""
    found = Statistics(*packed.unbind(0))
    return found._replace(**{name: getattr(found, name).detach() for name in WITHOUT_GRADIENT})
