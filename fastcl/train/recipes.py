"""The training runs: each function puts a method, a source and an encoder together, ready to fit."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from fastcl.train.curves import draw_curves, read_metrics
from fastcl.train.data import Source, load
from fastcl.train.encoders import small_resnet
from fastcl.train.evaluation import NearestNeighbours
from fastcl.train.methods import SimCLR


def simclr(
    data: str = "digits",
    out: Path = Path("runs/digits"),
    *,
    arch: str = "resnet8",
    width: PositiveInt = 32,
    dim: PositiveInt = 64,
    epochs: PositiveInt = 40,
    batch_size: PositiveInt = 128,
    temperature: PositiveFloat = 0.3,
    lr: PositiveFloat = 2e-3,
    weight_decay: NonNegativeFloat = 1e-4,
    seed: NonNegativeInt = 0,
) -> Run:
    """SimCLR: two random views of each image must find each other among all views of the batch.

    Writes metrics.csv, curves.png and simclr.ckpt.

    Args:
        data: Images to train on: 'digits', scikit-learn's 8x8 handwritten digits.
        out: Folder for the results, created if needed; an older run's results in it are replaced.
        arch: Encoder: 'resnet8', 'resnet14' or 'resnet20'.
        width: Channels of the encoder's first stage; the features are four times as wide.
        dim: Width of the projection, on which the loss is computed.
        epochs: Passes over the training images.
        batch_size: Images per step; each gives two views.
        temperature: Temperature of the loss.
        lr: First learning rate, annealed to zero over the training.
        weight_decay: Weight decay.
        seed: Seed of the initial weights, the batches and the views.

    Returns:
        The run, checked and ready to :meth:`Run.fit`.

    Raises:
        ValueError: an unknown source or architecture, a batch larger than the source, a folder that
            cannot be written to.
    """
    source = load(data)
    seed_everything(seed, verbose=False)
    encoder, features = small_resnet(arch, width, in_channels=source.train.images.shape[1])
    method = SimCLR(
        encoder,
        features,
        source.augment,
        dim=dim,
        temperature=temperature,
        lr=lr,
        weight_decay=weight_decay,
    )
    return Run(method, source, out, epochs, batch_size)


@dataclass(eq=False)
class Run:
    """A training run whose settings have been checked.

    Attributes:
        method: what is trained; its ``encoder`` is what is evaluated.
        source: the images.
        out: the folder for the results.
        epochs: passes over the training images.
        batch_size: images per step.

    Raises:
        ValueError: a batch larger than the source, a folder that cannot be written to.
    """

    method: SimCLR
    source: Source
    out: Path
    epochs: int
    batch_size: int

    def __post_init__(self) -> None:
        available = len(self.source.train.images)
        if not 2 <= self.batch_size <= available:
            raise ValueError(
                f"batch_size must be between 2 and {available}, the number of training images, "
                f"got {self.batch_size}"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        except OSError as error:
            raise ValueError(f"out must be a folder to write to, got {self.out}: {error.strerror}") from error

    def fit(self) -> None:
        """Train, evaluating after each epoch, and write the results."""
        name = type(self.method).__name__
        metrics, picture = self.out / "metrics.csv", self.out / "curves.png"
        checkpoint = ModelCheckpoint(self.out, filename=name.lower(), enable_version_counter=False)
        callbacks: list[Callback] = [NearestNeighbours(self.method.encoder, self.source, metrics), checkpoint]
        callbacks.append(TQDMProgressBar() if sys.stdout.isatty() else _Lines())
        images = self.source.train.images
        batches = DataLoader(TensorDataset(images), self.batch_size, shuffle=True, drop_last=True)
        with _quiet_lightning():
            trainer = Trainer(
                max_epochs=self.epochs,
                devices=1,
                callbacks=callbacks,
                logger=False,
                enable_progress_bar=sys.stdout.isatty(),
                enable_model_summary=False,
            )
            trainer.fit(self.method, batches)
        draw_curves(metrics, picture, f"{name}, {self.epochs} epochs, {len(images)} training images")
        first, *_, last = read_metrics(metrics)
        for metric in ("knn_top1", "knn_top1_few"):
            print(f"{metric:12} {first[metric]:.3f} -> {last[metric]:.3f}")
        print(f"wrote {metrics}, {picture}, {self.out / Path(checkpoint.best_model_path).name}")


class _Lines(Callback):
    """About ten lines per run, where a progress bar would clutter a log."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if epoch == epochs or epoch % max(1, epochs // 10) == 0:
            values = "  ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items())
            print(f"epoch {epoch}/{epochs}  {values}", flush=True)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's tips, device report and advice on workers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        try:
            yield
        finally:
            logger.setLevel(level)
