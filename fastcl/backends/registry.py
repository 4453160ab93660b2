"""The one registry of backends: a new one is its file, and a line here."""

from __future__ import annotations

from fastcl.backends import chunked, cpu, cuda, reference, triton
from fastcl.backends.base import Backend

# in the order 'auto' tries them; 'reference' is last and so never chosen
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        cuda.BACKEND,
        triton.BACKEND,
        cpu.BACKEND,
        chunked.BACKEND,
        reference.BACKEND,
    )
}
