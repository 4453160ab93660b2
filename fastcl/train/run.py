"""A training run from its settings: checked, trained, evaluated, resumable."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import is_torchelastic_launched

from fastcl.similarity.checks import check_choice
from fastcl.train import checkpoints
from fastcl.train.data.choice import kind
from fastcl.train.data.loader import Loader
from fastcl.train.data.sources import has_colours
from fastcl.train.domains import DOMAINS
from fastcl.train.evaluate.pictures import draw_curves
from fastcl.train.folder import ResultsFolder
from fastcl.train.methods import METHODS
from fastcl.train.methods.base import Method
from fastcl.train.monitor import Bar, Lines, Monitor, SeedEpochs
from fastcl.train.optimizers import Optimization
from fastcl.train.ranges import checked
from fastcl.train.schedules import scheduled
from fastcl.train.settings import RunSettings
from fastcl.train.stopping import CleanStop
from fastcl.train.times import StepTimes

_ACCELERATORS = ("auto", "cpu", "gpu")
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


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
    chosen = METHODS[method]
    data = checked("data", str, options.get("data", chosen.data))
    return Run(method, chosen.settings(**{**chosen.defaults(kind(data)), **options}))


@dataclass(eq=False)
class Run:
    """A training run whose settings have been checked.

    Attributes:
        name: of the method.
        settings: its options.
        folder: of the results.
        source: the samples.
        evaluation: of what is trained.
        method: what is trained; its ``evaluated`` network is what is evaluated.

    Raises:
        ValueError: as :func:`prepare`.
    """

    name: str
    settings: RunSettings

    def __post_init__(self) -> None:
        settings = self.settings
        _check_accelerator(settings)
        _check_precision(settings)
        _check_processes(settings)
        self.folder = ResultsFolder(self.name, settings)
        optimization = _optimization(settings)
        initial = None if settings.init is None or self.resumes else checkpoints.read_initial(settings.init)
        domain = DOMAINS[settings.for_data()]
        self.source = domain.load(settings)
        _check_batches(settings, len(self.source.train))
        self.evaluation = domain.evaluation(self.source, settings)
        seed_everything(settings.seed, verbose=False)
        self.method = self._made(*domain.encoder(self.source, settings), optimization)
        if self.method.needs_labels and not self.source.classes:
            raise ValueError(f"data must have labels for {self.name}, {settings.data} has none")
        if self.method.needs_colours and not has_colours(self.source):
            raise ValueError(f"data must have colours for {self.name}, {settings.data} has none")
        if initial is not None:
            _initialize(self.method, initial, settings.init)
        self.folder.check_weights(self.method.state_dict())

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.folder.resumes

    def fit(self) -> None:
        """Train, evaluating on the way, and write the results.

        Raises:
            RunStoppedError: by a signal, full disk or memory, too many unreadable images or a diverging loss;
                :meth:`fit` of the same settings with ``resume=True`` goes on from the last checkpoint.
        """
        settings, times = self.settings, StepTimes()
        monitor = Monitor(
            self.evaluation,
            settings.out / "metrics.csv",
            every=settings.evaluate_every,
            settings=self.folder.identity(),
            options=self.folder.options(),
        )
        with _quiet_lightning():
            stop = CleanStop(self.folder.checkpoint)
            self.method.training_features = self.evaluation.training_features
            trainer = self._trainer([stop, monitor], times)
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
                    self.folder.prepare()
                trainer.fit(
                    self.method,
                    batches,
                    ckpt_path=self.folder.checkpoint if self.resumes else None,
                    weights_only=True,
                )
                if trainer.is_global_zero:
                    self._finish(monitor, times, trainer.strategy.root_device)

    def _trainer(self, callbacks: list[Callback], times: StepTimes) -> Trainer:
        settings, terminal = self.settings, sys.stdout.isatty()
        several = settings.processes > 1
        saving = ModelCheckpoint(settings.out, filename=self.name, enable_version_counter=False)
        monitor = next(callback for callback in callbacks if isinstance(callback, Monitor))
        progress = Bar() if terminal else Lines(monitor)
        try:
            return Trainer(
                max_epochs=settings.epochs,
                accelerator=settings.accelerator,
                devices=settings.devices,
                num_nodes=settings.num_nodes,
                precision=settings.precision,  # type: ignore[arg-type]
                # each rank keeps its own running statistics; rank 0's are saved
                strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
                # PyTorch's synchronized batch normalization needs a GPU
                sync_batchnorm=several and not _on_cpu(settings) and self.method.synchronizes_batch_norm,
                use_distributed_sampler=False,
                plugins=[checkpoints.AtomicCheckpointIO()],
                callbacks=[SeedEpochs(settings.seed), *callbacks, saving, progress],
                logger=TensorBoardLogger(
                    settings.out, name="tensorboard", version="", default_hp_metric=False
                ),
                log_every_n_steps=1,
                profiler=times,
                enable_progress_bar=terminal,
                enable_model_summary=False,
            )
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    def _finish(self, monitor: Monitor, times: StepTimes, device: torch.device) -> None:
        out, rows, evaluation = self.settings.out, monitor.rows, self.evaluation
        name, epochs = type(self.method).__name__, self.settings.epochs
        title = f"{name}, {epochs} epochs, {len(self.source.train)} training samples"
        draw_curves(rows, evaluation.lines, out / "curves.png", title)
        written = ["metrics.csv", "curves.png"]
        if self.settings.evaluate_every:
            self.method.to(device)
            written += evaluation.draw(self.method.evaluated, device, out, title)
        if monitor.evaluates:
            for name in evaluation.lines:
                print(f"{name:12} {rows[0][name]:.3f} -> {rows[-1][name]:.3f}")
        if times.steps:
            (out / "times.json").write_text(json.dumps(times.milliseconds(), indent=1) + "\n")
            print(times.summary())
        written.append(self.folder.checkpoint.name)
        print(f"wrote {', '.join(str(out / name) for name in written)}")

    def _made(self, encoder: nn.Module, features: Any, optimization: Optimization) -> Method:
        settings, trainer = self.settings, METHODS[self.name].trainer
        make: Callable[..., Method] = trainer
        own = trainer.own_options(settings)
        of_data = {"samples": len(self.source.train), "classes": len(self.source.classes)}
        own |= {argument: of_data[argument] for argument in trainer.data_arguments}
        method = make(
            encoder, features, self.source.augment, dim=settings.dim, optimization=optimization, **own
        )
        method.encode_chunk = settings.encode_chunk
        return method


def _on_cpu(settings: RunSettings) -> bool:
    return settings.accelerator == "cpu" or not torch.cuda.is_available()


def _check_accelerator(settings: RunSettings) -> None:
    check_choice("accelerator", settings.accelerator, _ACCELERATORS)
    if settings.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError("accelerator must be 'auto' or 'cpu' on a machine without a GPU, got 'gpu'")


def _check_precision(settings: RunSettings) -> None:
    check_choice("precision", settings.precision, _PRECISIONS)
    if settings.precision == "16-mixed" and _on_cpu(settings):
        raise ValueError("precision must be '32-true' or 'bf16-mixed' on a CPU, got '16-mixed'")


def _check_processes(settings: RunSettings) -> None:
    launched = os.environ.get("WORLD_SIZE") if is_torchelastic_launched() else None
    if launched is not None and int(launched) != settings.processes:
        raise ValueError(
            f"num_nodes * devices must be the {launched} processes of torchrun, got {settings.num_nodes} * "
            f"{settings.devices}"
        )
    if settings.num_nodes > 1 and not {"MASTER_ADDR", "SLURM_JOB_ID"} & set(os.environ):
        raise ValueError(
            f"num_nodes must be 1 unless torchrun starts the processes, got {settings.num_nodes}: "
            f"torchrun --nnodes={settings.num_nodes} ... fastcl train ..."
        )


def _initialize(method: Method, state: Mapping[str, Tensor], path: Path | None) -> None:
    try:
        if checkpoints.is_moco(state):
            method.load_moco(state)
        else:
            checkpoints.load_own(state, method)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"init must fit this run, {path} does not: {reason}") from error


def _check_batches(settings: RunSettings, available: int) -> None:
    smallest = 2 * settings.processes
    if available < smallest:
        raise ValueError(f"data must have at least {smallest} training samples, got {available}")
    if not smallest <= settings.batch_size <= available:
        raise ValueError(
            f"batch_size must be between {smallest} and {available}, the number of training samples, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size % settings.processes != 0:
        raise ValueError(
            f"batch_size must be a multiple of the {settings.processes} processes, got {settings.batch_size}"
        )
    own, chunk = settings.batch_size // settings.processes, settings.encode_chunk
    if chunk is not None and (chunk < 2 or own % chunk != 0):
        raise ValueError(
            f"encode_chunk must be at least 2 and divide a process's batch of {own} samples, got {chunk}"
        )


def _optimization(settings: RunSettings) -> Optimization:
    lr = settings.lr * settings.batch_size / 256
    decay = scheduled(settings.weight_decay, settings.weight_decay_end)
    return Optimization(settings.optimizer, lr, decay, settings.warmup_epochs)


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
