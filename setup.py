"""Builds the native extension as FASTCL_BUILD asks: none, cpu, cuda or auto (the default).

``auto`` is cpu, with the CUDA kernels where torch was built for CUDA and nvcc is on the PATH. What is missing
ends the build with a line that says so. FASTCL_SANITIZE=1 builds with AddressSanitizer and
UndefinedBehaviorSanitizer. Ninja compiles all sources in parallel, and again only what has changed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("none", "cpu", "cuda", "auto")
BUILD = os.environ.get("FASTCL_BUILD", "auto")

# one object per level from the same source; the level in use is chosen at run time
KERNELS, BFLOAT16_KERNELS = "csrc/cpu/simd/kernels.cpp", "csrc/cpu/simd/bfloat16.cpp"
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 and 13 warn of their own intrinsics
# with exceptions an object exports more than its table, of which the linker keeps any level's
BFLOAT16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16", "-fno-exceptions", *QUIET]
INSTRUCTION_SETS = {
    "x86_64": {
        "generic": (KERNELS, []),
        "avx2": (KERNELS, ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": (KERNELS, AVX512_FLAGS),
        "avx512_bf16": (BFLOAT16_KERNELS, BFLOAT16_FLAGS),
        "amx": (BFLOAT16_KERNELS, [*BFLOAT16_FLAGS, "-mamx-tile", "-mamx-bf16"]),
    },
    "aarch64": {"generic": (KERNELS, []), "neon": (KERNELS, ["-DFASTCL_NEON"])},
}
VEC_TEST, TURNS_TEST = "csrc/cpu/test/vec_test.cpp", "csrc/cpu/test/turns_test.cpp"
NEEDS_TORCH_HEADERS = "csrc/cpu/run/parallel.cpp"  # of the CPU's sources
CPU_SOURCES = {
    str(path) for room in ("losses", "run", "simd") for path in Path("csrc/cpu", room).glob("*.cpp")
}
CPU_SOURCES -= {KERNELS, BFLOAT16_KERNELS}
OP_SOURCES = sorted([*map(str, Path("csrc").glob("*.cpp")), "csrc/cuda/ops.cpp"])
HOST_SOURCES = sorted(
    map(str, Path("csrc/host").glob("*.cpp"))
)  # for the tests and the benchmarks of a checkout
# compute_80 also as PTX, which newer GPUs compile for themselves
CUDA_TARGETS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
OLDEST_TORCH = (2, 11)
STABLE_ABI = f"{OLDEST_TORCH[0]:#04x}{OLDEST_TORCH[1]:02x}000000000000"
CXX_FLAGS += ["-Wall", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
SANITIZE = []
if os.environ.get("FASTCL_SANITIZE") == "1":
    CXX_FLAGS[CXX_FLAGS.index("-O3")] = "-O1"  # half the time to build and test
    SANITIZE = ["-fsanitize=address,undefined"]
    CXX_FLAGS += [*SANITIZE, "-fno-omit-frame-pointer", "-g"]
CXX = os.environ.get("CXX", "g++")
NVCC = shutil.which("nvcc")
NEEDS_SETUPTOOLS = 77  # the first that reads pyproject.toml's license
NEEDS_TORCH = """fastcl compiles against the torch it will run with, and there is none here. Install it first:
    pip install torch --index-url https://download.pytorch.org/whl/cpu    # without a GPU
    pip install torch                                                     # with one
    pip install "setuptools>=77" ninja
    pip install --no-build-isolation ."""


class Build(build_ext):
    """One shared library, of the sources once each and of the kernels once per instruction set.

    In a checkout also ``fastcl/_host.so``, of what the tests and benchmarks measure and compare with.
    """

    def run(self):
        self.in_checkout = self.inplace or self.editable_mode
        super().run()

    def build_extension(self, ext):
        check_torch()
        check_tools(platform.machine())
        folder = Path(self.build_temp).absolute()
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        host = Path("fastcl/_host.so").absolute() if self.in_checkout else None
        run_ninja(folder, build_rules(folder, library, host, with_cuda()), self.force)

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".abi3.so"


class KernelsTest(Command):
    """The CPU's kernels with their tests as a program, without torch and for any machine."""

    description = "build the program that tests the CPU's kernels: BUILD/kernels_test"
    user_options: ClassVar = [
        ("machine=", None, "as uname -m calls it; CXX compiles for it"),
        ("folder=", None, "BUILD"),
    ]

    def initialize_options(self):
        self.machine = platform.machine()
        self.folder = "build/kernels_test"

    def finalize_options(self):
        self.folder = Path(self.folder).absolute()

    def run(self):
        check_tools(self.machine)
        tests = {str(path) for path in Path("csrc/cpu/test").glob("*.cpp")} - {VEC_TEST, TURNS_TEST}
        builds = [(source, source, []) for source in sorted(CPU_SOURCES - {NEEDS_TORCH_HEADERS} | tests)]
        for name, source, flags in level_builds(self.machine):
            builds.append((name, source, flags))
            if source == KERNELS:
                builds.append((name.replace(source, VEC_TEST), VEC_TEST, flags))
        lines, objects = object_rules(self.folder, builds, [])
        lines += [link_rule(["-pthread", *SANITIZE]), link(self.folder / "kernels_test", objects.values())]
        run_ninja(self.folder, lines, False)


