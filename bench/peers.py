"""Other libraries' losses against their stand-ins in fastcl.integrations: ``python -m bench.peers``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import cpu_model
from bench.timing import paired

_SECONDS = 3.0  # per row of the table


@dataclass(frozen=True)
class PeerCase:
    """A loss of a library, and the one that stands in for it, at one size."""

    library: str
    name: str
    size: str
    original: Callable[..., Tensor]
    fastcl: Callable[..., Tensor]
    inputs: list[Tensor]  # float32, all with gradients

    def step(self, loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The loss and its gradients."""
        leaves = [x.clone().requires_grad_() for x in self.inputs]

        def run() -> tuple[Tensor, ...]:
            value = loss(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return run


def cases(small: bool = False) -> Iterator[PeerCase]:
    """All of them; ``small``: at sizes that take no time."""
    n = 16 if small else 1024
    for library in (_lightly, _pytorch_metric_learning, _sentence_transformers, _open_clip, _transformers):
        yield from library(n)


def _rows(*counts: int, dim: int = 128) -> list[Tensor]:
    return [nn.functional.normalize(torch.randn(count, dim)) for count in counts]


def _both(theirs: Any, ours: Any, name: str, **options: Any) -> tuple[Any, Any]:
    return getattr(theirs, name)(**options), getattr(ours, name)(**options)


# fastcl's module comes before the library that it imports: it makes torchvision importable


def _lightly(n: int) -> Iterator[PeerCase]:
    from fastcl.integrations import lightly as ours

    import lightly.loss as theirs  # isort: skip

    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        yield PeerCase("lightly", name, f"{n} x 128, 2 views", *_both(theirs, ours, name), _rows(n, n))
    bank, rows = 64 * n, _rows(n // 4, n // 4)
    pair = _both(theirs, ours, "NTXentLoss", memory_bank_size=(bank, 128))
    pair[1].memory_bank = copy.deepcopy(pair[0].memory_bank)
    yield PeerCase("lightly", "NTXentLoss", f"{n // 4} x 128, bank of {bank}", *pair, rows)


def _pytorch_metric_learning(n: int) -> Iterator[PeerCase]:
    from pytorch_metric_learning import losses as theirs

    from fastcl.integrations import pytorch_metric_learning as ours

    for name, labels in (
        ("NTXentLoss", torch.arange(n // 8).repeat(2)),
        ("SupConLoss", torch.arange(n) % 10),
    ):
        original, fused = (partial(loss, labels=labels) for loss in _both(theirs, ours, name))
        size, rows = f"{len(labels)} x 128, {len(labels.unique())} labels", _rows(len(labels))
        yield PeerCase("pytorch-metric-learning", name, size, original, fused, rows)


def _sentence_transformers(n: int) -> Iterator[PeerCase]:
    from fastcl.integrations import sentence_transformers as ours

    from sentence_transformers.sentence_transformer import losses as theirs  # isort: skip

    name = "MultipleNegativesRankingLoss"
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for columns, directions in ((2, every[:1]), (3, every)):
        pair = _both(theirs, ours, name, model=nn.Identity(), directions=directions)
        original, fused = (partial(_of_columns, loss) for loss in pair)
        size = f"{n} x 768, {columns} columns, {len(directions)} of 4 directions"
        rows = _rows(*[n] * columns, dim=768)
        yield PeerCase("sentence-transformers", name, size, original, fused, rows)


def _of_columns(loss: Any, *columns: Tensor) -> Any:
    return loss.compute_loss_from_embeddings(list(columns), None)


def _open_clip(n: int) -> Iterator[PeerCase]:
    from fastcl.integrations import open_clip as ours

    from open_clip import loss as theirs  # isort: skip

    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    for name, numbers in (("ClipLoss", [scale]), ("SigLipLoss", [scale, bias])):
        inputs = [*_rows(n, n, dim=512), *numbers]
        yield PeerCase("open_clip", name, f"{n} x 512", *_both(theirs, ours, name), inputs)


def _transformers(n: int) -> Iterator[PeerCase]:
    """Towers of next to nothing: what is timed is logits and loss."""
    from fastcl.integrations.transformers import use_fastcl

    from transformers import CLIPConfig, CLIPModel  # isort: skip

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**tower, "vocab_size": 8, "max_position_embeddings": 1, "eos_token_id": 7}
    vision = {**tower, "image_size": 8, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    words = torch.randint(0, 8, (n, 1))
    original, fused = (partial(_of_images, m, words) for m in (model, use_fastcl(copy.deepcopy(model))))
    size = f"{n} x 512, with logits"
    yield PeerCase("transformers", "CLIPModel", size, original, fused, [torch.randn(n, 3, 8, 8)])


def _of_images(model: Any, words: Tensor, images: Tensor) -> Any:
    return model(words, images, return_loss=True).loss


def assert_same(case: PeerCase) -> None:
    """Both sides give the same loss and gradients."""
    exact, got = case.step(case.original)(), case.step(case.fastcl)()
    for x, y in zip(exact, got, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__).parse_args()
    torch.manual_seed(0)
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, float32, loss and gradients,")
    print("medians of interleaved runs, quartiles of their ratios.\n")
    print("| library | loss | size | original, ms | fastcl, ms | faster |")
    print("|---|---|---|--:|--:|--:|")
    for case in cases():
        assert_same(case)
        times = paired(case.step(case.original), case.step(case.fastcl), _SECONDS)
        low, high = times.ratio_quartiles
        print(
            f"| {case.library} | {case.name} | {case.size} | {times.plain_ms:.1f} | {times.ms:.1f} "
            f"| {times.ratio:.1f}x ({low:.1f} to {high:.1f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
