"""Evaluation during training: nearest-neighbour accuracy of the encoder's features, epoch by epoch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import fastcl
from fastcl.train.data import Source

COLUMNS = ("epoch", "loss", "knn_top1", "knn_top1_few")


def knn_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Share of queries whose most similar bank entry, by cosine, has their label."""
    _, nearest = fastcl.similarity_topk(queries, bank, 1, normalize=True)
    return (bank_labels[nearest[:, 0]] == labels).double().mean().item()


def knn_top1_few(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, draws: int = 20
) -> float:
    """:func:`knn_top1` with one bank entry per class, averaged over draws that are always the same."""
    generator = torch.Generator().manual_seed(0)
    classes = sorted(set(bank_labels.tolist()))
    total = 0.0
    for _ in range(draws):
        order = torch.randperm(len(bank_labels), generator=generator).to(bank_labels.device)
        shuffled = bank_labels[order]
        chosen = torch.stack([order[(shuffled == label).long().argmax()] for label in classes])
        total += knn_top1(bank[chosen], bank_labels[chosen], queries, labels)
    return total / draws


@torch.no_grad()
def embed(encoder: nn.Module, images: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The features of ``images``, in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(batch) for batch in torch.split(images, batch_size)])
    encoder.train(was_training)
    return features


class NearestNeighbours(Callback):
    """Appends a row to a CSV file, with :data:`COLUMNS`, before training and after each epoch.

    Args:
        encoder: what is evaluated.
        source: the labelled images; train is the bank, test the queries.
        path: of the CSV file; an older one is replaced.
    """

    def __init__(self, encoder: nn.Module, source: Source, path: Path) -> None:
        self.encoder = encoder
        self.source = source
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.unlink(missing_ok=True)
        self._append(COLUMNS)
        self._append((0, "", *self._evaluate(pl_module.device)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics["loss"].item()
        top1, few = self._evaluate(pl_module.device)
        pl_module.log_dict({"knn_top1": top1, "knn_top1_few": few}, prog_bar=True)
        self._append((trainer.current_epoch + 1, loss, top1, few))

    def _evaluate(self, device: torch.device) -> tuple[float, float]:
        train, test = self.source.train.to(device), self.source.test.to(device)
        bank, queries = embed(self.encoder, train.images), embed(self.encoder, test.images)
        arguments = (bank, train.labels, queries, test.labels)
        return knn_top1(*arguments), knn_top1_few(*arguments)

    def _append(self, row: Sequence[object]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
