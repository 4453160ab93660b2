"""Makes torchvision importable beside a PyTorch that its compiled operators were not built for."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_OPERATORS = ("torchvision::nms", "torchvision::qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision() -> None:
    """Import torchvision, where it is installed; call this before anything else imports it (Lightning does).

    A CUDA build of torchvision cannot load its operators beside a CPU-only PyTorch, and its import then
    fails on those it registers shape functions for. Their schemas alone are enough for the import, and
    nothing here uses them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for operator in _OPERATORS:
            torch.library.define(operator, _SCHEMA)
        importlib.import_module("torchvision")
