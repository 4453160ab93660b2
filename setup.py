"""Builds the native extension as FASTCL_BUILD asks: none, cpu, cuda or auto (the default).

``auto`` builds what the machine can and installs without the extension if that fails; every other
value fails loudly. FASTCL_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("none", "cpu", "cuda", "auto")
BUILD = os.environ.get("FASTCL_BUILD", "auto")

# one object per level from the same source; the level in use is chosen at run time
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 and 13 warn of their own intrinsics
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", *QUIET],
    "amx": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", *QUIET],
}
ISA_SOURCES = {
    "csrc/cpu/kernels.cpp": ("generic", "avx2", "avx512"),
    "csrc/cpu/bfloat16.cpp": ("avx512_bf16", "amx"),
}
NOT_BUILT_IN = {*ISA_SOURCES, "csrc/cpu/turns_test.cpp"}
CPU_SOURCES = [path for path in Path("csrc/cpu").glob("*.cpp") if str(path) not in NOT_BUILT_IN]
CPU_SOURCES += [Path("csrc/cuda/host_ops.cpp")]  # the CUDA kernels as the tests run them
CUDA_SOURCES = ["csrc/cuda/device_ops.cpp"]
# compute_80 also as PTX, which newer GPUs compile for themselves
CUDA_TARGETS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
SANITIZE = os.environ.get("FASTCL_SANITIZE") == "1"
if SANITIZE:
    CXX_FLAGS[CXX_FLAGS.index("-O3")] = "-O1"  # half the time to build and test
    CXX_FLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
NVCC = shutil.which("nvcc")
WITH_CUDA = BUILD == "cuda" or (BUILD == "auto" and NVCC is not None)
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


class Build(build_ext):
    """Compiles the kernels once per instruction set, then links one plain shared library."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if BUILD != "auto":
                raise
            print(f"fastcl: installing without the native extension: {error}", file=sys.stderr)

    def build_extension(self, ext):
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            levels = [
                pool.submit(self.compile_level, source, level)
                for source, levels in ISA_SOURCES.items()
                for level in levels
            ]
            if WITH_CUDA:
                self.add_cuda(ext)
            ext.extra_objects += [path for level in levels for path in level.result()]
        super().build_extension(ext)

    def compile_level(self, source, level):
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / level),
            macros=[("FASTCL_ISA", level)],
            include_dirs=["csrc"],
            extra_postargs=[*CXX_FLAGS, *ISA_FLAGS[level]],
        )

    def add_cuda(self, ext):
        output = Path(self.build_temp) / "device.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [NVCC, *NVCC_FLAGS, *(f"-I{path}" for path in ext.include_dirs), "--threads", "0"]
        command += [f"-gencode={target}" for target in CUDA_TARGETS]
        try:
            subprocess.run([*command, "-c", "csrc/cuda/device.cu", "-o", str(output)], check=True)
        except subprocess.CalledProcessError as error:
            if BUILD != "auto":
                raise
            print(f"fastcl: installing without the CUDA kernels: {error}", file=sys.stderr)
            return
        ext.sources += CUDA_SOURCES
        ext.extra_objects.append(str(output))
        ext.library_dirs.append(cuda_libraries())
        # static, and it finds the driver at run time, so that the library loads where there is none
        ext.libraries += ["cudart_static", "dl", "rt"]

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".abi3.so"


def cuda_libraries():
    """The folder of the toolkit nvcc belongs to, as nvcc itself tells it: nvcc may be a wrapper."""
    trace = subprocess.run(
        [NVCC, "-dryrun", "-x", "cu", os.devnull], stderr=subprocess.PIPE, text=True
    ).stderr
    top = Path(re.search(r"^#\$ TOP=(.+)$", trace, re.MULTILINE).group(1))
    return next(str(path) for path in (top / "lib64", top / "lib") if (path / "libcudart_static.a").exists())


def extensions():
    if BUILD not in CHOICES:
        raise SystemExit(f"FASTCL_BUILD must be one of {', '.join(CHOICES)}, got {BUILD!r}")
    if BUILD == "none":
        return []
    if WITH_CUDA and NVCC is None:
        raise SystemExit("FASTCL_BUILD=cuda needs nvcc (CUDA 12 or newer) on the PATH, which is not there")
    return [
        Extension(
            "fastcl._native",
            ["csrc/module.cpp", *sorted(str(path) for path in CPU_SOURCES)],
            include_dirs=["csrc"],
            depends=[str(path) for path in Path("csrc").rglob("*.*")],
            define_macros=STABLE_ABI,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
            libraries=["torch_cpu", "torch", "c10"],
            py_limited_api=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
