"""Docstrings refer to functions as Sphinx does; here that becomes a link, where there is a page."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
_PUBLIC = re.compile(r"fastcl(\.train)?\.\w+\Z")


def _link(role: re.Match[str]) -> str:
    name = role[1]
    return f"[`{name}`][{name}]" if _PUBLIC.match(name) else f"`{name}`"


class Roles(griffe.Extension):
    """Turns ``:func:`` and the like into links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
