"""What is measured, as data: a new case is a row in CASES, a new loss a row in LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastcl
from bench import objectives, packages
from bench.packages import LossFunction
from fastcl import MochiDraws, NegativeQueue, testing

FASTCL = "fastcl"
PLAIN = "plain"  # plain PyTorch
COMPILE = "compile"  # plain PyTorch under torch.compile
PYPI = "pypi"  # a package from PyPI
SIDES = (PLAIN, COMPILE, PYPI, FASTCL)

Arguments = tuple[Any, ...]  # tensors, and what some losses take besides
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One loss at one size. The first dimension of the inputs is ``rows``, the last ``dim``."""

    loss: str
    rows: int
    dim: int
    keys: int = 0  # explicit negatives
    classes: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    sides: tuple[str, ...] = (PLAIN, COMPILE, FASTCL)

    @property
    def name(self) -> str:
        parts = [self.loss, f"{self.rows}x{self.dim}"]
        if self.keys:
            parts.append(f"{self.keys}keys")
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.device != "cpu":
            parts.append(self.device)
        return "-".join(parts)

    @property
    def pairs(self) -> int:
        """Entries of the similarity matrix."""
        rows = LOSSES[self.loss].views * self.rows
        return rows * (self.keys or rows)

    def arguments(self) -> Arguments:
        """The inputs, the same on every call; those whose gradient is wanted require it."""
        return LOSSES[self.loss].arguments(self)


@dataclass(frozen=True)
class Loss:
    """A loss under test, what it is compared with, and inputs that all of them take."""

    fastcl: LossFunction
    plain: LossFunction
    arguments: Callable[[Case], Arguments]
    views: int = 1  # rows of the similarity matrix per row of the inputs
    options: dict[str, float] = field(default_factory=dict)  # of both
    pypi: LossFunction | None = None
    package: str | None = None  # where ``pypi`` comes from

    def function(self, side: str) -> LossFunction:
        """The function of one side, a fresh one if it is compiled."""
        if side == COMPILE:
            return packages.compiled(self.plain)
        function = {FASTCL: self.fastcl, PLAIN: self.plain, PYPI: self.pypi}[side]
        if function is None:
            raise ValueError("no package on PyPI is known for this loss")
        return function


def step(case: Case, side: str) -> Step:
    """One forward and backward of ``side``: a function that returns the loss and the gradients."""
    return step_of(case, LOSSES[case.loss].function(side), case.arguments())


def step_of(case: Case, function: LossFunction, arguments: Arguments) -> Step:
    """As :func:`step`, for any function and inputs; the time on a GPU includes waiting for it."""
    options = LOSSES[case.loss].options
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        loss = function(*arguments, **options)
        gradients = torch.autograd.grad(loss, wanted)
        if case.device != "cpu":
            torch.accelerator.synchronize()
        return loss.detach(), *gradients

    return run


def _views(case: Case) -> Arguments:
    first = torch.randn(case.rows, case.dim, generator=_generator())
    second = first + 0.7 * torch.randn(case.rows, case.dim, generator=_generator(1))
    return _leaf(case, first), _leaf(case, second)


def _learned_negatives(case: Case) -> Arguments:
    negatives = torch.randn(case.keys, case.dim, generator=_generator(2))
    return *_views(case), _leaf(case, negatives)


def _queue(case: Case) -> Arguments:
    query, positive_key = _views(case)
    torch.manual_seed(2)
    queue = NegativeQueue(case.keys, case.dim, dtype=case.dtype, device=case.device)
    return query, positive_key.detach(), queue


def _queue_and_draws(case: Case) -> Arguments:
    n_hard = min(_N_HARD, case.keys)
    ranks = [torch.randint(n_hard, (case.rows, n), generator=_generator(3)) for n in _N_MIXED]
    weights = [torch.rand(case.rows, n, generator=_generator(4)).to(case.dtype) for n in _N_MIXED]
    draws = MochiDraws(ranks[0], ranks[0].flip(1), weights[0], ranks[1], weights[1] / 2)
    return *_queue(case), MochiDraws(*(x.to(case.device) for x in draws)), n_hard


def _with_draws(function: LossFunction, *arguments: Any, temperature: float, **options: int) -> Tensor:
    *tensors, draws, n_hard = arguments
    return function(*tensors, draws=draws, n_hard=n_hard, temperature=temperature, **options)


def _pairs_and_scale(case: Case) -> Arguments:
    return *_views(case), torch.tensor(1 / 0.07, device=case.device, dtype=case.dtype).requires_grad_()


