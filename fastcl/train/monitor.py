"""What is measured while training, epoch by epoch, and the seeds that make an epoch repeatable."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from fastcl.train.evaluate.base import Evaluation
from fastcl.train.evaluate.pictures import Row
from fastcl.train.methods.base import Method

_PAIRS = ("contrastive_top1", "alignment", "uniformity", "center", "residual")
_LOGGED = ("loss", *_PAIRS)


class Monitor(Callback):
    """Keeps a row for the untrained encoder and each epoch, in a CSV file.

    The rows are part of the checkpoint, so that a resumed run continues the file from there.

    Args:
        evaluation: of what is trained.
        path: of the CSV file; an older one is replaced.
        every: epochs between evaluations, besides those of the untrained encoder and the last epoch; 0: none.
        settings: of the run, kept in the checkpoint.
        options: of the run, told to the loggers with its results.

    Attributes:
        evaluates: whether there is anything to measure.
        shown: the columns that are worth a line while training.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        path: Path,
        *,
        every: int,
        settings: Mapping[str, object],
        options: Mapping[str, object],
    ) -> None:
        self.evaluation = evaluation
        self.path = path
        self.every = every
        self.settings = dict(settings)
        self.options = dict(options)
        self.rows: list[Row] = []
        self.evaluates = bool(every) and evaluation.possible
        self.shown = ("loss", *evaluation.measures, *_PAIRS)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows:
            found = self._measured(pl_module, thorough=True)
            self.rows.append({"epoch": 0, **found})
            for logger in trainer.loggers:
                logger.log_metrics(found, step=0)
        self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = trainer.callback_metrics  # averaged over the ranks here
        epoch = trainer.current_epoch + 1
        row = {"epoch": epoch} | {name: measured[name].item() for name in _LOGGED if name in measured}
        last = epoch == trainer.max_epochs
        if last or (self.every and epoch % self.every == 0):
            found = self._measured(pl_module, thorough=last)
            pl_module.log_dict(found, prog_bar=True, rank_zero_only=True)
            row.update(found)
        self.rows.append(row)
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        final = {f"final/{name}": value for name, value in self.rows[-1].items() if name != "epoch"}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.options, final)

    def _measured(self, module: LightningModule, *, thorough: bool) -> Row:
        assert isinstance(module, Method)
        if not self.evaluates:
            return {}
        return self.evaluation.measure(module.evaluated, module.device, thorough=thorough)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        text = StringIO()
        columns = ("epoch", *self.shown, *self.evaluation.rare)
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        written = self.path.with_name(f".{self.path.name}")
        written.write_text(text.getvalue())
        os.replace(written, self.path)


class SeedEpochs(Callback):
    """Seeds each epoch by its number: whatever came before, a resumed run goes on as the first one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = trainer.global_rank
        torch.manual_seed(hash((self.seed, trainer.current_epoch, rank)) & (2**63 - 1))


class Lines(Callback):
    """About ten lines per run, where a progress bar would clutter a log."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if trainer.is_global_zero and (epoch == epochs or epoch % max(1, epochs // 10) == 0):
            row = self.monitor.rows[-1]
            values = "  ".join(f"{name} {row[name]:.3f}" for name in self.monitor.shown if name in row)
            print(f"epoch {epoch}/{epochs}  {values}", flush=True)


class Bar(TQDMProgressBar):
    """Lightning's progress bar, without its version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
