"""The places of fields in packed tensors, as kernels take them: the host's, which is where they are said."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastcl.similarity import fields


class Weights(NamedTuple):
    """What the gradient kernels take of each row, packed in this order."""

    neg_max: Tensor  # of the logits, in log2 units
    neg_slope: Tensor  # what exp2(logit - neg_max) is multiplied by
    pos_max: Tensor
    pos_slope: Tensor
    sum_slope: Tensor  # the gradient of the positives' sum


NEGATIVE_WEIGHTS = Weights._fields.index("pos_max")  # how many there are without positives


class SoftPartial(NamedTuple):
    """What a pass over some keys finds of a view's and a teacher's softmax of a row, in this order."""

    view_max: Tensor  # of the logits, in log2 units
    view_total: Tensor  # sum of exp2(logit - view_max)
    target_max: Tensor
    target_total: Tensor
    distance: Tensor  # sum of exp2(target logit - target_max) (view_max - logit)


NEG_MAX = tl.constexpr(fields.NEG_MAX)
NEG_TOTAL = tl.constexpr(fields.NEG_TOTAL)
POS_MAX = tl.constexpr(fields.POS_MAX)
NEGATIVE_STATE = tl.constexpr(fields.NEGATIVE_STATE)

# of partial statistics: the state, then the positives' sum and count
PARTIAL_SUM = tl.constexpr(fields.RUNNING_SUM)
PARTIAL_COUNT = tl.constexpr(fields.RUNNING_COUNT)
RUNNING = tl.constexpr(fields.RUNNING)

OF_POSITIVES = tl.constexpr(1)  # of sums over negatives, then positives

NEG_SLOPE = tl.constexpr(Weights._fields.index("neg_slope"))
POS_SHIFT = tl.constexpr(Weights._fields.index("pos_max"))
POS_SLOPE = tl.constexpr(Weights._fields.index("pos_slope"))
SUM_SLOPE = tl.constexpr(Weights._fields.index("sum_slope"))
LOSS_SLOPE = tl.constexpr(NEGATIVE_WEIGHTS)  # of softmaxes: after the maximum and 1 / sum

VIEW_MAX = tl.constexpr(SoftPartial._fields.index("view_max"))
VIEW_TOTAL = tl.constexpr(SoftPartial._fields.index("view_total"))
TARGET_MAX = tl.constexpr(SoftPartial._fields.index("target_max"))
TARGET_TOTAL = tl.constexpr(SoftPartial._fields.index("target_total"))
DISTANCE = tl.constexpr(SoftPartial._fields.index("distance"))
SOFT_PARTIAL = tl.constexpr(len(SoftPartial._fields))
