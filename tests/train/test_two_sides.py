"""Samples with two sides: images and their names, words and their definitions."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastcl.train")

import torch.distributed as dist

from fastcl.train import CLIP, Batch, Optimization, RunStoppedError, SigLIP, SimCSE, prepare
from fastcl.train.data import glyphs as glyph_data
from fastcl.train.data.glyphs import Glyphs, Task, distorted, read_glyphs, split
from fastcl.train.data.texts import DefinitionSource, read_definitions, tokenize
from fastcl.train.evaluate.retrieval import Retrieval, recall, tfidf
from fastcl.train.evaluate.zero_shot import nearest
from fastcl.train.pair_encoders import TextEncoder

SGD = Optimization("sgd", lr=0.01)
TINY = {"width": 8, "layers": 1, "dim": 8, "batch_size": 64, "limit": 128, "warmup_epochs": 0}
TINY_GLYPHS = {**TINY, "channels": 4}
CPU = torch.device("cpu")


def rasters(images: Tensor) -> set[bytes]:
    return {image.tobytes() for image in images.numpy()}


class TestGlyphs:
    def test_no_image_class_or_name_that_is_tested_on_was_trained_on(self) -> None:
        train, tests = split(read_glyphs())
        assert rasters(train.images).isdisjoint(rasters(tests["fonts"].images))
        assert rasters(train.images).isdisjoint(rasters(tests["characters"].images))
        assert not torch.isin(tests["characters"].codes, train.codes).any()
        assert not torch.isin(tests["characters"].classes, train.classes).any()
        assert torch.isin(tests["fonts"].classes, train.classes).all()
        assert tests["fonts"].held_out.all()
        assert not train.held_out.any()
        assert [len(test.classes.unique()) for test in tests.values()] == [500, 500]
        assert len(train.codes) > 40_000

    def test_characters_that_look_the_same_are_one_class(self) -> None:
        glyphs = read_glyphs()
        (latin,) = glyphs.classes[glyphs.codes == ord("A")].unique().tolist()
        alike = {chr(code) for code in glyphs.codes[glyphs.classes == latin].tolist()}
        assert {"A", "Α", "А"} <= alike  # noqa: RUF001
        assert "B" not in alike
        class_of: dict[bytes, int] = {}
        for image, found in zip(glyphs.images.numpy(), glyphs.classes.tolist(), strict=True):
            assert class_of.setdefault(image.tobytes(), found) == found
        assert glyphs.images.flatten(1).any(dim=1).all(), "none is blank"

    def test_a_held_out_font_s_copy_of_a_known_image_is_not_tested_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(glyph_data, "_drawn_classes", lambda classes, generator: classes.unique()[:1])
        rasters = torch.tensor([1, 2, 3, 4, 2, 5])  # the held-out font draws B as the other does
        codes = torch.tensor([65, 66, 67, 65, 66, 67])
        images = rasters[:, None, None, None].expand(6, 1, 32, 32).byte()
        train, tests = split(Glyphs(images, rasters, codes, codes - 65, torch.arange(6) > 2))
        assert tests["characters"].codes.tolist() == [65]
        assert train.codes.tolist() == [66, 67]
        assert tests["fonts"].codes.tolist() == [67]

    def test_distortion_moves_glyphs_and_none_leaves_them(self) -> None:
        images = read_glyphs().images[1000:1064]
        assert distorted(images, 0.0).equal(images / 255)
        views = distorted(images, 1.0)
        assert views.shape == images.shape
        assert views.min() >= -1e-6
        assert views.max() <= 1 + 1e-6
        assert not views.isclose(images / 255, atol=0.1).flatten(1).all(dim=1).any()


class TestTexts:
    def test_a_word_is_itself_its_trigrams_and_its_letters_whatever_is_around_it(self) -> None:
        pieces = tokenize(["Cats, a CAT's", "cats"])
        assert pieces.shape == (2, 4, 24)
        assert pieces[0, 0].equal(pieces[1, 0])
        assert (pieces[0, 0] > 0).sum() == 9  # <cats> <ca cat ats ts> c a t s
        assert len(set(pieces[0, 0].tolist()) & set(pieces[0, 2].tolist()) - {0}) == 5  # <ca cat c a t
        assert not pieces[1, 1:].any()

    def test_what_is_too_long_is_cut_and_nothing_is_a_word(self) -> None:
        assert tokenize([" ".join("abcdefghijklmnopqrstuvwxyz")]).shape == (1, 16, 24)
        assert (tokenize(["?!"]) > 0).sum() == 1  # <>, too short for a trigram

    def test_padding_changes_no_feature(self) -> None:
        encoder = TextEncoder(8, 1, 0.1).eval()
        alone, among = encoder(tokenize(["a cat"])), encoder(tokenize(["a cat", "one two three four"]))
        assert alone.isfinite().all()
        torch.testing.assert_close(alone[0], among[0])

    def test_words_are_dropped_whole(self) -> None:
        words = torch.ones(16, 4, 8)
        dropped = TextEncoder(8, 1, 0.1, word_dropout=0.5).dropout(words)
        assert {tuple(word.unique().tolist()) for word in dropped.flatten(0, 1)} == {(0.0,), (2.0,)}

    def test_held_out_definitions_are_not_trained_on(self, tmp_path: Path) -> None:
        definitions = [definition for _, definition in read_definitions()]
        assert len(definitions) == len(set(definitions)) > 21_000
        source = prepare("simcse", out=tmp_path).source
        assert not set(source.known) & set(source.definitions)
        assert len(source.definitions) == len(source.words) == 2000
        assert len(source.known) == len(source.train) == len(definitions) - 2000
        assert source.train.sides[0] is source.train.sides[1]

    def test_supervised_the_other_side_is_the_word(self, tmp_path: Path) -> None:
        source = prepare("simcse", out=tmp_path, supervised=True, limit=50, batch_size=50).source
        words = {definition: word for word, definition in read_definitions()}
        first, second = source.train.sides
        assert first.equal(tokenize([words[definition] for definition in source.known]))
        assert second.equal(tokenize(source.known))


class TestEvaluation:
    def test_recall_counts_the_row_s_own_column_only(self) -> None:
        similarity = torch.eye(20)
        similarity[0, 1] = 2  # its own is the second
        similarity[1, 2:14] = 2  # the thirteenth
        similarity[2] = 0  # one of twenty that are equal
        similarity[3, 4] = 1  # one of two
        assert recall(similarity) == {"recall_1": 16 / 20, "recall_10": 18 / 20}

    def test_tfidf_finds_definitions_by_their_rare_words(self) -> None:
        words = ["the feline", "the canine", "unknown", *[f"w{i}" for i in range(27)]]
        definitions = ["the feline thing", "the canine thing", *[f"the w{i}" for i in range(-1, 27)]]
        found = tfidf(DefinitionSource(None, [], [], words, definitions))
        assert (found["tfidf_recall_1"], found["tfidf_recall_10"]) == (29 / 30, 29 / 30)
        definitions[:2] = ["the canines", "the felines"]
        found = tfidf(DefinitionSource(None, [], [], words, definitions))
        assert found["tfidf_recall_10"] == 27 / 30
        definitions[:2] = definitions[1::-1]
        found = tfidf(DefinitionSource(None, [], [], words, definitions))
        assert found["tfidf_recall_10"] == 27 / 30
        assert found["tfidf_trigrams_recall_1"] == 29 / 30, "felines share trigrams with a feline"

    def test_a_glyph_s_nearest_names_come_first(self) -> None:
        class Ink(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], dim=1)

        class Dark(nn.Module):
            def forward(self, texts: Tensor) -> Tensor:
                dark = (texts[:, 0] == tokenize(["dark"])[:, 0]).all(dim=1)
                return torch.stack([dark, ~dark], dim=1).float()

        images = torch.tensor([255, 0, 250], dtype=torch.uint8)[:, None, None, None].expand(3, 1, 32, 32)
        task = Task(images, torch.tensor([1, 0, 1]), ["light", "dark"])
        assert nearest(nn.ModuleList([Ink(), Dark()]), task, 2, CPU).tolist() == [[1, 0], [0, 1], [1, 0]]


def module_of(method: Any) -> Any:
    """One with linear projections of its views, (N, 4) and (N, 6)."""
    torch.manual_seed(0)
    sides = nn.ModuleList([nn.Identity(), nn.Identity()])
    return method(sides, (4, 6), [nn.Identity()] * 2, dim=4, optimization=SGD)


def cosines(rows: tuple[Tensor, Tensor]) -> Tensor:
    x, y = (nn.functional.normalize(z) for z in rows)
    return x @ y.T


def clip_formula(module: Any, rows: tuple[Tensor, Tensor]) -> Tensor:
    logits, own = cosines(rows) * module.log_scale.exp(), torch.arange(len(rows[0]))
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


def siglip_formula(module: Any, rows: tuple[Tensor, Tensor]) -> Tensor:
    signs = 2 * torch.eye(len(rows[0])) - 1
    logits = cosines(rows) * module.log_scale.exp() + module.bias
    return -nn.functional.logsigmoid(signs * logits).sum() / len(rows[0])


FORMULAS = {CLIP: clip_formula, SigLIP: siglip_formula}


class TestLosses:
    @pytest.mark.parametrize("method", FORMULAS)
    def test_of_two_networks_at_a_learned_scale_is_the_paper_s(self, method: Any) -> None:
        module, views = module_of(method), (torch.randn(16, 4), torch.randn(16, 6))
        rows = module.embed(views)
        check_alike(module, module.loss(rows, (), Batch(views)), FORMULAS[method](module, rows))

    def test_the_learned_numbers_start_as_the_papers_have_them(self) -> None:
        assert module_of(CLIP).log_scale.exp().item() == pytest.approx(1 / 0.07)
        siglip = module_of(SigLIP)
        assert (siglip.log_scale.exp().item(), siglip.bias.item()) == pytest.approx((10, -10))

    def test_simcse_is_a_cross_entropy_with_one_network(self) -> None:
        module = SimCSE(nn.Identity(), 4, nn.Identity(), dim=4, optimization=SGD)
        views = (torch.randn(16, 4), torch.randn(16, 4))
        rows = module.embed(views)
        exact = nn.functional.cross_entropy(cosines(rows) / 0.05, torch.arange(16))
        check_alike(module, module.loss(rows, (), Batch(views)), exact)
        assert rows[1].equal(module.projector(views[1]))

    def test_dropout_makes_two_views_of_a_text(self) -> None:
        module = SimCSE(TextEncoder(8, 1, 0.1), 8, nn.Identity(), dim=4, optimization=SGD)
        views = [tokenize(["a cat"])] * 2
        first, second = module.embed(views)
        assert not first.isclose(second).all()
        first, second = module.eval().embed(views)
        assert first.equal(second)

    def test_the_scale_stays_below_a_hundred(self) -> None:
        module = module_of(CLIP)
        nn.init.constant_(module.log_scale, 9.0)
        module.on_train_batch_end(None, None, 0)
        assert module.log_scale.exp().item() == pytest.approx(100)


def check_alike(module: nn.Module, loss: Tensor, exact: Tensor) -> None:
    """The same value and gradients."""
    torch.testing.assert_close(loss, exact)
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    for x, y in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def losses_are_those_of_all_ranks_pairs(group: dist.ProcessGroup) -> None:
    source = torch.Generator().manual_seed(1)
    views = [torch.randn(8, width, generator=source) for width in (4, 6)]
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for method, formula in FORMULAS.items():
        module = module_of(method)
        parameters = list(module.parameters())
        loss = module.loss(module.embed([view[own] for view in views]), (), Batch(views))
        exact = formula(module, module.embed(views))
        torch.testing.assert_close(loss, exact)
        for x, y in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True
        ):
            dist.all_reduce(x)
            # what DistributedDataParallel averages
            torch.testing.assert_close(x / 2, y, atol=1e-6, rtol=1e-4)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestRuns:
    @pytest.mark.parametrize("method", ["clip", "siglip", "simcse"])
    def test_a_run_measures_what_its_data_are_for(
        self, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = TINY if method == "simcse" else TINY_GLYPHS
        prepare(method, out=tmp_path, epochs=1, evaluate_every=1, **options).fit()
        untrained, trained = rows(tmp_path)
        named = {
            "clip": ("zero_shot_fonts", "zero_shot_characters"),
            "siglip": ("zero_shot_fonts", "zero_shot_characters"),
            "simcse": (*Retrieval.measures, *Retrieval.rare),
        }[method]
        assert [name for name in untrained if untrained[name]] == ["epoch", *named]
        assert all(0 <= float(row[name]) < 0.5 for row in (untrained, trained) for name in named)
        assert 0 < float(trained["loss"]) < 20
        assert "knn_top1" not in untrained
        printed = capsys.readouterr().out
        assert all(f"{name} " in printed for name in ("zero_shot_fonts",) if name in named)
        pictures = {"curves.png"} if method == "simcse" else {"curves.png", "zero_shot.png"}
        assert {path.name for path in tmp_path.glob("*.png")} == pictures
        assert all(
            (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures - {"curves.png"}
        )

    def test_a_stopped_run_goes_on_as_if_it_was_not(self, tmp_path: Path) -> None:
        options = {**TINY_GLYPHS, "epochs": 3, "evaluate_every": 3}
        prepare("clip", out=tmp_path / "whole", **options).fit()
        stopped = prepare("clip", out=tmp_path / "stopped", **options)

        def stop() -> None:
            if stopped.method.current_epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped.method.on_train_epoch_start = stop
        with pytest.raises(RunStoppedError, match="stopped by SIGTERM"):
            stopped.fit()
        assert len(rows(tmp_path / "stopped")) == 3
        prepare("clip", out=tmp_path / "stopped", **options, resume=True).fit()
        states = []
        for name in ("stopped", "whole"):
            states.append(torch.load(tmp_path / name / "clip.ckpt", weights_only=True)["state_dict"])
        assert (tmp_path / "stopped" / "metrics.csv").read_bytes() == (
            tmp_path / "whole" / "metrics.csv"
        ).read_bytes()
        assert states[0]["log_scale"] != -math.log(0.07)
        assert all(x.equal(states[1][name]) for name, x in states[0].items())

    def test_a_chunk_at_a_time_gives_the_gradients_of_the_batch(self, tmp_path: Path) -> None:
        options = {**TINY, "supervised": True, "dropout": 0, "epochs": 1, "evaluate_every": 0}
        options |= {"optimizer": "sgd"}
        for name, chunk in (("whole", None), ("chunks", 16)):
            prepare("simcse", out=tmp_path / name, encode_chunk=chunk, **options).fit()
        whole, chunks = (
            torch.load(tmp_path / name / "simcse.ckpt", weights_only=True)["state_dict"]
            for name in ("whole", "chunks")
        )
        for name, x in whole.items():
            torch.testing.assert_close(chunks[name], x, msg=name)

    def test_data_that_a_method_is_not_for_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data must be glyphs for clip, got definitions"):
            prepare("clip", data="definitions", out=tmp_path)
        with pytest.raises(ValueError, match="data must be digits or small or large for simclr, got glyphs"):
            prepare("simclr", data="glyphs", out=tmp_path)
        with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
            prepare("simcse", width=6, limit=64, batch_size=32, out=tmp_path)
