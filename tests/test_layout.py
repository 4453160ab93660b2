"""The rooms of the package: who may import whom, and how large a file or a function may be."""

import ast
import re
from dataclasses import fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastcl
from fastcl.similarity.fields import RUNNING, STATE, STATISTICS, Statistics

ROOT = Path(fastcl.__file__).parent
KERNELS = ROOT / "kernels"
TREE = Path(__file__).parents[1]
PYTHON = [path for room in ("fastcl", "bench", "tests") for path in sorted(TREE.glob(f"{room}/**/*.py"))]
NATIVE = sorted(path for path in TREE.glob("csrc/**/*.*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, LINES_OF_A_KERNEL = 400, 60, 100


def _name(path):
    """The module in a file of the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(statements):
    """Names that are imported as the module is: not those in functions, nor those for types only."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield f"{statement.module}.{alias.name}"
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from _imports(statement.orelse)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for body in ("body", "orelse", "finalbody"):
                yield from _imports(getattr(statement, body, []))


def _graph(sources):
    """Which modules each module imports; a name in a module stands for the module."""
    graph = {}
    for module, source in sources.items():
        found = set(_imports(ast.parse(source).body))
        found |= {name.rpartition(".")[0] for name in found if name not in sources}
        graph[module] = (found & set(sources)) - {module}
    return graph


def test_no_modules_import_each_other_in_a_circle():
    sources = {_name(path): path.read_text() for path in ROOT.rglob("*.py")}
    assert {"fastcl.backends.choice", "fastcl.ops.calls"} <= set(sources)
    graph = _graph(sources)
    assert "fastcl.ops.schema" in graph["fastcl.ops.autograd"]
    list(TopologicalSorter(graph).static_order())


def test_a_circle_is_found():
    sources = {
        "fastcl.a": "from fastcl.b import x",
        "fastcl.b": "try:\n    from fastcl import c\nfinally: pass",
        "fastcl.c": "import fastcl.a",
    }
    with pytest.raises(CycleError):
        list(TopologicalSorter(_graph(sources)).static_order())
    sources["fastcl.c"] = "if TYPE_CHECKING:\n    import fastcl.a\ndef f():\n    import fastcl.a"
    list(TopologicalSorter(_graph(sources)).static_order())


def test_no_room_imports_the_trainers():
    sources = {_name(path): path.read_text() for path in ROOT.rglob("*.py")}
    for module, imported in _graph(sources).items():
        if not module.startswith("fastcl.train"):
            assert not any(name.startswith("fastcl.train") for name in imported), module


def test_files_are_short():
    assert len(PYTHON) > 150
    assert len(NATIVE) > 50
    lines = {path.relative_to(TREE): len(path.read_text().splitlines()) for path in (*PYTHON, *NATIVE)}
    assert {path: count for path, count in lines.items() if count > LINES_OF_A_FILE} == {}


def test_functions_are_short():
    long = {}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if _lines(node) > (LINES_OF_A_KERNEL if kernel else LINES_OF_A_FUNCTION):
                    long[f"{path.relative_to(TREE)}:{node.name}"] = _lines(node)
    assert long == {}


def _lines(function):
    """Lines of a function's code: what its docstring explains at length does not count."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    text = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - text


def test_the_order_of_the_statistics_is_said_once():
    """Where layouts are made and read, no size or subscript is a number that stands for one."""
    public = [field.name for field in fields(fastcl.SimilarityStats) if field.name != "columns"]
    assert public == list(Statistics._fields)
    readers = [*ROOT.glob("ops/*.py"), *ROOT.glob("distributed/*.py"), *KERNELS.glob("[ls]*.py")]
    readers += [path for path in ROOT.glob("backends/*.py") if path.stem not in ("cuda", "triton")]
    readers += [
        KERNELS / "device" / f"{name}.py" for name in ("attend", "gradient", "one_positive", "statistics")
    ]
    layouts = {STATE, STATISTICS, RUNNING, STATE + STATISTICS}
    for path in readers:
        for node in ast.walk(ast.parse(path.read_text())):
            places = {ast.Subscript: lambda x: [x.slice], ast.Call: lambda x: x.args}.get(type(node))
            for number in (x for place in (places(node) if places else ()) for x in ast.walk(place)):
                if isinstance(number, ast.Constant) and type(number.value) is int:
                    assert number.value not in layouts, f"{path}:{number.lineno}"
    for name in ("module.cpp", "tensors.h", "cpu/losses/similarity.cpp", "cpu/losses/similarity.h"):
        code = re.sub(r"//.*", "", (TREE / "csrc" / name).read_text())
        sizes = re.findall(r"[\[{(] *(\d+) *[\]},]|(?<![\w.])(\d+) \* \w", code)
        assert not {int(x) for found in sizes for x in found if x} & layouts, name


def _native_lines(pattern):
    """The C++ files that say ``pattern``, comments aside."""
    return {
        str(path.relative_to(TREE / "csrc"))
        for path in NATIVE
        if re.search(pattern, re.sub(r"//.*", "", path.read_text()))
    }


def test_threads_are_had_through_one_header():
    """Torch's threads: no OpenMP of our own beside them."""
    assert _native_lines(r"[Pp]ragma\W+omp\b|<omp\.h>|\bomp_\w+\s*\(") <= {"cpu/run/parallel.h"}
    assert _native_lines(r"torch::stable::parallel_for") == {"cpu/run/parallel.cpp"}


def test_intrinsics_are_had_through_their_architecture_alone():
    assert _native_lines(r"<immintrin\.h>") == {"cpu/simd/x86.h", "cpu/simd/pair_product.h"}
    assert _native_lines(r"<arm_neon\.h>") == {"cpu/simd/neon.h"}
    x86 = {"cpu/simd/x86.h", "cpu/simd/pair_product.h", "cpu/simd/bfloat16.cpp"}
    assert _native_lines(r"\b_mm\d*_|\b__m\d+\w*\b") == x86


def test_every_room_is_packaged():
    packages = (TREE / "pyproject.toml").read_text()
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        assert f'"{_name(folder / "__init__.py")}"' in packages
