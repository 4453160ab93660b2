"""The Triton backend: GPU tensors, and CPU tensors under the interpreter; imported by the first call."""

from fastcl.kernels.logistic import logistic, logistic_backward
from fastcl.kernels.losses import one_positive
from fastcl.kernels.queue import enqueue, mochi, topk
from fastcl.kernels.stats import stats_backward, stats_forward

__all__ = ["enqueue", "logistic", "logistic_backward", "mochi", "one_positive", "stats_backward", "stats_forward", "topk"]
