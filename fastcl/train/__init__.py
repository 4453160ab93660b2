"""Thin trainers: Lightning runs the loop, torchvision gives the networks, fastcl the loss."""

try:
    from fastcl.integrations.vision import ensure_torchvision

    ensure_torchvision()

    from fastcl.train.cached import cached_step
    from fastcl.train.checkpoints import export
    from fastcl.train.encoders import make_encoder
    from fastcl.train.methods.barlow_twins import BarlowTwins
    from fastcl.train.methods.base import Batch, Method
    from fastcl.train.methods.byol import BYOL
    from fastcl.train.methods.mochi import MoCHi
    from fastcl.train.methods.moco import MoCo
    from fastcl.train.methods.moco_v3 import MoCoV3
    from fastcl.train.methods.siamese import Siamese
    from fastcl.train.methods.simclr import SimCLR
    from fastcl.train.methods.simsiam import SimSiam
    from fastcl.train.methods.supcon import SupCon
    from fastcl.train.methods.vicreg import VICReg
    from fastcl.train.optimizers import Optimization
    from fastcl.train.run import Run, prepare
    from fastcl.train.schedules import Cosine
    from fastcl.train.stopping import RunStoppedError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"fastcl.train needs {error.name}: pip install 'fastcl[train]'") from error

__all__ = [
    "BYOL",
    "BarlowTwins",
    "Batch",
    "Cosine",
    "Method",
    "MoCHi",
    "MoCo",
    "MoCoV3",
    "Optimization",
    "Run",
    "RunStoppedError",
    "Siamese",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "VICReg",
    "cached_step",
    "export",
    "make_encoder",
    "prepare",
]
