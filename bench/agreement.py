"""The check before any timing: fastcl's values and gradients are as good as plain PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from bench.cases import FASTCL, LOSSES, PLAIN, Arguments, Case, step, step_of
from fastcl import MochiDraws, NegativeQueue
from fastcl.testing import assert_within_budget


def assert_agreement(case: Case) -> None:
    """Compare loss and gradients of both sides with plain PyTorch in float64, within the tests' budget.

    Raises:
        AssertionError: fastcl is further off than the budget allows; says where and by how much.
    """
    truth = step_of(case, LOSSES[case.loss].function(PLAIN), _double(case.arguments()))()
    plain, ours = step(case, PLAIN)(), step(case, FASTCL)()
    for index, (exact, theirs, got) in enumerate(zip(truth, plain, ours, strict=True)):
        name = f"{case.name}: {f'gradient {index}' if index else 'loss'}"
        # a scalar is a mean of terms of order 1, of which little may be left
        unit = exact.abs().max().item() if exact.dim() else 1.0
        assert_within_budget(got, exact, theirs, unit=unit, name=name)


def _double(arguments: Arguments) -> Arguments:
    def double(x: Any) -> Any:
        if isinstance(x, NegativeQueue):
            return copy.deepcopy(x).double()
        if isinstance(x, MochiDraws):
            return MochiDraws(*map(double, x))
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return x

    return tuple(map(double, arguments))
