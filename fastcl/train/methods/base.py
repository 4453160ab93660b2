"""What the methods share: views, schedules, the step whole or in chunks, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn

from fastcl.train.cached import cached_step
from fastcl.train.checkpoints import entries
from fastcl.train.evaluate.features import Features, summed
from fastcl.train.evaluate.pairs import measure_pairs
from fastcl.train.optimizers import Optimization
from fastcl.train.schedules import Value, scheduled, value_at
from fastcl.train.settings import RunSettings

Rows = tuple[Tensor, ...]
Augment = Callable[[Any], Any]


class Batch(NamedTuple):
    """What a step is given, on the device.

    Attributes:
        views: one entry per view; of images, tensors (N, C, H, W), whose sizes may differ.
        labels: (N,) int64, or None.
        indices: (N,) int64, the samples' places in the data set, or None.
    """

    views: Sequence[Any]
    labels: Tensor | None = None
    indices: Tensor | None = None


class Method(LightningModule):
    """The base of the methods. Batches are (samples,), (samples, labels) or (samples, labels, indices).

    ``samples`` is what ``augment`` takes, images (N, C, H, W) or anything else; or a list or tuple with
    one such per view, made while loading.

    A method says what of a sample the loss is of (:meth:`embed`), what else it needs that has no gradient
    (:meth:`targets`), and the loss (:meth:`loss`); the step is then the same for all of them.

    Args:
        encoder: samples to features (N, F); what is kept after training.
        augment: samples to random views of them, called once for each of two views; or one function per
            view.
        optimization: the optimizer and its schedules.

    Attributes:
        synchronizes_batch_norm: whether batch normalization is over all processes, where that can be done.
        needs_labels: whether batches must have labels.
        needs_indices: whether batches must have indices.
        needs_colours: whether images must have colours.
        steady_part: the part whose learning rate does not fall, if any.
        data_arguments: what of the data the constructor is told: 'samples', how many there are for training,
            'classes', how many labels.
        views_share_batch_norm: whether views of one size are encoded, and normalized, as one batch.
        training_features: gives :meth:`begin_epoch` the features of the training samples by a network, on a
            device, this rank's share, a batch at a time; a run that was prepared has it.
    """

    synchronizes_batch_norm = True
    needs_labels = False
    needs_indices = False
    needs_colours = False
    steady_part: str | None = None
    data_arguments: tuple[str, ...] = ()
    views_share_batch_norm = True
    learning_rate: float
    training_features: Callable[[nn.Module, torch.device], Iterator[Features]] | None = None

    def __init__(
        self, encoder: nn.Module, augment: Augment | Sequence[Augment], *, optimization: Optimization
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.augment = (augment, augment) if callable(augment) else tuple(augment)
        self.optimization = optimization
        self._encode_chunk: int | None = None
        self._schedules: dict[str, Value] = {}
        self._steps = self._steps_per_epoch = 1

    @classmethod
    def own_options(cls, settings: RunSettings) -> dict[str, Any]:
        """The options in ``settings`` that not every method has, as arguments of the constructor.

        An option ``x`` with another ``x_end`` becomes the schedule of both.

        Raises:
            ValueError: they do not go together with the others.
        """
        shared = {option.name for option in fields(settings.for_data())}
        own = {name: value for name, value in asdict(settings).items() if name not in shared}
        ends = {name for name in own if name.endswith("_end")}
        return {
            name: scheduled(value, own[f"{name}_end"]) if f"{name}_end" in ends else value
            for name, value in own.items()
            if name not in ends
        }

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, or None in a single process."""
        return dist.group.WORLD if dist.is_initialized() else None

    @property
    def encode_chunk(self) -> int | None:
        """Samples that are encoded at a time, with the gradients of the whole batch; None: all.

        The encoder's activations are then those of one chunk (:func:`fastcl.train.cached_step`).
        """
        return self._encode_chunk

    @encode_chunk.setter
    def encode_chunk(self, size: int | None) -> None:
        if size is not None and type(self).training_step is not Method.training_step:
            raise ValueError(f"encode_chunk must be None for {type(self).__name__}, which has its own step")
        self._encode_chunk = size
        self.automatic_optimization = size is None

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated: samples to features (N, F)."""
        return self.encoder

    @property
    def observed(self) -> nn.Module:
        """What gives the features for :meth:`begin_epoch`: samples to rows (N, D)."""
        return self.encoder

    def embed(self, views: Sequence[Any]) -> Rows:
        """What the loss is of: (N, D) rows of samples, with their gradient."""
        raise NotImplementedError

    def targets(self, views: Sequence[Any]) -> Rows:
        """What else the loss takes: (N, D) rows of samples, without gradient; called once per step."""
        return ()

    def loss(self, embedded: Rows, targets: Rows, batch: Batch) -> Tensor:
        """The loss of a batch, ()."""
        raise NotImplementedError

    def after_loss(self, embedded: Rows, targets: Rows, batch: Batch) -> None:
        """What follows a step's loss, such as storing its keys."""

    def pairs(self, embedded: Rows, targets: Rows) -> Mapping[str, Tensor]:
        """What is measured of a step's pairs."""
        return measure_pairs(embedded[0], embedded[1])

    def begin_epoch(self, features: Iterator[Features]) -> None:
        """Called before an epoch if overridden, on every rank, with the features of the training samples.

        ``features`` gives them a batch at a time, this rank's share, as they are encoded.
        """

    def on_train_epoch_start(self) -> None:
        if type(self).begin_epoch is Method.begin_epoch:
            return
        if self.training_features is None:
            raise ValueError(
                f"{type(self).__name__} needs the features of all training samples before an epoch: set its "
                "training_features, or train by fastcl.train.prepare"
            )
        self.begin_epoch(self.training_features(self.observed, self.device))

    def schedule(self, **values: Value) -> None:
        """Attributes that have these values, those of a schedule from step to step."""
        self._schedules.update(values)
        for name, value in values.items():
            setattr(self, name, value_at(value, 0.0))

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Sequence[Any], dataloader_idx: int) -> Batch:
        """(samples, labels, indices) to :class:`Batch`, on the device."""
        samples, *rest = batch
        one_per_view = isinstance(samples, list | tuple)
        given = samples if one_per_view else [samples] * len(self.augment)
        return Batch([draw(x) for draw, x in zip(self.augment, given, strict=True)], *rest)

    def rows(self, network: nn.Module, views: Sequence[Any]) -> list[Tensor]:
        """What ``network`` makes of each view."""
        if not self.views_share_batch_norm:
            return [network(view) for view in views]
        found: list[Tensor] = []
        for size, group in groupby(views, lambda view: view.shape if isinstance(view, Tensor) else None):
            alike = list(group)
            if size is None or len(alike) == 1:
                found.extend(network(view) for view in alike)
            else:
                found.extend(network(torch.cat(alike)).chunk(len(alike)))
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.needs_labels and batch.labels is None:
            raise ValueError(f"{type(self).__name__} needs batches (samples, labels), got no labels")
        if self.needs_indices and batch.indices is None:
            raise ValueError(
                f"{type(self).__name__} needs batches (samples, labels, indices), got no indices"
            )
        targets = self.targets(batch.views)
        if self.encode_chunk is None:
            embedded = self.embed(batch.views)
            with self.timed("loss"):
                loss = self.loss(embedded, targets, batch)
        else:
            loss, embedded = self._step_in_chunks(self.encode_chunk, targets, batch)
        self.record(loss, lambda: self.pairs(embedded, targets))
        self.after_loss(embedded, targets, batch)
        return loss

    def _step_in_chunks(self, size: int, targets: Rows, batch: Batch) -> tuple[Tensor, Rows]:
        embedded: list[Rows] = []

        def loss_of(rows: Rows) -> Tensor:
            embedded.append(tuple(x.detach() for x in rows))
            with self.timed("loss"):
                return self.loss(rows, targets, batch)

        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        chunks = zip(*(view.split(size) for view in batch.views), strict=True)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        loss = cached_step(self.embed, list(chunks), loss_of, scaler=scaler)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.trainer.world_size
                summed(parameter.grad)
        optimizer.step()
        return loss, embedded[0]

    def timed(self, part: str) -> AbstractContextManager[object]:
        """The time spent inside is the trainer's profiler's, as ``part``."""
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]
        return profiler.profile(part)

    def record(self, loss: Tensor, pairs: Callable[[], Mapping[str, Tensor]]) -> None:
        """Log the loss, the learning rate and what ``pairs`` measures; every step counts alike."""
        over_epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
        self.log("loss", loss.detach(), prog_bar=True, **over_epoch)
        self.log_dict(dict(pairs()), **over_epoch)
        now: dict[str, Any] = {"step/loss": loss.detach(), "step/learning_rate": self.learning_rate}
        self.log_dict(now, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        steady = None if self.steady_part is None else self.get_submodule(self.steady_part)
        return self.optimization.configure(self, steady)

    def on_train_start(self) -> None:
        epochs = self.trainer.max_epochs or 1
        self._steps = max(1, int(self.trainer.estimated_stepping_batches))
        self._steps_per_epoch = max(1, self._steps // epochs)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Every schedule depends on the step only, so that a resumed run goes on with it."""
        step = self.global_step
        optimizer: Any = self.optimizers()
        self.learning_rate = self.optimization.set_rates(
            optimizer.optimizer, step, self._steps, self._steps_per_epoch
        )
        for name, value in self._schedules.items():
            setattr(self, name, value_at(value, step / self._steps))

    def load_moco(self, state: Mapping[str, Tensor]) -> None:
        """Take the encoder from :func:`fastcl.train.checkpoints.read_initial`'s state in MoCo's layout."""
        self.encoder.load_state_dict(entries(state, "encoder_q.", without="fc."))


def projection_head(features: int, dim: int, *, batch_norm: bool) -> nn.Sequential:
    """Two layers from ``features`` to ``dim``, the hidden one as wide as the features."""
    norm = [nn.BatchNorm1d(features)] if batch_norm else []
    return nn.Sequential(nn.Linear(features, features), *norm, nn.ReLU(), nn.Linear(features, dim))
