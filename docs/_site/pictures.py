"""The pictures of "how it works", as inline SVG in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence

_CELL = 22


def _figure(width: int, height: int, parts: Sequence[str], caption: str) -> str:
    drawn = "".join(parts)
    return (
        f'<figure class="drawn"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{caption}">{drawn}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{kind}"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="arrow" marker-end="url(#head)"/>'


_HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>'
)


def tile() -> str:
    """One tile of the similarity matrix between queries, keys and the numbers per row that are kept."""
    left, top, rows, columns, size = 110, 70, 5, 8, 30
    parts = [_HEAD, _text(left + columns * size / 2, 18, "keys, M &times; D", "middle")]
    parts += [_box(left + j * size, 28, size, 30, "key on" if j == 4 else "key") for j in range(columns)]
    parts.append(_text(8, top + rows * size + 24, "queries, N &times; D"))
    for i in range(rows):
        row, active = top + i * size, i == 2
        parts.append(_box(64, row, 36, size, "query on" if active else "query"))
        for j in range(columns):
            kind = "tile" if active and j == 4 else "passed" if active and j < 4 else "absent"
            parts.append(_box(left + j * size, row, size, size, kind))
    row, right = top + 2 * size, left + columns * size
    parts.append(_arrow(left, row + size / 2, left + 4 * size - 2, row + size / 2))
    parts.append(_arrow(right + 6, row + size / 2, right + 34, row + size / 2))
    names = ("max", "Σ exp &minus;", "Σ exp +", "Σ l +", "count +")
    for k, name in enumerate(names):
        x = right + 40 + k * 62
        parts += [_box(x, row, 58, size, "kept"), _text(x + 29, row + 20, name, "middle small")]
    parts.append(_text(right + 40, row - 10, "kept, per row"))
    parts.append(_text(left, top + rows * size + 24, "similarities: a tile at a time, never all"))
    caption = "A tile is formed, sorted by the pair rule, added to the row's numbers, and forgotten."
    return _figure(right + 40 + len(names) * 62, top + rows * size + 36, parts, caption)


def _grid(x: float, title: str, queries: Sequence[int], keys: Sequence[int], own: bool) -> list[str]:
    """A matrix of pairs, sorted as the rule sorts them: by equal ids; with ``own``, a row is not its own."""
    parts = [_text(x, 16, title, "strong")]
    for i, query in enumerate(queries):
        y = 52 + i * _CELL
        parts.append(_text(x + 10, y + 15, str(query), "middle small"))
        for j, key in enumerate(keys):
            kind = "excluded" if own and i == j else "positive" if query == key else "negative"
            parts.append(_box(x + 24 + j * _CELL, y, _CELL - 2, _CELL - 2, kind))
    parts += [_text(x + 34 + j * _CELL, 44, str(key), "middle small") for j, key in enumerate(keys)]
    return parts


def rule() -> str:
    """Three losses as one test: which ids are equal."""
    views, labels = [0, 1, 2, 0, 1, 2], [7, 7, 3, 7, 3, 5]
    width = 24 + 6 * _CELL + 26
    parts = _grid(0, "SimCLR: sample", views, views, own=True)
    parts += _grid(width, "SupCon: class", labels, labels, own=True)
    parts += _grid(2 * width, "CLIP: sample", list(range(6)), list(range(6)), own=False)
    y = 52 + 6 * _CELL + 14
    for k, kind in enumerate(("excluded", "positive", "negative")):
        parts += [_box(24 + k * 130, y, 16, 16, kind), _text(46 + k * 130, y + 13, kind, "small")]
    caption = (
        "Ids beside rows and columns: two pairs of ids say what each pair is; no N &times; M mask is stored."
    )
    return _figure(3 * width, y + 24, parts, caption)


def algebra() -> str:
    """From key sets to a loss."""
    parts = [_HEAD]
    for k, name in enumerate(("batch", "queue", "other ranks")):
        y = 20 + k * 44
        parts += [_box(0, y, 104, 32, "key"), _text(52, y + 20, name, "middle small")]
        parts.append(_arrow(108, y + 16, 150, y + 16))
        parts += [_box(156, y, 118, 32, "kept"), _text(215, y + 20, "statistics", "middle small")]
        parts.append(_arrow(278, y + 16, 330, 80))
    parts += [_box(336, 60, 82, 40, "positive"), _text(377, 84, "merge", "middle")]
    parts += [_box(336, 132, 82, 32, "query"), _text(377, 152, "own logits", "middle small")]
    parts.append(_arrow(377, 130, 377, 104))
    parts += [_text(384, 120, "join", "small"), _text(156, 12, "similarity_stats", "small")]
    for k, name in enumerate(("any_positive", "each_positive", "decoupled", "your formula")):
        y = 6 + k * 40
        parts += [_arrow(422, 80, 476, y + 16), _box(482, y, 128, 32, "tile")]
        parts.append(_text(546, y + 20, name, "middle small"))
    caption = (
        "Statistics of disjoint key sets merge, your own logits join them; a loss is a formula over these."
    )
    return _figure(616, 172, parts, caption)
