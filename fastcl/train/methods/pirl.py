"""PIRL, the whole method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from fastcl.train.methods.base import Augment, Batch, Rows
from fastcl.train.methods.instances import Instances, InstancesSettings, WithMemory
from fastcl.train.methods.patches import jigsaw
from fastcl.train.methods.registry import Recipe, register
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import ClosedUnitInterval, Several
from fastcl.train.schedules import Value

_DEFAULT = Optimization("sgd", lr=0.12)


@dataclass(frozen=True, kw_only=True)
class PIRLSettings(InstancesSettings):
    """PIRL's own."""

    grid: Annotated[Several, "Patches of a jigsaw, in each direction."] = 3
    jigsaw_weight: Annotated[ClosedUnitInterval, "Share of the jigsaw's loss; the rest is the image's."] = 0.5


_PIRL = {"loss": "softmax", "noise": 32000, "temperature": 0.07, "optimizer": "sgd", "weight_decay": 1e-4}
_RECIPE: Recipe = {
    "digits": {"loss": "softmax", "noise": 512, "grid": 2},
    "small": {**_PIRL, "lr": 0.03},
    "large": {
        **{**_PIRL, "lr": 0.03, "epochs": 800, "batch_size": 1024, "warmup_epochs": 0},
        **{"crop_min": 0.2, "jitter": 0.4, "blur": False},
    },
}


@register(
    "pirl",
    "an image and its jigsaw find its row in a memory (Misra and van der Maaten 2020, arXiv 1912.01991)",
    settings=PIRLSettings,
    recipe=_RECIPE,
)
class PIRL(WithMemory):
    """PIRL: an image and a jigsaw of its patches both find the image's row in a memory of all images.

    Misra and van der Maaten 2020, https://arxiv.org/abs/1912.01991. The jigsaw is cut from the second view.
    With several processes the memory is that of all.

    Args:
        encoder: images to features (N, features); what is kept after training.
        features: width of the encoder's output.
        augment: a batch of images to one of random views of them; or one function per view.
        samples: how many training images there are.
        dim: width of the projections and of the memory's rows.
        temperature: of the loss; a number, or a schedule of it.
        loss: 'softmax' or 'nce'.
        noise: rows drawn as negatives per step; 0 with 'softmax': all.
        bank_momentum: share of the old row in its update, which is by the image.
        grid: the jigsaw's patches, in each direction.
        jigsaw_weight: share of its loss.
        optimization: the optimizer and its schedules.

    Raises:
        ValueError: an unknown loss; 'nce' without noise.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        augment: Augment | Sequence[Augment],
        *,
        samples: int,
        dim: int = 128,
        temperature: Value = 0.07,
        loss: str = "softmax",
        noise: int = 32000,
        bank_momentum: float = 0.5,
        grid: int = 3,
        jigsaw_weight: float = 0.5,
        optimization: Optimization = _DEFAULT,
    ) -> None:
        super().__init__(encoder, augment, optimization=optimization)
        self.projector = nn.Linear(features, dim)
        self.patch_projector = nn.Linear(features, dim)
        self.joint_projector = nn.Linear(grid**2 * dim, dim)
        self.instances = Instances(samples, dim, loss=loss, noise=noise, momentum=bank_momentum)
        self.grid = grid
        self.jigsaw_weight = jigsaw_weight
        self.schedule(temperature=temperature)

    def embed(self, views: Sequence[Any]) -> Rows:
        """Of the image, and of its jigsaw."""
        cut = jigsaw(views[1], self.grid)
        of_patches = self.patch_projector(self.encoder(cut.flatten(0, 1))).unflatten(0, cut.shape[:2])
        return self.projector(self.encoder(views[0])), self.joint_projector(of_patches.flatten(1))

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        of_image, of_jigsaw = (self.instances(z, batch.indices, self.temperature) for z in embedded)
        loss: Tensor = self.jigsaw_weight * of_jigsaw + (1 - self.jigsaw_weight) * of_image
        return loss
