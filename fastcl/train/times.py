"""Where a training step's time goes."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter

import torch
from lightning.pytorch.profilers import Profiler

_PARTS = ("data", "forward", "loss", "backward", "optimizer")
_GPU_STRIDE = 20


class StepTimes(Profiler):
    """Lightning's profiler hooks, summed up into data, forward, loss, backward and optimizer.

    'data' is what a step waits for its batch, with the transfer and the augmentation on the device;
    'optimizer' also moves and logs. A GPU is waited for around each part, in every 20th step only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._step = 0
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Called by Lightning before an action."""
        action = _action(action_name)
        if action == "train_dataloader_next":
            self._step += 1
        if action is not None and self._measured():
            self._started[action] = _now()

    def stop(self, action_name: str) -> None:
        """Called by Lightning after an action."""
        action = _action(action_name)
        if action is None or action not in self._started:
            return
        self.seconds[action] += _now() - self._started.pop(action)
        self.steps += action == "run_training_batch"

    def _measured(self) -> bool:
        return not torch.cuda.is_available() or self._step % _GPU_STRIDE == 1

    def milliseconds(self) -> dict[str, float]:
        """Per part, the mean over the measured steps."""
        total = self.seconds
        forward_and_loss = total["training_step"]
        seconds = {
            "data": total["train_dataloader_next"] + total["batch_to_device"],
            "forward": forward_and_loss - total["loss"],
            "loss": total["loss"],
            "backward": total["backward"],
            "optimizer": total["run_training_batch"] - forward_and_loss - total["backward"],
        }
        return {part: 1e3 * seconds[part] / max(1, self.steps) for part in _PARTS}

    def summary(self) -> str:
        """One line for people."""
        parts = self.milliseconds()
        total = sum(parts.values())
        shares = ", ".join(f"{part} {100 * value / (total or 1):.1f}%" for part, value in parts.items())
        return f"a step took {total:.1f} ms: {shares}"


def _action(name: str) -> str | None:
    """The measured action in one of Lightning's names, such as '[Strategy]DDPStrategy.backward'."""
    action = name.rsplit(".", 1)[-1]
    if action in ("train_dataloader_next", "run_training_batch", "loss"):
        return action
    return action if name.startswith("[Strategy]") and action in _STRATEGY_ACTIONS else None


_STRATEGY_ACTIONS = ("batch_to_device", "training_step", "backward")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()
