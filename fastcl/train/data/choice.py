"""Which source --data names."""

from __future__ import annotations

from pathlib import Path

from fastcl.train.data.digits import read_digits
from fastcl.train.data.downloads import DOWNLOADS, download
from fastcl.train.data.folders import image_folder, size_of_images
from fastcl.train.data.idx import is_idx, read_idx
from fastcl.train.data.sources import Source, in_memory
from fastcl.train.encoders import SMALL_IMAGE
from fastcl.train.settings import Settings


def kind(data: str) -> str:
    """Which recipe ``data`` is trained with.

    'glyphs', 'definitions', or of images 'digits', 'small' (up to 64 pixels) or 'large'.

    Raises:
        ValueError: no such source.
    """
    if data in ("digits", "glyphs", "definitions"):
        return data
    if data in DOWNLOADS or is_idx(Path(data)):
        return "small"
    return "small" if size_of_images(Path(data)) <= SMALL_IMAGE else "large"


def load_images(settings: Settings) -> Source:
    """The source that ``settings.data`` names.

    Raises:
        ValueError: no such source, no network to download it, one class only, unreadable images.
    """
    if settings.data == "digits":
        return read_digits(settings)
    if settings.data in DOWNLOADS:
        (images, classes), (test, _) = (download(settings, train=train) for train in (True, False))
        return in_memory(settings, images, test, classes)
    folder = Path(settings.data)
    if is_idx(folder):
        images, test = (read_idx(folder, part) for part in ("train", "t10k"))
        count = int(images.labels.max()) + 1
        return in_memory(settings, images, test, [str(label) for label in range(count)])
    return image_folder(settings, folder)
