"""What the objects of the native extension define: no name that two of them could mean differently."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    ("kernels", "generic", "x86_64", []),
    ("kernels", "avx512", "x86_64", ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
    (
        "bfloat16",
        "amx",
        "x86_64",
        ["-mavx512f", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-fno-exceptions"],
    ),
    ("kernels", "neon", "aarch64", ["-DFASTCL_NEON"]),
]


def defined(path, tools=""):
    """Name and kind of the symbols that ``path`` defines."""
    listing = subprocess.run([f"{tools}nm", "-C", "--defined-only", path], capture_output=True, text=True)
    lines = (line.split(maxsplit=2) for line in listing.stdout.splitlines())
    return [(parts[2], parts[1]) for parts in lines if len(parts) == 3]


@pytest.mark.parametrize(("source", "level", "machine", "flags"), LEVELS, ids=[row[1] for row in LEVELS])
def test_an_instruction_set_exports_its_table_alone(source, level, machine, flags, tmp_path):
    """Unoptimized, when nothing is inlined by choice: a weak symbol could be taken up by a generic object."""
    tools = "" if platform.machine() == machine else f"{machine}-linux-gnu-"
    if not shutil.which(f"{tools}g++"):
        pytest.skip(f"there is no {tools}g++")
    made = tmp_path / "object.o"
    command = [f"{tools}g++", "-std=c++20", "-O0", f"-I{ROOT / 'csrc'}", f"-DFASTCL_ISA={level}", *flags]
    subprocess.run([*command, "-w", "-c", ROOT / f"csrc/cpu/simd/{source}.cpp", "-o", made], check=True)
    exported = [name for name, kind in defined(made, tools) if kind.isupper()]
    tables = {"kernels": ("kernels_float", "kernels_double"), "bfloat16": ("bfloat16_kernels",)}[source]
    assert sorted(exported) == sorted(f"fastcl::cpu::{table}_{level}()" for table in tables)


def test_cpu_and_cuda_share_no_type():
    """A class of one name in both would be one class to the linker."""
    library = next((ROOT / "fastcl").glob("_native*.so"), None)
    if library is None:
        pytest.skip("the native extension is not built")
    ours = {name for name, _ in defined(library) if name.startswith("fastcl::")}
    rooms = {name.split("::")[1] for name in ours}
    assert rooms <= {"cpu", "cuda", "shared"}, rooms


def test_what_runs_a_kernel_on_the_host_is_not_shipped():
    shipped, host = ROOT / "fastcl/_native.abi3.so", ROOT / "fastcl/_host.so"
    if not host.is_file():
        pytest.skip("the libraries of a checkout are not built")
    assert [any("run_grid" in name for name, _ in defined(library)) for library in (host, shipped)] == [
        True,
        False,
    ]