def _pairs_scale_and_bias(case: Case) -> Arguments:
    bias = torch.tensor(-10.0, device=case.device, dtype=case.dtype).requires_grad_()
    return *_pairs_and_scale(case), bias


def _prototypes(views: int, teachers: int, case: Case) -> Arguments:
    """The rows of the views and of the teachers, and the prototypes of both."""
    query, target_query = (
        _leaf(case, torch.randn(count, case.rows, case.dim, generator=_generator(seed)))
        for seed, count in ((5, views), (6, teachers))
    )
    key, target_key = (
        _leaf(case, torch.randn(case.keys, case.dim, generator=_generator(seed))) for seed in (7, 8)
    )
    return query, key, target_query.detach(), target_key.detach()


def _view_and_prototypes(case: Case) -> Arguments:
    query, key, target_query, _ = _prototypes(1, 1, case)
    return query[0].detach().requires_grad_(), key, target_query[0]


def _swav_loss(
    query: Tensor, key: Tensor, target_query: Tensor, *, temperature: float, target_temperature: float
) -> Tensor:
    bias = fastcl.sinkhorn(target_query, key, temperature=target_temperature)
    return fastcl.soft_cross_entropy(
        query,
        key,
        target_query,
        key,
        temperature=temperature,
        target_temperature=target_temperature,
        target_bias=bias,
    )


def _classes(case: Case) -> Arguments:
    first, second = _views(case)
    features = torch.stack([first, second], dim=1).detach().requires_grad_()
    labels = torch.randint(case.classes, (case.rows,), generator=_generator(3))
    return features, labels.to(case.device)


def _classes_as_mask(case: Case) -> Arguments:
    features, labels = _classes(case)
    return features, None, labels[:, None] == labels


def _lse_and_positives(statistics: Callable[..., Any], query: Tensor, key: Tensor, scale: float) -> Tensor:
    ids = torch.arange(query.shape[0], device=query.device)
    rule = fastcl.PairRule(positive=(ids, ids))
    stats = statistics(query, key, scale=scale, rule=rule, normalize=True)
    return torch.stack([stats.lse_neg, stats.lse_pos, stats.pos_sum]).sum()


def _rows_and_classes(case: Case) -> Arguments:
    features, labels = _classes(case)
    return features.detach()[:, 0].clone().requires_grad_(), labels


def _assigned(case: Case) -> Arguments:
    query, _, prototypes = _learned_negatives(case)
    return query, prototypes, torch.randint(case.keys, (case.rows,), generator=_generator(3)).to(case.device)


def _leaf(case: Case, values: Tensor) -> Tensor:
    return values.to(case.device, case.dtype).requires_grad_()


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_N_HARD, _N_MIXED = 1024, (512, 256)  # type 1 and type 2, the paper's

_INFO_NCE_PACKAGE = "info-nce-pytorch"
_METRIC_LEARNING = "pytorch-metric-learning"


def _registered(name: str, arguments: Callable[[Case], Arguments], **options: Any) -> Loss:
    """A loss of the table that the tests go through too."""
    loss = testing.LOSSES[name]
    return Loss(loss.function, loss.dense, arguments, **options)


_SOFT_TEMPERATURES = {"temperature": 0.1, "target_temperature": 0.05}


def _soft_cross_entropy(views: int, teachers: int) -> Loss:
    arguments = partial(_prototypes, views, teachers)
    functions = fastcl.soft_cross_entropy, testing.dense_soft_cross_entropy
    return Loss(*functions, arguments, views=views, options=_SOFT_TEMPERATURES)


