"""The Triton backend: GPU tensors, and CPU tensors under the interpreter; imported by the first call."""

from fastcl.kernels.logistic import logistic, logistic_backward
from fastcl.kernels.losses import one_positive
from fastcl.kernels.queue import enqueue, mochi, topk
from fastcl.kernels.soft_targets import sinkhorn, soft_cross_entropy, soft_cross_entropy_backward
from fastcl.kernels.stats import stats_backward, stats_forward

__all__ = [
    "enqueue",
    "logistic",
    "logistic_backward",
    "mochi",
    "one_positive",
    "sinkhorn",
    "soft_cross_entropy",
    "soft_cross_entropy_backward",
    "stats_backward",
    "stats_forward",
    "topk",
]
