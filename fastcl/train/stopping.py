"""Ending a run early: with one line, every process ended, and the last checkpoint whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor

from fastcl.train.data.images import TooManyUnreadableError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOKED_AT_EVERY = 50  # steps


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would stop a run come at the end of what is inside.

    An interrupt amid ``torch.save`` leaves its C++ writer half-way, which may abort the process.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield
        return
    received: list[int] = []
    previous = _handle(lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


class RunStoppedError(Exception):
    """A run ended before its last epoch; the message says why and what is left of it."""


class _DivergedError(Exception):
    """A loss that is no finite number."""


_CAUSES = (OSError, MemoryError, torch.OutOfMemoryError, TooManyUnreadableError, _DivergedError)


class CleanStop(Callback):
    """Turns signals, full disk or memory, unreadable images and divergence into :class:`RunStoppedError`.

    Args:
        checkpoint: the file that a resumed run goes on from.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self._finite: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back: Lightning's handler waits for the other ranks, which may never answer."""
        self._install(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss, on all ranks: a GPU and other ranks are waited for in every 50th step only.

        And at the signals: an interrupt that reached a callback of a library is swallowed there.
        """
        if self.received is not None:
            raise KeyboardInterrupt
        finite = outputs["loss"].isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        waits = trainer.world_size > 1 or finite.is_cuda
        last = batch_idx + 1 == trainer.num_training_batches
        if waits and batch_idx % _LOOKED_AT_EVERY and not last:
            return
        flag = self._finite.float()
        if trainer.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        if not flag.item():
            raise _DivergedError(
                f"a loss that is no finite number by step {batch_idx + 1} of epoch "
                f"{trainer.current_epoch + 1}"
            )

    @contextmanager
    def guard(self, trainer: Trainer) -> Iterator[None]:
        """What happens inside ends cleanly.

        Raises:
            RunStoppedError: by a signal, full disk or memory, too many unreadable images or a diverging loss.
        """
        previous = self._install(trainer)
        try:
            yield
        except BaseException as error:
            _handle(signal.SIG_IGN)
            if self.received is not None:  # an interrupted library may raise an error of its own
                _end_other_ranks(trainer)
                raise RunStoppedError(self._message(f"by {self.received.name}")) from error
            if not isinstance(error, _CAUSES):
                raise
            _end_other_ranks(trainer)
            if isinstance(error, _DivergedError) and not trainer.is_global_zero:
                raise SystemExit(1) from error  # the first rank says it
            cause = f"by {error}" if isinstance(error, _DivergedError) else f"by an error: {error}"
            raise RunStoppedError(self._message(cause)) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> dict[signal.Signals, Any]:
        return _handle(self._interrupt if trainer.is_global_zero else signal.SIG_IGN)

    def _interrupt(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        raise KeyboardInterrupt

    def _message(self, reason: str) -> str:
        if self.checkpoint.is_file():
            return f"stopped {reason}; {self.checkpoint} is whole: --resume goes on from there"
        return f"stopped {reason}, before the first checkpoint"


def _end_other_ranks(trainer: Trainer) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)


def _handle(handler: Callable[[int, Any], object] | signal.Handlers) -> dict[signal.Signals, Any]:
    """What handled the signals before; where ``nohup`` has SIGHUP ignored, it stays so."""
    hang_up = signal.getsignal(signal.SIGHUP)
    handled = (x for x in _SIGNALS if x != signal.SIGHUP or hang_up != signal.SIG_IGN)
    return {number: signal.signal(number, handler) for number in handled}