LOSSES = {
    "nt_xent": _registered(
        "nt_xent",
        _views,
        views=2,
        options={"temperature": 0.5},
        pypi=packages.pypi_nt_xent,
        package=_METRIC_LEARNING,
    ),
    "info_nce": _registered(
        "info_nce",
        _views,
        options={"temperature": 0.1},
        pypi=packages.pypi_info_nce,
        package=_INFO_NCE_PACKAGE,
    ),
    "info_nce_negatives": _registered(
        "info_nce-negatives",
        _learned_negatives,
        options={"temperature": 0.1},
        pypi=packages.pypi_info_nce,
        package=_INFO_NCE_PACKAGE,
    ),
    "moco": _registered("info_nce", _queue, options={"temperature": 0.2}),
    "mochi": Loss(
        partial(_with_draws, fastcl.mochi_loss, n_mix=_N_MIXED[0], n_query_mix=_N_MIXED[1]),
        partial(_with_draws, testing.dense_mochi_loss),
        _queue_and_draws,
        options={"temperature": 0.2},
    ),
    "clip_loss": _registered("clip_loss", _pairs_and_scale),
    "siglip_loss": Loss(fastcl.siglip_loss, testing.dense_siglip_loss, _pairs_scale_and_bias),
    "soft_cross_entropy": _soft_cross_entropy(1, 1),
    "dino": _soft_cross_entropy(8, 2),
    "swav": Loss(_swav_loss, testing.dense_swav_loss, _view_and_prototypes, options=_SOFT_TEMPERATURES),
    "sup_con": _registered(
        "sup_con",
        _classes,
        views=2,
        options={"temperature": 0.07},
        pypi=packages.pypi_sup_con,
        package=_METRIC_LEARNING,
    ),
    "sup_con_mask": Loss(
        fastcl.sup_con,
        testing.LOSSES["sup_con"].dense,
        _classes_as_mask,
        views=2,
        options={"temperature": 0.07},
    ),
    "similarity_stats": Loss(
        partial(_lse_and_positives, fastcl.similarity_stats),
        partial(_lse_and_positives, testing.dense_stats),
        _views,
        options={"scale": 10.0},
    ),
    "decoupled_loss": Loss(
        fastcl.decoupled_loss,
        objectives.decoupled_loss,
        _views,
        views=2,
        options={"temperature": 0.1},
    ),
    "hard_negative_loss": Loss(
        fastcl.hard_negative_loss,
        objectives.hard_negative_loss,
        _views,
        views=2,
        options={"temperature": 0.5},
    ),
    "prototype_nce": Loss(
        fastcl.prototype_nce, objectives.prototype_nce, _assigned, options={"temperature": 0.1}
    ),
    "triplet_loss": Loss(fastcl.triplet_loss, objectives.triplet_loss, _views, options={"margin": 0.2}),
    "batch_hard_triplet_loss": Loss(
        fastcl.batch_hard_triplet_loss,
        objectives.batch_hard_triplet_loss,
        _rows_and_classes,
        options={"margin": 0.2},
    ),
}

_BFLOAT16 = torch.bfloat16

_GRID = (
    Case("nt_xent", 32, 128, sides=SIDES),
    Case("nt_xent", 256, 128, sides=SIDES),
    Case("nt_xent", 1024, 128),
    Case("nt_xent", 2048, 128),
    Case("nt_xent", 4096, 128),
    Case("nt_xent", 8192, 128, sides=(FASTCL,)),
    Case("nt_xent", 16384, 128, sides=(FASTCL,)),
    Case("nt_xent", 32768, 128, sides=(FASTCL,)),
    Case("nt_xent", 1024, 512),
    Case("nt_xent", 1024, 128, dtype=_BFLOAT16),
    Case("nt_xent", 4096, 128, dtype=_BFLOAT16),
    Case("info_nce", 1024, 128, sides=SIDES),
    Case("info_nce", 4096, 128, sides=SIDES),
    Case("info_nce", 4096, 128, dtype=_BFLOAT16),
    Case("info_nce_negatives", 1024, 128, keys=4096, sides=SIDES),
    Case("moco", 256, 128, keys=65_536),
    Case("mochi", 256, 128, keys=65_536, sides=(PLAIN, FASTCL)),
    Case("clip_loss", 1024, 512),
    Case("clip_loss", 1024, 512, dtype=_BFLOAT16),
    Case("siglip_loss", 1024, 128),
    Case("siglip_loss", 4096, 128),
    Case("siglip_loss", 4096, 128, dtype=_BFLOAT16),
    Case("siglip_loss", 16384, 64, sides=(FASTCL,)),
    Case("soft_cross_entropy", 256, 128, keys=8192),
    Case("soft_cross_entropy", 512, 256, keys=65_536, sides=(PLAIN, FASTCL)),
    Case("dino", 64, 128, keys=8192),
    Case("swav", 256, 128, keys=3000),
    Case("sup_con", 512, 128, classes=100, sides=SIDES),
    Case("sup_con_mask", 512, 128, classes=100),
    Case("similarity_stats", 64, 128),
    Case("decoupled_loss", 1024, 128),
    Case("hard_negative_loss", 1024, 128),
    Case("prototype_nce", 256, 128, keys=16_384),
    Case("triplet_loss", 4096, 128),
    Case("batch_hard_triplet_loss", 4096, 128, classes=100),
)

CASES = {case.name: case for case in _GRID}
