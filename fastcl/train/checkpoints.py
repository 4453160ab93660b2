"""Checkpoints: written whole or not at all, read with clear errors, exported for torchvision."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from fastcl.train.encoders import RESNETS
from fastcl.train.stopping import uninterrupted


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint, then takes its place: at any moment one of both is there, whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: the disk is full, or the folder cannot be written to; ``path`` is as it was.
        """
        write_atomically(Path(path), checkpoint)


@uninterrupted()
def write_atomically(path: Path, content: object) -> None:
    """``torch.save`` to ``path``, which is replaced only once the whole content is on the disk.

    Raises:
        OSError: it cannot be written, or is there and is no regular file.
    """
    _check_regular(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save fails once more on its way out
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _check_regular(path: Path) -> None:
    """Raise for a folder, a pipe, which would be waited for, and a device, which would be replaced."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint: a mapping that holds a 'state_dict'.

    Raises:
        ValueError: no such file, or not a checkpoint.
    """
    damaged = f"{path} is not a checkpoint, or a damaged one"
    try:
        _check_regular(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is None:  # of the content rather than the file
            raise ValueError(damaged) from error
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(damaged) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in state.items()
    ):
        raise ValueError(f"{path} is not a checkpoint of a run, which holds the weights as its 'state_dict'")
    return dict(checkpoint)


def entries(state: Mapping[str, Tensor], prefix: str, *, without: str | None = None) -> dict[str, Tensor]:
    """The entries under ``prefix``, named without it; those that go on with ``without`` are left out."""
    inner = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    return {name: x for name, x in inner.items() if without is None or not name.startswith(without)}


def read_initial(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint to start from, of ``fastcl train`` or in MoCo's official layout.

    Returns:
        The entries 'encoder.*' and the rest of a method's; or, for :meth:`Method.load_moco`, 'encoder_q.*'
        and, if there, 'encoder_k.*', 'queue' and 'queue_ptr'.

    Raises:
        ValueError: no such file, another layout, or an encoder of no finite numbers.
    """
    state = read(path)["state_dict"]
    state = {name.removeprefix("module."): x for name, x in state.items()}
    if not (entries(state, "encoder.") or is_moco(state)):
        raise ValueError(
            f"{path} is neither of fastcl train nor in MoCo's official layout: it holds neither "
            "'encoder.*' nor 'module.encoder_q.*'"
        )
    for name, x in state.items():
        if name.startswith("encoder") and not x.isfinite().all():
            raise ValueError(f"{path} holds weights that are no finite numbers: {name!r}")
    return state


def is_moco(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is in the layout of MoCo's official code."""
    return bool(entries(state, "encoder_q."))


def load_own(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Take all of ``state``, a method's, if ``module`` is of that method, else the encoder.

    Raises:
        ValueError: weights that ``module`` needs are missing or of another shape.
    """
    own = module.state_dict()
    if not own.keys() ^ state.keys():
        check_weights(state, own)
        module.load_state_dict(state)
    else:
        encoder = entries(state, "encoder.")
        check_weights(encoder, entries(own, "encoder."))
        module.get_submodule("encoder").load_state_dict(encoder)


def check_weights(state: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Raise unless ``state`` has the names and shapes of ``needed``.

    Raises:
        ValueError: it does not.
    """
    for said, names in (
        ("lacks", [name for name in needed if name not in state]),
        ("has the unknown", [name for name in state if name not in needed]),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"it {said} weights {names[0]!r}{others}")
    for name, x in needed.items():
        if x.shape != state[name].shape:
            raise ValueError(f"{name!r} is {tuple(state[name].shape)} in it, here {tuple(x.shape)}")


def export(checkpoint: str | Path, out: str | Path) -> str:
    """Write the backbone of a training checkpoint as a torchvision ``state_dict``.

    The classifier ``fc``, which no contrastive method trains, is there for ``load_state_dict``'s sake, all 0.

    Args:
        checkpoint: written by a run of any method, with one of torchvision's ResNets.
        out: the file to write.

    Returns:
        What was written and how to load it.

    Raises:
        ValueError: not such a checkpoint, or a file that cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    backbone = entries(read(checkpoint)["state_dict"], "encoder.")
    small_stem = "conv1.weight" in backbone and backbone["conv1.weight"].shape[-1] == 3
    for arch in RESNETS:
        with torch.device("meta"):
            model = torchvision.models.get_model(arch)
        full = {**backbone, "fc.weight": torch.zeros(model.fc.weight.shape), "fc.bias": torch.zeros(1000)}
        if _fits(model.state_dict(), full, small_stem):
            break
    else:
        raise ValueError(f"{checkpoint} holds no encoder of {', '.join(RESNETS)}: nothing to export")
    if out.exists() and out.samefile(checkpoint):
        raise ValueError(f"cannot write {out}: it is the checkpoint")
    try:
        write_atomically(out, full)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from error
    stem, adaptation = "standard stem", ""
    if small_stem:
        stem = "3x3 stem for small images"
        adaptation = (
            "\n  model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"
            "\n  model.maxpool = torch.nn.Identity()"
        )
    return (
        f"wrote {out}: {arch} with the {stem}; load it with\n"
        f"  model = torchvision.models.{arch}(){adaptation}\n"
        f"  model.load_state_dict(torch.load({str(out)!r}))"
    )


def _fits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], small_stem: bool) -> bool:
    return expected.keys() == state.keys() and all(
        x.shape == state[name].shape or (small_stem and name == "conv1.weight")
        for name, x in expected.items()
    )
