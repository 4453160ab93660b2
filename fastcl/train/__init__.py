"""Thin trainers: Lightning runs the loop, torchvision gives the layers, fastcl the loss."""

try:
    from fastcl.train.vision import ensure_torchvision

    ensure_torchvision()

    from fastcl.train.data import Source
    from fastcl.train.methods import SimCLR
    from fastcl.train.recipes import Run, simclr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"fastcl.train needs {error.name}: pip install 'fastcl[train]'") from error

__all__ = ["Run", "SimCLR", "Source", "simclr"]
