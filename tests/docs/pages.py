"""The pages under docs, and the Python on them."""

import inspect
import re
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
METHODS = {page.stem: page for page in sorted((DOCS / "methods").glob("*.md"))}
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks_of(page):
    """The source of each block of Python on a page."""
    return _BLOCK.findall(page.read_text())


@cache
def functions_of(method):
    """What the blocks of a method's page define, by name."""
    functions = {}
    for block in blocks_of(METHODS[method]):
        namespace = {"__name__": method}
        exec(compile(block, METHODS[method], "exec"), namespace)
        functions |= {k: v for k, v in namespace.items() if inspect.isfunction(v) and v.__module__ == method}
    return functions
