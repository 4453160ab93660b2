"""The optimizer of a run and its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import nn

from fastcl.similarity.checks import check_choice
from fastcl.train.schedules import Cosine, Value, value_at

_TIMM_NAMES = {"lars": "lars", "sgd": "momentum", "adamw": "adamw"}
_TIMM_OPTIONS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}}  # a step of CLIP takes a tenth less


@dataclass(frozen=True)
class Optimization:
    """An optimizer with momentum 0.9 whose learning rate warms up linearly and falls to 0 as a cosine.

    Attributes:
        name: 'lars' (You et al. 2017, https://arxiv.org/abs/1708.03888; biases and batch-norm parameters
            are neither adapted nor decayed), 'sgd' or 'adamw'.
        lr: the highest learning rate.
        weight_decay: of the optimizer; a number, or a schedule of it.
        warmup_epochs: epochs until the learning rate is at its highest; none if training has no more.

    Raises:
        ValueError: an unknown name.
    """

    name: str = "sgd"
    lr: float = 0.03
    weight_decay: Value = 1e-4
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        check_choice("optimizer", self.name, tuple(_TIMM_NAMES))

    def configure(self, module: nn.Module, steady: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the module's trainable parameters, before :meth:`set_rates`.

        ``steady``: a part of it whose learning rate rises with the others' and does not fall.
        """
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            module,
            _TIMM_NAMES[self.name],
            self.lr,
            1.0,  # stands for the weight decay, which set_rates gives to the groups that have any
            momentum=0.9,
            filter_bias_and_bn=self.name == "lars",
            **_TIMM_OPTIONS.get(self.name, {}),
        )
        for group in optimizer.param_groups:
            group["is_decayed"], group["is_steady"] = bool(group["weight_decay"]), False
        if steady is not None:
            _divide(optimizer, set(steady.parameters()))
        self.set_rates(optimizer, 0, 1, 1)
        return optimizer

    def set_rates(
        self, optimizer: torch.optim.Optimizer, step: int, steps: int, steps_per_epoch: int
    ) -> float:
        """Give ``optimizer`` the rates of one of ``steps``; returns the learning rate."""
        warmup = self.warmup_epochs * steps_per_epoch
        warmup = warmup if warmup < steps else 0
        lr = self.lr * _share_of_lr(step, steps, warmup)
        decay = value_at(self.weight_decay, step / steps)
        for group in optimizer.param_groups:
            group["lr"] = self.lr if group["is_steady"] and step >= warmup else lr
            group["weight_decay"] = decay if group["is_decayed"] else 0.0
        return lr


def _divide(optimizer: torch.optim.Optimizer, steady: set[nn.Parameter]) -> None:
    """Gives the steady parameters of each group one of their own."""
    for group in list(optimizer.param_groups):
        own = [x for x in group["params"] if x in steady]
        if own:
            group["params"] = [x for x in group["params"] if x not in steady]
            optimizer.add_param_group({**group, "params": own, "is_steady": True})


def _share_of_lr(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (1 + (warmup - 1) * step / warmup) / warmup
    return Cosine(1.0, 0.0).at((step - warmup) / max(1, steps - warmup))
