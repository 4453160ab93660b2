"""What the figures were measured with: device and versions, nothing that names the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from bench.cases import LOSSES
from fastcl.backends import native


def describe() -> dict[str, object]:
    """Device, threads and versions, for the JSON."""
    packages = sorted({loss.package for loss in LOSSES.values() if loss.package})
    return {
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_driver": _gpu_driver() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "kernels": native.describe(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("fastcl", "torch", "triton", *packages)},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
