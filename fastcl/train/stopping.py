"""Ending a run early: with one line, every process ended, and the last checkpoint whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from fastcl.train.data.images import TooManyUnreadableError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStoppedError(Exception):
    """A run ended before its last epoch; the message says why and what is left of it."""


class CleanStop(Callback):
    """Turns SIGINT, SIGTERM, a full disk and unreadable images into :class:`RunStoppedError`.

    Args:
        checkpoint: the file that a resumed run goes on from.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back: Lightning's handler waits for the other ranks, which may never answer."""
        self._install(trainer)

    @contextmanager
    def guard(self, trainer: Trainer) -> Iterator[None]:
        """What happens inside ends cleanly.

        Raises:
            RunStoppedError: by a signal, a full disk or too many unreadable images.
        """
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._install(trainer)
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            if self.received is None:
                raise
            _end_other_ranks(trainer)
            raise RunStoppedError(self._message(f"by {self.received.name}")) from error
        except (OSError, TooManyUnreadableError) as error:
            _end_other_ranks(trainer)
            raise RunStoppedError(self._message(f"by an error: {error}")) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._interrupt if trainer.is_global_zero else signal.SIG_IGN)

    def _interrupt(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        raise KeyboardInterrupt

    def _message(self, reason: str) -> str:
        if self.checkpoint.exists():
            return f"stopped {reason}; {self.checkpoint} is whole: --resume goes on from there"
        return f"stopped {reason}, before the first checkpoint"


def _end_other_ranks(trainer: Trainer) -> None:
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
