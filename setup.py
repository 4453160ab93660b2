"""Builds the native extension as FASTCL_BUILD asks: none, cpu, cuda or auto (the default).

``auto`` builds what the machine can and installs without the extension if that fails; every other
value fails loudly. FASTCL_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("none", "cpu", "cuda", "auto")
BUILD = os.environ.get("FASTCL_BUILD", "auto")

# one object per level from the same source; the level in use is chosen at run time
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
CPU_SOURCES = [path for path in Path("csrc/cpu").glob("*.cpp") if path.name != "kernels.cpp"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
SANITIZE = os.environ.get("FASTCL_SANITIZE") == "1"
if SANITIZE:
    CXX_FLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
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
            objects = list(pool.map(self.compile_level, ISA_FLAGS))
        ext.extra_objects += [path for level in objects for path in level]
        super().build_extension(ext)

    def compile_level(self, level):
        return self.compiler.compile(
            ["csrc/cpu/kernels.cpp"],
            output_dir=str(Path(self.build_temp) / level),
            macros=[("FASTCL_ISA", level)],
            include_dirs=["csrc"],
            extra_postargs=[*CXX_FLAGS, *ISA_FLAGS[level]],
        )

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".abi3.so"


def extensions():
    if BUILD not in CHOICES:
        raise SystemExit(f"FASTCL_BUILD must be one of {', '.join(CHOICES)}, got {BUILD!r}")
    if BUILD == "none":
        return []
    if BUILD == "cuda":
        raise SystemExit("FASTCL_BUILD=cuda: this version of fastcl has no CUDA kernels yet")
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
