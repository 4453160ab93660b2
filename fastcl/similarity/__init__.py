"""The primitive that losses are built on: which pairs count, and the few numbers per row of them."""
