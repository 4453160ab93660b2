"""The primitive that losses are built on: which pairs count, and the few numbers per row of them."""

from fastcl.similarity.numerics import logaddexp, softplus

__all__ = ["logaddexp", "softplus"]
