"""Sums of softplus over pairs, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.kernels import launch, stats
from fastcl.kernels.device import logistic as device
from fastcl.kernels.device.tile import Side, Stored
from fastcl.similarity.problem import LogisticNeeds, Needs, PairGradients, Problem, input_gradients


@launch.at_its_precision
def logistic(problem: Problem, bias: Tensor) -> Tensor:
    """As :func:`fastcl.backends.chunked.logistic`."""
    sides = _sides(problem, bias)
    if not sides.wide:
        return _sums(sides.query, sides.key, sides.scale)
    sums = sides.scale.new_empty(2, sides.query.count)
    for chunk in stats.chunks(sides.query, sides.key):
        sums[:, chunk.rows] = _sums(chunk.query, sides.key, sides.scale, chunk.by_query)
    return sums


@launch.at_its_precision
def logistic_backward(
    problem: Problem, bias: Tensor, grad: Tensor, needs: LogisticNeeds
) -> tuple[Tensor | None, ...]:
    """As :func:`fastcl.backends.chunked.logistic_backward`."""
    sides, grad = _sides(problem, bias), grad.contiguous()
    unit = torch.ones_like(sides.scale)
    if sides.query.rows.dtype == torch.float16 and grad.numel():
        unit = launch.power_of_two_over(grad.abs().amax())
    # the keys' statistics have a bias, here the queries' have: the sides change places
    key_sum, query_sum, grad_bias = stats.gradients(
        sides.key,
        sides.query,
        sides.scale,
        None,
        grad,
        unit,
        needs.key,
        needs.query or needs.scale,
        needs.bias,
        device.logistic_weights,
    )
    pairs = PairGradients(query_sum, key_sum, None)
    of_inputs = input_gradients(problem, sides.prepared(), pairs, Needs(*needs[:-1], False, False))
    return (*of_inputs[: len(needs) - 1], grad_bias)


def _sides(problem: Problem, bias: Tensor) -> stats.Sides:
    sides = stats.Sides(problem)
    sides.query = sides.query._replace(bias=launch.bias2(bias))
    return sides


def _sums(query: Side, key: Side, scale: Tensor, matrix: Stored | None = None) -> Tensor:
    walk = launch.plan("statistics", query, key)
    sums = scale.new_empty(walk.grid[1], 2, query.count)
    launch.launch(device.logistic, walk.grid, query, key, scale, matrix, sums, **walk.options)
    return launch.over_splits(sums)
