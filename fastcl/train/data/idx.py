"""MNIST's IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcl.train.data.images import MemoryImages, grey_to_rgb


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def is_idx(folder: Path) -> bool:
    """Whether ``folder`` holds such files."""
    return _idx_path(folder, "train-images-idx3-ubyte") is not None


def read_idx(folder: Path, part: str) -> MemoryImages:
    """The images and labels of ``part``, 'train' or 't10k'."""
    images = _read_idx_file(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx_file(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} must have one label per image, got {len(labels)} for {len(images)} in {part}"
        )
    return MemoryImages(grey_to_rgb(images), labels.long())


def _read_idx_file(folder: Path, name: str, dimensions: int) -> Tensor:
    path = _idx_path(folder, name)
    if path is None:
        raise ValueError(f"data must hold {name} or {name}.gz, {folder} does not")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    header = 4 * (1 + dimensions)  # type and dimensions, then the lengths, big-endian
    lengths = np.frombuffer(content[4:header], ">i4").tolist()
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + int(np.prod(lengths)):
        raise ValueError(f"{path} is not a whole IDX file of bytes in {dimensions} dimension(s)")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(lengths).copy())
