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

from fastcl.train.data.images import Images
from fastcl.train.data.loader import Loader
from fastcl.train.data.sources import Source
from fastcl.train.evaluate.features import Features, embed
from fastcl.train.evaluate.linear import evaluate_linear
from fastcl.train.evaluate.neighbours import evaluate_neighbours
from fastcl.train.evaluate.pictures import Row
from fastcl.train.methods.base import Method

_LOGGED = ("loss", "contrastive_top1", "alignment", "uniformity")
_LINEAR = ("linear_top1", "linear_top1_10percent", "linear_top1_1percent")
COLUMNS = ("epoch", "loss", "knn_top1", "knn_top1_few", *_LOGGED[1:], *_LINEAR)


class Monitor(Callback):
    """Keeps a row of :data:`COLUMNS` for the untrained encoder and each epoch, in a CSV file.

    The rows are part of the checkpoint, so that a resumed run continues the file from there.

    Args:
        source: the images; ``bank`` holds the neighbours of ``test``.
        path: of the CSV file; an older one is replaced.
        neighbours: how many vote.
        every: epochs between evaluations; the last epoch is always evaluated.
        settings: of the run, kept in the checkpoint.
    """

    def __init__(
        self, source: Source, path: Path, *, neighbours: int, every: int, settings: Mapping[str, object]
    ) -> None:
        self.source = source
        self.path = path
        self.neighbours = neighbours
        self.every = every
        self.settings = dict(settings)
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not self.rows:
            self.rows.append({"epoch": 0, **self._neighbours(pl_module)})
        self._write()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = trainer.callback_metrics  # on every rank: they are averaged over the ranks here
        epoch = trainer.current_epoch + 1
        row = {"epoch": epoch} | {name: measured[name].item() for name in _LOGGED if name in measured}
        if not trainer.is_global_zero:
            return
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            found = self._neighbours(pl_module)
            pl_module.log_dict(found, prog_bar=True, rank_zero_only=True)
            row.update(found)
        self.rows.append(row)
        self._write()

    def finish(self, method: Method, device: torch.device) -> Features:
        """Add the linear classifiers' accuracies to the last row; the features of the test images."""
        method.to(device)
        bank, queries = self._embed(method, self.source.bank), self._embed(method, self.source.test)
        self.rows[-1].update(evaluate_linear(bank, queries))
        self._write()
        return queries

    def _neighbours(self, module: LightningModule) -> Mapping[str, float]:
        bank, queries = self._embed(module, self.source.bank), self._embed(module, self.source.test)
        return evaluate_neighbours(bank, queries, self.neighbours)

    def _embed(self, module: LightningModule, images: Images) -> Features:
        batches = Loader(images, 512, self.source.unreadable)
        assert isinstance(module, Method)
        return embed(module.encoder, batches, self.source.normalize, module.device)

    def _write(self) -> None:
        text = StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
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
            values = "  ".join(f"{name} {row[name]:.3f}" for name in COLUMNS[1:] if name in row)
            print(f"epoch {epoch}/{epochs}  {values}", flush=True)


class Bar(TQDMProgressBar):
    """Lightning's progress bar, without its version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
