"""Values that change while training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """A value that goes from ``start`` to ``end`` over all of training, as half a cosine.

    Attributes:
        start: in the first step.
        end: after the last step.
    """

    start: float
    end: float

    def at(self, progress: float) -> float:
        """The value after the share ``progress`` of training, 0 to 1."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


Value = float | Cosine


def value_at(value: Value, progress: float) -> float:
    """A number, or a schedule's after the share ``progress`` of training."""
    return value.at(progress) if isinstance(value, Cosine) else value


def scheduled(start: float, end: float | None) -> Value:
    """``start`` throughout, or a :class:`Cosine` to ``end``."""
    return start if end is None else Cosine(start, end)
