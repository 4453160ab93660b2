"""Building from source: what is missing ends the build with a line that says what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]


def _build(folder, code="", **settings):
    """What the build printed as its last line; ``code`` runs before setup.py."""
    program = f"import runpy, sys\n{code}\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py')"
    command = [
        sys.executable,
        "-c",
        program,
        "-q",
        "build_ext",
        f"--build-lib={folder}",
        f"--build-temp={folder}",
    ]
    run = subprocess.run(command, cwd=TREE, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    assert run.returncode != 0
    return run.stderr.strip()


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        ("", {"CXX": "no-such-compiler"}, "need the C++ compiler no-such-compiler, which is not on the PATH"),
        ("", {"FASTCL_BUILD": "all"}, "FASTCL_BUILD must be one of none, cpu, cuda, auto, got 'all'"),
        (
            "import setuptools; setuptools.__version__ = '69.5.1'",
            {},
            "needs setuptools 77 or newer, this is 69.5.1",
        ),
        (
            "import setuptools, importlib.metadata as m; m.version = lambda name: '2.10.0'",
            {},
            "needs torch 2.11 or newer, this is 2.10.0",
        ),
        (
            "import importlib.util as u; u.find_spec = lambda name: None",
            {},
            "pip install torch --index-url https://download.pytorch.org/whl/cpu    # without a GPU",
        ),
        (
            "import platform; platform.machine = lambda: 'riscv64'",
            {},
            "kernels are for x86_64 and aarch64, this is riscv64: install without kernels",
        ),
    ],
    ids=["no compiler", "unknown build", "old setuptools", "old torch", "no torch", "unknown machine"],
)
def test_what_is_missing_is_said(tmp_path, code, settings, message):
    assert message in _build(tmp_path, code, **settings)


def test_a_compiler_error_is_no_silent_install(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    compiler.chmod(0o755)
    assert _build(tmp_path, CXX=str(compiler)).endswith(
        "compiling fastcl failed; the compiler's errors are above"
    )
