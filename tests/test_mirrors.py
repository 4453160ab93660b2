"""Numbers that Python, C++ and Triton each must know: said once, or compared here."""

import re
from pathlib import Path

import pytest

from bench import many_cores
from fastcl.backends import cuda, native
from fastcl.losses.families import one_positive
from fastcl.similarity import numerics
from fastcl.similarity.fields import RowState, Statistics
from fastcl.similarity.problem import Needs

CSRC = Path(__file__).parents[1] / "csrc"
LAYOUTS = ("VIEWS", "BATCH", "PAIRS", "NEGATIVES", "PAIRED", "ASSIGNED")


def words(name):
    """A C++ enumerator as Python spells it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("k")).lower()


def enumerators(file, pattern):
    """Names and values of the enumeration that follows ``pattern`` in a C++ file."""
    text = re.sub(r"//.*", "", (CSRC / file).read_text())
    body = re.search(pattern + r"[^{]*\{([^}]*)\}", text).group(1)
    found = {}
    for part in body.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        found[words(name)] = int(value) if value else len(found)
    return found


def numbered(names):
    return {name: i for i, name in enumerate(names)}


ENUMERATIONS = {
    "statistics": (
        "fields.h",
        r"struct StatisticsFields \{\s*enum",
        numbered((*Statistics._fields, "count")),
    ),
    "state": ("fields.h", r"struct StateFields \{\s*enum", numbered((*RowState._fields, "count"))),
    "needs": ("fields.h", r"struct Needs \{\s*enum", {name: 1 << i for i, name in enumerate(Needs._fields)}),
    "layouts": (
        "layout.h",
        "enum class Layout",
        {name.lower(): getattr(one_positive, name) for name in LAYOUTS},
    ),
    "precisions": ("cpu/run/unit_rows.h", "enum class Precision", numerics._PRECISIONS),
    "instruction sets": (
        "cpu/simd/isa.h",
        r"#else\s*enum class Isa",
        numbered(native._LEVELS["x86_64"]),
    ),
    "instruction sets, arm64": (
        "cpu/simd/isa.h",
        r"__aarch64__\)\s*enum class Isa",
        numbered(native._LEVELS["aarch64"]),
    ),
}


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_an_enumeration_is_the_same_in_both_languages(name):
    file, pattern, ours = ENUMERATIONS[name]
    assert enumerators(file, pattern) == ours


CONSTANTS = {
    "warps of a block": ("cuda/grid.h", r"kWarps = (\d+)", cuda._WARPS),
    "log2 e": ("cpu/run/problem.h", r"kLog2E = ([\d.]+)", numerics.LOG2E),
    "rows of a block": ("cpu/run/plan.cpp", r"kBlock = (\d+)", many_cores._BLOCK),
    "ln 2": ("cpu/run/problem.h", r"kLn2 = ([\d.]+)", numerics.LN2),
    "smallest norm": ("cpu/run/unit_rows.cpp", r"max\(norm, T\((1e-\d+)\)", numerics.NORM_EPS),
    "smallest norm, synthetics": ("cpu/losses/mochi.cpp", r"max\(norm, T\((1e-\d+)\)", numerics.NORM_EPS),
    "largest inverse, CUDA": ("cuda/unit_rows.cuh", r"kLargestInverse = (1e\d+)f", 1 / numerics.NORM_EPS),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_same_in_both_languages(name):
    file, pattern, ours = CONSTANTS[name]
    assert {float(value) for value in re.findall(pattern, (CSRC / file).read_text())} == {ours}


def test_kernels_take_the_numbers_of_the_host():
    pytest.importorskip("triton")
    from fastcl.kernels.device import rows, tile

    assert (tile.LOG2E.value, tile.LN2.value) == (numerics.LOG2E, numerics.LN2)
    assert rows.NORM_EPS.value == numerics.NORM_EPS


def test_a_difference_is_found(tmp_path, monkeypatch):
    (tmp_path / "x.h").write_text("enum class Layout : int { views, pairs, batch = 7 };")
    monkeypatch.setattr("test_mirrors.CSRC", tmp_path)
    assert enumerators("x.h", "enum class Layout") == {"views": 0, "pairs": 1, "batch": 7}
