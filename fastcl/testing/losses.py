"""Every loss, registered once: the tests of the contract, the grids and the benchmarks go through this table.

A new loss is a line in LOSSES, and its paper's formula beside the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcl.losses.clip import clip_loss
from fastcl.losses.info_nce import InfoNCE, info_nce
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.sup_con import SupConLoss, sup_con
from fastcl.testing.cases import Case
from fastcl.testing.dense import dense_clip_loss, dense_info_nce, dense_nt_xent, dense_sup_con

LossFunction = Callable[..., Tensor]


def _float(temperature: float) -> float:
    return float(temperature)


def _inverse(temperature: float) -> float:
    return 1 / temperature


def _nothing(first: Tensor) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Loss:
    """A loss in one of its forms: fastcl's function, plain PyTorch's twin, and what both take.

    ``name``: of the objective, not of the form: of the public function, and of its paper's formula.
    ``inputs``: the tensors that receive gradients, from a case.
    ``keyword``, ``factor``: the argument that scales the logits, and its value for a temperature.
    ``given``: what the loss takes besides, from the first of the inputs.
    """

    name: str
    function: LossFunction
    dense: LossFunction
    inputs: Callable[[Case], list[Tensor]]
    keyword: str = "temperature"
    factor: Callable[[float], float] = _float
    given: Callable[[Tensor], dict[str, Tensor]] = _nothing
    options: Mapping[str, Any] = field(default_factory=dict)
    module: type[nn.Module] | None = None

    def calling(self, function: LossFunction) -> LossFunction:
        """``function`` of this loss's inputs, then its factor; any of the functions, called alike."""
        keyword, given, fixed = self.keyword, self.given, dict(self.options)

        def call(*arguments: Any, **options: Any) -> Tensor:
            *tensors, factor = arguments
            return function(*tensors, **{keyword: factor}, **given(tensors[0]), **fixed, **options)

        return call


def _unit(inputs: Callable[[Case], Sequence[Tensor]]) -> Callable[[Case], list[Tensor]]:
    return lambda case: [F.normalize(x, dim=-1) for x in inputs(case)]


def _pair(case: Case) -> list[Tensor]:
    return [case.query, case.positive]


def _negatives(case: Case) -> list[Tensor]:
    return [case.query, case.positive, case.key]


def _paired(case: Case) -> list[Tensor]:
    n, d = case.query.shape
    count = min(7, len(case.key))
    rows = torch.arange(n * count) % len(case.key)
    return [case.query, case.positive, case.key[rows].reshape(n, count, d)]


def _views(case: Case) -> list[Tensor]:
    return [torch.stack([case.query, case.positive], dim=1)]


def _single(case: Case) -> list[Tensor]:
    return [case.query]


def example_labels(features: Tensor) -> Tensor:
    """Classes of about three rows each, the first of them negative."""
    count = len(features)
    return torch.arange(count) * 7 % (count // 3 + 1) - 1


def example_mask(features: Tensor) -> Tensor:
    """An asymmetric mask, with rows that have no positives at all."""
    i = torch.arange(len(features))
    return ((i[:, None] * 5 + i * 3) % 7 < 2) & (i[:, None] % 4 != 1)


def _labelled(features: Tensor) -> dict[str, Tensor]:
    return {"labels": example_labels(features)}


def _masked(features: Tensor) -> dict[str, Tensor]:
    return {"mask": example_mask(features)}


def _info_nce(inputs: Callable[[Case], list[Tensor]], mode: str = "unpaired") -> Loss:
    options = {"negative_mode": mode}
    return Loss("info_nce", info_nce, dense_info_nce, inputs, options=options, module=InfoNCE)


def _clip(inputs: Callable[[Case], list[Tensor]], **options: Any) -> Loss:
    factor = {"keyword": "logit_scale", "factor": _inverse}
    return Loss("clip_loss", clip_loss, dense_clip_loss, inputs, **factor, options=options)  # type: ignore[arg-type]


def _sup_con(
    inputs: Callable[[Case], list[Tensor]] = _views,
    given: Callable[[Tensor], dict[str, Tensor]] = _labelled,
    **options: Any,
) -> Loss:
    return Loss("sup_con", sup_con, dense_sup_con, inputs, given=given, options=options, module=SupConLoss)


LOSSES = {
    "info_nce": _info_nce(_pair),
    "info_nce-negatives": _info_nce(_negatives),
    "info_nce-paired": _info_nce(_paired, "paired"),
    "nt_xent": Loss("nt_xent", nt_xent, dense_nt_xent, _pair),
    "clip_loss": _clip(_pair),
    "clip_loss-unnormalized": _clip(_unit(_pair), normalize=False),
    "sup_con": _sup_con(),
    "sup_con-in": _sup_con(variant="in"),
    "sup_con-one": _sup_con(contrast_mode="one"),
    "sup_con-simclr": _sup_con(given=_nothing),
    "sup_con-2d": _sup_con(_single),
    "sup_con-unnormalized": _sup_con(_unit(_views), normalize=False),
}
# served by 'chunked' and 'reference' only
MASKED = {
    "sup_con-mask": _sup_con(given=_masked),
    "sup_con-mask-in": _sup_con(given=_masked, variant="in"),
    "sup_con-mask-one": _sup_con(given=_masked, contrast_mode="one"),
}
