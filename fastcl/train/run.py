"""A training run from its settings: checked, trained, evaluated, resumable."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from fastcl.similarity.checks import check_choice
from fastcl.train import checkpoints
from fastcl.train.data.choice import kind, load
from fastcl.train.data.loader import Loader
from fastcl.train.data.sources import Source
from fastcl.train.encoders import make_encoder
from fastcl.train.evaluate.pictures import draw_curves, draw_embedding
from fastcl.train.methods import METHODS
from fastcl.train.methods.base import Method
from fastcl.train.monitor import Bar, Lines, Monitor, SeedEpochs
from fastcl.train.optimizers import Optimization
from fastcl.train.settings import Settings
from fastcl.train.stopping import CleanStop
from fastcl.train.times import StepTimes

_MAY_CHANGE = {
    "out", "resume", "init", "workers", "max_unreadable", "download_dir", "evaluate_every",
    "accelerator", "devices", "precision",
}  # fmt: skip


def prepare(method: str, **options: Any) -> Run:
    """A run of ``method``, checked and ready to :meth:`Run.fit`.

    Args:
        method: its name, one of those that ``fastcl train --help`` lists.
        **options: those of ``fastcl train METHOD --help``; the others take the recipe's defaults.

    Raises:
        ValueError: an unknown method, source or architecture; a source that cannot be trained on; a
            folder that cannot be written to; a checkpoint that does not fit.
        TypeError: an unknown option.
    """
    check_choice("method", method, tuple(METHODS))
    data = str(options.get("data", Settings.data))
    chosen = METHODS[method]
    return Run(method, chosen.settings(**{**chosen.defaults(kind(data)), **options}))


@dataclass(eq=False)
class Run:
    """A training run whose settings have been checked.

    Attributes:
        name: of the method.
        settings: its options.
        source: the images.
        method: what is trained; its ``encoder`` is what is evaluated.

    Raises:
        ValueError: as :func:`prepare`.
    """

    name: str
    settings: Settings

    def __post_init__(self) -> None:
        settings = self.settings
        _check_folder(settings.out)
        optimization = _optimization(settings)
        initial = None if settings.init is None else checkpoints.read_moco(settings.init)
        self.checkpoint = settings.out / f"{self.name}.ckpt"
        self.resumes = settings.resume and self.checkpoint.exists()
        if self.resumes:
            self._check_resumed()
        self.source = load(settings)
        _check_batches(settings, self.source)
        seed_everything(settings.seed, verbose=False)
        self.method = _method(self.name, settings, self.source, optimization)
        if initial is not None:
            try:
                self.method.load_moco(initial)
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"init must fit this run, {settings.init} does not: {reason}") from error

    def fit(self) -> None:
        """Train, evaluating on the way, and write the results.

        Raises:
            RunStoppedError: by a signal, a full disk or too many unreadable images; :meth:`fit` of the same
                settings with ``resume=True`` goes on from the last checkpoint.
        """
        settings, times = self.settings, StepTimes()
        monitor = Monitor(
            self.source,
            settings.out / "metrics.csv",
            neighbours=settings.neighbours,
            every=settings.evaluate_every,
            settings=self._identity(),
        )
        with _quiet_lightning():
            stop = CleanStop(self.checkpoint)
            trainer = self._trainer(monitor, times, stop)
            batches = Loader(
                self.source.train,
                settings.batch_size // trainer.world_size,
                self.source.unreadable,
                seed=settings.seed,
                rank=trainer.global_rank,
                ranks=trainer.world_size,
            )
            with stop.guard(trainer):
                if trainer.is_global_zero:
                    self._prepare_folder()
                trainer.fit(
                    self.method,
                    batches,
                    ckpt_path=self.checkpoint if self.resumes else None,
                    weights_only=True,
                )
                if trainer.is_global_zero:
                    self._finish(trainer, monitor, times)

    def _identity(self) -> dict[str, object]:
        """What a checkpoint must have in common with the run that resumes it."""
        options = {name: value for name, value in asdict(self.settings).items() if name not in _MAY_CHANGE}
        return {"method": self.name, **options}

    def _check_resumed(self) -> None:
        checkpoint = checkpoints.read(self.checkpoint)
        trained = checkpoint.get("callbacks", {}).get("Monitor", {}).get("settings")
        if trained is None:
            raise ValueError(f"{self.checkpoint} was not written by fastcl train: it cannot be resumed")
        for name, value in self._identity().items():
            if trained.get(name) != value:
                raise ValueError(
                    f"{name} must be {trained.get(name)!r} as in {self.checkpoint} to resume it, "
                    f"got {value!r}"
                )

    def _trainer(self, monitor: Monitor, times: StepTimes, stop: CleanStop) -> Trainer:
        settings, terminal = self.settings, sys.stdout.isatty()
        several = settings.devices > 1
        cpu = settings.accelerator == "cpu" or not torch.cuda.is_available()
        saving = ModelCheckpoint(settings.out, filename=self.name, enable_version_counter=False)
        progress = Bar() if terminal else Lines(monitor)
        try:
            return Trainer(
                max_epochs=settings.epochs,
                accelerator=settings.accelerator,
                devices=settings.devices,
                precision=settings.precision,  # type: ignore[arg-type]
                # each rank keeps its own running statistics; rank 0's are saved
                strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
                # PyTorch's synchronized batch normalization needs a GPU
                sync_batchnorm=several and not cpu and self.method.synchronizes_batch_norm,
                use_distributed_sampler=False,
                plugins=[checkpoints.AtomicCheckpointIO()],
                callbacks=[SeedEpochs(settings.seed), stop, monitor, saving, progress],
                logger=TensorBoardLogger(settings.out, name="tensorboard", version=""),
                profiler=times,
                enable_progress_bar=terminal,
                enable_model_summary=False,
            )
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    def _prepare_folder(self) -> None:
        """Without an older run's results, unless this one continues them."""
        if not self.resumes:
            self.checkpoint.unlink(missing_ok=True)
            shutil.rmtree(self.settings.out / "tensorboard", ignore_errors=True)
            if self.settings.resume:
                print(f"no checkpoint in {self.settings.out} yet: starting from the beginning")
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.settings).items()
            if name != "resume"
        }
        (self.settings.out / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))

    def _finish(self, trainer: Trainer, monitor: Monitor, times: StepTimes) -> None:
        out, rows = self.settings.out, monitor.rows
        features = monitor.finish(self.method, trainer.strategy.root_device)
        name, epochs = type(self.method).__name__, self.settings.epochs
        title = f"{name}, {epochs} epochs, {len(self.source.train)} training images"
        draw_curves(rows, out / "curves.png", title)
        draw_embedding(features, out / "embedding.png", title)
        for metric in ("knn_top1", "knn_top1_few"):
            print(f"{metric:12} {rows[0][metric]:.3f} -> {rows[-1][metric]:.3f}")
        linear = [rows[-1][f"linear_top1{labels}"] for labels in ("", "_10percent", "_1percent")]
        print("linear_top1  {:.3f}, of 10% of the labels {:.3f}, of 1% {:.3f}".format(*linear))
        if times.steps:
            (out / "times.json").write_text(json.dumps(times.milliseconds(), indent=1) + "\n")
            print(times.summary())
        names = ("metrics.csv", "curves.png", "embedding.png", self.checkpoint.name)
        print(f"wrote {', '.join(str(out / name) for name in names)}")


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"out must be a folder to write to, got {out}: {error.strerror}") from error


def _check_batches(settings: Settings, source: Source) -> None:
    available, smallest = len(source.train), 2 * settings.devices
    if not smallest <= settings.batch_size <= available:
        raise ValueError(
            f"batch_size must be between {smallest} and {available}, the number of training images, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size % settings.devices != 0:
        raise ValueError(
            f"batch_size must be a multiple of devices = {settings.devices}, got {settings.batch_size}"
        )


def _optimization(settings: Settings) -> Optimization:
    lr = settings.lr * settings.batch_size / 256
    return Optimization(settings.optimizer, lr, settings.weight_decay, settings.warmup_epochs)


def _method(name: str, settings: Settings, source: Source, optimization: Optimization) -> Method:
    encoder, features = make_encoder(
        settings.arch, source.image_size, width=settings.width, in_channels=source.channels
    )
    trainer = METHODS[name].trainer
    make: Callable[..., Method] = trainer
    return make(
        encoder,
        features,
        source.augment,
        dim=settings.dim,
        temperature=settings.temperature,
        optimization=optimization,
        **trainer.own_options(settings),
    )


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
