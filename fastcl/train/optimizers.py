"""The optimizer of a run and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from fastcl.similarity.checks import check_choice

_TIMM_NAMES = {"lars": "lars", "sgd": "momentum", "adamw": "adamw"}


@dataclass(frozen=True)
class Optimization:
    """An optimizer with momentum 0.9 whose learning rate warms up linearly and falls to 0 as a cosine.

    Attributes:
        name: 'lars' (You et al. 2017, https://arxiv.org/abs/1708.03888; biases and batch-norm parameters
            are neither adapted nor decayed), 'sgd' or 'adamw'.
        lr: the highest learning rate.
        weight_decay: of the optimizer.
        warmup_epochs: epochs until the learning rate is at its highest.

    Raises:
        ValueError: an unknown name.
    """

    name: str = "sgd"
    lr: float = 0.03
    weight_decay: float = 1e-4
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        check_choice("optimizer", self.name, tuple(_TIMM_NAMES))

    def configure(
        self, module: nn.Module, epochs: int, steps_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer of the module's trainable parameters, and its schedule in steps."""
        optimizer = create_optimizer_v2(
            module,
            _TIMM_NAMES[self.name],
            self.lr,
            self.weight_decay,
            momentum=0.9,
            filter_bias_and_bn=self.name == "lars",
        )
        steps, warmup = epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
        if not 0 < warmup < steps:
            return optimizer, cosine
        linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        return optimizer, SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
