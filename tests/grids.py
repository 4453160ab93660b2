"""Which cases a test goes through, and where each is computed: the reference of a case is formed once."""

from contextlib import nullcontext
from functools import partial
from itertools import combinations

import fastcl
from fastcl import testing

HERE = {"": nullcontext}  # by whatever backend serves now


def every_backend():
    """A context for each backend under test, by its name."""
    return {name: partial(fastcl.use_backend, name) for name in testing.backends()}


def pairwise(**axes):
    """Rows, as dicts, in which any two values of two axes meet; the full product has no other pairs."""
    axes = {name: list(values) for name, values in axes.items()}

    def pairs_of(row):
        return {frozenset(pair) for pair in combinations(sorted(row.items()), 2)}

    indices = {name: range(len(values)) for name, values in axes.items()}
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in combinations(sorted(axes), 2)
        for i in indices[a]
        for j in indices[b]
    }
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for name in axes:
            if name not in row:
                row[name] = max(indices[name], key=lambda i: len(pairs_of({**row, name: i}) & missing))
        missing -= pairs_of(row)
        rows.append({name: axes[name][row[name]] for name in axes})
    return rows
