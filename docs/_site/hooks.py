"""What mkdocs calls while it builds the site: pages say ``{{ name }}`` where something made goes."""

from __future__ import annotations

import re
from typing import Any

import pictures
import site_tables
from catalogue import DOCS, losses, read, recipes
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = DOCS.parent
_MARK = re.compile(r"^\{\{ (\w+)(?: (\S+))? \}\}$", re.MULTILINE)
_PICTURE = re.compile(r"^!\[.*\)$", re.MULTILINE)
_TABLES = {
    "literature": site_tables.literature,
    "which": site_tables.which,
    "trainers": site_tables.trainers,
    "backends": site_tables.backends,
    "reference": site_tables.reference,
}
_SHOWN = ("bench/results/cpu-epyc-2threads.png",)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The loss and method pages, under what the configuration has of the navigation."""
    assert config.nav is not None
    sections = {"Losses": losses(), "Methods": recipes()}
    for entry in config.nav:
        for title, pages in sections.items():
            if title in entry:
                entry[title] += [{page.title.partition(":")[0]: page.source} for page in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pictures of the benchmarks."""
    for path in _SHOWN:
        files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with everything in its place."""
    source = page.file.src_uri
    markdown = _MARK.sub(lambda mark: _made(mark[1], mark[2], source), markdown)
    if not source.startswith(("losses/", "methods/")):
        return markdown
    described = read(DOCS / source)
    title, _, body = markdown.partition("\n")
    parts = [title, site_tables.facts(described), body]
    if not described.is_recipe:
        parts += ["## Reference", *site_tables.directives(f"fastcl.{name}" for name in described.functions)]
    return "\n\n".join(parts)


def _made(name: str, argument: str | None, source: str) -> str:
    if name == "include":  # a file of results, without its title and its picture, which the page shows itself
        body = (_ROOT / str(argument)).read_text().partition("\n")[2]
        return _PICTURE.sub("", body).strip().replace("<", "&lt;")
    if name == "picture":
        made: Any = getattr(pictures, str(argument))
        return str(made())
    return _TABLES[name](source)