def run_ninja(folder, lines, force):
    """Build what the rules say, under ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rules, text = folder / "build.ninja", "\n".join(lines) + "\n"
    if not rules.exists() or rules.read_text() != text:
        rules.write_text(text)
    ninja = [sys.executable, "-m", "ninja", "--quiet", "-f", str(rules)]
    if force:
        subprocess.run([*ninja, "-t", "clean"], check=True)
    if subprocess.run(ninja).returncode:
        raise SystemExit("compiling fastcl failed; the compiler's errors are above")


def check_torch():
    """End with a line that says what to install."""
    if find_spec("torch") is None:
        raise SystemExit(NEEDS_TORCH)
    torch_version = version("torch")
    if tuple(int(part) for part in torch_version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(f"fastcl needs torch {oldest} or newer, this is {torch_version}: upgrade it first")


def check_tools(machine):
    """The same of what compiles for ``machine``."""
    if machine not in INSTRUCTION_SETS:
        raise SystemExit(
            f"fastcl's kernels are for {' and '.join(INSTRUCTION_SETS)}, this is {machine}: "
            "install without kernels by FASTCL_BUILD=none"
        )
    if find_spec("ninja") is None:
        raise SystemExit("fastcl's build needs ninja: pip install ninja")
    if shutil.which(CXX) is None:
        raise SystemExit(
            f"fastcl's kernels need the C++ compiler {CXX}, which is not on the PATH. Install it (Debian: "
            "apt install g++), name another by CXX, or install without kernels by FASTCL_BUILD=none"
        )


def with_cuda():
    """Whether the CUDA kernels are built too."""
    from torch.version import cuda

    return BUILD == "cuda" or (BUILD == "auto" and cuda is not None and NVCC is not None)


def level_builds(machine):
    """Name, source and flags of the kernels' objects, one per instruction set."""
    return [
        (f"{source}.{level}", source, [*flags, f"-DFASTCL_ISA={level}"])
        for level, (source, flags) in INSTRUCTION_SETS[machine].items()
    ]


def object_rules(folder, builds, includes):
    """What ninja reads of objects with their name, source and flags; and the objects by name."""
    flags = [*CXX_FLAGS, f"-I{Path('csrc').absolute()}", *includes]
    lines = [
        f"builddir = {folder}",
        f"cxxflags = {' '.join(flags)}",
        f"rule cxx\n  command = {CXX} $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $in $flags",
    ]
    objects = {}
    for name, source, flags in builds:
        objects[name] = str(folder / f"{name.replace('/', '.')}.o")
        lines.append(f"build {objects[name]}: cxx {Path(source).absolute()}\n  flags = {' '.join(flags)}")
    return lines, objects


def link_rule(flags):
    """The same of how objects are linked."""
    return f"rule link\n  command = {CXX} $in -o $out {' '.join(flags)} $libraries"


def link(result, objects, libraries=()):
    """The same of what is linked."""
    return f"build {result}: link {' '.join(objects)}\n  libraries = {' '.join(libraries)}"


def build_rules(folder, library, host, cuda):
    """The same of the extension, and of ``host`` if there is one."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in include_paths()]
    flags = ["-shared", *SANITIZE, *(f"-L{path}" for path in library_paths())]
    flags += ["-ltorch_cpu", "-ltorch", "-lc10"]
    flags += ["-l:libgcc.a"]  # conversions of half precision, which libgcc_s has from GCC 12 on only
    of_cuda = ["csrc/cuda/device_ops.cpp"] if cuda else []
    of_host = HOST_SOURCES if host else []
    levels = level_builds(platform.machine())  # the slowest first
    sources = [*OP_SOURCES, *sorted(CPU_SOURCES), *of_cuda, *of_host]
    lines, objects = object_rules(folder, [*levels, *((name, name, []) for name in sources)], includes)
    lines.append(link_rule(flags))
    if host:
        lines.append(
            link(host, [made for name, made in objects.items() if name not in {*OP_SOURCES, *of_cuda}])
        )
    made = [made for name, made in objects.items() if name not in of_host]
    libraries = []
    if cuda:
        made.append(str(folder / "device.o"))
        targets = [f"-gencode={target}" for target in CUDA_TARGETS]
        nvcc = [NVCC, *NVCC_FLAGS, f"-I{Path('csrc').absolute()}"]
        nvcc += [*(flag.replace("-isystem", "-I") for flag in includes), "--threads", "0"]
        lines += [
            f"rule nvcc\n  command = {' '.join([*nvcc, *targets])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"build {made[-1]}: nvcc {Path('csrc/cuda/device.cu').absolute()}",
        ]
        # static, and it finds the driver at run time, so that the library loads where there is none
        libraries = [f"-L{cuda_libraries()}", "-lcudart_static", "-ldl", "-lrt"]
    return [*lines, link(library, made, libraries)]


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
    if BUILD == "cuda" and NVCC is None:
        raise SystemExit("FASTCL_BUILD=cuda needs nvcc (CUDA 12 or newer) on the PATH, which is not there")
    return [
        Extension(
            "fastcl._native",
            [*OP_SOURCES, *sorted(CPU_SOURCES), KERNELS, BFLOAT16_KERNELS],
            depends=[str(path) for path in Path("csrc").rglob("*.*")],
            py_limited_api=True,
        )
    ]


if int(setuptools.__version__.partition(".")[0]) < NEEDS_SETUPTOOLS:
    raise SystemExit(
        f"fastcl's build needs setuptools {NEEDS_SETUPTOOLS} or newer, this is {setuptools.__version__}: "
        f"pip install --upgrade 'setuptools>={NEEDS_SETUPTOOLS}'"
    )
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "kernels_test": KernelsTest},
    # ops on torch's stable ABI: the file knows no Python at all, and the tag must name the oldest
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if BUILD != "none" else {},
)
