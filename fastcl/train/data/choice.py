"""Which source --data names."""

from __future__ import annotations

from pathlib import Path

from fastcl.train.data.digits import read_digits
from fastcl.train.data.downloads import DOWNLOADS, download
from fastcl.train.data.folders import first_size, image_folder, tree
from fastcl.train.data.idx import is_idx, read_idx
from fastcl.train.data.sources import Source, in_memory
from fastcl.train.encoders import SMALL_IMAGE
from fastcl.train.settings import Settings


def kind(data: str) -> str:
    """'digits', 'small' (up to 64 pixels) or 'large': which recipe ``data`` is trained with.

    Raises:
        ValueError: no such source.
    """
    if data == "digits":
        return "digits"
    if data in DOWNLOADS or is_idx(Path(data)):
        return "small"
    return "small" if first_size(tree(Path(data), "train")) <= SMALL_IMAGE else "large"


def load(settings: Settings) -> Source:
    """The source that ``settings.data`` names.

    Raises:
        ValueError: no such source, no network to download it, one class only, unreadable images.
    """
    if settings.data == "digits":
        return read_digits(settings)
    if settings.data in DOWNLOADS:
        return in_memory(settings, *(download(settings, train=train) for train in (True, False)))
    folder = Path(settings.data)
    if is_idx(folder):
        return in_memory(settings, *(read_idx(folder, part) for part in ("train", "t10k")))
    return image_folder(settings, folder)
