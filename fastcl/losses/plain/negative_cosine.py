"""The negative cosine between a prediction and its target: SimSiam's and BYOL's loss.

Chen and He 2021, https://arxiv.org/abs/2011.10566; Grill et al. 2020, https://arxiv.org/abs/2006.07733.
"""

from __future__ import annotations

from torch import Tensor

from fastcl.similarity.checks import check_pair, check_reduction
from fastcl.similarity.compiled import anchored
from fastcl.similarity.numerics import reduce, row_dot, unit_rows, without_autocast


def negative_cosine(prediction: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """``-cos(prediction_i, target_i)``; no gradient reaches the target.

    SimSiam averages both views' (Chen and He 2021, https://arxiv.org/abs/2011.10566); BYOL's loss is
    ``2 + 2 * negative_cosine``, summed over both (Grill et al. 2020, https://arxiv.org/abs/2006.07733).

    Args:
        prediction: (N, D), float64, float32, float16 or bfloat16.
        target: (N, D), same dtype; a constant, as if detached.
        reduction: 'mean', 'sum' or 'none'.

    Returns:
        The loss, () or (N,) with 'none'; float64 for float64 inputs, else float32. A zero row's is 0.

    Raises:
        ValueError: shapes or devices that do not fit; an unknown reduction.
        TypeError: dtypes that are not floating, or differ outside autocast.
    """
    check_reduction(reduction)
    prediction, target = check_pair("prediction", prediction, "target", target)
    with without_autocast(prediction.device):
        cosines = row_dot(unit_rows(anchored(prediction)), unit_rows(target.detach()))
        return reduce(-cosines, reduction)
