"""The image sources, the views drawn of them, and what is said about images that cannot be trained on."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import RunStoppedError, prepare
from fastcl.train.data.choice import kind
from fastcl.train.data.digits import augment_digits
from fastcl.train.data.images import MemoryImages, Unreadable
from fastcl.train.data.loader import Loader
from fastcl.train.data.photos import photo_augmentation

TINY = {"arch": "resnet8", "width": 4, "epochs": 1, "batch_size": 8, "workers": 0, "evaluate_every": 1}


def make_tree(folder: Path, size: int, *, classes: tuple[str, ...] = ("cat", "dog"), count: int = 8) -> Path:
    """A tree of noise images, whose brightness tells the class."""
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for brightness, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(100 * brightness, 100 * brightness + 56, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index:04}.png")
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """Fashion-MNIST's files, some gzipped, with 32 and 16 images."""
    folder, noise = tmp_path / "idx", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 32), ("t10k", 16)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", noise.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 4)
    return folder


class TestSources:
    def test_a_fifth_of_each_class_of_digits_is_for_testing(self, tmp_path: Path) -> None:
        source = prepare("simclr", out=tmp_path).source
        train, test = source.train.labels.bincount(), source.test.labels.bincount()
        assert train.sum() + test.sum() == 1797
        assert ((test / (train + test) - 0.2).abs() < 0.01).all()

    def test_small_images_of_a_tree_are_held_in_memory(self, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", 20)
        source = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY).source
        assert isinstance(source.train, MemoryImages)
        assert source.train.images.shape == (16, 3, 20, 20)
        assert source.train.labels.tolist() == [0] * 8 + [1] * 8
        first = np.asarray(Image.open(tree / "train" / "cat" / "0000.png"))
        assert (source.train.images[0].permute(1, 2, 0).numpy() == first).all()

    def test_large_images_are_read_by_workers_as_two_crops(self, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", 96)
        options = TINY | {"image_size": 72, "workers": 1}
        run = prepare("moco", data=str(tree), out=tmp_path / "out", **options, queue_size=16)
        (first, second), labels, indices = next(iter(Loader(run.source.train, 4, Unreadable(0), seed=0)))
        assert labels.tolist() == [index // 8 for index in indices.tolist()]
        assert first.shape == second.shape == (4, 3, 72, 72)
        assert labels.shape == (4,)
        assert not first.equal(second)
        run.fit()
        assert "curves.png" in {file.name for file in (tmp_path / "out").iterdir()}

    def test_imagenets_val_is_for_testing(self, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        (tree / "test").rename(tree / "val")
        source = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY).source
        assert source.test is not None
        assert len(source.test) == 16
        assert source.classes == ("cat", "dog")

    @pytest.mark.parametrize("size", [8, 96])
    def test_any_tree_is_trained_on_without_labels(self, size: int, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", size)
        (tree / "train").rename(tree / "photos")
        (tree / "test").rename(tree / "photos" / "more")
        run = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY, image_size=min(size, 72))
        assert run.source.test is None
        assert run.source.classes == ()
        assert run.source.train.labels.tolist() == [-1] * 32
        run.fit()
        header, first, last = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
        assert first == "0" + "," * header.count(",")
        values = dict(zip(header.split(","), last.split(","), strict=True))
        assert float(values["loss"]) > 0
        assert values["knn_top1"] == values["linear_top1"] == ""
        assert (tmp_path / "out" / "embedding.png").exists()
        with pytest.raises(ValueError, match="data must have labels for supcon"):
            prepare("supcon", data=str(tree), out=tmp_path / "new", **TINY)

    def test_folders_whose_links_lead_back_count_once(self, tmp_path: Path) -> None:
        labelled = make_tree(tmp_path / "labelled", 8)
        unlabelled = make_tree(tmp_path / "unlabelled", 8)
        (unlabelled / "train").rename(unlabelled / "photos")
        (unlabelled / "test").rename(unlabelled / "more")
        for tree, part in ((labelled, "train/cat"), (unlabelled, "photos/cat")):
            for name in ("again", "and again"):
                (tree / part / name).symlink_to(tree / part)
            images = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY).source.train
            assert len(images) == (16 if tree == labelled else 32)

    def test_training_images_alone_have_labels_and_no_evaluation(self, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        shutil.rmtree(tree / "test")
        source = prepare("supcon", data=str(tree), out=tmp_path / "out", **TINY).source
        assert source.test is None
        assert source.train.labels.tolist() == [0] * 8 + [1] * 8

    @pytest.mark.parametrize("size", [16, 96])
    def test_small_crops_are_further_views(self, size: int, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", size)
        side = 16 if size == 16 else 72
        options = TINY | {"image_size": side, "small_crops": 2, "small_crop_size": side // 2}
        run = prepare("byol", data=str(tree), out=tmp_path / "out", **options, hidden=8)
        batch = next(iter(Loader(run.source.train, 4, Unreadable(0), seed=0)))
        views = run.method.on_after_batch_transfer(batch, 0).views
        assert [view.shape[-1] for view in views] == [side, side, side // 2, side // 2]
        run.fit()

    def test_idx_files_plain_or_gzipped(self, idx: Path, tmp_path: Path) -> None:
        run = prepare("simclr", data=str(idx), out=tmp_path / "out", **TINY)
        assert run.source.train.images.shape == (32, 3, 28, 28)
        assert run.source.test.labels.tolist() == [0, 1, 2, 3] * 4

    def test_a_limit_takes_the_first_images_of_each_class(self, idx: Path, tmp_path: Path) -> None:
        run = prepare("simclr", data=str(idx), out=tmp_path / "out", **TINY, limit=10)
        assert run.source.train.labels.bincount().tolist() == [3, 3, 2, 2]
        assert len(run.source.test) == 10

    def test_the_recipe_follows_the_size_of_the_images(self, idx: Path, tmp_path: Path) -> None:
        assert kind("digits") == "digits"
        assert kind("cifar10") == kind(str(idx)) == "small"
        assert kind(str(make_tree(tmp_path / "small", 64))) == "small"
        assert kind(str(make_tree(tmp_path / "large", 65))) == "large"


class TestLoader:
    images = MemoryImages(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))

    def labels(self, epoch: int, rank: int = 0, ranks: int = 1) -> list[int]:
        loader = Loader(self.images, 4 // ranks, Unreadable(0), seed=3, rank=rank, ranks=ranks)
        assert loader.sampler is not None
        loader.sampler.set_epoch(epoch)
        return [label for _, labels, _ in loader for label in labels.tolist()]

    def test_the_order_depends_on_the_epoch_and_repeats(self) -> None:
        assert self.labels(0) == self.labels(0) != self.labels(1)
        assert len(set(self.labels(0))) == 8, "two whole batches of four"

    def test_ranks_share_the_batches_of_one_process(self) -> None:
        whole, first, second = self.labels(1), self.labels(1, 0, 2), self.labels(1, 1, 2)
        for batch in range(2):
            shared = first[2 * batch : 2 * batch + 2] + second[2 * batch : 2 * batch + 2]
            assert sorted(shared) == sorted(whole[4 * batch : 4 * batch + 4])

    def test_evaluation_takes_all_in_order(self) -> None:
        batches = [labels.tolist() for _, labels, _ in Loader(self.images, 4, Unreadable(0))]
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_a_batch_says_which_samples_are_in_it(self) -> None:
        for loader in (
            Loader(self.images, 4, Unreadable(0), seed=3),
            Loader(self.images, 4, Unreadable(0), only=range(1, 10, 2)),
        ):
            seen = [int(index) for _, _, indices in loader for index in indices]
            images = [int(image) for images, _, _ in loader for image in images.flatten()]
            assert seen == images
        assert seen == [1, 3, 5, 7, 9]


class TestViews:
    def test_digits_views_differ_from_each_other_but_not_in_shape(self, tmp_path: Path) -> None:
        images = prepare("simclr", out=tmp_path).source.train.images[:16]
        first, second = augment_digits(images), augment_digits(images)
        assert first.shape == second.shape == images.shape
        assert first.isfinite().all()
        assert not first.isclose(second).all(dim=(1, 2, 3)).any()

    @pytest.mark.parametrize("size", [None, 16])
    def test_every_photo_of_a_batch_has_its_own_view(self, size: int | None) -> None:
        augment = photo_augmentation(size, crop=(0.2, 1.0), jitter=0.8, blur=True)
        image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
        views = augment(image.expand(16, -1, -1, -1))
        assert views.shape == (16, 3, size or 32, size or 32)
        assert views.isfinite().all()
        assert len({tuple(view.flatten().tolist()) for view in views}) > 12


class TestBadInput:
    def refused(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        arguments = ["--arch=resnet8", "--width=4", "--epochs=1", "--batch-size=8", "--workers=0", *options]
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", "--data", str(data), "--out", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    def test_a_tree_without_images(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "tree" / "train" / "cat").mkdir(parents=True)
        assert "data must be a tree of images" in self.refused(tmp_path / "tree", tmp_path, capsys)
        (tmp_path / "tree" / "val").mkdir()
        assert "data must have a folder of images per class" in self.refused(
            tmp_path / "tree", tmp_path, capsys
        )

    def test_one_class(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tree = make_tree(tmp_path / "tree", 8, classes=("cat",))
        assert "at least 2 classes" in self.refused(tree, tmp_path, capsys)

    @pytest.mark.parametrize(("size", "options"), [(1, ()), (2, ()), (7, ("--small-crops=1",))])
    def test_images_of_whose_crops_no_view_can_be_made(
        self, size: int, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = make_tree(tmp_path / "tree", size)
        assert f"got images of {size} pixel(s) a side" in self.refused(tree, tmp_path, capsys, *options)
        prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY, image_size=8, small_crops=1).fit()

    def test_classes_that_differ(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        (tree / "test" / "dog").rename(tree / "test" / "wolf")
        assert "the same classes" in self.refused(tree, tmp_path, capsys)

    def test_a_batch_larger_than_the_tree(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        said = self.refused(tree, tmp_path, capsys, "--batch-size=17")
        assert "batch_size must be between 2 and 16" in said

    @pytest.mark.parametrize("length", [0, 100])
    def test_unreadable_and_truncated_images_are_named_and_skipped_up_to_a_limit(
        self, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        broken = [tree / "train" / "dog" / f"000{index}.png" for index in (1, 2)]
        for path in broken:
            path.write_bytes(path.read_bytes()[:length])
        run = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY, max_unreadable=2)
        assert run.source.train.labels.bincount().tolist() == [8, 6]
        named = capsys.readouterr().err
        assert all(f"skipped {path}" in named for path in broken)
        said = self.refused(tree, tmp_path, capsys, "--max-unreadable=1")
        assert "2 images could not be read, max_unreadable is 1" in said
        assert str(broken[1]) in said

    def test_a_large_image_that_cannot_be_read_is_replaced_and_too_many_end_the_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = make_tree(tmp_path / "tree", 80)
        broken = sorted((tree / "train").rglob("*.png"))[3:5]
        for path in broken:
            path.write_bytes(path.read_bytes()[:200])
        options = TINY | {"image_size": 72}
        prepare("simclr", data=str(tree), out=tmp_path / "out", **options, max_unreadable=2).fit()
        err = capsys.readouterr().err
        assert all(err.count(f"skipped {path}") == 1 for path in broken)
        run = prepare("simclr", data=str(tree), out=tmp_path / "new", **options, max_unreadable=1)
        with pytest.raises(RunStoppedError, match="2 images could not be read"):
            run.fit()

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tree = make_tree(tmp_path / "tree", 8)
        pipe = tree / "train" / "cat" / "0000.png"
        pipe.unlink()
        os.mkfifo(pipe)
        run = prepare("simclr", data=str(tree), out=tmp_path / "out", **TINY)
        assert run.source.train.labels.bincount().tolist() == [7, 8]
        assert f"skipped {pipe}: not a regular file" in capsys.readouterr().err

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x09short"])
    def test_damaged_idx_files(
        self, content: bytes, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (idx / "t10k-labels-idx1-ubyte").write_bytes(content)
        assert "t10k-labels-idx1-ubyte is not a whole IDX file" in self.refused(idx, tmp_path, capsys)

    def test_a_download_without_a_network(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
        said = self.refused(Path("cifar10"), tmp_path, capsys, f"--download-dir={tmp_path}")
        assert "cannot be downloaded: no route to host" in said
