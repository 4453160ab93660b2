"""SwAV and DINO against their papers' formulas, on one process and on two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import make_tree
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

import torch.distributed as dist

from fastcl.train import DINO, Batch, Optimization, SwAV, prepare
from fastcl.train.methods.prototypical import Prototypical

SGD = Optimization("sgd", lr=0.01)
SMALL = {"width": 4, "batch_size": 128, "limit": 512, "dim": 8, "hidden": 16, "prototypes": 12}
unit = nn.functional.normalize


def make(method: Any, **options: Any) -> Prototypical:
    torch.manual_seed(0)
    options = {"dim": 4, "hidden": 8, "prototypes": 5, "optimization": SGD} | options
    return method(nn.Identity(), 4, nn.Identity(), **options).double()


def crops(count: int, rows: int = 8) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum(1).mean()


def balanced(scores: Tensor, steps: int) -> Tensor:
    """Algorithm 1 of SwAV: columns, then rows of exp(scores) are made to sum to the same."""
    q = scores.exp()
    for _ in range(steps):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swapped(z: tuple[Tensor, ...], prototypes: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
    scores = [unit(x) @ unit(prototypes).T for x in z]
    each = []
    for t in (0, 1):
        rows = [scores[t], *(x @ unit(prototypes).T for x in earlier[t : t + 1])]
        target = balanced(torch.cat(rows).detach() / 0.05, 3)[: len(z[t])]
        each += [cross_entropy(target, scores[v] / 0.1) for v in range(len(z)) if v != t]
    return torch.stack(each).mean()


class TestSwAV:
    def test_each_crop_predicts_the_balanced_codes_of_the_first_two(self) -> None:
        module, z = make(SwAV), crops(4)
        torch.testing.assert_close(module.loss(z, (), Batch(z)), swapped(z, module.prototypes))

    def test_gradients_reach_prototypes_through_the_prediction_only(self) -> None:
        module, z = make(SwAV), tuple(x.requires_grad_() for x in crops(3))
        found, exact = (
            torch.autograd.grad(loss, [module.prototypes, *z])
            for loss in (module.loss(z, (), Batch(z)), swapped(z, module.prototypes))
        )
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x, y)

    def test_a_full_queue_is_balanced_with_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, z = make(SwAV, queue_size=16, queue_from_epoch=0), crops(2)
        module.after_loss(z, (), Batch(z))
        torch.testing.assert_close(module.loss(z, (), Batch(z)), swapped(z, module.prototypes))
        module.after_loss(z, (), Batch(z))
        monkeypatch.setattr(SwAV, "global_step", 2)
        for queue, x in zip(module.queues, z, strict=True):
            torch.testing.assert_close(queue.keys, unit(torch.cat([x, x])).to(queue.keys.dtype))
        exact = swapped(z, module.prototypes, [unit(torch.cat([x, x])) for x in z])
        torch.testing.assert_close(module.loss(z, (), Batch(z)), exact)

    def test_prototypes_are_still_for_an_epoch(self, tmp_path: Path) -> None:
        run = prepare("swav", out=tmp_path, epochs=2, evaluate_every=0, **SMALL)
        seen: list[Tensor] = []
        run.method.on_train_epoch_start = lambda: seen.append(run.method.prototypes.detach().clone())
        run.fit()
        seen.append(run.method.prototypes.detach())
        assert seen[0].equal(seen[1])
        assert not seen[1].equal(seen[2])


def swav_is_balanced_over_all_ranks(group: dist.ProcessGroup) -> None:
    z, rank = crops(3), dist.get_rank()
    module = make(SwAV, queue_size=8, queue_from_epoch=0)
    own = tuple(x[4 * rank : 4 * rank + 4].clone().requires_grad_() for x in z)
    whole = tuple(x.clone().requires_grad_() for x in z)
    inputs = (module.prototypes, *own)
    for step in (0, 1):
        type(module).global_step = step  # the queue is full after the first
        earlier = [queue.keys.double() for queue in module.queues] if step else []
        loss = module.loss(own, (), Batch(own))
        exact = swapped(whole, module.prototypes, earlier)
        torch.testing.assert_close(loss, exact)
        found = torch.autograd.grad(loss, inputs)
        expected = torch.autograd.grad(exact, (module.prototypes, *whole))
        dist.all_reduce(found[0])
        torch.testing.assert_close(found[0] / 2, expected[0])
        for x, y in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(x / 2, y[4 * rank : 4 * rank + 4])
        module.after_loss(own, (), Batch(own))


def dino_has_one_centre(group: dist.ProcessGroup) -> None:
    z, rank = crops(2), dist.get_rank()
    module, whole = make(DINO, momentum=0.9), make(DINO, momentum=0.9)
    own = tuple(x[4 * rank : 4 * rank + 4] for x in z)
    module.after_loss(own, own, Batch(own))
    scores = (
        torch.cat(z).pipe if False else torch.stack([unit(x) @ unit(whole.target_prototypes).T for x in z])
    )
    torch.testing.assert_close(module.centre, (0.1 * scores.mean((0, 1))).detach())


class TestDINO:
    def logits(self, module: Prototypical, z: tuple[Tensor, ...]) -> list[Tensor]:
        return [unit(x) @ unit(module.target_prototypes).T for x in z]

    def exact(self, module: Prototypical, z: tuple[Tensor, ...], targets: list[Tensor]) -> Tensor:
        student = [unit(x) @ unit(module.prototypes).T / 0.1 for x in z]
        each = [cross_entropy(q, student[v]) for t, q in enumerate(targets) for v in range(len(z)) if v != t]
        return torch.stack(each).mean()

    def test_each_crop_predicts_the_centred_teacher(self) -> None:
        module, z = make(DINO, momentum=0.9), crops(4)
        teacher = tuple(x + 0.1 for x in z[:2])
        module.centre.copy_(torch.randn(5))
        with torch.no_grad():
            module.target_prototypes.add_(0.3)
        targets = [((s - module.centre) / 0.04).softmax(1) for s in self.logits(module, teacher)]
        torch.testing.assert_close(module.loss(z, teacher, Batch(z)), self.exact(module, z, targets))

    def test_sinkhorn_takes_the_place_of_the_centre(self) -> None:
        module, z = make(DINO, momentum=0.9, balance="sinkhorn"), crops(3)
        teacher = tuple(x + 0.1 for x in z[:2])
        targets = [balanced(s / 0.04, 3).detach() for s in self.logits(module, teacher)]
        torch.testing.assert_close(module.loss(z, teacher, Batch(z)), self.exact(module, z, targets))
        module.after_loss(z, teacher, Batch(z))
        assert not module.centre.any()
        with pytest.raises(ValueError, match="balance must be one of 'centre', 'sinkhorn', got 'none'"):
            make(DINO, balance="none")

    def test_the_centre_follows_the_teachers_mean_logits(self) -> None:
        module, z = make(DINO, momentum=0.9), crops(2)
        mean = torch.cat(self.logits(module, z)).mean(0)
        for expected in (0.1 * mean, 0.19 * mean):
            module.after_loss(z, z, Batch(z))
            torch.testing.assert_close(module.centre, expected.detach())

    def test_the_teacher_follows_prototypes_too(self) -> None:
        module = make(DINO, momentum=0.5)
        before = module.target_prototypes.clone()
        with torch.no_grad():
            module.prototypes.add_(1.0)
        module.targets(crops(2))
        torch.testing.assert_close(module.target_prototypes, before + 0.5)
        assert not module.target_prototypes.requires_grad

    def test_a_vision_transformer_takes_crops_of_two_sizes(self, tmp_path: Path) -> None:
        options = SMALL | {"arch": "vit_tiny", "small_crop_size": 8, "batch_size": 16, "evaluate_every": 0}
        folder = make_tree(tmp_path / "tree", 16)
        run = prepare("dino", data=str(folder), out=tmp_path / "out", epochs=1, **options)
        assert [len(run.method.augment), run.settings.small_crop_max] == [6, 0.4]
        run.fit()
