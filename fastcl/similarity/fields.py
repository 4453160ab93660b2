"""The order of the statistics and of a row's state in the tensors that backends exchange, said once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


class Measured(NamedTuple):
    """The statistics of the rows and, where asked for, of the columns."""

    rows: Statistics
    columns: Statistics | None


STATISTICS = len(Statistics._fields)
STATE = len(RowState._fields)

# of packed statistics
LSE_NEG, LSE_POS, POS_SUM, POS_COUNT, MAX_NEG = range(STATISTICS)
LSES = slice(LSE_NEG, LSE_POS + 1)  # in the order of MAXIMA
POSITIVE_SUMS = slice(POS_SUM, POS_COUNT + 1)  # what adds up over keys

# of a packed state
NEG_MAX, NEG_TOTAL, POS_MAX, POS_TOTAL = range(STATE)
MAXIMA, TOTALS = slice(0, STATE, 2), slice(1, STATE, 2)  # of the negatives, then of the positives
NEGATIVE_STATE = POS_MAX  # how much of it is known where there are no positives
OF_NEGATIVES, OF_POSITIVES = slice(0, NEGATIVE_STATE), slice(NEGATIVE_STATE, STATE)  # maximum and total

# what is kept of rows while their keys come in turn: the state, then the POSITIVE_SUMS
RUNNING_STATE, RUNNING_SUMS = slice(0, STATE), slice(STATE, STATE + 2)
RUNNING = STATE + 2


def unpack(packed: Tensor) -> Statistics:
    """The fields of (STATISTICS, N); the two that carry no gradient are cut off from it."""
    lse_neg, lse_pos, pos_sum, pos_count, max_neg = packed.unbind(0)
    return Statistics(lse_neg, lse_pos, pos_sum, pos_count.detach(), max_neg.detach())
