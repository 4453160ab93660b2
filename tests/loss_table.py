"""Every loss three times: fastcl's, the paper's formula, plain PyTorch; and how they are compared."""

from functools import partial
from typing import NamedTuple

import formulas
import torch
import torch.nn.functional as F

import fastcl
from fastcl import testing


class Loss(NamedTuple):
    """Called as ``product(*inputs(case), factor, reduction=...)``, and ``formula`` and ``dense`` the same."""

    product: object
    formula: object
    dense: object
    inputs: object  # testing.Case -> float64 tensors
    factor: object = float  # temperature -> what the loss takes for it


def _pair(case):
    return [case.query, case.positive]


def _negatives(case):
    return [case.query, case.positive, case.key]


def _paired(case):
    n, d = case.query.shape
    count = min(7, len(case.key))
    rows = torch.arange(n * count) % len(case.key)
    return [case.query, case.positive, case.key[rows].reshape(n, count, d)]


def _views(case):
    return [torch.stack([case.query, case.positive], dim=1)]


def _unit_pair(case):
    return [F.normalize(x, dim=-1) for x in _pair(case)]


def _unit_views(case):
    return [F.normalize(x, dim=-1) for x in _views(case)]


def _single(case):
    return [case.query]


def _labels(features):
    count = len(features)
    return torch.arange(count) * 7 % (count // 3 + 1) - 1


def mask(features):
    """An asymmetric mask, with rows that have no positives at all."""
    i = torch.arange(len(features))
    return ((i[:, None] * 5 + i * 3) % 7 < 2) & (i[:, None] % 4 != 1)


def _sup_con(inputs=_views, labelled=True, masked=False, **options):
    def call(function, keyword, features, factor, **rest):
        labels = _labels(features) if labelled and not masked else None
        table = mask(features) if masked else None
        return function(features, labels, table, **{keyword: factor}, **options, **rest)

    return Loss(
        partial(call, fastcl.sup_con, "temperature"),
        partial(call, formulas.sup_con, "temperature"),
        partial(call, testing.dense_sup_con, "temperature"),
        inputs,
    )


def _info_nce(inputs, mode="unpaired"):
    def call(function, *arguments, **options):
        *tensors, factor = arguments
        return function(*tensors, temperature=factor, **options)

    return Loss(
        partial(call, fastcl.info_nce, negative_mode=mode),
        partial(call, formulas.info_nce),
        partial(call, testing.dense_info_nce, negative_mode=mode),
        inputs,
    )


def _nt_xent_formula(z1, z2, factor, reduction):
    return formulas.nt_xent(z1, z2, temperature=factor, reduction=reduction)


def _clip_formula(image, text, factor, normalize=True, reduction="mean"):
    return formulas.clip(image, text, scale=factor, normalize=normalize, reduction=reduction)


def _clip(normalize=True):
    return Loss(
        partial(fastcl.clip_loss, normalize=normalize),
        partial(_clip_formula, normalize=normalize),
        partial(testing.dense_clip_loss, normalize=normalize),
        _pair if normalize else _unit_pair,
        factor=lambda temperature: 1 / temperature,
    )


LOSSES = {
    "info_nce": _info_nce(_pair),
    "info_nce-negatives": _info_nce(_negatives),
    "info_nce-paired": _info_nce(_paired, "paired"),
    "nt_xent": Loss(fastcl.nt_xent, _nt_xent_formula, testing.dense_nt_xent, _pair),
    "clip_loss": _clip(),
    "clip_loss-unnormalized": _clip(normalize=False),
    "sup_con": _sup_con(),
    "sup_con-in": _sup_con(variant="in"),
    "sup_con-one": _sup_con(contrast_mode="one"),
    "sup_con-simclr": _sup_con(labelled=False),
    "sup_con-2d": _sup_con(_single),
    "sup_con-unnormalized": _sup_con(_unit_views, normalize=False),
}
# served by 'chunked' and 'reference' only
MASKED = {
    "sup_con-mask": _sup_con(masked=True),
    "sup_con-mask-in": _sup_con(masked=True, variant="in"),
    "sup_con-mask-one": _sup_con(masked=True, contrast_mode="one"),
}


def scalar_like(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def check(loss, case, dtype, temperature, *, factor_dtype=None, reduction="mean"):
    """The value and every gradient, the factor's with ``factor_dtype``, within the error budget.

    One ulp of the largest logit moves every probability by as much: that is the unit of the floor.
    """
    inputs = [x.to(dtype) for x in loss.inputs(case)]
    factor = loss.factor(temperature)
    units = [1 / temperature / x.double().norm(dim=-1).min().item() for x in inputs]
    if factor_dtype is not None:
        inputs.append(scalar_like(factor, factor_dtype))
        units.append(1 / temperature / factor)

    def call(function, *tensors):
        return function(*tensors, *(() if factor_dtype is not None else (factor,)), reduction=reduction)

    (got,), got_grads = testing.value_and_grads(partial(call, loss.product), inputs)
    (exact,), exact_grads = testing.value_and_grads(partial(call, loss.formula), [x.double() for x in inputs])
    (dense,), dense_grads = testing.value_and_grads(partial(call, loss.dense), inputs)

    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    count = len(inputs[0])
    testing.assert_within_budget(got, exact, dense, unit=(count if reduction == "sum" else 1) / temperature)
    for i, (x, unit) in enumerate(zip(inputs, units, strict=True)):
        assert (got_grads[i].dtype, got_grads[i].shape) == (x.dtype, x.shape)
        if reduction == "mean" and x.dim():
            unit /= count
        elif reduction != "mean" and not x.dim():
            unit *= count
        unit *= max(1.0, 1 / temperature)
        # a float64 factor's gradient is as accurate as the inputs let it be
        grad = got_grads[i].to(got.dtype) if x.dtype == torch.float64 else got_grads[i]
        testing.assert_within_budget(grad, exact_grads[i], dense_grads[i], unit=unit, name=f"gradient {i}")
