"""SimCLR, the whole method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

import fastcl
from fastcl.similarity.checks import check_choice
from fastcl.train.methods.base import Augment, projection_head
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.methods.siamese import Siamese
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Value
from fastcl.train.settings import ContrastiveSettings

_DEFAULT = Optimization("lars", lr=4.8, weight_decay=1e-6, warmup_epochs=10)
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": fastcl.nt_xent,
    "decoupled": fastcl.decoupled_loss,
    "hard_negative": fastcl.hard_negative_loss,
}


@dataclass(frozen=True, kw_only=True)
class SimCLRSettings(ContrastiveSettings):
    """SimCLR's own."""

    loss: Annotated[
        str,
        "'nt_xent', 'decoupled' (Yeh et al. 2022, arXiv 2110.06848) or 'hard_negative' (Robinson et al. "
        "2021, arXiv 2010.04592).",
    ] = "nt_xent"


_RECIPE: Recipe = {
    "digits": {},
    "small": {"temperature": 0.5, "optimizer": "lars", "lr": 1.0, "weight_decay": 1e-6},
    "large": {
        **{"temperature": 0.1, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6},
        **{"epochs": 100, "batch_size": 4096, "warmup_epochs": 10},
        **{"crop_min": 0.08, "jitter": 0.8, "blur": True},
    },
}


@register(
    "simclr",
    "two views of an image find each other among the batch (Chen et al. 2020, arXiv 2002.05709)",
    settings=SimCLRSettings,
    recipe=_RECIPE,
)
class SimCLR(Siamese):
    """SimCLR: two random views of each image must find each other among all views of the batch.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709. With several processes the batch is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        dim: width of the projection, on which the loss is computed.
        temperature: of the loss; a number, or a schedule of it.
        loss: 'nt_xent', 'decoupled' (:func:`fastcl.decoupled_loss`) or 'hard_negative'
            (:func:`fastcl.hard_negative_loss`).
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: an unknown loss.
    """

    views_share_batch_norm = True
    temperature: float

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        dim: int = 128,
        temperature: Value = 0.1,
        loss: str = "nt_xent",
        optimization: Optimization = _DEFAULT,
    ) -> None:
        check_choice("loss", loss, tuple(_LOSSES))
        projector = projection_head(features, dim, batch_norm=True)
        super().__init__(encoder, augment, projector=projector, optimization=optimization)
        self.schedule(temperature=temperature)
        self.objective: Any = _LOSSES[loss]

    def compare(self, online: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.objective(target, online, self.temperature, group=self.group)
        return loss
