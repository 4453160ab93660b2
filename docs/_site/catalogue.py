"""What the pages of losses and methods say of themselves: all tables of the site are made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parents[1]
RECIPES_TEST = "tests/docs/test_recipes.py"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n# ([^\n]+)\n(.*)\Z", re.DOTALL)
_IMPORT = re.compile(r"^from fastcl import (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Method:
    """A paper's method; ``over``: the functions it is made of."""

    name: str
    year: int
    paper: str
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A loss, with the functions that it documents, or a recipe, with those that it uses.

    ``products`` and ``memory``: what a step costs. ``have`` and ``gain``: its row of "which loss?", if any.
    """

    source: str  # under docs
    title: str
    functions: tuple[str, ...]
    test: str
    methods: tuple[Method, ...]
    products: str
    memory: str
    have: str = ""
    gain: str = ""

    @property
    def is_recipe(self) -> bool:
        return self.source.startswith("methods/")


def read(path: Path) -> Page:
    """The page at ``path``.

    Raises:
        ValueError: no front matter, or no title after it.
    """
    found = _FRONT_MATTER.match(path.read_text())
    if found is None:
        raise ValueError(f"{path} must begin with front matter and a title")
    said: dict[str, Any] = yaml.safe_load(found[1])
    if path.parent.name == "methods":
        imported = (name for names in _IMPORT.findall(found[3]) for name in names.split(", "))
        said |= {"functions": dict.fromkeys(imported), "test": RECIPES_TEST}
    functions = tuple(said.pop("functions"))
    # a recipe is made of what it calls; a loss page's method, of the page's first function
    over = functions if path.parent.name == "methods" else functions[:1]
    methods = tuple(Method(**{"over": over, **method}) for method in said.pop("methods"))
    source = path.relative_to(DOCS).as_posix()
    return Page(source=source, title=found[2], functions=functions, methods=methods, **said)


def losses() -> list[Page]:
    """The pages of the library's own losses."""
    return _pages("losses")


def recipes() -> list[Page]:
    """The pages of the methods that are a few lines over them."""
    return _pages("methods")


def _pages(folder: str) -> list[Page]:
    return sorted(map(read, (DOCS / folder).glob("*.md")), key=lambda page: page.title.lower())
