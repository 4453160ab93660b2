"""The tables of the site, as Markdown."""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Iterable

from catalogue import Method, Page, losses, recipes

import fastcl
from fastcl import train
from fastcl.backends.registry import BACKENDS
from fastcl.train.methods.registry import METHODS


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _to(target: str, source: str) -> str:
    """The link from the page ``source`` to ``target``, both under docs."""
    return posixpath.relpath(target, posixpath.dirname(source) or ".")


def _page_of() -> dict[str, Page]:
    """The loss page of each function that has one."""
    return {name: page for page in losses() for name in page.functions}


def _function(name: str, source: str) -> str:
    """A function's name, with a link to its page, or its place in the reference."""
    page = _page_of().get(name)
    target = "reference.md" if page is None else page.source
    return f"[`{name}`]({_to(target, source)}#fastcl.{name})"


def trainer_of(method: Method) -> str:
    """What ``fastcl train`` calls the trainer whose docstring has the method's paper; empty without one."""
    for name, registered in METHODS.items():
        if method.paper in re.findall(r"https://[^\s,;)]*\w", registered.trainer.__doc__ or ""):
            return name
    return ""


def literature(source: str) -> str:
    """Every method: its loss, its page, its trainer, its test."""
    rows = []
    for page in (*losses(), *recipes()):
        for method in page.methods:
            trainer = trainer_of(method)
            row = [
                f"[{method.name}]({method.paper})",
                str(method.year),
                ", ".join(_function(name, source) for name in method.over),
                f"[{'recipe' if page.is_recipe else 'loss'}]({_to(page.source, source)})",
                f"[`{trainer}`]({_to('training.md', source)})" if trainer else "&ndash;",
                f"`{page.test.removeprefix('tests/')}`",
            ]
            rows.append((method.name.lower(), row))
    head = ["Method", "Year", "Over", "Page", "Trainer", "Test"]
    return _table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def which(source: str) -> str:
    """What one has, the page, and why that."""
    pages = sorted((*losses(), *recipes()), key=lambda page: page.have)
    rows = [
        [page.have, f"[{page.title.partition(':')[0]}]({_to(page.source, source)})", page.gain]
        for page in pages
        if page.have
    ]
    return _table(["You have", "Take", "Because"], rows)


def facts(page: Page) -> str:
    """What stands under a page's title: papers, cost, trainer, test."""
    rows = []
    if page.methods:
        rows.append(["Papers", ", ".join(f"[{m.name}]({m.paper}) ({m.year})" for m in page.methods)])
    if page.is_recipe:
        rows.append(["Over", ", ".join(_function(name, page.source) for name in page.functions)])
    rows.append([f"[Products]({_to('how.md', page.source)}#what-a-step-costs)", page.products])
    rows.append(["Memory", page.memory])
    over_ranks = _takes_group(page)
    if over_ranks:
        calls = ", ".join(f"`{name}({options})`" for name, options in over_ranks.items())
        rows.append([f"[Over ranks]({_to('processes.md', page.source)})", calls])
    names = dict.fromkeys(filter(None, map(trainer_of, page.methods)))
    if names:
        rows.append(["Trainer", ", ".join(f"`fastcl train {name}`" for name in names)])
    rows.append(["Tested by", f"`{page.test}`"])
    (first, *rest) = rows
    return _table(first, rest)


def _takes_group(page: Page) -> dict[str, str]:
    """The page's own functions that take ranks, and how."""
    found = {}
    for name in () if page.is_recipe else page.functions:
        function = getattr(fastcl, name)
        taken = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        if "group" in taken:
            found[name] = "group=, ring=" if "ring" in taken else "group="
    return found


def trainers(source: str) -> str:
    """What ``fastcl train`` offers."""
    return _table(["METHOD", ""], [[f"`{name}`", method.summary] for name, method in METHODS.items()])


def backends(source: str) -> str:
    """What computes, in the order in which it is tried."""
    return _table(["name", "what it is"], [[f"`{x.name}`", x.summary] for x in BACKENDS.values()])


def reference(source: str) -> str:
    """Directives for all public names that no loss page documents, by room."""
    documented = _page_of()
    rooms: dict[str, list[str]] = {}
    for name in fastcl.__all__:
        if name not in documented and not name.startswith("_"):
            room = getattr(fastcl, name).__module__.split(".")[1]
            rooms.setdefault(room, []).append(f"fastcl.{name}")
    rooms["train"] = [f"fastcl.train.{name}" for name in train.__all__]
    parts = []
    for room, names in sorted(rooms.items(), key=lambda item: list(_ROOMS).index(item[0])):
        parts += [f"## {_ROOMS[room]}", *directives(names)]
    return "\n\n".join(parts)


_ROOMS = {
    "similarity": "The algebra",
    "distributed": "Ranks",
    "memory": "Queues, banks, momentum",
    "backends": "Backends",
    "train": "Training",
}


def directives(names: Iterable[str]) -> list[str]:
    """What mkdocstrings replaces by the documentation of each name."""
    return [f"::: {name}" for name in names]
